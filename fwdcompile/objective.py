"""The objective f of the paper: a model and a loss as one function of inputs and target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import LossError


class Objective:
    """`loss_fn(model(*inputs), target)`, called as `objective(*inputs, target)`.

    Parameters keep the names they have in the model, so that `fc1.weight` is `fc1.weight`.

    Args:
        model: an nn.Module, or a function that closes over modules.
        loss_fn: of the model's output and the last argument; None where the model returns the loss.
    """

    def __init__(self, model: Callable[..., Any], loss_fn: Callable[..., Any] | None) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.__qualname__ = getattr(model, "__qualname__", type(model).__name__)
        function = model.forward if isinstance(model, nn.Module) else model
        self._takes = inspect.signature(function)
        names = list(self._takes.parameters.values())
        if loss_fn is not None:
            target = inspect.Parameter("target", inspect.Parameter.POSITIONAL_OR_KEYWORD)
            places = [p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in names]
            required = [p for p, place in zip(names, places, strict=True)
                        if place and p.default is inspect.Parameter.empty]  # fmt: skip
            names = [*required, target] if all(places) else []
        if names:
            self.__signature__ = inspect.Signature(names)

    def check(self, inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuses arguments that the model does not take beside the target.

        Raises:
            LossError: too few, too many, or others.
        """
        if self.loss_fn is None:
            return
        try:
            self._takes.bind(*inputs[:-1], **kwargs)
        except TypeError as error:
            raise LossError(
                f"the model is called with all but the last positional argument, {error}. The last "
                "is the target, as in loss_fn(model(*inputs), target): a tuple or dict if there "
                "are several; leave loss_fn out if the model returns the loss."
            ) from None

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The loss; the last positional argument is the target if there is a `loss_fn`."""
        if self.loss_fn is None:
            return self.model(*inputs, **kwargs)
        return self.loss_fn(self.model(*inputs[:-1], **kwargs), inputs[-1])
