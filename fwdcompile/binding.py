"""Binding: the tensors of a call by name, checked, and put in the places of a program."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .directions import RankOne, dense_tensor
from .errors import TangentError
from .parts import Model, inner_tensors, input_leaves, modules_of, named_state, tied_names
from .program import Slot, is_differentiable
from .sizes import wider

Tangents = Mapping[str, Tensor | RankOne]


def call_values(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Everything a call can be differentiated by: parameters, buffers and input leaves by name.

    The second result is `tied_names` of the parameters and buffers.

    Raises:
        TangentError: an argument has the name of a parameter or buffer.
    """
    values: dict[str, Any] = named_state(model, "parameter") | named_state(model, "buffer")
    tied = tied_names(values)
    for name, leaf in input_leaves(model, args, kwargs):
        if name in values:
            raise TangentError(f"argument {name!r} has the name of a parameter; rename one of them")
        if inner_tensors(leaf):
            raise TangentError(f"{name!r} is a {type(leaf).__name__}: give a plain tensor")
        values[name] = leaf
    return values, tied


def state_homes(model: Model) -> dict[str, tuple[Any, str]]:
    """Where each parameter and buffer is kept: the dict of its module, and the key in it."""
    homes: dict[str, tuple[Any, str]] = {}
    for root, module in modules_of(model).items():
        for path, owner in module.named_modules(prefix=root, remove_duplicate=False):
            for home in (owner._parameters, owner._buffers):
                for key, x in home.items():
                    name, inner = f"{path}.{key}".lstrip("."), Inner(home, key)
                    homes |= {name: (home, key)}
                    homes |= {f"{name}.{part}": (inner, part) for part in inner_tensors(x)}
    return homes


class Inner:
    """Where the plain tensors are kept that a parameter or buffer of a subclass consists of."""

    def __init__(self, home: dict[str, Any], key: str) -> None:
        self._home, self._key = home, key

    def __getitem__(self, part: str) -> Tensor:
        return inner_tensors(self._home[self._key])[part]


def by_direction(tangents: Any) -> tuple[list[Any], bool]:
    """The tangents of each direction, and whether they were given as several."""
    several = isinstance(tangents, list | tuple)
    return (list(tangents) if several else [tangents]), several


def check_tangents(
    tangents: Tangents, values: Mapping[str, Any], tied: Mapping[str, str], batched: bool = False
) -> dict[str, Tensor | RankOne]:
    """Tangents under their primal's first name, each checked against its primal.

    Args:
        tangents: by the name of their primals.
        values: the primals.
        tied: as of `tied_names`.
        batched: whether each tangent has an axis of directions in front.

    Raises:
        TangentError: no mapping, unknown name, integer primal, wrong shape, dtype or device, two
            tangents for one tied parameter, or no tangent at all.
    """
    if not isinstance(tangents, Mapping):
        raise TangentError(
            f"tangents are given by name, not as a {type(tangents).__name__}: tangents={{name: "
            f"tangent}}, or a sequence of such; names here are {', '.join([*values][-4:])}"
        )
    size = batch_size(tangents) if batched else 0
    checked: dict[str, Tensor | RankOne] = {}
    for name, dot in tangents.items():
        check_name(name, values)
        first = tied.get(name, name)
        if first in checked:
            raise TangentError(f"{name!r} and {first!r} are one tied tensor: give one tangent")
        checked[first] = _like_primal(name, dot, values[name], size)
    if not checked:
        raise TangentError("no tangent given: nothing to differentiate by")
    return checked


def dense(tangents: Tangents) -> dict[str, Tensor | RankOne]:
    """The same tangents with outer products made."""
    return {name: dense_tensor(dot) for name, dot in tangents.items()}


def batch_size(tangents: Tangents) -> int:
    """How many directions a mapping of batched tangents holds.

    Raises:
        TangentError: a tangent is no tensor, or has no axis in front.
    """
    for name, dot in tangents.items():
        if not isinstance(dot, Tensor) or not dot.ndim or not len(dot):
            raise TangentError(f"batched=True: the tangent of {name!r} is a tensor [K, ...], K > 0")
    return len(next(iter(tangents.values()), ()))  # type: ignore[arg-type]


def _like_primal(name: str, dot: Any, primal: Tensor, size: int) -> Tensor | RankOne:
    """A tangent laid out as its primal, behind an axis of `size` directions if that is not 0.

    The factors of a tangent are contiguous.
    """
    if isinstance(dot, RankOne):
        if primal.ndim < 2:
            raise TangentError(f"{name!r} has {primal.ndim} dimensions, RankOne needs two or more")
        _check_like(f"factor u of the tangent of {name!r}", dot.u, primal, primal.shape[:1])
        _check_like(f"factor v of the tangent of {name!r}", dot.v, primal, primal.shape[1:])
        return RankOne(dot.u.contiguous(), dot.v.contiguous())
    if not isinstance(dot, Tensor):
        raise TangentError(f"the tangent of {name!r} is a {type(dot).__name__}, not a tensor")
    shape = torch.Size((size, *primal.shape)) if size else primal.shape
    _check_like(f"the tangent of {name!r}", dot, primal, shape)
    if dot.stride() == ((primal.numel(), *primal.stride()) if size else primal.stride()):
        return dot
    laid_out = wider(primal, size) if size else torch.empty_like(primal)
    return laid_out.copy_(dot)


