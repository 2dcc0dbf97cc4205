"""What the steps of many workers share: the exchange of a step, its history, and its replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import __version__
from .autocast import without_casts
from .binding import state_homes
from .directions import Sphere
from .drawing import kinds_of
from .errors import HistoryError, MismatchError
from .history import History, Record, check_header, read
from .layout import Layout
from .lowered import Lowered
from .plan import Plan
from .stepper import Stepper, counted, kind_of
from .words import stream_keys
from .workers import Workers, digest

_FORMAT = 1
_BITS = 48  # of a digest, that a float64 holds without rounding


@dataclass
class Part:
    """What this worker has for the next step: sums over the parts of its batch."""

    layout: Layout
    loss: Tensor
    slopes: Tensor
    mixing: Tensor | None
    finite: bool
    count: int = 1
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def undo(self) -> None:
        """Gives buffers and inputs the values that they had before the step."""
        for x, old in self.before.values():
            x.copy_(old)


class Together(Stepper):
    """A step in two halves: a forward run in each worker, then what follows from all numbers."""

    def _join(
        self, workers: Workers, history: str | Path | None, check_every: int, buffers: bool
    ) -> None:
        orthogonal = isinstance(self.directions, Sphere) and self.directions.orthogonal
        if workers.share == "directions" and orthogonal:
            raise ValueError('orthogonal directions are drawn together: share="data" has that')
        (self.check_every,) = counted("check_every", check_every)
        self.workers, self.broadcast_buffers = workers, buffers
        self._path = None if history is None else Path(history)
        self._history: History | None = None
        self._written: Layout | None = None
        self._part: Part | None = None
        self._layouts: dict[Plan, Layout] = {}
        self._keys: dict[tuple[int, int], Callable[[Tensor, Tensor], Tensor]] = {}
        self._homes = state_homes(self.objective)
        self._unchecked = True
        if workers.share == "directions":
            self._first_sample = workers.rank * self.samples
        workers.agree(self._identity())

    def _identity(self) -> dict[str, Any]:
        """What has to be equal in all workers."""
        names = self._names()
        return {
            "the version of fwdcompile": __version__,
            "the version of torch": torch.__version__,
            "the number of threads": torch.get_num_threads(),
            "what is shared": self.workers.share,
            "its kind of step": type(self).__name__,
            "directions": repr(self.directions),
            "samples": self.samples,
            "clip": self.clip,
            "nonfinite": self.nonfinite,
            "compile": self._compile and self._mode,
            "check_every": self.check_every,
            "its state": self.state_dict(),
            "parameter names": names,
        } | {f"parameter {name}": kind_of(self._parameter(name)) for name in names}

    def _parameter(self, name: str) -> Tensor:
        home, key = self._homes[name]
        return home[key]  # type: ignore[no-any-return]

    @torch.no_grad()
    def accumulate(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Takes a part of this worker's batch along the directions of the next step.

        Nothing is sent and no parameter moves; the step that follows takes the mean over its own
        inputs and all parts before. Parts of equal size give the step of the whole batch.

        Args:
            *inputs: as of a step.
            **kwargs: as of a step.

        Returns:
            The loss of this part.
        """
        plan, leaves = self._plan(inputs, kwargs)
        if plan not in self._layouts:
            self._layouts[plan] = Layout.of(plan.lowered)
        layout = self._layouts[plan]
        tensors = plan.tensors(leaves)
        buffers, changed = plan.written(leaves)
        part = self._part
        before = part.before if part else {}
        for x in (*buffers, *changed):
            before.setdefault(id(x), (x, x.clone()))
        if part is None and self.broadcast_buffers:
            self.workers.follow(buffers)
        loss: Tensor
        with without_casts():
            loss, finite, slopes, mixing = plan.run(tensors, self._seed, self._step)
        loss, slopes = loss.to(torch.float64), slopes.to(torch.float64)
        mixing = None if mixing is None else mixing.to(torch.float64)
        if part is None:
            self._part = Part(layout, loss, slopes, mixing, bool(finite), before=before)
        elif part.layout != layout:
            raise MismatchError("the parts of one step must train the same parameters")
        else:
            part.loss, part.slopes = part.loss + loss, part.slopes + slopes
            part.finite, part.count = part.finite and bool(finite), part.count + 1
        return loss

    def _launched(self, lowered: Lowered) -> Callable[..., Any]:
        # whatever a kind of step launches behind it alone
        return self._compiled(self._body(lowered))

    def _body(self, lowered: Lowered) -> Callable[..., Any]:
        draw = self._draw(kinds_of(lowered))

        def estimate(tensors: Any, seed: Tensor, count: Tensor) -> Any:
            loss, finite, _, drawn, slopes, _ = self._estimate(lowered, draw, tensors, seed, count)
            return loss, finite, torch.stack([*slopes.values()]), self.directions.mixing(drawn)

        return estimate

    def _meet(self, inputs: Sequence[Any], kwargs: Any) -> tuple[Tensor, Layout, list[Tensor]]:
        """The mean loss, and for each set of losses the weights of all directions, `[G]`."""
        self.accumulate(*inputs, **kwargs)
        part, self._part = self._part, None
        assert part is not None
        checked = self._unchecked or self.iteration % self.check_every == 0
        own = self._digest() if checked else "0"
        numbers = part.slopes / part.count
        if self.workers.share == "directions":
            numbers = torch.stack([self._weigh(slope, part.mixing) for slope in numbers])
        head = [self.iteration, part.layout.fingerprint, int(own, 16) >> (256 - _BITS)]
        told = torch.tensor([*head, part.finite], dtype=torch.float64, device=numbers.device)
        loss = part.loss[None] / part.count
        rows = self.workers.gather(torch.cat([told, loss, numbers.flatten()]))
        finite = rows[:, 3] > 0
        alike = bool((rows[:, :3] == rows[0, :3]).all())
        if not (alike and part.finite and (finite.all() or self.nonfinite == "skip")):
            part.undo()
        if not alike:
            self._refuse(rows)
        self._unchecked = False
        if self.nonfinite == "raise" and not finite.all():
            where = (~finite).nonzero().flatten().tolist()
            raise self._refusal(rows[where[0], 4], f", worker {', '.join(map(str, where))}")
        if checked:
            self._write({"kind": "check", "i": self.iteration, "weights": own}, part.layout)
        kept = finite if finite.any() else ~finite
        weights = self._weights_of(rows[:, 5:], finite, part)
        return rows[kept, 4].mean(), part.layout, part.layout.moves(weights)

    def _weights_of(self, numbers: Tensor, finite: Tensor, part: Part) -> Tensor:
        """Weights of all directions, `[losses, G]`, for a mean over them, from what was told."""
        losses = len(part.layout.losses)
        each = torch.where(finite[:, None], numbers, 0.0) / finite.sum().clamp(min=1)
        if self.workers.share == "directions":
            return each.view(len(each), losses, -1).transpose(0, 1).flatten(1) / self.samples
        mixing = None if part.mixing is None else part.mixing.cpu()
        slopes = each.sum(0).view(losses, -1)
        return torch.stack([self._weigh(slope, mixing) for slope in slopes]) / self.samples

    def _refuse(self, rows: Tensor) -> NoReturn:
        """Says in what workers have come apart."""
        each: dict[str, Any] = {"its iteration": self.iteration, "the seed": int(self._seed)}
        each |= {f"parameter {name}": digest([self._parameter(name)]) for name in self._names()}
        self.workers.agree(each)
        raise MismatchError(f"workers run programs of other parameters: {rows[:, 1].tolist()}")

    def _names(self) -> list[str]:
        """The parameters that train, by all of their names."""
        found = {name: home[key] for name, (home, key) in self._homes.items()}
        return [name for name, x in found.items() if x is not None and x.requires_grad]

    def _digest(self) -> str:
        return digest([*(self._parameter(name) for name in self._names()), self._seed])

    def _apply(
        self, layout: Layout, moves: Sequence[Tensor], target: Callable[[Tensor], Tensor]
    ) -> None:
        """Adds the directions of this step times `moves` to the target of each parameter."""
        device = self._seed.device
        keys = self._keys_of(len(moves[0]), len(layout.parameters))(self._seed, self._step)
        placed = [each.to(device) for each in moves]
        for number, (name, which) in enumerate(layout.parameters):
            if which is not None:
                x = target(self._parameter(name))
                own = torch.split(keys[:, number], self.samples)
                factors = torch.split(placed[which], self.samples)
                for some, theirs in zip(own, factors, strict=True):
                    self._redraw(x, some, theirs)

    def _keys_of(self, count: int, parameters: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The function from seed and step to the keys of all directions."""
        if (count, parameters) not in self._keys:

            def keys(seed: Tensor, step: Tensor) -> Tensor:
                return stream_keys(seed, step, count, parameters)

            self._keys[count, parameters] = self._compiled(keys)
        return self._keys[count, parameters]

    def _header(self) -> Record:
        """What has to be equal for a history to be replayed."""
        return {
            "format": _FORMAT,
            "step": type(self).__name__,
            "directions": repr(self.directions),
            "seed": int(self._seed),
        }

    def _write(self, record: Record, layout: Layout) -> None:
        """Adds to the history, which worker 0 keeps for all."""
        if self._path is None or self.workers.rank:
            return
        if self._history is None:
            self._history = History(self._path, self._header(), self.iteration)
        if layout != self._written:
            parameters = [
                [name, kind_of(self._parameter(name)), number] for name, number in layout.parameters
            ]
            self._history.write({"kind": "plan", "i": self.iteration, "parameters": parameters})
            self._written = layout
        self._history.write(record)

    def _write_moves(self, moves: Sequence[Tensor], layout: Layout) -> None:
        self._write({"i": self.iteration, "m": [each.tolist() for each in moves]}, layout)

    def close(self) -> None:
        """Ends the history, if there is one."""
        if self._history is not None:
            self._history.close()
            self._history = None

    def _replayed(
        self,
        path: str | Path | None,
        until: int | None,
        unfinished: bool,
        target: Callable[[Tensor], Tensor],
    ) -> Iterator[int]:
        """Does the steps of a history again, from the iteration that this one is at."""
        source = path or self._path
        if source is None:
            raise ValueError("replay needs the path of a history")
        records = read(source, unfinished=unfinished or until is not None)
        check_header(Path(source), records[0], self._header())
        layout: Layout | None = None
        for record in records[1:]:
            if self.iteration == until:
                return
            if record.get("kind") == "plan":
                layout = self._planned_layout(record, source)
            elif record.get("kind") == "check" and record["i"] == self.iteration:
                if self._digest() != record["weights"]:
                    raise HistoryError(
                        f"{source}: other weights at iteration {self.iteration} than the run had: "
                        "it began with others, or another torch or number of threads made them"
                    )
            elif record.get("m") is not None and record["i"] >= self.iteration:
                if record["i"] > self.iteration or layout is None:
                    raise HistoryError(f"{source} lacks iteration {self.iteration}")
                moves = [torch.tensor(each, dtype=torch.float64) for each in record["m"]]
                self._apply(layout, moves, target)
                self._advance()
                yield self.iteration
        if until is not None and self.iteration < until:
            raise HistoryError(f"{source} ends at iteration {self.iteration}, before {until}")

    def _planned_layout(self, record: Record, source: str | Path) -> Layout:
        """The layout of a record, for the parameters that this model has."""
        known = set(self._names())
        for name, kind, _ in record["parameters"]:
            mine = kind_of(self._parameter(name)) if name in known else "missing"
            if mine != kind:
                raise HistoryError(f"{source} trains {name}, {kind}; here it is {mine}")
        return Layout((), (), tuple((name, number) for name, _, number in record["parameters"]))
