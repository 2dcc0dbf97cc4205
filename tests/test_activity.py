"""Forward gradients by activity perturbation: unbiased, layer by layer, example by example."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from nets import Decoder
from torch import Tensor, nn
from torch.nn import functional as F

import fwdcompile
from fwdcompile.activity import ActivityForward
from fwdcompile.objective import Objective


def each(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out, target, reduction="none")


class Tied(nn.Module):
    """An embedding that is the weight of the last layer as well, and a scale of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        return (
            torch.tanh(self.embed(tokens) * self.scale)
            @ torch.eye(2).double()
            @ self.embed.weight.T
        )


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Composed(nn.Module):
    """A layer takes the weight of another for its data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3, bias=False), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) @ self.outer(self.inner.weight)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3, bias=False))


def rectified() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Hardtanh(0, 0.5), nn.Linear(3, 2))


def images() -> nn.Module:
    convolution = nn.Conv2d(1, 2, 2, stride=2, padding=1)
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(8, 2))


def batch(model: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = model().double()
    x = {
        images: torch.randn(2, 1, 3, 3),
        mlp: torch.randn(2, 3),
        rectified: torch.randn(2, 3),
        Shared: torch.randn(2, 2),
        Composed: torch.randn(2, 2),
    }
    inputs = x[model].double() if model in x else torch.tensor([1, 3])
    return net, inputs, torch.tensor([0, 1])


def signs(kinds: list[Any]) -> Any:
    """All directions of signs, the same for each example, as lists of tangents."""
    count = sum(x[0].numel() if per else x.numel() for x, per in kinds)
    for bits in product((-1.0, 1.0), repeat=count):
        numbers, tangents = iter(bits), []
        for x, per in kinds:
            shape = x.shape[1:] if per else x.shape
            one = torch.tensor([next(numbers) for _ in range(shape.numel())], dtype=x.dtype)
            tangents.append(one.view(shape).expand(x.shape))
        yield tangents


@pytest.mark.parametrize("samples", [None, (1, 1)])
@pytest.mark.parametrize("loss", [each, F.cross_entropy])
@pytest.mark.parametrize("model", [mlp, rectified, Shared])
def test_the_mean_over_all_directions_is_the_gradient(
    model: Callable[[], nn.Module], loss: Callable[..., Tensor], samples: tuple[int, ...] | None
) -> None:
    net, x, y = batch(model)
    objective = Objective(net, loss)
    lowered = ActivityForward(objective, samples=samples).lower(
        x, y, directions=sum(samples or [1])
    )
    program, state = (
        lowered.program,
        dict(net.named_parameters()) | {"input": x, "x": x, "target": y},
    )
    plain = [state[s.name].detach() for s in program.inputs if s.kind != "tangent"]
    kinds = [
        (n.meta["val"], loss is each) for n, s in program.placeholders() if s.kind == "tangent"
    ]
    tangents = [slot for slot in program.inputs if slot.kind == "tangent"]
    assert all(slot.name.endswith(".output") for slot in tangents)
    assert [slot.direction for slot in tangents] == ([0, 1] if samples else [0, 0])
    runs = [lowered.function(*plain, *dots) for dots in signs(kinds)]
    F.cross_entropy(net(x), y).backward()
    found = {s.name for s in program.outputs if s.kind == "gradient"}
    assert found == {name for name, _ in net.named_parameters()}
    for i, slot in enumerate(program.outputs):
        if slot.kind == "gradient":
            mean = torch.stack([run[i] for run in runs]).mean(0)
            torch.testing.assert_close(mean, state[slot.name].grad)


@pytest.mark.parametrize("model", [mlp, images, Tied, Shared, Composed])
def test_forward_gradients_come_near_the_gradient(model: Callable[[], nn.Module]) -> None:
    net, x, y = batch(model)
    grad = fwdcompile.ForwardGradient(
        net,
        each,
        samples=64,
        perturb="activations",
        compile=False,
        directions=fwdcompile.Rademacher(),
    )
    for _ in range(100):
        loss = grad(x, y)
    found = [p.grad / 100 for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    expected = F.cross_entropy(net(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    mine = torch.cat([x.flatten() for x in found])
    true = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert (mine - true).norm() < 0.15 * true.norm()


def test_a_unit_that_is_off_has_no_noise() -> None:
    net, x, y = batch(rectified)
    net[0].weight.data *= 0.1
    net[0].bias.data.copy_(torch.tensor([0.25, -100, 0.25]))
    fwdcompile.ForwardGradient(net, each, perturb="activations", compile=False)(x, y)
    assert not net[0].weight.grad[1].any() and not net[0].bias.grad[1].any()
    assert net[0].weight.grad[0].any()


def test_a_parameter_of_no_layer_keeps_a_direction_of_its_own() -> None:
    net, x, y = batch(Tied)
    program = ActivityForward(Objective(net, each)).lower(x, y).program
    tangents = [slot.name for slot in program.inputs if slot.kind == "tangent"]
    # the table is read by an embedding and transposed: no layer owns it
    assert sorted(tangents) == ["embed.weight", "scale"]
    assert not [slot for slot in program.outputs if slot.kind == "gradient"]


def test_a_weight_that_is_data_elsewhere_belongs_to_no_layer() -> None:
    net, x, y = batch(Composed)
    program = ActivityForward(Objective(net, each)).lower(x, y).program
    assert "inner.weight" in [slot.name for slot in program.inputs if slot.kind == "tangent"]
    found = [slot.name for slot in program.outputs if slot.kind == "gradient"]
    assert sorted(found) == ["outer.bias", "outer.weight"]


def test_rank_one_directions_stay_with_the_weights() -> None:
    net, x, y = batch(Tied)
    directions = fwdcompile.Rademacher(rank_one=True)
    fwdcompile.ForwardGradient(
        net, each, directions=directions, perturb="activations", compile=False
    )(x, y)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in net.parameters())
    program = ActivityForward(Objective(net, each)).lower(x, y, rank_one=True).program
    factors = {slot.name for slot in program.inputs if slot.kind == "tangent" and slot.factor}
    assert factors == {"embed.weight"}


def test_losses_that_depend_on_other_examples_are_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    grad = fwdcompile.ForwardGradient(net, each, perturb="activations", compile=False)
    with pytest.raises(fwdcompile.LossError, match="batch norm in training"):
        grad(x, y)
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    grad = fwdcompile.ForwardGradient(net, F.cross_entropy, perturb="activations", compile=False)
    grad(x, y)
    assert all(p.grad is not None for p in net.parameters())
    net.zero_grad()
    net.eval()
    fwdcompile.ForwardGradient(net, each, perturb="activations", compile=False)(x, y)


def test_the_check_draws_no_random_number_of_the_models() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    torch.manual_seed(3)
    expected = each(net(x), y).mean()
    torch.manual_seed(3)
    loss = fwdcompile.ForwardGradient(net, each, perturb="activations", compile=False)(x, y)
    torch.testing.assert_close(loss, expected.detach())


def test_noise_is_less_than_by_weights() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    x, y = torch.randn(16, 30).double(), torch.randint(5, (16,))
    errors = {}
    F.cross_entropy(net(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in net.parameters()])
    for perturb, loss in (("weights", F.cross_entropy), ("activations", each)):
        grad = fwdcompile.ForwardGradient(net, loss, perturb=perturb, compile=False)
        total = 0.0
        for _ in range(50):
            net.zero_grad()
            grad(x, y)
            mine = torch.cat([p.grad.flatten() for p in net.parameters()])
            total += float((mine - true).square().sum())
        errors[perturb] = total
    assert errors["activations"] < 0.2 * errors["weights"]


def test_a_transformer_compiled() -> None:
    torch.manual_seed(0)
    net = Decoder()
    tokens = torch.randint(11, (3, 6))
    eager, compiled = (
        fwdcompile.ForwardGradient(net, perturb="activations", compile=c) for c in (False, True)
    )
    gradients = []
    for grad in (eager, compiled):
        net.zero_grad()
        grad(tokens, tokens)
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturb": "inputs"},
        {"perturb": "activations", "dynamic": True},
        {"perturb": "activations", "directions": fwdcompile.Sphere()},
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="perturb|activity"):
        fwdcompile.ForwardGradient(mlp(), each, compile=False, **settings)


class Blocks(nn.Module):
    """A gradient is stopped between the blocks; each has an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        return h, self.second(h.detach())


