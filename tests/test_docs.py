"""The documents show what the code does: their programs and numbers are checked, not trusted."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention
import beyond_torch
import capture
import distributed
import jacobians
import laplacian
import pytest
import reference_page
import scaling
import torch
import without_torch
import zoo
from coverage_page import page
from oracle import REVIEWED

import fwdcompile
from fwdcompile.distributed import DistributedFGD

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import activity
import paper

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_shows_the_program_its_example_prints(tmp_path: Path) -> None:
    example, program, *_ = blocks("README.md")
    script = tmp_path / "demo" / "net.py"
    script.parent.mkdir()
    script.write_text(example)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], check=True, capture_output=True, text=True
    ).stdout
    assert program in out


def test_readme_replays_the_history_that_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("README.md") if "DistributedFGD" in block]
    writes, replays = block.replace("lr=2e-4", "lr=2e-4, compile=False").split("fgd.replay")
    x, target, loss_fn = torch.randn(4, 3), torch.randn(4, 2), torch.nn.functional.mse_loss
    model = torch.nn.Linear(3, 2)
    names = {"x": x, "target": target, "loss_fn": loss_fn, "rank": 0, "size": 1}
    twin = copy.deepcopy(model)
    exec(writes, names | {"model": model})
    fgd = DistributedFGD(twin, loss_fn, lr=2e-4, compile=False)
    exec(f"fgd.replay{replays}", {"fgd": fgd})
    torch.testing.assert_close(twin.weight, model.weight, rtol=0, atol=0)
    assert fgd.iteration == 1


def test_readme_table_is_the_first_of_the_results_file() -> None:
    table, *_ = (ROOT / "docs/results/step-cpu.md").read_text().split("\n\n")
    assert table.startswith("| ms a step") and "| mlp |" in table and "fgd normal" in table
    assert f"\n\n{table}\n\n" in (ROOT / "README.md").read_text()


def test_walkthrough_shows_the_golden_program() -> None:
    golden = (ROOT / "tests/golden/tanh.py").read_text()
    body, table = blocks("docs/walkthrough.md")[-2:]
    assert body.strip() in golden
    assert table.strip() in golden


def test_the_page_for_those_who_know_torch_func() -> None:
    solver, biharmonic = blocks("docs/from_torch_func.md")
    y, times = torch.rand(3), torch.linspace(0, 1, 20)
    names = {"torch": torch, "fwdcompile": fwdcompile, "y": y, "times": times}
    names |= {"y_dot": y.cos(), "times_dot": times.cos()}
    exec(solver, names)

    def unrolled(y: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        for t in times:
            y = y + 0.01 * torch.sin(y) * t
        return y

    expected = torch.func.jvp(unrolled, (y, times), (y.cos(), times.cos()))
    torch.testing.assert_close((names["last"], names["last_dot"]), expected)
    torch.testing.assert_close(names["path_dot"][-1], expected[1])  # type: ignore[index]
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    names |= {"net": net.double(), "x": torch.rand(4, 2, dtype=torch.float64)}
    exec(biharmonic, names)

    def trace(f: Any) -> Any:
        return lambda x: torch.func.hessian(f)(x).trace()

    for x, u in zip(names["x"], names["u_biharmonic"], strict=True):  # type: ignore[call-overload]
        laplace = trace(lambda x: net(x).squeeze())
        torch.testing.assert_close(u.squeeze(), trace(laplace)(x))


def test_rules_page_quotes_rows_of_the_table() -> None:
    table = "".join(path.read_text() for path in (ROOT / "rules").glob("*.py"))
    *rows, _own, _function, _test = blocks("docs/rules.md")
    assert len(rows) == 7
    for row in rows:
        assert _dense(row).removesuffix(")") in _dense(table), row


def test_rules_page_gives_a_custom_op_its_row() -> None:
    names: dict[str, Any] = {}
    exec(blocks("docs/rules.md")[-3], names)
    _, expected = torch.func.jvp(
        lambda x: x * torch.sigmoid(1.5 * x), (names["x"],), (names["x_dot"],)
    )
    torch.testing.assert_close(names["y_dot"], expected)
    del fwdcompile.rule.table[torch.ops.mine.swish.default]


def test_rules_page_keeps_the_derivative_of_a_function() -> None:
    x, x_dot = torch.linspace(-2, 2, 9), torch.randn(9)
    names = {"torch": torch, "fwdcompile": fwdcompile, "x": x, "x_dot": x_dot}
    exec(blocks("docs/rules.md")[-2], names)
    torch.testing.assert_close(names["y_dot"], x_dot * (x.abs() < 1))


class Wave(torch.nn.Module):
    """w sin(x) cos(y) exp(t)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> Any:
        return self.w * x.sin() * t.exp() * (1.0 if y is None else y.cos())


