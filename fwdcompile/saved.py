"""Saved programs: a generated file, edited or not, called like the transform it came from."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .autocast import without_casts
from .binding import Tangents, arrange, by_direction, check_tangents, store
from .directions import RankOne
from .emit import UNTRACKED, execute
from .errors import TangentError
from .inside import is_capturing, refused
from .parts import named_state, tied_names
from .program import Kind, Slot

_numbers = itertools.count()


class Saved:
    """A generated program read from a file. Make one with `fwdcompile.load`."""

    def __init__(self, path: str | Path, state: Mapping[str, Tensor]) -> None:
        self.code = Path(path).read_text()
        self._module = execute(self.code, f"fwdcompile_saved_{next(_numbers)}")
        self._inputs = tuple(Slot(*entry) for entry in self._module.INPUTS)
        self._outputs = tuple(Slot(*entry) for entry in self._module.OUTPUTS)
        self._state = dict(state)
        stored = [slot.name for slot in self._inputs if slot.kind in ("parameter", "buffer")]
        if missing := [name for name in stored if name not in self._state]:
            raise TangentError(f"the program reads {missing[0]!r}: load it with the model's state")

    def __call__(
        self, *args: Any, tangents: Tangents | Sequence[Tangents], **kwargs: Any
    ) -> tuple[Any, ...]:
        """Runs the program as `fwd(*args, tangents=..., **kwargs)` ran it.

        Args:
            args: the model's positional arguments, of the shapes the program was made for.
            tangents: tangents of exactly the names that the program was made for.
            kwargs: the model's keyword arguments, in the order they had then.

        Returns:
            `(y, y_dot)`, and `y_ddot` behind them from a program of `laplacian`, whose directions
            are those of `tangents` and then those of `first`. A dataclass or named tuple comes back
            as a dict of its fields.

        Raises:
            TangentError: other names, shapes or dtypes than the program was made for.
            CaptureError: a model calls it that is captured, and autograd cannot go through it.
        """
        if is_capturing():
            self._refuse_sealed()
        values = self._values([x for x in pytree.tree_leaves((args, kwargs)) if _is_tensor(x)])
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
        with without_casts():
            outs = self._module.forward(*arrange(self._inputs, values, dots))
        store(self._outputs, outs, values)
        y = self._build(outs, "output")
        y_dots = tuple(self._build(outs, "tangent", k) for k in range(len(dots)))
        pair = y, y_dots if several else y_dots[0]
        summed = any(slot.kind == "second" for slot in self._outputs)
        return (*pair, self._build(outs, "second")) if summed else pair

    def _refuse_sealed(self) -> None:
        if sealed := re.search(f"^{UNTRACKED}(.*)\\.$", self.code, re.MULTILINE):
            raise refused(sealed[1])

    def _values(self, leaves: list[Tensor]) -> dict[str, Any]:
        names = [slot.name for slot in self._inputs if slot.kind == "input"]
        if len(names) != len(leaves):
            raise TangentError(f"the program takes {len(names)} tensors ({', '.join(names)}), "
                               f"not {len(leaves)}")  # fmt: skip
        return self._state | dict(zip(names, leaves, strict=True))

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


def _told(tangents: set[tuple[str, int, bool, int]]) -> str:
    return ", ".join(
        f"{name!r} ({'RankOne, ' if factors else ''}direction {k}{f', {size} each' * bool(size)})"
        for name, k, factors, size in sorted(tangents)
    )


def _fixed(text: str) -> Any:
    return eval(text, {"torch": torch, "inf": float("inf"), "nan": float("nan")})


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
