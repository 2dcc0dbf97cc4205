"""State: what a model changes of itself by assignment, which torch.export drops without a word."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .hazards import here, is_user_file
from .parts import register_dataclasses
from .program import Program

_STANDARD = ("_parameters", "_buffers", "_modules")
_PLAIN = (bool, int, float, complex, str, type(None))
_DATA: Any = torch._C.TensorBase.data


class Attributes:
    """The tensors that a model has for attributes, while it runs once to be captured.

    Attributes:
        assigned: tensors that were attributes, and no buffers, before the model assigned others.
        turned: flags, numbers and words that the model has given other values, by module and name.
    """

    def __init__(self, root: nn.Module) -> None:
        self.assigned: dict[str, Tensor] = {}
        self.turned: dict[tuple[nn.Module, str], Any] = {}
        self._modules = list(root.modules())
        self._containers = _containers(self._modules)
        homes = {
            id(x): (module, name)
            for module in self._modules
            for home in (module._parameters, module._buffers)
            for name, x in home.items()
        }
        self._listed: list[tuple[Any, Any, nn.Module, str]] = []
        for container in self._containers:
            items = container.items() if isinstance(container, dict) else enumerate(container)
            for key, x in items:
                if isinstance(x, Tensor) and id(x) in homes:
                    self._listed.append((container, key, *homes[id(x)]))

    def called(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a call gives, in which the assignment of a buffer is a write: `self.mean.copy_(m)`.

        The buffers are written last, and what is given shows none of them.
        """
        before = [(module, dict(module._buffers)) for module in self._modules]
        parameters = [(module, dict(module._parameters)) for module in self._modules]
        with self._watched():
            out = model(*args, **kwargs)
        for module, own in parameters:
            for name in (name for name, p in own.items() if module._parameters.get(name) is not p):
                raise CaptureError(
                    f"{type(module).__name__} replaces its parameter {name!r}, which a program "
                    "cannot.\n  Write to it outside of the model, under torch.no_grad()."
                )
        register_dataclasses(out)
        writes = [
            (module, name, old, _copy_of_new(module, name, old))
            for module, buffers in before
            for name, old in buffers.items()
            if module._buffers.get(name) is not old
        ]
        if writes:
            out = pytree.tree_map(_copied, out)
        for module, name, old, new in writes:
            old.copy_(new)  # type: ignore[union-attr]
            module._buffers[name] = old
        return out

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Lets lists and dicts hold what the attributes are now; notes what is assigned."""
        others = [(module, dict(vars(module))) for module in self._modules]
        before = [container[key] for container, key, *_ in self._listed]
        for container, key, module, name in self._listed:
            container[key] = getattr(module, name)
        yield
        for (container, key, *_), x in zip(self._listed, before, strict=True):
            container[key] = x
        for module, attributes in others:
            for name, thing in attributes.items():
                now = vars(module).get(name)
                if isinstance(thing, Tensor) and now is not thing:
                    self.assigned[name] = thing
                if _is_turned(thing, now):
                    self.turned[module, name] = now

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Leaves the attributes of all modules, and the lists and dicts in them, as they were."""
        attributes = [(module, dict(vars(module))) for module in self._modules]
        standard = (vars(module)[part] for module in self._modules for part in _STANDARD)
        contents = [(one, one.copy()) for one in (*self._containers, *standard)]
        try:
            yield
        finally:
            for container, content in contents:
                _refill(container, content)
            for module, found in attributes:
                vars(module).clear()
                vars(module).update(found)


@contextmanager
def as_left(turned: Mapping[tuple[nn.Module, str], Any]) -> Iterator[None]:
    """Gives attributes the values that a call has left in them."""
    before = {(module, name): vars(module).get(name) for module, name in turned}
    for (module, name), value in turned.items():
        vars(module)[name] = value
    try:
        yield
    finally:
        for (module, name), value in before.items():
            vars(module)[name] = value


def _is_turned(old: Any, new: Any) -> bool:
    plain = isinstance(old, _PLAIN) and isinstance(new, _PLAIN)
    return plain and (type(old), repr(old)) != (type(new), repr(new))


def turned_attributes(turned: Iterable[tuple[nn.Module, str]]) -> CaptureError:
    """The error of flags and numbers that a model changes in each call, and computes by."""
    names = ", ".join(f"{type(module).__name__}.{name}" for module, name in turned)
    return CaptureError(
        f"The model changes {names} and computes by it: the next call would be another program, "
        "as no Python runs in one.\n  Make it a buffer, or change it outside of the model; where "
        "it changes in a first call alone, make that before."
    )