@pytest.mark.compiled
def test_derivatives_page_trains_on_a_laplacian() -> None:
    class Plane(Wave):
        def forward(self, x: torch.Tensor, y: torch.Tensor, t: torch.Tensor) -> Any:
            return super().forward(x, t, y)

    model, (x, y, t) = Plane(), torch.rand(3, 5)
    names = {"torch": torch, "fwdcompile": fwdcompile, "model": model, "x": x, "y": y, "t": t}
    exec(blocks("docs/derivatives.md")[0], names)
    u = model(x, y, t)
    torch.testing.assert_close(names["u_xx_yy"], -2 * u)
    torch.testing.assert_close(model.w.grad, 2 * (9 * u * u).mean() / model.w)


def test_derivatives_page_differentiates_a_model_that_does() -> None:
    net, (x, v, wanted) = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()),
        torch.randn(3, 5, 3),
    )
    hessian = torch.func.hessian(lambda x: net(x).sum())(x)
    force = -torch.func.grad(lambda x: net(x).sum())(x)
    names = {"torch": torch, "fwdcompile": fwdcompile, "net": net, "x": x, "v": v, "wanted": wanted}
    exec(blocks("docs/derivatives.md")[1].replace("lr=1e-3", "lr=1e-3, compile=False"), names)
    torch.testing.assert_close(names["hessian"], hessian)
    torch.testing.assert_close(names["forces_dot"], -torch.einsum("iajb,jb->ia", hessian, v))
    torch.testing.assert_close(names["loss"], (force - wanted).square().mean())


def test_derivatives_page_takes_batches_of_directions() -> None:
    x, v = torch.randn(2, 5, 8, dtype=torch.float64)
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()).double()

    def model(x: torch.Tensor) -> torch.Tensor:
        return net(x)

    names = {"torch": torch, "fwdcompile": fwdcompile, "model": model, "x": x, "v": v}
    exec(blocks("docs/derivatives.md")[2].replace("eye(8)", "eye(8).double()"), names)
    y, y_dot = net(x), names["y_dot"]
    slope = (1 - y * y) * net[0].weight.T[:, None]
    torch.testing.assert_close(y_dot, slope)
    torch.testing.assert_close(names["slopes"], slope)
    torch.testing.assert_close(names["along_v"][0], (slope * v.T[:, :, None]).sum(0))
    torch.testing.assert_close(names["y_ddot"], (-2 * y * slope * net[0].weight.T[:, None]).sum(0))
    torch.testing.assert_close(names["jacobian"].sum(2).movedim(-1, 0), slope)


def test_derivatives_page_trains_without_a_backward_pass() -> None:
    net, (x, t) = Wave(), torch.rand(2, 5)
    names = {"torch": torch, "nn": torch.nn, "fwdcompile": fwdcompile, "net": net, "x": x, "t": t}
    before = net(x, t).detach()
    exec(blocks("docs/derivatives.md")[3].replace("lr=1e-3", "lr=1e-3, compile=False"), names)
    torch.testing.assert_close(names["loss"], (1.1 * before).square().mean())
    assert net.w < 2


@pytest.mark.skipif(not REVIEWED, reason="the page has the ops of torch 2.13")
def test_coverage_page_has_the_rows_of_the_table() -> None:
    def ends(page: str) -> list[str]:
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| aten.")]
        return [" ".join((row[0], row[1], row[-2].split(":")[0])) for row in rows]

    assert ends((ROOT / "docs/coverage.md").read_text()) == ends(page()), "run `make coverage`"


def test_the_reference_has_what_users_call() -> None:
    assert (ROOT / "docs/reference.md").read_text() == reference_page.page(), "run `make reference`"


