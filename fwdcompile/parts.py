"""The parts of a model that a program has names for: modules, parameters, buffers, inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .lifted import Derived, Lifted
from .objective import Objective

Model = Callable[..., Any]
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
# no module can go by these names within another
_TAKEN = frozenset(dir(nn.Module())) | {"attributes", "_called"}


def modules_of(model: Model) -> dict[str, nn.Module]:
    """The modules a model consists of, by the prefix of their parameters' names."""
    if isinstance(model, nn.Module):
        return {"": model}
    if isinstance(model, Objective):
        loss = modules_of(model.loss_fn) if model.loss_fn else {}
        prefixed = {f"loss_fn_{name}".rstrip("_"): module for name, module in loss.items()}
        return modules_of(model.model) | prefixed
    if isinstance(model, Lifted):
        return modules_of(model.like)
    if isinstance(model, functools.partial):
        return modules_of(model.func)
    found: dict[str, nn.Module] = {}
    if isinstance(owner := getattr(model, "__self__", None), nn.Module):
        found[""] = owner
    function = inspect.unwrap(getattr(model, "__func__", model))
    if inspect.isfunction(function):
        variables = inspect.getclosurevars(function)
        for name, thing in (*variables.nonlocals.items(), *variables.globals.items()):
            name += "_" * (name in _TAKEN)
            if isinstance(thing, nn.Module):
                found[name] = thing
            elif isinstance(thing, Derived):
                inner = modules_of(thing.base).items()
                found |= {f"{name}_{prefix}".rstrip("_"): module for prefix, module in inner}
    return found


def named_state(model: Model, kind: str) -> dict[str, Tensor]:
    """Parameters or buffers by qualified name; a tied one appears under each of its names.

    One of a subclass of Tensor, such as a quantized weight, is followed by its `inner_tensors`.
    """
    state: dict[str, Tensor] = {}
    for prefix, module in modules_of(model).items():
        walk = module.named_parameters if kind == "parameter" else module.named_buffers
        state.update(walk(prefix=prefix, remove_duplicate=False))
    for name, x in [*state.items()]:
        state |= {f"{name}.{path}": inner for path, inner in inner_tensors(x).items()}
    return state


def inner_tensors(x: Any) -> dict[str, Tensor]:
    """The plain tensors that one of a subclass consists of, by their path in it; else none."""
    if type(x) in _PLAIN or not is_traceable_wrapper_subclass(x):
        return {}
    found: dict[str, Tensor] = {}
    for name in x.__tensor_flatten__()[0]:
        inner = getattr(x, name)
        deeper = {f"{name}.{path}": part for path, part in inner_tensors(inner).items()}
        found |= deeper or {name: inner}
    return found


def names_in_exports(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What torch.export calls inner tensors, with the names that they have here."""
    names: dict[str, str] = {}
    for name, x in state.items():
        owner, _, last = name.rpartition(".")
        torchs = f"{owner}.parametrizations.{last}.original".lstrip(".")
        names |= {f"{torchs}{i}": f"{name}.{path}" for i, path in enumerate(inner_tensors(x))}
    return names


def aliases_of(model: Model) -> dict[str, str]:
    """`tied_names` of a model's parameters and buffers."""
    return tied_names(named_state(model, "parameter") | named_state(model, "buffer"))


def tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Each further name of a tied parameter or buffer, with the name it was first met by."""
    first: dict[int, str] = {}
    for name, x in state.items():
        first.setdefault(id(x), name)
    return {name: first[id(x)] for name, x in state.items() if first[id(x)] != name}


def input_leaves(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """Names each leaf of the inputs by its argument and path: `x`, `batch.image`, `pair.0`."""
    register_dataclasses((args, kwargs))
    positional = _positional_names(model, len(args))
    leaves, _ = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
    named = []
    for path, leaf in leaves:
        group, place = (_step(key) for key in path[:2])
        first = positional[place] if group == 0 else place
        named.append((dotted(first, path[2:]), leaf))
    return named


def register_dataclasses(tree: Any) -> None:
    """Teaches pytree every dataclass found in `tree`, so that its fields are seen."""
    for leaf in pytree.tree_leaves(tree):
        if is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_dataclasses(leaf)


def _positional_names(model: Model, count: int) -> list[str]:
    signature = arguments_of(model)
    if signature is None:
        return [f"arg{i}" for i in range(count)]
    parameters = signature.parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "arg")
    return [*names, *(f"{rest}.{i}" for i in range(count - len(names)))][:count]


def arguments_of(model: Model) -> inspect.Signature | None:
    """The arguments of a model; None for a builtin that does not tell them."""
    function = model.forward if isinstance(model, nn.Module) else model
    function = function.like if isinstance(function, Lifted) else function
    if schema := getattr(function, "schema", None):  # of TorchScript
        names = [argument.name for argument in schema.arguments if argument.name != "self"]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(name, kind) for name in names])
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def dotted(first: str, path: Sequence[Any]) -> str:
    """The name of a leaf of a pytree: where it starts, then each step to it."""
    return ".".join([first, *(str(_step(key)) for key in path)])


def _step(key: Any) -> Any:
    """The index, dict key or field name that one entry of a pytree path holds."""
    return next(getattr(key, name) for name in ("idx", "key", "name") if hasattr(key, name))
