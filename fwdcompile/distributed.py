"""Forward gradients by many workers: a step sends numbers, and no tensor of the model's size.

A worker's part of a forward gradient is d v (Theorem 1 of Baydin et al. 2022), and v is a pure
function of seed, step, sample and parameter: d is all that has to travel. Every worker forms the
same sum from the same numbers, so that all hold the same parameters without ever sending them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fgd import FGD, ForwardGradient
from .together import Together
from .workers import Workers

__all__ = ["DistributedFGD", "DistributedForwardGradient", "Workers"]


class DistributedFGD(Together, FGD):
    """Forward gradient descent by many workers; each step sends some 48 bytes from each.

    With `Workers("data")` all take the same directions, each on its part of the batch: the step of
    `FGD` on the whole batch, where parts are of equal size and the loss is a mean. With
    `Workers("directions")` each takes directions of its own: `FGD` with `size * samples` of them.
    Directions are drawn a second time for the update, whatever `store_directions` says.

    Args:
        model, loss_fn: as for `FGD`; weights and all settings are the same in all workers.
        workers: who trains, and what is shared.
        history: a file for the numbers of all steps, which `replay` makes weights of again; worker
            0 writes it.
        check_every: steps between two looks at whether all hold the same weights.
        broadcast_buffers: buffers that the model changes (batch norm) are those of worker 0 at the
            start of each step, as in DistributedDataParallel: they travel, then.
        options: as for `FGD`. With nonfinite="skip" the workers whose numbers are finite go on
            without the others.

    Raises:
        MismatchError: workers differ; says in what, and nothing has changed.

    Example:
        >>> torch.distributed.init_process_group("gloo")  # under torchrun
        >>> fgd = fwdcompile.distributed.DistributedFGD(model, loss_fn, lr=2e-4)
        >>> loss = fgd.step(x[rank::size], target[rank::size])
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        workers: Workers | None = None,
        history: str | Path | None = None,
        check_every: int = 100,
        broadcast_buffers: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, **options)
        self._join(workers or Workers(), history, check_every, broadcast_buffers)

    def step(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """One iteration of all workers: changes the parameters in place.

        Args:
            *inputs: this worker's part, as for `FGD.step`.
            **kwargs: the model's keyword arguments.

        Returns:
            The mean loss of all workers before the update, float64, of no dimensions.

        Raises:
            NonFiniteError: in every worker, if one has a loss or derivative that is not finite;
                nothing has changed.
            MismatchError: workers have come apart.
        """
        loss, layout, weights = self._meet(inputs, kwargs)
        moves = [-self.lr * each for each in weights]
        self._write_moves(moves, layout)
        self._apply(layout, moves, _itself)
        self._advance()
        return loss

    def replay(
        self, path: str | Path | None = None, *, until: int | None = None, unfinished: bool = False
    ) -> int:
        """Makes the weights of a later step from those here and a history, with no data.

        Args:
            path: of the history; by default the one that this run writes.
            until: iteration to stop at; by default the last.
            unfinished: takes what is there of a run that was stopped.

        Returns:
            The iteration reached.

        Raises:
            HistoryError: the history is damaged, cut short or of another run.
        """
        for _ in self._replayed(path, until, unfinished, _itself):
            pass
        return self.iteration


class DistributedForwardGradient(Together, ForwardGradient):
    """Fills `p.grad` with the forward gradient of many workers, for any optimizer.

    The gradient is the same in all workers, and so is what an optimizer makes of it.

    Args:
        model, loss_fn: as for `ForwardGradient`.
        workers: as for `DistributedFGD`; so are `history`, `check_every` and `broadcast_buffers`.
        history: see there.
        check_every: see there.
        broadcast_buffers: see there.
        options: as for `ForwardGradient`; `perturb="activations"` is refused, whose gradients are
            not made of directions of weights.

    Example:
        >>> grad = fwdcompile.distributed.DistributedForwardGradient(model, loss_fn)
        >>> optimizer.zero_grad(); grad(x[rank::size], target[rank::size]); optimizer.step()
    """

    def __init__(
        self,
        model: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        workers: Workers | None = None,
        history: str | Path | None = None,
        check_every: int = 100,
        broadcast_buffers: bool = True,
        **options: Any,
    ) -> None:
        if options.get("perturb", "weights") != "weights":
            raise ValueError(
                "activity perturbation has gradients of the model's size to send: train it with "
                "ForwardGradient and reduce p.grad, or perturb weights"
            )
        super().__init__(model, loss_fn, **options)
        self._join(workers or Workers(), history, check_every, broadcast_buffers)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Adds the forward gradient of all workers to `p.grad`; returns their mean loss, float64.

        Raises:
            NonFiniteError: in every worker, if one has a loss or derivative that is not finite;
                nothing has changed.
            MismatchError: workers have come apart.
        """
        loss, layout, weights = self._meet(inputs, kwargs)
        self._write_moves(weights, layout)
        self._apply(layout, weights, _gradient)
        self._advance()
        return loss

    def replay(
        self, path: str | Path | None = None, *, until: int | None = None, unfinished: bool = False
    ) -> Iterator[int]:
        """Adds the gradients of a history to `p.grad`, one iteration after the other.

        Args:
            path: of the history; by default the one that this run writes.
            until: iteration to stop at; by default the last.
            unfinished: takes what is there of a run that was stopped.

        Yields:
            The iteration reached, for the optimizer to step.

        Raises:
            HistoryError: the history is damaged, cut short or of another run.

        Example:
            >>> for _ in grad.replay("run/history"):
            ...     optimizer.step()
            ...     optimizer.zero_grad()
        """
        yield from self._replayed(path, until, unfinished, _gradient)


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
