"""Capture: a model and example inputs become one functional ATen graph, by `torch.export`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import _trace
from torch.export.exported_program import ExportedProgram
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from .autocast import composites_cast
from .checks import without_value_checks
from .custom import adopt_calls, kept_derivatives
from .decompose import decompose
from .errors import CaptureError, DecisionError
from .explain import explain
from .exported import ROOT, adopted
from .flex import flex_as_ops
from .hazards import (
    kept_random_ops,
    known_shapes,
    literals_of,
    refuse_hidden_writes,
    user_source_lines,
)
from .inside import captured_with_inner
from .literals import Fixed, known_literals
from .parts import (
    Model,
    input_leaves,
    modules_of,
    named_state,
)
from .program import Program, is_differentiable, same_ops
from .reverse import recorded
from .scripts import scripts_as_modules
from .sharing import tell_shared_memory
from .sizes import open_first, thaw
from .state import (
    Attributes,
    as_left,
    asking_for_gradients,
    assignments_seen,
    refuse_constants,
    turned_attributes,
)

_GRAD_OF_NON_LEAF = "The .grad attribute of a Tensor that is not a leaf"  # which dynamo reads
# Recurrent layers keep a list of their parameters, which export puts its own into and back.
_WEIGHTS_OF_RNN = r"The tensor attributes? (self[\w.]*\._flat_weights\[\d+\](, )?)+ w"


def capture(
    model: Model,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool = False,
    active: Collection[str] = (),
) -> Program:
    """Captures `model(*args, **kwargs)` as a flat functional program.

    Ops that have a row in the rule table stay whole, all others are lowered until rows are met.
    In-place changes of buffers and inputs become extra outputs. Nothing is computed: inputs are
    replaced by fakes of the same shape, dtype and device, and no random number is drawn.

    Args:
        model: a module or a function of tensors and pytrees of tensors.
        args: example positional arguments.
        kwargs: example keyword arguments.
        dynamic: leaves the first dimension of the inputs open, where the model does not fix it.
        active: names of the tensors that are to have a tangent: they require gradients, in grad
            mode, where the model asks.

    Raises:
        CaptureError: the model branches on data, or fails; the message names the user's line.

    Example:
        >>> capture(torch.tanh, (torch.zeros(3),), {}).graph.print_tabular()
    """
    if torch.is_inference_mode_enabled():
        active = ()

    def tried(active: Collection[str]) -> Program:
        try:
            return once(active, None)
        except DecisionError:
            return once(active, [])

    def once(active: Collection[str], fixed: Fixed | None) -> Program:
        return captured_with_inner(lambda: _captured(model, args, kwargs, dynamic, active, fixed))

    try:
        return tried(active)
    except CaptureError:
        if not active:
            raise
    # autograd refuses some writes to inputs and views, and ops that have no backward
    return tried(())


def _captured(
    model: Model,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool,
    active: Collection[str],
    fixed: Fixed | None,
    first: bool = True,
) -> Program:
    root = Root(model)
    named = input_leaves(model, args, kwargs)
    leaves, moving = _distinct(model, named, active)
    spec = pytree.tree_structure((tuple(args), dict(kwargs)))
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, spec)
    asking = asking_for_gradients(moving) if active else nullcontext()
    with scripts_as_modules(root), root.attributes.restored(), asking, kept_derivatives() as made:
        exported, literals = _export(root, *inputs, dynamic, fixed)
    program = adopted(exported, model, [name for name, _ in named])
    program = replace(program, literals=literals, fixed=tuple(fixed or ()))
    refuse_constants(program, named_state(model, "parameter"), root.attributes.assigned)
    if turned := root.attributes.turned if first else {}:
        with as_left(turned):
            again = _captured(model, args, kwargs, dynamic, active, fixed, first=False)
        if not same_ops(program, again):
            raise turned_attributes(turned)
    return adopt_calls(program, made)


class Root(nn.Module):
    """Wraps a module or function, so that both are captured alike.

    Modules that a function closes over, or whose method it is, become submodules: their
    parameters then are parameters of the program and not constants frozen into it.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        for name, module in modules_of(model).items():
            self.add_module(name or ROOT, module)
        self._called = (model,)  # in a tuple, so that it is not registered a second time

    @cached_property
    def attributes(self) -> Attributes:
        """The attributes of the modules as they are when first asked for."""
        return Attributes(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, writes to the buffers that it assigns, registers dataclasses."""
        return self.attributes.called(self._called[0], *args, **kwargs)


def _distinct(
    model: Model, named: Sequence[tuple[str, Any]], active: Collection[str]
) -> tuple[list[Any], list[Tensor]]:
    """The leaves of the inputs with memory of their own, and those that are `active`.

    Export takes equal objects for one, fails where it sees a write to memory that is shared, heeds
    the sizes that a tensor says are open, and leaves such marks where it fails. Parameters and
    buffers may be active as well.
    """
    state = named_state(model, "parameter") | named_state(model, "buffer")
    seen = {x.untyped_storage()._cdata for x in state.values() if x.layout is torch.strided}

    def fresh(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if (memory := x.untyped_storage()._cdata) in seen:
            apart = x.new_empty_strided(x.shape, x.stride())
            return apart.requires_grad_(x.requires_grad)
        seen.add(memory)
        return x.detach().requires_grad_(x.requires_grad)

    leaves = [(name, fresh(x)) for name, x in named]
    wanted = [x for name, x in (*state.items(), *leaves) if name in active]
    moving = [x for x in wanted if is_differentiable(x) and x.is_leaf]
    return [x for _, x in leaves], moving


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of torch about its own code, and what it says where export fails."""
    half_a_graph = mock.patch.object(_trace, "print", create=True)
    with warnings.catch_warnings(), half_a_graph, mock.patch.object(_trace.log, "error"):
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _export(
    root: Root, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool, fixed: Fixed | None
) -> tuple[ExportedProgram, frozenset[str]]:
    try:
        with ExitStack() as stack:
            stack.enter_context(quiet())
            for text in (_WEIGHTS_OF_RNN, _GRAD_OF_NON_LEAF):
                warnings.filterwarnings("ignore", text, UserWarning)
            stack.enter_context(user_source_lines())
            stack.enter_context(without_value_checks())
            stack.enter_context(flex_as_ops())
            stack.enter_context(known_shapes())
            stack.enter_context(composites_cast())
            stack.enter_context(kept_random_ops())
            stack.enter_context(assignments_seen())
            stack.enter_context(known_literals(fixed))
            shapes = open_first(args, kwargs) if dynamic else None
            with preserve_node_meta():  # the source lines in the branches of a torch.cond
                exported = recorded(root, args, kwargs, shapes)
            refuse_hidden_writes(exported)
            tell_shared_memory(exported)
            thaw(exported.graph)
            return decompose(exported), literals_of(exported)
    except CaptureError:
        raise
    except Exception as error:
        raise explain(error) from error
