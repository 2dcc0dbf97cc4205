"""Mixed precision: programs and steps under torch.autocast, against models that cast by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Decoder, Mlp, directions
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy, linear

import fwdcompile
from fwdcompile import FGD, ForwardGradient, Normal, Rademacher
from fwdcompile.autocast import casts, without_casts
from fwdcompile.distributed import DistributedFGD

X, Y = torch.linspace(-1, 1, 24).view(4, 6), torch.tensor([0, 1, 2, 1])


class ByHand(Mlp):
    """Casts as autocast does."""

    def forward(self, x: Tensor) -> Tensor:
        def narrow(layer: nn.Linear, x: Tensor) -> Tensor:
            return linear(*(t.bfloat16() for t in (x, layer.weight, layer.bias)))

        return narrow(self.fc2, torch.tanh(narrow(self.fc1, x)))


class Inside(Mlp):
    """Has an autocast of its own for the first layer."""

    def forward(self, x: Tensor) -> Tensor:
        with autocast():
            h = self.fc1(x)
        return self.fc2(torch.tanh(h.float()))


def autocast(dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype=dtype)


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out.float(), y)


def twins(kind: type[nn.Module] = ByHand) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    model = Mlp()
    other = kind()
    other.load_state_dict(model.state_dict())
    return model, other, directions(dict(model.named_parameters()))


def assert_same(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    for x, y in zip(mine, theirs, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_a_program_has_the_casts_of_where_it_is_captured():
    model, by_hand, dots = twins()
    with autocast():
        found = fwdcompile.transform(model)(X, tangents=dots)
    assert found[0].dtype == torch.bfloat16
    assert_same(found, fwdcompile.transform(by_hand)(X, tangents=dots))


def test_each_autocast_has_a_program_of_its_own():
    model, by_hand, dots = twins()
    fwd = fwdcompile.transform(model)
    plain = fwdcompile.transform(model)(X, tangents=dots)
    narrow = fwdcompile.transform(by_hand)(X, tangents=dots)
    for _ in range(2):
        assert_same(fwd(X, tangents=dots), plain)
        with autocast():
            assert_same(fwd(X, tangents=dots), narrow)
        with autocast(torch.float16):
            assert fwd(X, tangents=dots)[0].dtype == torch.float16


def test_an_autocast_inside_the_model():
    model, inside, dots = twins(Inside)
    y, y_dot = fwdcompile.transform(inside)(X, tangents=dots)
    assert_same([y], [inside(X)])
    plain, plain_dot = fwdcompile.transform(model)(X, tangents=dots)
    torch.testing.assert_close((y, y_dot), (plain, plain_dot), rtol=0.05, atol=0.05)
    assert not torch.equal(y_dot, plain_dot)


def test_a_program_casts_no_more_than_it_says(tmp_path: Path):
    model, _, dots = twins()
    fwd = fwdcompile.transform(model)
    plain = fwd(X, tangents=dots)
    fwd.save(tmp_path / "program.py")
    with autocast():
        assert_same(fwdcompile.load(tmp_path / "program.py", model)(X, tangents=dots), plain)


def test_second_derivatives():
    model, by_hand, _ = twins()
    tangents = {"x": torch.ones_like(X)}
    with autocast():
        (y, y_dot), (_, y_ddot) = fwdcompile.transform(fwdcompile.transform(model))(
            X, tangents=tangents
        )
    expected = fwdcompile.transform(fwdcompile.transform(by_hand))(X, tangents=tangents)
    assert_same([y, y_dot, y_ddot], [*expected[0], expected[1][1]])


def test_a_decoder_keeps_the_dtypes_of_torch():
    model, tokens = Decoder(), torch.arange(12).view(2, 6) % 11
    dots = directions(dict(model.named_parameters()))
    plain = fwdcompile.transform(model)(tokens, tokens, tangents=dots)
    with autocast():
        loss, loss_dot = fwdcompile.transform(model)(tokens, tokens, tangents=dots)
        assert_same([loss], [model(tokens, tokens)])
    torch.testing.assert_close((loss, loss_dot), plain, rtol=0.02, atol=0.02)
    assert not torch.equal(loss_dot, plain[1])


STEPS: list[tuple[Any, dict[str, Any]]] = [
    (FGD, {"directions": Normal()}),
    (FGD, {"directions": Rademacher(rank_one=True), "samples": 2}),
    (FGD, {"directions": Rademacher(), "store_directions": False}),
    (DistributedFGD, {"directions": Rademacher()}),
    (ForwardGradient, {}),
    (ForwardGradient, {"perturb": "activations"}),
]


COMPILED = [
    pytest.param(*step, True, marks=[pytest.mark.compiled, *([pytest.mark.slow] if i % 2 else [])])
    for i, step in enumerate(STEPS)
]


@pytest.mark.parametrize(
    ("made", "settings", "compile"), [*((*step, False) for step in STEPS), *COMPILED]
)
def test_steps_are_those_of_a_model_that_casts_by_hand(
    made: Any, settings: dict[str, Any], compile: bool
):
    model, by_hand, _ = twins()
    if made is not ForwardGradient:
        settings = settings | {"lr": 0.1}
    mine, theirs = (made(m, loss_of, compile=compile, **settings) for m in (model, by_hand))
    for _ in range(2):
        with autocast():
            found = step_of(mine)
        assert_same([found], [step_of(theirs)])
    assert_same(model.parameters(), by_hand.parameters())
    if made is ForwardGradient:
        assert_same((p.grad for p in model.parameters()), (p.grad for p in by_hand.parameters()))


def test_layers_are_found_behind_their_casts():
    model, _, _ = twins()
    gradient = ForwardGradient(model, loss_of, perturb="activations", compile=False)
    with autocast():
        gradient(X, Y)
    assert "fc1_weight_grad: f32[8, 6]" in gradient.code
    assert "fc1_weight_dot" not in gradient.code


def test_a_step_outside_is_as_if_there_had_been_none_inside():
    model, _, _ = twins()
    twin = copy.deepcopy(model)
    fgd, plain = (FGD(m, loss_of, lr=0.1, compile=False) for m in (model, twin))
    with autocast():
        ForwardGradient(model, loss_of, compile=False)(X, Y)
        fgd.calibrate(X, Y)
    assert_same([fgd.step(X, Y)], [plain.step(X, Y)])
    assert_same(model.parameters(), twin.parameters())


def step_of(trainer: Any) -> Tensor:
    return trainer(X, Y) if isinstance(trainer, ForwardGradient) else trainer.step(X, Y)


def test_what_is_cast_where():
    assert casts() == ()
    with autocast(torch.float16):
        assert casts() == (("cpu", torch.float16),)
        with without_casts():
            assert casts() == ()
        assert casts() == (("cpu", torch.float16),)


RNN = nn.RNN(4, 3).requires_grad_(False)
COMPOSED = {
    "einsum": lambda h, w: torch.einsum("bi,oi->bo", h, w),
    "einsum, then float": lambda h, w: torch.einsum("bi,oi->bo", h, w).float(),
    "tensordot": lambda h, w: torch.tensordot(h, w, dims=([1], [1])),
    "inner": torch.inner,
    "multi_dot": lambda h, w: torch.linalg.multi_dot([h, w.mT, w]),
    "bilinear": lambda h, w: F.bilinear(h, h, w[None]),
    "same padding": lambda h, w: F.conv1d(h[None], w[:, :, None], padding="same"),
    "cov": lambda h, w: torch.cov(h @ w.mT),
    "rnn": lambda h, w: RNN((h + w)[None])[0],
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_ops_cast_what_they_are_made_of(name: str) -> None:
    op = COMPOSED[name]
    h, w = torch.randn(2, 4, 4)

    def function(h: Tensor, w: Tensor) -> Tensor:
        return op(h, w)

    def inside(h: Tensor, w: Tensor) -> Tensor:
        with autocast():
            return op(h, w)

    expected = inside(h, w)
    _, exact = fwdcompile.transform(function)(h, w, tangents={"h": h})
    with autocast():
        around = fwdcompile.transform(function)(h, w, tangents={"h": h})
    for y, y_dot in (fwdcompile.transform(inside)(h, w, tangents={"h": h}), around):
        assert_same([y], [expected])
        torch.testing.assert_close(y_dot.float(), exact, rtol=0.1, atol=0.1)
