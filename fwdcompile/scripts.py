"""Scripts: TorchScript in a model, whose ops are recorded as those of other modules."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.jit._fuser import optimized_execution
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .state import kept_attribute

# What TorchScript calls a change of a list or dict.
_CHANGES = {
    f"aten::{name}"
    for name in (
        "append", "clear", "Delete", "extend", "insert", "pop", "remove", "reverse", "setdefault",
        "_set_item", "sort", "update",
    )
}  # fmt: skip


class Scripted(nn.Module):
    """Stands for a ScriptModule: its parameters and buffers, which torch.export can replace.

    Its code runs on a copy of the ScriptModule, which shares no attribute with it.
    """

    script: Any

    def __init__(self, script: Any) -> None:
        super().__init__()
        vars(self)["script"] = script  # not registered: no submodule
        self._code = copy.copy(script._c)
        for name, x in script._parameters.items():
            own = isinstance(x, nn.Parameter)  # what torch.jit.load gives is none
            self._parameters[name] = x if own else nn.Parameter(x, x.requires_grad)
        self._buffers.update(script._buffers.items())
        for name, child in script._modules.items():
            self._modules[name] = part = Scripted(child)
            self._code.setattr(name, part._code)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the ScriptModule computes."""
        return self._run("forward", *args, **kwargs)

    def parts(self) -> list[Scripted]:
        """This one and those within it."""
        return [part for part in self.modules() if isinstance(part, Scripted)]

    def methods(self) -> dict[str, Any]:
        """Those of the ScriptModule, by name."""
        return {name: functools.partial(self._run, name) for name in self._code._method_names()}

    def _run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        tensors = [(part, {**part._parameters, **part._buffers}) for part in self.parts()]
        placed = [(part, name, x) for part, found in tensors for name, x in found.items()]
        for part, name, x in placed:
            part._code.setattr(name, x)
        code = self._code._get_method(method)
        with self._unchanged(_kept(code).difference(self.state_dict(keep_vars=True))):
            out = _unoptimised(code, self._code, *args, **kwargs)
        for part, name, x in placed:
            if (new := part._code.getattr(name)) is not x:
                setattr(part, name, new)
        return out

    @contextmanager
    def _unchanged(self, paths: set[str]) -> Iterator[None]:
        """Refuses changes of attributes; lists and dicts are copies of the ScriptModule's."""
        slots = [(path, *self._slot(path)) for path in paths]
        before = [pytree.tree_map(lambda x: x, code.getattr(name)) for _, code, name in slots]
        for (_, code, name), x in zip(slots, before, strict=True):
            code.setattr(name, x)
        yield
        for (path, code, name), x in zip(slots, before, strict=True):
            (old, was), (new, spec) = map(pytree.tree_flatten, (x, code.getattr(name)))
            if was != spec or not all(map(_is_same, old, new)):
                raise kept_attribute(path)

    def _slot(self, path: str) -> tuple[Any, str]:
        *owners, name = path.split(".")
        return functools.reduce(lambda code, owner: code.getattr(owner), owners, self._code), name

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.script, name)


def _is_same(x: Any, y: Any) -> bool:
    return x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else bool(x == y)


def _kept(method: Any) -> set[str]:
    """What a method reads and may change: tensors, lists and dicts, by their qualified names."""

    def path(node: Any) -> str:
        name: str = node.s("name")
        owner = next(node.inputs()).node()
        return f"{path(owner)}.{name}" if owner.kind() == "prim::GetAttr" else name

    def is_changed(read: Any) -> bool:
        x = read.output()
        changes = (use.user.kind() in _CHANGES and use.offset == 0 for use in x.uses())
        return x.type().kind() in ("ListType", "DictType") and any(changes)

    graph = method.inlined_graph
    reads = graph.findAllNodes("prim::GetAttr")
    assigned = {node: list(node.inputs())[1] for node in graph.findAllNodes("prim::SetAttr")}
    tensors = {path(node) for node, x in assigned.items() if "Tensor" in str(x.type())}
    return tensors & {*map(path, reads)} | {path(node) for node in reads if is_changed(node)}


def _unoptimised(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs a method of TorchScript, on the module given first, op by op.

    What TorchScript has optimised before detaches its inputs, to differentiate them by itself.
    """
    function = torch._C._create_function_from_graph(method.name, method.graph)
    rest = method.schema.arguments[len(args) :]
    given = [kwargs.pop(argument.name, argument.default_value) for argument in rest]
    if kwargs:
        raise TypeError(f"{method.name} has no arguments {', '.join(kwargs)}")
    # else torch looks for the Python code of the function, which a method has none of
    running = mock.patch.object(torch.compiler, "_is_exporting_flag", False)
    with running, torch._C.DisableTorchFunction(), optimized_execution(False):
        return function(*args, *given)


@contextmanager
def scripts_as_modules(root: nn.Module) -> Iterator[None]:
    """Lets modules stand in for the ScriptModules below one; scripted functions torch captures."""
    known: dict[nn.Module, Scripted] = {}
    with ExitStack() as stack:
        for module in list(root.modules()):
            if isinstance(module, ScriptModule):
                continue
            parts = module._modules.items()
            scripts = {name: part for name, part in parts if isinstance(part, ScriptModule)}
            for script in scripts.values():
                if script._c._get_forward_hooks() or script._c._get_forward_pre_hooks():
                    raise CaptureError(
                        f"The script of {script.original_name} has hooks, which capture does not "
                        "see.\n  Make a script of a module round it, or call them in forward."
                    )
                known.setdefault(script, Scripted(script))
            stand_ins = {name: known[script] for name, script in scripts.items()}
            stack.enter_context(mock.patch.dict(module._modules, stand_ins))
        for part in (part for whole in known.values() for part in whole.parts()):
            stack.enter_context(mock.patch.dict(vars(part.script), part.methods()))
        yield