def test_of_several_losses_a_layer_learns_from_its_own() -> None:
    torch.manual_seed(0)
    net, x, y = Blocks().double(), torch.randn(2, 3).double(), torch.tensor([0, 1])

    def local(outs: tuple[Tensor, Tensor], target: Tensor) -> list[Tensor]:
        return [each(out, target) for out in outs]

    grad = fwdcompile.ForwardGradient(net, local, perturb="activations", samples=256, compile=False,
                                      directions=fwdcompile.Rademacher())  # fmt: skip
    for _ in range(40):
        loss = grad(x, y)
    found = [p.grad / 40 for p in net.parameters()]
    net.zero_grad()
    expected = sum(each(out, y).mean() for out in net(x))
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    # two outputs of signs: four directions, so that the noise is small if no other block adds any
    for mine, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=0.05, atol=0.02)


def test_losses_of_examples_have_one_length() -> None:
    net, x, y = Blocks(), torch.randn(2, 3), torch.tensor([0, 1])

    def uneven(outs: tuple[Tensor, Tensor], target: Tensor) -> list[Tensor]:
        return [each(outs[0], target), each(outs[1], target)[:1]]

    with pytest.raises(fwdcompile.LossError, match="one length"):
        fwdcompile.ForwardGradient(net, uneven, perturb="activations", compile=False)(x, y)