def _copy_of_new(module: nn.Module, name: str, old: Any) -> Tensor:
    """What a module has assigned to its buffer, if that is like the old value."""
    new = module._buffers.get(name)
    alike = isinstance(new, Tensor) and isinstance(old, Tensor)
    if not alike or (new.shape, new.dtype) != (old.shape, old.dtype):  # type: ignore[union-attr]
        raise CaptureError(
            f"{type(module).__name__} assigns to its buffer {name!r} what has another shape or "
            "dtype, or is no tensor: a program cannot keep that.\n  Register it with the shape and "
            "dtype that it has in the end."
        )
    return new.clone()  # type: ignore[union-attr]


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def refuse_constants(
    program: Program, parameters: Mapping[str, Tensor], assigned: Mapping[str, Tensor]
) -> None:
    """Refuses constants of a program that are parameters, or change from call to call.

    Raises:
        CaptureError: one has the memory of one of these; of a parameter may be what is detached.
    """
    for node, slot in program.placeholders():
        if slot.kind != "constant":
            continue
        constant = program.constants[slot.name]
        for name, x in assigned.items():
            if _shared(constant, x) and _geometry(constant) == _geometry(x):
                raise kept_attribute(name)
        for name, x in parameters.items():
            if _shared(constant, x) and _moves(node):
                raise CaptureError(
                    f"The model reads its parameter {name!r} in a way that capture does not see, "
                    "from a tuple, dict or other object: it has no tangent there.\n  Read it from "
                    "the attribute, give it as an argument, or close over a .clone() of it."
                )


def kept_attribute(name: str) -> CaptureError:
    """The error of a thing that a model keeps from call to call, and that is no buffer."""
    return CaptureError(
        f"The model reads its attribute {name!r} and changes it: it is another one in each "
        "call, and no buffer.\n  Make it one, by register_buffer."
    )


def _moves(start: fx.Node) -> bool:
    """Whether an output depends on a node by another way than through a detach."""
    seen, waiting = {start}, [start]
    while waiting:
        users = [user for user in waiting.pop().users if user not in seen]
        users = [user for user in users if user.target is not torch.ops.aten.detach.default]
        seen.update(users)
        waiting += users
    return any(node.op == "output" for node in seen)


def _shared(a: Tensor, b: Tensor) -> bool:
    return bool(a.numel()) and a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _geometry(x: Tensor) -> Any:
    return x.storage_offset(), x.shape, x.stride(), x.dtype


def _containers(modules: Iterable[nn.Module]) -> list[Any]:
    """The lists and dicts among the attributes of all modules, those within others included."""
    found: dict[int, Any] = {}

    def look(things: Iterable[Any]) -> None:
        for thing in things:
            if type(thing) in (list, dict) and id(thing) not in found:
                found[id(thing)] = thing
                look(thing.values() if isinstance(thing, dict) else thing)
            elif type(thing) is tuple:
                look(thing)

    for module in modules:
        look(x for name, x in vars(module).items() if name not in _STANDARD)
    return list(found.values())


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def assignments_seen() -> Iterator[None]:
    """Lets the model read `x.data` as `x.detach()`; refuses what a program cannot repeat.

    Raises:
        CaptureError: the model assigns to `x.data`, draws random numbers from Python or numpy, sets
            torch's generator, or enters inference mode.
    """

    def read(x: Tensor) -> Tensor:
        asked = is_user_file(sys._getframe(1).f_code.co_filename)
        return x.detach() if asked else _DATA.__get__(x)

    def write(x: Tensor, new: Tensor) -> None:
        if is_user_file(sys._getframe(1).f_code.co_filename):
            raise CaptureError(
                f"{here()}\n  It gives a tensor other memory (.data =), which a captured program "
                "cannot say.\n  Write to it: x.copy_(...), under torch.no_grad()."
            )
        _DATA.__set__(x, new)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Tensor, "data", property(read, write), create=True))
        for owner in (torch, torch.random):
            for name in ("manual_seed", "seed", "set_rng_state"):
                stack.enter_context(mock.patch.object(owner, name, _seeding(getattr(owner, name))))
        entered = mock.patch.object(torch.inference_mode, "__enter__", _enter)
        stack.enter_context(entered)
        drawn = _states()
        yield
        if drawn != _states():
            raise CaptureError(
                "The model draws random numbers from Python's or numpy's generator: a program "
                "would have these for ever.\n  Draw them with torch, or outside of the model."
            )


_ENTER = torch.inference_mode.__enter__


def _enter(mode: torch.inference_mode) -> None:
    """Refuses a region out of which no tangent comes, as a program does not tell it from others."""
    file = sys._getframe(1).f_code.co_filename  # torch itself makes fakes of such tensors in it
    asked = is_user_file(file) or file.endswith("_contextlib.py")  # a decorator
    if asked and mode.mode and not torch.is_inference_mode_enabled():
        raise CaptureError(
            f"{here()}\n  The model enters torch.inference_mode(), where tangents would end.\n  "
            "Use torch.no_grad(), and .detach() where they shall."
        )
    _ENTER(mode)


def _seeding(function: Callable[..., Any]) -> Callable[..., Any]:
    def seeded(*args: Any, **kwargs: Any) -> Any:
        if is_user_file(sys._getframe(1).f_code.co_filename):
            raise CaptureError(
                f"{here()}\n  The model sets the random number generator, which a program does not "
                "do again.\n  Set it outside of the model, or draw once and keep a buffer."
            )
        return function(*args, **kwargs)

    return seeded


def _states() -> tuple[Any, ...]:
    _, key, *rest = np.random.get_state()
    return random.getstate(), np.asarray(key).tobytes(), *rest


@contextmanager
def asking_for_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """In grad mode, with tensors that require gradients: for models that ask whether they do."""
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if torch._C._autograd._top_saved_tensors_default_hooks(True):  # the user's are not for this
            same = (lambda x: x, lambda x: x)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(*same))
        for x in tensors:
            if not x.requires_grad:
                stack.callback(x.requires_grad_, False)
                x.requires_grad_(True)
        yield
