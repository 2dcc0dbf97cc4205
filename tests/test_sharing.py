"""Memory that tensors share without torch knowing it: right where it can be told, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile

X = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)


def writing(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Writes to what a view shows, and to what a view was made of."""

    def function(x: Tensor) -> Tensor:
        h, k = x.sin(), x.cos()
        a, b = view(h), view(k)
        a.mul_(3)
        k.add_(x)
        return (h * h).sum() + (b * b).sum()

    return function


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout that is off": lambda h: F.dropout(h, 0.5, False),
    "dropout of nothing": lambda h: F.dropout(h, 0.0),
    "module in evaluation mode": nn.Dropout(0.3).eval(),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, False),
    "whole windows": lambda h: h.flatten().unfold(0, 3, 3),
    "strides": lambda h: h.as_strided((2, 2), (3, 1)),
    "strides of rows": lambda h: h.as_strided((2, 3), (3, 1)).reshape(-1),
    "einsum that multiplies": lambda h: torch.einsum("ij,jk->ki", h, h),
    "atleast_3d": torch.atleast_3d,
    "reshape that copies": lambda h: h.T.reshape(-1),
    "reshape that does not": lambda h: h.reshape(-1),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "einsum": (lambda h: torch.einsum("ij->ji", h), "aten.einsum.default gives a view or a copy"),
    "diagonal by einsum": (lambda h: torch.einsum("ii->i", h), "einsum"),
    "windows with gaps": (lambda h: h.unfold(1, 1, 2), "unfold.default leaves gaps"),
    "windows that do not reach": (lambda h: h.unfold(1, 2, 2), "unfold.default leaves gaps"),
    "flat strides": (lambda h: h.as_strided((3, 2), (1, 3)).flatten(), "flatten.*view or a copy"),
}


@pytest.mark.parametrize("around", [lambda f: f, torch.func.vmap])
@pytest.mark.parametrize("view", RIGHT.values(), ids=RIGHT)
def test_writes_reach_what_shows_their_memory(
    view: Callable[[Tensor], Tensor], around: Callable[[Any], Any]
) -> None:
    function = around(writing(view))
    x = X.expand(2, 3, 3) if around is torch.func.vmap else X
    outs = fwdcompile.transform(lambda x: function(x))(x, tangents={"x": x})
    torch.testing.assert_close(outs, torch.func.jvp(function, (x,), (x,)))


@pytest.mark.parametrize(("view", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused(view: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(fwdcompile.CaptureError, match=rf"(?s)test_sharing.py:\d+.*{message}"):
        fwdcompile.transform(writing(view))(X, tangents={"x": X})
    unwritten = lambda x: view(x.sin()).square().sum()  # noqa: E731
    outs = fwdcompile.transform(unwritten)(X, tangents={"x": X})
    torch.testing.assert_close(outs, torch.func.jvp(unwritten, (X,), (X,)))