def test_clip_bounds_the_slope_of_each_example() -> None:
    net, x, y = batch(mlp)
    wide, tight = (
        fwdcompile.ForwardGradient(net, each, perturb="activations", clip=clip, compile=False)
        for clip in (1e9, 1e-3)
    )
    sizes = []
    for grad in (wide, tight):
        net.zero_grad()
        grad(x, y)
        sizes.append(float(net[2].weight.grad.abs().max()))
    assert 0 < sizes[1] < 0.02 * sizes[0]


def test_layer_by_layer_there_is_no_noise_of_other_layers() -> None:
    net, x, y = batch(mlp)
    errors = {}
    F.cross_entropy(net(x), y).backward()
    true = torch.cat([p.grad.flatten() for p in net.parameters()])
    for samples in (1, (1, 1), (1, 8)):
        grad = fwdcompile.ForwardGradient(
            net, each, perturb="activations", samples=samples, compile=False,
            directions=fwdcompile.Rademacher(),
        )  # fmt: skip
        assert grad.samples == (samples if isinstance(samples, int) else sum(samples))
        found = []
        for _ in range(200):
            net.zero_grad()
            grad(x, y)
            found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        errors[samples] = (torch.stack(found) - true).square().mean(0)
        error = (torch.stack(found).mean(0) - true).abs()
        assert (error < 5 * (errors[samples] / 200).sqrt() + 1e-9).all()
    assert errors[1, 1].sum() < 0.7 * errors[1].sum()
    last = slice(-net[2].weight.numel(), None)
    assert errors[1, 8][last].sum() < 0.3 * errors[1, 1][last].sum()


def test_layers_and_all_other_parameters_have_numbers_of_their_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    settings: dict[str, Any] = {"perturb": "activations", "compile": False}
    with pytest.raises(ValueError, match=r"2 numbers for 3: .* layers linear, linear_1, and one"):
        fwdcompile.ForwardGradient(net, each, samples=(1, 1), **settings)(x, y)
    grad = fwdcompile.ForwardGradient(net, each, samples=(1, 2, 400), **settings)
    grad(x, y)
    found = [p.grad for p in net[1].parameters()]
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    # 400 directions of 8 numbers
    for mine, p in zip(found, net[1].parameters(), strict=True):
        assert (mine - p.grad).norm() < 0.6 * torch.cat([found[0], found[1]]).norm()
    with pytest.raises(ValueError, match="several numbers"):
        fwdcompile.ForwardGradient(net, F.cross_entropy, samples=(1, 2), compile=False)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        fwdcompile.ForwardGradient(net, each, samples=(1, 0, 1), **settings)


def test_layer_by_layer_compiled() -> None:
    net, x, y = batch(images)
    gradients = []
    for compile in (False, True):
        grad = fwdcompile.ForwardGradient(
            net, each, perturb="activations", samples=(1, 3), compile=compile
        )
        net.zero_grad()
        grad(x, y)
        gradients.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*gradients)


class Hidden(nn.Module):
    """Mixes examples ahead of a head of zeros, behind which nothing follows at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head((h - h.mean(0)).tanh())


class ToGo(nn.Module):
    """Sums over what comes: that of no other example follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flip(0).cumsum(0).flip(0)


class Reordered(nn.Module):
    """Runs examples in another order, in which the first is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("order", torch.tensor([0, 2, 1, 4, 5, 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[self.order])[self.order.argsort()]


@pytest.mark.parametrize("kind", [Hidden, ToGo, Reordered])
def test_examples_that_depend_on_each_other_are_found(kind: type[nn.Module]) -> None:
    def each(out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean(1)

    model = kind()
    grad = fwdcompile.ForwardGradient(model, each, perturb="activations", compile=False)
    with pytest.raises(fwdcompile.LossError, match="depends on the activations of another"):
        grad(torch.randn(6, 4), torch.randn(6, 2))
    assert all(p.grad is None for p in model.parameters())
