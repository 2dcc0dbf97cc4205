"""flex_attention against the same attention written in plain ops, which torch.func.jvp takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fwdcompile.rules.attention import BLOCK
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fwdcompile

F64 = torch.float64
SIZE = 12
ROW, COLUMN = torch.arange(SIZE)[:, None], torch.arange(SIZE)
SEEN = ROW >= COLUMN
DOCUMENTS = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
TABLE = torch.linspace(-1, 1, 4 * (2 * SIZE - 1), dtype=F64).cos().view(4, -1)
CAUSAL = create_block_mask(lambda b, h, i, j: i >= j, None, None, SIZE, SIZE, device="cpu")
OWN = create_block_mask(
    lambda b, h, i, j: (DOCUMENTS[i] == DOCUMENTS[j]) & (j > 0),
    None,
    None,
    SIZE,
    SIZE,
    device="cpu",
)


def attend(scores: Tensor, value: Tensor) -> Tensor:
    weights = torch.softmax(scores, -1).nan_to_num()  # a row without keys is zero
    return weights @ value


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / q.shape[-1] ** 0.5


# flex_attention of q, k, v and a tensor t beside what it is in plain ops.
CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
    "plain": (
        lambda q, k, v, t: flex_attention(q, k, v * t),
        lambda q, k, v, t: attend(scores(q, k), v * t),
        (1,),
    ),
    "capped": (
        lambda q, k, v, t: flex_attention(q, k, v, lambda s, b, h, i, j: t[0] * (s / t[0]).tanh()),
        lambda q, k, v, t: attend(t * (scores(q, k) / t).tanh(), v),
        (1,),
    ),
    "causal, with a slope for each head": (
        lambda q, k, v, t: flex_attention(
            q, k, v, lambda s, b, h, i, j: s + t[h] * (j - i), block_mask=CAUSAL
        ),
        lambda q, k, v, t: attend(
            torch.where(SEEN, scores(q, k) + t[:, None, None] * (COLUMN - ROW), -torch.inf),
            v,
        ),
        (4,),
    ),
    "a table of distances": (
        lambda q, k, v, t: flex_attention(
            q, k, v, lambda s, b, h, i, j: s + (t * TABLE)[h, i - j + SIZE - 1] * t[h, b]
        ),
        lambda q, k, v, t: attend(
            scores(q, k) + (t * TABLE)[:, ROW - COLUMN + SIZE - 1] * t[:, :2].T[:, :, None, None], v
        ),
        (4, 2 * SIZE - 1),
    ),
    "documents, one without keys": (
        lambda q, k, v, t: flex_attention(q * t, k, v, block_mask=OWN, scale=0.3),
        lambda q, k, v, t: attend(
            torch.where(
                (DOCUMENTS[:, None] == DOCUMENTS) & (COLUMN > 0), 0.3 * (t * q) @ k.mT, -torch.inf
            ),
            v,
        ),
        (1,),
    ),
    "fewer heads of keys": (
        lambda q, k, v, t: flex_attention(q * t, k[:, :2], v[:, :2], enable_gqa=True),
        lambda q, k, v, t: attend(
            scores(q * t, k[:, [0, 0, 1, 1]]), v[:, [0, 0, 1, 1]]
        ),
        (1,),
    ),
    "with the logarithm of the sum": (
        lambda q, k, v, t: flex_attention(q * t, k, v, return_lse=True),
        lambda q, k, v, t: (attend(scores(q * t, k), v), scores(q * t, k).logsumexp(-1)),
        (1,),
    ),
}  # fmt: skip


def inputs(shape: tuple[int, ...], size: int = SIZE) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    tensors = (torch.randn(2, 4, size, 8, dtype=F64) for _ in range(3))
    return (*tensors, torch.rand(shape, dtype=F64) + 1)


def directions(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(map(torch.randn_like, x))


@pytest.mark.filterwarnings("ignore:return_lse is deprecated")
@pytest.mark.parametrize("case", CASES)
def test_flex_attention(case: str) -> None:
    function, plain, shape = CASES[case]
    x = inputs(shape)
    dots = directions(x)
    found, expected = fwdcompile.jvp(function, x, dots), torch.func.jvp(plain, x, dots)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["capped", "causal, with a slope for each head"])
def test_second_derivatives(case: str) -> None:
    function, plain, shape = CASES[case]
    x = inputs(shape)
    dots = directions(x)

    def twice(jvp: Any, function: Any) -> Any:
        return jvp(lambda *x: jvp(function, x, dots)[1], x, dots)[1]

    forward = fwdcompile.transform(fwdcompile.transform(function))
    (_, _), (_, second) = forward(*x, tangents=dict(zip("qkvt", dots, strict=True)))
    torch.testing.assert_close(second, twice(torch.func.jvp, plain), rtol=1e-9, atol=1e-9)


def test_a_block_of_queries_at_a_time() -> None:
    length = 2 * BLOCK + 70
    q, k, v, t = inputs((4,), length)
    x = (q[:1], k[:1, :, :20], v[:1, :, :20], t)
    dots = directions(x)
    places = torch.arange(length)[:, None], torch.arange(20)

    def function(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
        return flex_attention(q, k, v, lambda s, b, h, i, j: s + t[h] * (i - j))

    def plain(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Any:
        return attend(scores(q, k) + t[:, None, None] * (places[0] - places[1]), v)

    forward = fwdcompile.transform(function)
    found = forward(*x, tangents=dict(zip("qkvt", dots, strict=True)))
    torch.testing.assert_close(found, torch.func.jvp(plain, x, dots), rtol=1e-10, atol=1e-10)
    shapes = {tuple(n.meta["val"].shape) for n in forward.program.graph.find_nodes(
        op="call_function", target=torch.ops.aten._safe_softmax.default)}  # fmt: skip
    assert shapes == {(1, 4, BLOCK, 20), (1, 4, 70, 20)}


def test_scores_of_16_bits_have_32() -> None:
    x = tuple(x.bfloat16() for x in inputs((1,)))
    dots = directions(x)
    _, plain, _ = CASES["capped"]
    y, y_dot = fwdcompile.jvp(CASES["capped"][0], x, dots)
    wide = torch.func.jvp(plain, tuple(p.double() for p in x), tuple(d.double() for d in dots))
    assert y.dtype == y_dot.dtype == torch.bfloat16
    torch.testing.assert_close((y.double(), y_dot.double()), wide, rtol=0.03, atol=0.03)


def test_torch_has_no_forward_mode_of_it() -> None:
    function, _, shape = CASES["plain"]
    x = inputs(shape)
    with pytest.raises(Exception, match="flex_attention"):
        torch.func.jvp(function, x, directions(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 1)
        self.slope = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, lambda s, b, h, i, j: s + self.slope[h] * (i - j))
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_step_learns_through_it() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(8, 6, 8)
    target = x.mean((1, 2))[:, None]
    fgd = fwdcompile.FGD(model, nn.functional.mse_loss, lr=3e-2)
    slope = model.slope.detach().clone()
    losses = [float(fgd.step(x, target)) for _ in range(300)]
    assert sum(losses[-20:]) < sum(losses[:20]) and not torch.equal(slope, model.slope)
