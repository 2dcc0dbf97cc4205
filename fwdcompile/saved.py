"""Saved programs: a generated file, edited or not, called like the transform it came from."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autocast import without_casts
from .binding import Tangents, arrange, by_direction, check_tangents, refuse_shared, store
from .directions import RankOne
from .emit import UNTRACKED, execute
from .errors import TangentError
from .inside import is_capturing, refused
from .parts import named_state, tied_names
from .program import Kind, Slot
from .statements import shape_text

_numbers = itertools.count()


class Saved:
    """A generated program read from a file. Make one with `fwdcompile.load`."""

    def __init__(self, path: str | Path, state: Mapping[str, Tensor]) -> None:
        self.code = Path(path).read_text()
        self._module = execute(self.code, f"fwdcompile_saved_{next(_numbers)}")
        self._inputs = tuple(Slot(*entry) for entry in self._module.INPUTS)
        self._outputs = tuple(Slot(*entry) for entry in self._module.OUTPUTS)
        forward = self._module.forward
        types = inspect.get_annotations(forward)
        self._types = [types.get(name, "") for name in inspect.signature(forward).parameters]
        self._plain: dict[str, str] = getattr(self._module, "PLAIN", {})
        self._changed = {s.name for s in self._outputs if s.kind in ("buffer", "input")}
        self._state = dict(state)
        stored = [slot.name for slot in self._inputs if slot.kind in ("parameter", "buffer")]
        if missing := [name for name in stored if name not in self._state]:
            raise TangentError(f"the program reads {missing[0]!r}: load it with the model's state")

    def __call__(
        self, *args: Any, tangents: Tangents | Sequence[Tangents], **kwargs: Any
    ) -> tuple[Any, ...]:
        """Runs the program as `fwd(*args, tangents=..., **kwargs)` ran it.

        What the model's Python code decided stays so: training or not, numbers in attributes.

        Args:
            args: the model's positional arguments, of the shapes the program was made for.
            tangents: tangents of exactly the names that the program was made for.
            kwargs: the model's keyword arguments, in the order they had then.

        Returns:
            `(y, y_dot)`, and `y_ddot` behind them from a program of `laplacian`, whose directions
            are those of `tangents` and then those of `first`. A dataclass or named tuple comes back
            as a dict of its fields.

        Raises:
            TangentError: other names, shapes, dtypes or plain arguments than the program was made
                for, or a tensor that is written to shares memory with another one.
            CaptureError: a model calls it that is captured, and autograd cannot go through it.
        """
        if is_capturing():
            self._refuse_sealed()
        values = self._values(pytree.tree_leaves((args, kwargs)))
        tied = tied_names(self._state)
        each, several = by_direction(tangents)
        moved = [slot for slot in self._inputs if slot.kind == "tangent"]
        batched = any(slot.size for slot in moved)
        dots = [check_tangents(one, values, tied, batched) for one in each]
        wanted = {(s.name, s.direction, bool(s.factor), s.size) for s in moved}
        given = {
            (name, k, isinstance(dot, RankOne), len(dot) if batched else 0)  # type: ignore[arg-type]
            for k, one in enumerate(dots)
            for name, dot in one.items()
        }
        if wanted != given:
            raise TangentError(f"the program takes tangents {_told(wanted)}, not {_told(given)}")
        tensors = arrange(self._inputs, values, dots)
        refuse_shared(self._inputs, self._changed, tensors, {})
        with without_casts():
            outs = self._module.forward(*tensors)
        store(self._outputs, outs, values)
        y = self._build(outs, "output")
        y_dots = tuple(self._build(outs, "tangent", k) for k in range(len(dots)))
        pair = y, y_dots if several else y_dots[0]
        summed = any(slot.kind == "second" for slot in self._outputs)
        return (*pair, self._build(outs, "second")) if summed else pair

    def _refuse_sealed(self) -> None:
        if sealed := re.search(f"^{UNTRACKED}(.*)\\.$", self.code, re.MULTILINE):
            raise refused(sealed[1])

    def _values(self, leaves: list[Any]) -> dict[str, Any]:
        """The tensors of a call by name, each checked against what the program declares."""
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        names = [slot.name for slot in self._inputs if slot.kind == "input"]
        if len(names) != len(tensors):
            raise TangentError(f"the program takes {len(names)} tensors ({', '.join(names)}), "
                               f"not {len(tensors)}")  # fmt: skip
        plain = [repr(x) for x in leaves if not isinstance(x, Tensor)]
        if plain != [*self._plain.values()]:
            made = ", ".join(f"{name}={text}" for name, text in self._plain.items()) or "none"
            raise TangentError(f"the program was made for plain arguments {made}, not {plain}")
        values = self._state | dict(zip(names, tensors, strict=True))
        sizes: dict[str, str] = {}
        for slot, declared in zip(self._inputs, self._types, strict=True):
            if slot.kind != "tangent" and not _fits(values[slot.name], declared, sizes):
                given = shape_text(values[slot.name])
                raise TangentError(f"the program takes {slot.name!r} as {declared}, not {given}")
        return values

    def _build(self, outs: Sequence[Any], kind: Kind, direction: int = 0) -> Any:
        """The results of a kind in the model's structure."""
        pairs = zip(self._outputs, outs, strict=True)
        values = {s.name: x for s, x in pairs if (s.kind, s.direction) == (kind, direction)}

        def leaf(name: Any) -> Any:
            if isinstance(name, str) and name.startswith("="):
                return _fixed(name[1:]) if kind == "output" else None
            return values.get(name)

        return pytree.tree_map(leaf, self._module.STRUCTURE)


def load(path: str | Path, model: nn.Module | Mapping[str, Tensor] | None = None) -> Saved:
    """Reads a program that `fwd.save(path)` wrote, edited or not.

    Args:
        path: of the file.
        model: where the program's parameters and buffers are: a module, or tensors by name.

    Returns:
        A callable with the convention of the transform that the program came from.

    Raises:
        FwdcompileError: the file is no generated program.
        TangentError: the program reads a parameter that the model does not have.

    Example:
        >>> fwd.save("model_fwd.py")
        >>> y, y_dot = fwdcompile.load("model_fwd.py", model)(x, tangents={"x": x_dot})
    """
    if isinstance(model, nn.Module):
        state = named_state(model, "parameter") | named_state(model, "buffer")
    else:
        state = dict(model or {})
    return Saved(path, state)


def _fits(x: Tensor, declared: str, sizes: dict[str, str]) -> bool:
    """Whether a tensor is of a declared type, such as `f32[n, 3]`, where `sizes` has each n."""
    if not declared:
        return True
    (dtype, dims), (given, lengths) = map(_parts, (declared, shape_text(x)))
    if (dtype, len(dims)) != (given, len(lengths)):
        return False
    pairs = [(sizes.setdefault(d, n) if d.isidentifier() else d, n)
             for d, n in zip(dims, lengths, strict=True)]  # fmt: skip
    return all(size == n or not size.isdecimal() for size, n in pairs)


def _parts(declared: str) -> tuple[str, list[str]]:
    """The dtype and the sizes in a declared type."""
    dtype, _, dims = declared.partition("[")
    return dtype, dims.removesuffix("]").split(", ") if dims else []


def _told(tangents: set[tuple[str, int, bool, int]]) -> str:
    return ", ".join(
        f"{name!r} ({'RankOne, ' if factors else ''}direction {k}{f', {size} each' * bool(size)})"
        for name, k, factors, size in sorted(tangents)
    )


def _fixed(text: str) -> Any:
    return eval(text, {"torch": torch, "inf": float("inf"), "nan": float("nan")})
