from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from nets import Decoder, Flow, Lstm, Mlp, Pair, Tied, difference, directions, reverse_jvp
from torch import Tensor, nn

import fwdcompile

F64 = torch.float64


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


def test_parameters_and_inputs_have_tangents_by_name() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    dots = directions(dict(model.named_parameters()) | {"x": x})
    y, y_dot = fwdcompile.transform(model)(x, tangents=dots)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach() for p in model.parameters())
    tangents = (dots["x"], *(dots[name] for name, _ in model.named_parameters()))
    expected = torch.func.jvp(function, (x, *values), tangents)
    close(y, model(x))
    close(y_dot, expected[1])


def test_absent_tangents_cost_no_node() -> None:
    model, x = Mlp(), torch.randn(4, 6)
    fwd = fwdcompile.transform(model)

    def count(names: list[str]) -> int:
        stages = fwd.lower(x, tangents=names).stages
        ops = [
            sum(n.op == "call_function" for n in stages[s].nodes) for s in ("capture", "simplify")
        ]
        return ops[1] - ops[0]

    assert count(["fc2.bias"]) == 1  # one expand: the bias goes to every row
    assert count(["fc2.weight"]) == 1
    assert count(["fc2.weight", "fc2.bias"]) == 1
    assert count(["fc1.weight"]) == 5  # linear, three for the slope of tanh, linear
    assert count(["fc1.weight", "fc2.weight"]) == 7


def test_same_program_is_used_again() -> None:
    model, x = Mlp(), torch.randn(4, 6)
    fwd = fwdcompile.transform(model)
    first = fwd.lower(x)
    assert fwd.lower(torch.randn(4, 6)) is first
    assert fwd.lower(torch.randn(5, 6)) is not first
    model.eval()
    assert fwd.lower(x) is not first
    model.train()
    assert fwd.lower(x) is first


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def test_pytrees_keywords_and_fixed_values() -> None:
    def model(pair: Pair, *rest: Tensor, scale: float = 1.0, extra: dict[str, Tensor]) -> Any:
        out = pair.left * pair.right * scale
        return {"out": out, "pair": Pair(out + rest[0], rest[1]), "n": 3, "z": extra["a"].sin()}

    left, right, one, two, a = (torch.randn(3, dtype=F64) for _ in range(5))
    fwd = fwdcompile.transform(model)
    dots = {"pair.left": torch.ones(3, dtype=F64), "extra.a": torch.ones(3, dtype=F64)}
    y, y_dot = fwd(Pair(left, right), one, two, scale=2.0, extra={"a": a}, tangents=dots)
    close(y["out"], left * right * 2)
    assert isinstance(y["pair"], Pair)
    assert y["n"] == 3
    assert y_dot["n"] is None
    close(y_dot["out"], right * 2)
    close(y_dot["pair"].left, right * 2)
    close(y_dot["pair"].right, torch.zeros(3, dtype=F64))
    close(y_dot["z"], a.cos())


def test_named_tuple_and_integer_outputs() -> None:
    def model(p: Point) -> Any:
        return Point(p.x * p.y, p.x.argmax()), p.y

    x, y = torch.randn(3, dtype=F64), torch.randn(3, dtype=F64)
    (out, same), (out_dot, same_dot) = fwdcompile.transform(model)(
        Point(x, y), tangents={"p.x": torch.ones(3, dtype=F64)}
    )
    close(out_dot.x, y)
    assert out_dot.y is None
    close(same_dot, torch.zeros(3, dtype=F64))
    assert same is y or torch.equal(same, y)
    assert out.y == x.argmax()


