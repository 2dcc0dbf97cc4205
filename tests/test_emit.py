from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Decoder, Mlp, Pair, Tied, directions
from torch import Tensor, nn

import fwdcompile

RUN_WITHOUT_FWDCOMPILE = """
import sys, importlib.util, torch
sys.modules["fwdcompile"] = None
spec = importlib.util.spec_from_file_location("saved", sys.argv[1])
saved = importlib.util.module_from_spec(spec)
spec.loader.exec_module(saved)
torch.save(saved.forward(*torch.load(sys.argv[2])), sys.argv[3])
assert not any(name.startswith("fwdcompile.") for name in sys.modules)
"""


def test_saved_file_runs_with_torch_alone(tmp_path: Path) -> None:
    model, x = Mlp(), torch.randn(4, 6)
    fwd = fwdcompile.transform(model)
    dots = directions(dict(model.named_parameters()))
    y, y_dot = fwd(x, tangents=dots)
    fwd.save(tmp_path / "model_fwd.py")
    arguments = [*(p.detach() for p in model.parameters()), x, *dots.values()]
    torch.save(arguments, tmp_path / "arguments.pt")
    files = [str(tmp_path / name) for name in ("model_fwd.py", "arguments.pt", "results.pt")]
    subprocess.run([sys.executable, "-c", RUN_WITHOUT_FWDCOMPILE, *files], check=True)
    results = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(results[0], y.detach())
    torch.testing.assert_close(results[1], y_dot.detach())