@pytest.mark.parametrize(
    ("module", "results", "document"),
    [
        (beyond_torch, "beyond-torch.json", "docs/beyond_torch.md"),
        (zoo, "zoo-cpu.json", "docs/models.md"),
        (capture, "capture-cpu.json", "docs/results/capture-cpu.md"),
        (attention, "attention-cpu.json", "docs/results/attention-cpu.md"),
        (laplacian, "laplacian-cpu.json", "docs/results/laplacian-cpu.md"),
        (jacobians, "jacobians-cpu.json", "docs/results/jacobians-cpu.md"),
        (distributed, "distributed-cpu.json", "docs/results/distributed-cpu.md"),
        (scaling, "scaling.json", "docs/results/scaling.md"),
        (without_torch, "without-torch-cpu.json", "docs/results/without-torch-cpu.md"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_pages_are_written_from_their_results(module: Any, results: str, document: str) -> None:
    result = json.loads((ROOT / "docs/results" / results).read_text())
    assert module.page(result) == (ROOT / document).read_text()


@pytest.mark.parametrize(
    ("results", "page"),
    [
        ("paper.md", lambda path: paper.page(path.parent)),
        ("activity-mnist.md", lambda path: activity.page(path.with_suffix(".jsonl"))),
        ("activity-synthetic-grey.md", lambda path: activity.page(path.with_suffix(".jsonl"))),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tables_of_experiments_follow_from_their_lines(results: str, page: Any) -> None:
    path = ROOT / "docs/results/paper" / results
    assert page(path) == path.read_text()


@pytest.mark.parametrize("results", ["paper.md", "activity-mnist.md"])
def test_readme_has_the_tables_of_the_papers_experiments(results: str) -> None:
    parts = (ROOT / "docs/results/paper" / results).read_text().split("\n\n")
    rows = next(part for part in parts if part.startswith("|")).split("\n")
    table = "\n".join(row for row in rows if "-tuned" not in row)
    assert f"\n\n{table}\n\n" in (ROOT / "README.md").read_text()


def test_readme_has_the_bytes_that_were_measured() -> None:
    result = json.loads((ROOT / "docs/results/distributed-cpu.json").read_text())
    (entry,) = [e for e in result["entries"] if (e["work"], e["workers"]) == ("mlp", 2)]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"each sends {entry['bytes']['fgd rank-one']:.0f} bytes a step" in text
    assert f"and {entry['bytes']['ddp']:,.0f} by DistributedDataParallel" in text


def test_readme_has_the_times_of_laplacians() -> None:
    field = json.loads((ROOT / "docs/results/laplacian-cpu.json").read_text())["works"]["3 inputs"]
    text = " ".join((ROOT / "README.md").read_text().split())

    def times(way: str) -> list[str]:
        return [
            f"{field[task][way]['ms']:.1f}" for task in laplacian.TASKS if "ms" in field[task][way]
        ]

    ours, twice = times("fwdcompile.laplacian"), times("autograd twice, eager")
    assert f"takes {ours[0]} ms, its training gradient {ours[1]}; " in text
    assert f"autograd twice takes {twice[0]} and {twice[1]}" in text
    (hessian,) = times("torch.func.hessian, compiled")
    assert f"`torch.func.hessian` compiled {hessian} and an error" in text
    jax = times("jax.hessian, jitted")
    assert f"JAX's Hessian jitted {jax[0]} and {jax[1]} (" in text


def test_readme_counts_the_models_that_are_right() -> None:
    headings = re.findall(r"(?m)^## .*: (\d+) of (\d+)$", (ROOT / "docs/models.md").read_text())
    right, all_of_them = (sum(map(int, counts)) for counts in zip(*headings, strict=True))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"has {right} of {all_of_them} models of torchvision" in text
    few = ["none", "one", *["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]]
    assert f"says why {few[all_of_them - right]} do not" in text


def test_readme_has_the_times_of_hessians_and_steps_and_their_memory() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    works = json.loads((ROOT / "docs/results/jacobians-cpu.json").read_text())["works"]
    methods = works["forces of 16 atoms, 48 to 48"]["methods"]
    names = ("fwdcompile.jacfwd, compiled", "torch.func.jacrev, compiled", "jax.jacfwd, jitted")
    ours, torchs, jaxs = (f"{methods[name]['ms']:.1f}" for name in names)
    assert f"of 16 atoms takes {ours} ms so, {torchs} by `torch.compile` over" in text
    assert f"`torch.func.jacrev`, and {jaxs} by JAX" in text
    works = json.loads((ROOT / "docs/results/step-cpu.json").read_text())["works"]
    papers = (works[name]["methods"] for name in ("logistic-regression", "mlp", "cnn"))
    ratios = [methods["fgd rank-one"]["ratio"] for methods in papers]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of compiled" in text
    works = json.loads((ROOT / "docs/results/memory-cpu.json").read_text())["works"]
    methods = works["mlp-depth-100, batch 1024"]["methods"]
    ours, autograds = (methods[name]["peak"] / 2**20 for name in ("fgd rank-one", "backprop"))
    assert f"takes {ours:.0f} MiB above parameters and data where" in text
    assert f"backpropagation takes {autograds:.0f} (" in text


def _dense(text: str) -> str:
    return re.sub(r"\s", "", text)