def test_tied_parameters_are_one() -> None:
    model, tokens = Tied().double(), torch.tensor([0, 3, 3, 1])
    fwd = fwdcompile.transform(model)
    lowered = fwd.lower(tokens)
    names = [slot.name for slot in lowered.program.inputs if slot.kind == "tangent"]
    assert names.count("embed.weight") == 1
    assert "head.weight" not in names
    dots = directions({"embed.weight": model.embed.weight.detach()})
    before = {name: b.clone() for name, b in model.named_buffers()}
    _, y_dot = fwd(tokens, tangents={"head.weight": dots["embed.weight"]})
    after = {name: b.clone() for name, b in model.named_buffers()}
    for name, b in model.named_buffers():
        b.copy_(before[name])
    y = model(tokens)
    for name, b in model.named_buffers():
        close(b, after[name])
    u = torch.randn_like(y)
    close((u * y_dot).sum(), reverse_jvp(model, (u * y).sum(), dots))
    with pytest.raises(fwdcompile.TangentError, match="tied"):
        fwd(tokens, tangents=dict.fromkeys(("head.weight", "embed.weight"), dots["embed.weight"]))


def test_dropout_uses_the_primal_mask() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    x = torch.randn(200, dtype=F64)
    torch.manual_seed(3)
    y, y_dot = fwdcompile.transform(model)(x, tangents={"input": torch.ones_like(x)})
    torch.manual_seed(3)
    close(y, model(x))
    assert set(y_dot.tolist()) == {0.0, 2.0}
    assert torch.equal(y_dot == 0, y == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tangents_have_the_dtype_of_the_primal(dtype: torch.dtype) -> None:
    x = torch.randn(3, dtype=dtype)
    y, y_dot = fwdcompile.transform(nn.Softplus())(x, tangents={"input": torch.ones_like(x)})
    assert y_dot.dtype == y.dtype == dtype
    close(y_dot.float(), torch.sigmoid(x.float()), rtol=2e-2)


def test_strides_of_primal_and_tangent() -> None:
    model = nn.MaxPool2d(2)
    x = torch.randn(1, 2, 4, 4, dtype=F64)
    fwd = fwdcompile.transform(model)
    for primal in (x, x.mT, x.to(memory_format=torch.channels_last)):
        for v in (torch.randn_like(x), torch.randn_like(x).mT):
            expected = torch.func.jvp(model, (primal,), (v,))
            torch.testing.assert_close(fwd(primal, tangents={"input": v}), expected)


def test_casts_inside_the_model() -> None:
    x = torch.randn(3, dtype=F64)
    y, y_dot = fwdcompile.jvp(lambda z: z.float().exp().double(), (x,), (torch.ones_like(x),))
    close(y_dot, y)


def test_scalars_and_mixed_dtypes() -> None:
    def model(a: Tensor, b: Tensor) -> Tensor:
        return a * b + a

    a, b = torch.tensor(2.0), torch.randn(3, dtype=F64)
    y, y_dot = fwdcompile.transform(model)(a, b, tangents={"a": torch.tensor(1.0)})
    close(y_dot, b + 1)
    assert y_dot.dtype == y.dtype


def test_buffers_and_inputs_changed_in_place() -> None:
    def model(x: Tensor, memory: Tensor) -> Tensor:
        memory.add_(1)
        return x * memory

    x, memory = torch.randn(3), torch.zeros(3)
    _, y_dot = fwdcompile.transform(model)(x, memory, tangents={"x": torch.ones(3)})
    close(memory, torch.ones(3))
    close(y_dot, torch.ones(3))


def test_closed_over_modules_are_parameters() -> None:
    net = nn.Linear(3, 2).double()
    fwd = fwdcompile.transform(lambda x: net(x).sum())
    x = torch.randn(4, 3, dtype=F64)
    dots = directions({"net.weight": net.weight.detach()})
    _, y_dot = fwd(x, tangents=dots)
    close(y_dot, reverse_jvp(net, net(x).sum(), {"weight": dots["net.weight"]}))
    with torch.no_grad():
        net.weight.mul_(2)
    y, _ = fwd(x, tangents=dots)
    close(y, net(x).sum())


def test_a_closed_over_module_may_have_any_name() -> None:
    forward, attributes = nn.Linear(3, 2).double(), nn.Tanh()
    x, dot = torch.randn(3, dtype=F64), torch.randn(2, dtype=F64)
    fwd = fwdcompile.transform(lambda x: attributes(forward(x)))
    y, y_dot = fwd(x, tangents={"forward_.bias": dot})
    close(y_dot, (1 - y * y) * dot)


def test_several_directions_share_one_primal() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    fwd = fwdcompile.transform(model)
    dots = [directions({"x": x}, seed) for seed in range(3)]
    _, y_dots = fwd(x, tangents=dots)
    for one, y_dot in zip(dots, y_dots, strict=True):
        close(y_dot, fwd(x, tangents=one)[1])
    fwd(x, tangents=dots)
    assert fwd.code.count("aten.tanh(") == 1


def test_directions_may_move_different_names() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    fwd = fwdcompile.transform(model)
    ways = [{"fc1.weight": torch.randn(8, 6, dtype=F64)}, {"x": torch.randn_like(x)}]
    y, both = fwd(x, tangents=ways)
    close(y, model(x))
    assert fwd.code.count("fc1_weight_dot0:") == 1 and "fc1_weight_dot1" not in fwd.code
    for way, y_dot in zip(ways, both, strict=True):
        close(y_dot, fwd(x, tangents=way)[1])


def test_transform_of_transform_is_the_second_derivative() -> None:
    decoder = Flow().double()
    x, t = torch.randn(2, 3, 2, dtype=F64), torch.rand(2, 1, dtype=F64)
    v, u = directions({"x": x}, 1)["x"], directions({"x": x}, 2)["x"]
    first = fwdcompile.transform(decoder)
    second = fwdcompile.transform(first)
    (y, y_dot), (y_dot_again, y_ddot) = second(x, t, tangents={"x": v})
    close(y, decoder(x, t))
    close(y_dot, y_dot_again)
    slope = difference(lambda z: first(z, t, tangents={"x": v})[1], x, v)
    close(y_ddot, slope, rtol=1e-6)
    mixed = second(x, t, tangents={"x": u}, inner={"x": v})[1][1]
    close(mixed, difference(lambda z: first(z, t, tangents={"x": v})[1], x, u), rtol=1e-6)
    with pytest.raises(fwdcompile.TangentError, match="by name, not as a Tensor"):
        second(x, t, tangents={"x": u}, inner=v)
    third = fwdcompile.transform(second)(x, t, tangents={"x": v})[1][1][1]
    close(third, difference(lambda z: second(z, t, tangents={"x": v})[1][1], x, v), rtol=1e-5)


def test_reverse_over_forward() -> None:
    model, x = Mlp().double(), torch.randn(4, 6, dtype=F64)
    fwd = fwdcompile.transform(model)
    v = directions({"x": x})["x"]
    x.requires_grad_()
    _, y_dot = fwd(x, tangents={"x": v})
    (gradient,) = torch.autograd.grad(y_dot.sum(), x)
    jvp = torch.func.jvp(lambda z: torch.func.grad(lambda q: model(q).sum())(z), (x,), (v,))
    close(gradient, jvp[1])


def test_tracks_grad_false_keeps_autograd_out_of_the_tangent() -> None:
    model = Flow().double()
    x, t = torch.randn(2, 3, 2, dtype=F64), torch.rand(2, 1, dtype=F64)
    dots = directions({"x": x, "t": t})
    tracked = fwdcompile.transform(model)(x, t, tangents=dots)
    y, y_dot = fwdcompile.transform(model, tracks_grad=False)(x, t, tangents=dots)
    close(y_dot, tracked[1])
    assert tracked[1].requires_grad
    assert not y_dot.requires_grad
    gradients = torch.autograd.grad(y.sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(x, t).sum(), list(model.parameters()))
    for mine, theirs in zip(gradients, expected, strict=True):
        close(mine, theirs)


@pytest.mark.compiled
def test_meanflow_compiles() -> None:
    model = Flow()
    x, t = torch.randn(2, 3, 2), torch.rand(2, 1)
    dots = directions({"x": x, "t": t})
    fwd = fwdcompile.transform(model, tracks_grad=False, compile=True)
    y, y_dot = fwd(x, t, tangents=dots)
    plain = fwdcompile.transform(model)(x, t, tangents=dots)
    torch.testing.assert_close((y, y_dot), plain, rtol=1e-4, atol=1e-5)
    (y - (x + y_dot)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch._dynamo.utils.counters.clear()
    fwd(x + 1, t, tangents=dots)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("model", [Decoder().double()])
def test_decoder(model: nn.Module) -> None:
    tokens, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    dots = directions(dict(model.named_parameters()))
    loss, slope = fwdcompile.transform(model)(tokens, targets, tangents=dots)
    expected = model(tokens, targets)
    close(loss, expected)
    close(slope, reverse_jvp(model, expected, dots))


def test_lstm_loop() -> None:
    model, x = Lstm().double(), torch.randn(2, 3, 3, dtype=F64)
    dots = directions(dict(model.named_parameters()))
    y, y_dot = fwdcompile.transform(model)(x, tangents=dots)
    u = torch.randn_like(y)
    close((u * y_dot).sum(), reverse_jvp(model, (u * model(x)).sum(), dots))


def test_jvp_is_that_of_torch_func() -> None:
    x, y = torch.randn(3, dtype=F64), torch.randn(3, dtype=F64)

    def function(a: Tensor, b: dict[str, Tensor]) -> Any:
        return a * b["y"].sin(), [b["y"].exp()]

    primals, tangents = (x, {"y": y}), (y, {"y": x})
    mine = fwdcompile.jvp(function, primals, tangents)
    theirs = torch.func.jvp(function, primals, tangents)
    torch.testing.assert_close(mine, theirs)

    def with_aux(a: Tensor) -> Any:
        return a * a, a + 1

    mine, theirs = (f(with_aux, (x,), (y,), has_aux=True) for f in (fwdcompile.jvp, torch.func.jvp))
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(fwdcompile.TangentError, match="structure"):
        fwdcompile.jvp(function, primals, (y, y))
    with pytest.raises(fwdcompile.TangentError, match="does not depend"):
        fwdcompile.jvp(lambda a: torch.ones(2), (x,), (y,), strict=True)


BAD = [
    ({"fc1.wait": torch.zeros(8, 6)}, "fc1.weight"),
    ({"fc1.weight": torch.zeros(8, 5)}, r"shape \[8, 5\]"),
    ({"fc1.weight": torch.zeros(8, 6, dtype=F64)}, "dtype torch.float64"),
    ({"fc1.weight": torch.zeros(8, 6, device="meta")}, "device meta"),
    ({"fc1.weight": 1.0}, "not a tensor"),
    ({}, "no tangent"),
    (torch.zeros(2, 6), "by name, not as a Tensor"),
    (None, "by name, not as a NoneType"),
    ((None, {}), "by name, not as a NoneType"),
]


@pytest.mark.parametrize(("dots", "message"), BAD)
def test_wrong_tangents_are_refused(dots: Any, message: str) -> None:
    with pytest.raises(fwdcompile.TangentError, match=message):
        fwdcompile.transform(Mlp())(torch.zeros(2, 6), tangents=dots)


def test_integer_arguments_have_no_tangent() -> None:
    tokens = torch.tensor([1, 2])
    with pytest.raises(fwdcompile.TangentError, match="int64"):
        fwdcompile.transform(Tied())(tokens, tangents={"tokens": tokens})


def test_names_of_inner_tangents_are_no_names_of_the_model() -> None:
    x = torch.ones(2)
    fwd = fwdcompile.transform(fwdcompile.transform(lambda x, x_dot: x * x_dot))
    with pytest.raises(fwdcompile.TangentError, match=r"input 'x_dot' .* the tangent of 'x'"):
        fwd(x, x, tangents={"x": x})
    fwd = fwdcompile.transform(fwdcompile.transform(lambda x: {"u": x.sin(), "u_dot": x.exp()}))
    with pytest.raises(fwdcompile.TangentError, match=r"output 'out.u_dot' .* tangent of 'out.u'"):
        fwd(x, tangents={"x": x})


def test_a_mode_that_torch_compile_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="torch.compile must know the mode, and has none called"):
        fwdcompile.transform(Mlp(), mode="fast")


def test_nothing_to_show_before_the_first_call() -> None:
    with pytest.raises(fwdcompile.FwdcompileError, match="lower"):
        _ = fwdcompile.transform(Mlp()).code