def test_load_calls_like_the_transform(tmp_path: Path) -> None:
    model, tokens = Tied(), torch.tensor([0, 1, 3, 3])
    fwd = fwdcompile.transform(model)
    dots = {"embed.weight": torch.randn(5, 4)}
    expected = fwd(tokens, tangents=dots)
    fwd.save(tmp_path / "tied.py")
    loaded = fwdcompile.load(tmp_path / "tied.py", model)
    moved = int(model.norm.num_batches_tracked)
    torch.testing.assert_close(
        loaded(tokens, tangents={"head.weight": dots["embed.weight"]}), expected
    )
    assert int(model.norm.num_batches_tracked) == moved + 1
    with pytest.raises(fwdcompile.TangentError, match="takes tangents"):
        loaded(tokens, tangents={"norm.bias": torch.zeros(4)})
    with pytest.raises(fwdcompile.TangentError, match="load it with"):
        fwdcompile.load(tmp_path / "tied.py")
    with pytest.raises(fwdcompile.TangentError, match="takes 1 tensors"):
        loaded(tokens, tokens, tangents=dots)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(5, 3), 2.0), r"takes 'x' as f32\[4, 3\], not f32\[5, 3\]"),
        ((torch.ones(4, 3, dtype=torch.float64), 2.0), r"takes 'x' as f32\[4, 3\], not f64"),
        ((torch.ones(4, 3), 3.0), r"made for plain arguments scale=2.0, not \['3.0'\]"),
        ((torch.ones(4, 3),), "made for plain arguments scale=2.0"),
    ],
)
def test_a_loaded_program_takes_what_it_was_made_for(
    args: Any, message: str, tmp_path: Path
) -> None:
    def function(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x.var() * scale

    x = torch.randn(4, 3)
    fwd = fwdcompile.transform(function)
    expected = fwd(x, 2.0, tangents={"x": x})
    fwd.save(tmp_path / "scaled.py")
    loaded = fwdcompile.load(tmp_path / "scaled.py")
    torch.testing.assert_close(loaded(x, 2.0, tangents={"x": x}), expected)
    with pytest.raises(fwdcompile.TangentError, match=message):
        loaded(*args, tangents={"x": args[0]})


def test_a_loaded_program_has_open_sizes(tmp_path: Path) -> None:
    fwd = fwdcompile.transform(lambda x, y: (x * y).sum(0), dynamic=True)
    fwd(torch.ones(4, 3), torch.ones(4, 3), tangents={"x": torch.ones(4, 3)})
    fwd.save(tmp_path / "open.py")
    loaded = fwdcompile.load(tmp_path / "open.py")
    x, y = torch.randn(7, 3), torch.randn(7, 3)
    torch.testing.assert_close(loaded(x, y, tangents={"x": x})[0], (x * y).sum(0))
    with pytest.raises(fwdcompile.TangentError, match=r"takes 'y' as f32\[s\d+, 3\], not f32\[6"):
        loaded(x, y[:6], tangents={"x": x})


def test_a_loaded_program_refuses_a_write_to_shared_memory(tmp_path: Path) -> None:
    fwd = fwdcompile.transform(lambda x, y: x.mul_(2) + y)
    x = torch.ones(3)
    fwd(x, torch.ones(3), tangents={"x": x})
    fwd.save(tmp_path / "writes.py")
    with pytest.raises(fwdcompile.TangentError, match="shares memory"):
        fwdcompile.load(tmp_path / "writes.py")(x, x, tangents={"x": x})


def test_an_edited_program_runs_edited(tmp_path: Path) -> None:
    fwd = fwdcompile.transform(lambda x: {"y": x.sin(), "n": 2, "p": Pair(x, x)})
    x, v = torch.randn(3), torch.randn(3)
    fwd(x, tangents={"x": v})
    fwd.save(tmp_path / "sine.py")
    path = tmp_path / "sine.py"
    loaded = fwdcompile.load(path)
    y, y_dot = loaded(x, tangents={"x": v})
    assert y["n"] == 2
    assert y_dot["n"] is None
    torch.testing.assert_close(y["p"]["left"], x)
    path.write_text(fwd.code.replace("aten.sin(x)", "aten.sin(x) * 2"))
    edited, _ = fwdcompile.load(path)(x, tangents={"x": v})
    torch.testing.assert_close(edited["y"], 2 * y["y"])


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("x = 1\n")
    with pytest.raises(fwdcompile.FwdcompileError, match="no generated program"):
        fwdcompile.load(path)


def test_text_is_the_same_on_every_run() -> None:
    script = """
import sys; sys.path.insert(0, "tests")
import torch, fwdcompile
from nets import Decoder
fwd = fwdcompile.transform(Decoder())
fwd.lower(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64))
print(fwd.code, end="")
"""
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    fwd = fwdcompile.transform(Decoder())
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    fwd.lower(tokens, tokens)
    assert out.stdout == fwd.code


def test_every_line_fits_and_dead_values_are_deleted() -> None:
    fwd = fwdcompile.transform(Decoder())
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    fwd.lower(tokens, tokens)
    body = fwd.code.split("):\n", 1)[1].split("    return ")[0]
    made = {line.split(":")[0].strip() for line in body.splitlines() if ": f32" in line}
    deleted = {
        name
        for line in body.splitlines()
        if line.strip().startswith("del ")
        for name in line.strip().removeprefix("del ").split(", ")
    }
    returned = fwd.code.split("return (")[1].split(")")[0].split(", ")
    assert made <= deleted | set(returned)


SPECIAL: list[Any] = [
    lambda x: x.masked_fill(x > 0, float("inf")),
    lambda x: x * torch.tensor([1.0, float("nan"), 2.0]),
    lambda x: x[:, None] + torch.arange(40.0),
    lambda x: (2 - x) ** 2 / (x - (x + 1)) - -x,
    lambda x: torch.stack(x.unbind()).sort().values,
    lambda x: x.to(torch.complex64) * 2j,
    lambda x: torch.where(x > 0, torch.tensor(complex("-inf")), x.to(torch.complex64)),
    lambda x: x.to(torch.complex64) * complex("inf"),
    lambda x: tuple(torch.max(x.expand(2, 3), 1))[:1],
]


@pytest.mark.parametrize("function", SPECIAL)
def test_text_means_what_the_graph_means(function: Any, tmp_path: Path) -> None:
    x, v = torch.randn(3), torch.randn(3)
    fwd = fwdcompile.transform(function)
    y, y_dot = fwd(x, tangents={"x": v})
    torch.testing.assert_close(y, function(x), equal_nan=True)
    fwd.save(tmp_path / "program.py")
    again = fwdcompile.load(tmp_path / "program.py")(x, tangents={"x": v})
    torch.testing.assert_close(again, (y, y_dot), equal_nan=True)
    expected: tuple[Tensor, Tensor] = torch.func.jvp(function, (x,), (v,))
    torch.testing.assert_close(y_dot, expected[1], equal_nan=True)


def test_lines_are_at_most_a_hundred_wide() -> None:
    fwd = fwdcompile.transform(Decoder())
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    fwd.lower(tokens, tokens)
    fwdcompile.transform(fwd).lower(tokens, tokens)
    assert max(map(len, fwd.code.splitlines())) <= 100


def test_results_of_torch_itself_keep_their_type() -> None:
    x, v = torch.randn(2, 3), torch.ones(2, 3)
    y, y_dot = fwdcompile.jvp(lambda x: torch.max(x, 1), (x,), (v,))
    assert type(y) is type(torch.max(x, 1))
    torch.testing.assert_close(y_dot.values, torch.ones(2))
    assert y_dot.indices is None


def test_names_that_a_program_uses_itself() -> None:
    def product(aten: Tensor, torch: Tensor) -> Tensor:
        return (aten * torch).sin()

    x, y = torch.randn(2, 3, dtype=torch.float64)
    found = fwdcompile.transform(product)(x, y, tangents={"aten": x})
    torch.testing.assert_close(found, ((x * y).sin(), (x * y).cos() * x * y))


def test_a_keyword_for_a_name_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"in": nn.Linear(3, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers["in"](x)

    x = torch.ones(3)
    with pytest.raises(fwdcompile.CaptureError, match="has a keyword of Python for a name"):
        fwdcompile.transform(Net())(x, tangents={"x": x})