def _check_like(what: str, dot: Tensor, primal: Tensor, shape: torch.Size) -> None:
    for quality, its in (("shape", shape), ("dtype", primal.dtype), ("device", primal.device)):
        mine = getattr(dot, quality)
        if mine != its:
            raise TangentError(
                f"{what} has {quality} {_text(mine)}, its primal asks for {_text(its)}"
            )


def check_name(name: str, values: Mapping[str, Any]) -> None:
    """Refuses a name that nothing floating-point goes by.

    Raises:
        TangentError: with the nearest known names.
    """
    if name not in values:
        known = [n for n, x in values.items() if is_differentiable(x)]
        near = difflib.get_close_matches(name, known, 3, 0.4) or known[:8]
        raise TangentError(f"nothing is called {name!r}; nearest: {', '.join(near) or 'nothing'}")
    if not is_differentiable(values[name]):
        kind = getattr(values[name], "dtype", type(values[name]).__name__)
        raise TangentError(f"{name!r} is {kind}: only floating-point tensors have tangents")
    if inner := inner_tensors(values[name]):
        raise TangentError(
            f"{name!r} is a {type(values[name]).__name__}, which has no tangent; it consists of "
            f"{', '.join(f'{name}.{part}' for part in inner)}"
        )
    _check_dense(values[name])


def arrange(
    slots: Iterable[Slot], values: Mapping[str, Any], directions: Sequence[Tangents]
) -> list[Tensor]:
    """The arguments of a generated function, in the order of its slots."""
    return [
        _tangent(slot, directions) if slot.kind == "tangent" else values[slot.name]
        for slot in slots
        if slot.kind != "constant"
    ]


def _tangent(slot: Slot, directions: Sequence[Tangents]) -> Tensor:
    dot = directions[slot.direction][slot.name]
    return getattr(dot, slot.factor) if slot.factor else dot  # type: ignore[return-value]


def refuse_shared(
    slots: Iterable[Slot],
    changed: Collection[str],
    tensors: Iterable[Any],
    constants: Mapping[str, Tensor],
) -> None:
    """Refuses a call in which what is written to is read by another name.

    Args:
        slots: the inputs of the program.
        changed: names of the buffers and inputs that the program gives new values.
        tensors: of the call, as by `arrange`.
        constants: what the program closes over.

    Raises:
        TangentError: a tensor that is written to shares memory with another one.
    """
    if not changed:
        return
    memory: dict[int, list[tuple[str, Tensor]]] = {}
    for name, x in constants.items():
        memory.setdefault(x.untyped_storage()._cdata, []).append((f"constant {name}", x))
    given = [slot for slot in slots if slot.kind != "constant"]
    for slot, x in zip(given, tensors, strict=True):
        if slot.kind != "tangent":
            memory.setdefault(x.untyped_storage()._cdata, []).append((slot.name, x))
    for named in (shared for shared in memory.values() if len(shared) > 1):
        for name, x in (pair for pair in named if pair[0] in changed):
            for other, y in named:
                if other != name and _overlap(x, y):
                    raise TangentError(
                        f"the model writes to {name!r}, which shares memory with {other!r}: what "
                        "is captured takes them for two tensors. Give it a clone of one of them."
                    )


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the stretches of one storage overlap in which two tensors lie."""
    (first, end), (other, other_end) = map(_stretch, (x, y))
    return first < other_end and other < end


def _stretch(x: Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins and ends, in bytes."""
    start = int(x.storage_offset()) * x.element_size()
    last = sum((int(n) - 1) * int(stride) for n, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size() * bool(x.numel())


@torch.no_grad()
def store(slots: Sequence[Slot], outs: Sequence[Tensor], values: Mapping[str, Any]) -> None:
    """Writes new values of buffers and inputs that the model changes in place."""
    for slot, out in zip(slots, outs, strict=True):
        if slot.kind in ("buffer", "input"):
            values[slot.name].copy_(out)


def signature_of(x: Any) -> Any:
    """What of an input decides the captured graph: a tensor's metadata, anything else's value."""
    if isinstance(x, Tensor):
        _check_dense(x)
        kind = x.shape, x.stride(), x.dtype, x.device
        if inner := inner_tensors(x):
            context = x.__tensor_flatten__()[1]  # type: ignore[attr-defined]
            return kind, type(x), repr(context), *map(signature_of, inner.values())
        return kind
    if isinstance(x, float | complex):
        return type(x), repr(x)  # tells 0.0 and -0.0 apart, and no NaN from another
    try:
        hash(x)
    except TypeError:
        return type(x), repr(x)
    return type(x), x


def _check_dense(x: Tensor) -> None:
    if x.layout != torch.strided:
        raise TangentError(f"{x.layout} tensors have no forward mode here: use x.to_dense()")


def _text(x: Any) -> str:
    return str(list(x)) if isinstance(x, torch.Size) else str(x)
