"""The benchmarks: what they time is a whole step of the same model, and they count as they say."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import distributed
import gpu
import memory
import pytest
import results
import scaling
import step
import torch
import without_torch
from plots import main as plot
from steps import LR, PEERS, STEPS, forward_ad_slope
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from works import DEPTHS, PAPER, VOCABULARY, WORKS, Problem, checkpointed

import fwdcompile
from fwdcompile.measure import bytes_written
from fwdcompile.objective import Objective

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
FGD = [name for name in STEPS if name.startswith("fgd ")]
EAGER = [*FGD, "backprop", "backprop-checkpointed", "torch-jvp", "forward-ad"]
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def tiny(dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    return Problem(model, torch.randn(8, 4, dtype=dtype), torch.randint(2, (8,)), ())


def copied(problem: Problem) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in problem.model.named_parameters()}


def slope(problem: Problem, dots: dict[str, Tensor]) -> Tensor:
    fwd = fwdcompile.transform(Objective(problem.model, cross_entropy))
    return fwd(problem.x, problem.y, tangents=dots)[1].detach()


def generated(problem: Problem) -> dict[str, Tensor]:
    """The directions of the first step of the eager peers."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.empty_like(p).normal_(generator=generator) for n, p in copied(problem).items()}


@pytest.mark.parametrize("method", EAGER)
def test_a_step_returns_the_loss_before_it_and_changes_every_parameter(method: str) -> None:
    problem = tiny()
    before, expected = copied(problem), cross_entropy(problem.model(problem.x), problem.y)
    loss = STEPS[method](problem, **({"compile": False} if method in FGD else {}))()
    torch.testing.assert_close(loss, expected.detach())
    after = list(problem.model.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before.values(), after, strict=True))


def test_a_batch_in_parts_is_the_step_of_the_whole() -> None:
    whole, parts = tiny(), tiny()
    STEPS["fgd rank-one"](whole, compile=False)()
    STEPS["fgd rank-one in 4 parts"](parts, compile=False)()
    torch.testing.assert_close(copied(parts), copied(whole), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["torch-jvp", "forward-ad"])
def test_peers_move_by_the_slope_that_fwdcompile_finds_along_their_direction(method: str) -> None:
    problem = tiny()
    before, dots = copied(problem), generated(problem)
    expected = slope(problem, dots)
    STEPS[method](problem)()
    for name, after in problem.model.named_parameters():
        moved = (after.detach() - before[name]) / -LR
        torch.testing.assert_close(moved, expected * dots[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("work", ["resnet18", "vit-block", "gpt2-block"])
@pytest.mark.parametrize("method", ["torch-jvp", "forward-ad"])
def test_peers_have_the_detours_that_torch_names(work: str, method: str) -> None:
    problem = WORKS[work].problem(2, CPU, torch.float32)
    expected = cross_entropy(problem.model(problem.x), problem.y).detach()
    torch.testing.assert_close(STEPS[method](problem)(), expected, rtol=1e-4, atol=1e-5)


def test_forward_ad_finds_the_slope_of_tied_weights() -> None:
    problem = WORKS["gpt2-block"].problem(1, CPU, torch.float64)
    problem.model.attention = nn.Identity()
    dots = generated(problem)
    found = forward_ad_slope(problem, copied(problem), dots)[1]
    torch.testing.assert_close(found, slope(problem, dots))


def small() -> Problem:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    return Problem(model, torch.randn(5, 1, 8, 8), torch.randint(2, (5,)), ())


@pytest.mark.parametrize("work", ["small", "resnet18", "vit-block", "gpt2-block"])
def test_jax_finds_the_loss_and_slope_of_the_same_weights(work: str) -> None:
    jax = pytest.importorskip("jax")
    import peers_jax

    problem = small() if work == "small" else WORKS[work].problem(2, CPU, torch.float32)
    dots = generated(problem)
    parameters, apply = peers_jax.translate(problem.model)
    x, y = peers_jax.inputs(problem.x), peers_jax.array(problem.y)
    pair = ({n: peers_jax.weight(p) for n, p in ps.items()} for ps in (parameters, dots))
    found = jax.jvp(lambda ps: peers_jax.cross_entropy(apply(ps, x), y), *zip(pair))
    expected = cross_entropy(problem.model(problem.x), problem.y).detach(), slope(problem, dots)
    torch.testing.assert_close(
        tuple(torch.tensor(float(f)) for f in found), expected, rtol=1e-4, atol=1e-5
    )


def test_jax_moves_the_weights_at_every_step() -> None:
    pytest.importorskip("jax")
    from peers_jax import jax_step

    problem = small()
    run = jax_step(problem, 0.1, 0.0)
    losses = [float(run()) for _ in range(3)]
    expected = cross_entropy(problem.model(problem.x), problem.y).detach()
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert len(set(losses)) == 3


def test_jax_refuses_modules_it_does_not_know() -> None:
    pytest.importorskip("jax")
    import peers_jax

    for model in (nn.Bilinear(2, 2, 2), nn.Sequential(nn.Tanh()), nn.Conv2d(2, 2, 1, groups=2)):
        with pytest.raises(NotImplementedError, match="the JAX peer"):
            peers_jax.translate(model)


@pytest.mark.parametrize("name", [n for n in WORKS if n not in ("mlp-depth-30", "mlp-depth-100")])
def test_a_work_gives_logits_for_its_classes(name: str) -> None:
    problem = WORKS[name].problem(2, CPU, torch.float32)
    logits = problem.model(problem.x)
    assert logits.shape == (len(problem.y), VOCABULARY if name == "gpt2-block" else 10)
    assert cross_entropy(logits, problem.y).isfinite()
    again = WORKS[name].problem(2, CPU, torch.float32)
    assert torch.equal(again.x, problem.x)
    pairs = zip(again.model.parameters(), problem.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_work_of_depth_d_has_d_layers_of_width_1024() -> None:
    for depth in DEPTHS[:3]:
        weights = list(WORKS[f"mlp-depth-{depth}"].build().parameters())
        shapes = [(1024, 784), *[(1024, 1024)] * (depth - 1), (10, 1024)]
        assert [tuple(w.shape) for w in weights] == shapes


@pytest.mark.parametrize("name", ["mlp-depth-10", "resnet18", "vit-block", "gpt2-block"])
def test_checkpointing_stores_less_and_changes_no_gradient(name: str) -> None:
    def gradients(model: nn.Module, problem: Problem) -> tuple[list[Tensor], int]:
        stored: set[int] = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (stored.add(x.untyped_storage().data_ptr()), x)[1], lambda x: x
        ):
            loss = cross_entropy(model(problem.x), problem.y)
            count = len(stored)
        return list(torch.autograd.grad(loss, list(model.parameters()))), count

    problem = WORKS[name].problem(2, CPU, torch.float32)
    expected, all_stored = gradients(problem.model, problem)
    found, few_stored = gradients(checkpointed(problem), problem)
    torch.testing.assert_close(found, expected)
    assert few_stored < 0.7 * all_stored


def cell(ms: float) -> dict[str, Any]:
    return {"ms": ms, "ratio": ms / 2, "first step, seconds": 1.0}


def entry(work: str, methods: dict[str, Any], batch: int = 64) -> dict[str, Any]:
    return results.header(work, batch, "float32", "cpu") | {"methods": methods}


def test_a_run_replaces_its_own_entry_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step-cpu.json"
    results.replace(path, "cnn", entry("cnn", {"base": cell(1)}))
    results.replace(path, "mlp", entry("mlp", {"base": cell(2)}))
    found = results.replace(path, "cnn", entry("cnn", {"base": cell(3)}))
    assert found == results.load(path) == json.loads(path.read_text())
    assert list(found["works"]) == ["mlp", "cnn"]
    assert [e["methods"]["base"]["ms"] for e in found["works"].values()] == [2, 3]
    environment = found["works"]["mlp"]["environment"]
    assert environment["torch"] == torch.__version__ and environment["device"]


def test_the_hardware_is_named_with_its_vectors() -> None:
    named = entry("mlp", {"base": cell(1)})
    assert results.hardware(named).endswith(f" with {torch.backends.cpu.get_cpu_capability()}")
    assert results.hardware(named | {"vectors": None}) == named["environment"]["device"]
    assert results.hardware(named) in results.conditions({"mlp": named})


def test_a_file_of_another_layout_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"models": {}}')
    assert results.load(tmp_path / "old.json") == {"works": {}}


def test_an_entry_is_named_by_what_is_not_the_default() -> None:
    assert results.entry_name("mlp", 64, "float32") == "mlp"
    assert results.entry_name("mlp", 8, "bfloat16") == "mlp, batch 8, bfloat16"
    assert results.entry_name("mlp", 64, "float32", "reduce-overhead") == "mlp, reduce-overhead"
    sizes = {"mlp": 64, "cnn": 64, "resnet18": 32, "mlp, batch 8": 8}
    works = {name: {"batch": size} for name, size in sizes.items()}
    assert results.batches(works) == ", batch 64 (resnet18 32)"
    assert results.batches({"mlp, batch 8": {"batch": 8}}) == ""


def test_each_batch_and_dtype_has_a_table_of_its_own() -> None:
    names = ("mlp", "mlp, batch 8, tf32", "resnet18, batch 8, tf32", "cnn, batch 8, tf32")
    works = {name: entry(name.split(",")[0], {"base": cell(1)}) for name in names}
    heads = [text.splitlines()[0] for text in results.tables("ms", works, lambda c: "1")]
    assert heads == [
        "| ms | mlp |",
        "| ms, batch 8, tf32 | mlp | cnn |",
        "| ms, batch 8, tf32 | resnet18 |",
    ]


def test_the_page_begins_with_the_papers_works_and_names_who_refused() -> None:
    refused = results.refusal(ValueError("\nno rule\nmore"))
    works = {name: entry(name, {"base": cell(1), "backprop": cell(2)}) for name in PAPER}
    works["resnet18"] = entry("resnet18", {"base": cell(3), "forward-ad": refused})
    first, second, *_ = step.page({"works": works}).split("\n\n")
    assert first.splitlines() == [
        "| ms a step (ratio to compiled backprop) | logistic-regression | mlp | cnn |",
        "|---|---|---|---|",
        "| base | 1.00 (0.50) | 1.00 (0.50) | 1.00 (0.50) |",
        "| backprop | 2.00 (1.00) | 2.00 (1.00) | 2.00 (1.00) |",
    ]
    assert second.splitlines()[2:] == ["| base | 3.00 (1.50) |", "| forward-ad | refused |"]
    assert "- resnet18, forward-ad: `ValueError: no rule`" in step.page({"works": works})


def test_a_summary_has_medians_of_times_and_paired_ratios() -> None:
    turns = {"backprop-compiled": [1.0, 2.0, 4.0], "base": [2.0, 2.0, 2.0]}
    found = step.summary(turns, "base", 5.0)
    assert found == {"ms": 2000.0, "first step, seconds": 5.0, "ratio": 1.0}


def test_only_peers_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem: Problem) -> Any:
        raise RuntimeError("cannot")

    for method in ("backprop", "forward-ad"):
        monkeypatch.setitem(STEPS, method, broken)
    work = WORKS["logistic-regression"]
    methods = ["torch-jvp", "forward-ad"]
    found = step.measure(work, methods, 2, CPU, torch.float32, "default", 2)
    assert found["forward-ad"] == {"refused": "RuntimeError: cannot"}
    assert found["torch-jvp"]["ms"] > 0
    with pytest.raises(RuntimeError, match="cannot"):
        step.measure(work, ["backprop"], 2, CPU, torch.float32, "default", 2)
    assert not any(name.startswith(("fgd", "base")) for name in PEERS)


def test_runs_compile_beside_each_other_and_are_timed_alone(tmp_path: Path) -> None:
    alone = threading.Event()
    with step.Turns(tmp_path / "turns") as other:
        waits = threading.Thread(target=lambda: (other.alone(), alone.set()))
        with step.Turns(tmp_path / "turns"):
            waits.start()
            assert not alone.wait(0.2)
        assert alone.wait(10)
        waits.join()
    with step.Turns(None) as turns:
        turns.alone()


def test_an_entry_of_a_gpu_is_a_work_with_a_batch_and_a_dtype() -> None:
    for entry, methods in gpu.ENTRIES.items():
        work, batch, dtype = entry.split(":")
        assert work in WORKS and int(batch) > 1 and dtype in results.DTYPES
        assert set(methods.split(",")) <= set(STEPS)


def test_tf32_is_asked_of_products() -> None:
    before, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        for dtype, asked in (("tf32", "high"), ("float32", "highest")):
            results.prepare(dtype)
            assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(threads)


def test_plots_are_written_and_equal_for_equal_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = {"peak": 3 * MIB, "parameters": MIB, "data": 1}
    for name in ("mlp", "mlp-depth-1", "mlp-depth-3", "resnet18"):
        methods = {"base": cell(1), "forward-ad": {"refused": "no"}}
        results.replace(tmp_path / "step-cpu.json", name, entry(name, methods))
        results.replace(tmp_path / "memory-cpu.json", name, entry(name, {"base": peak}))
    monkeypatch.setattr(sys, "argv", ["plots.py", "--out", str(tmp_path)])
    texts = []
    for _ in range(2):
        plot()
        texts.append((tmp_path / "step-cpu.svg").read_text())
    made = sorted(path.name for path in tmp_path.glob("*-cpu.[ps]*g"))
    stems = ("blocks", "depth", "memory", "step")
    assert made == [f"{stem}-cpu.{kind}" for stem in stems for kind in ("png", "svg")]
    assert texts[0] == texts[1] and "refused" in texts[0]


@linux
def test_memory_of_backprop_in_a_fresh_process_holds_its_gradients() -> None:
    found = memory.fresh(("mlp-depth-1", "backprop", "64", "cpu", "float32", "default"))
    assert found["parameters"] == 4 * (784 * 1024 + 1024 * 10)
    assert found["parameters"] < found["peak"] < 2.5 * found["parameters"]


def test_a_run_of_some_methods_leaves_the_memory_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = {"base": {"peak": 2 * MIB}, "backprop-compiled": {"peak": 8 * MIB}}
    monkeypatch.setattr(memory, "ALLOCATOR", {})
    monkeypatch.setattr(memory, "fresh", lambda of: dict(cells[of[1]]))
    for method in cells:
        arguments = ["memory.py", "--works", "mlp", "--methods", method, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        memory.main()
    found = results.load(tmp_path / "memory-cpu.json")["works"]["mlp"]["methods"]
    assert {method: cell["ratio"] for method, cell in found.items()} == {
        "base": 0.25,
        "backprop-compiled": 1.0,
    }


def test_engines_go_on_from_the_state_that_a_step_gave(tmp_path: Path) -> None:
    problem = tiny(torch.float32)
    fgd = fwdcompile.FGD(problem.model, cross_entropy, lr=0.1, compile=False)
    tensors = fgd.export(tmp_path / "step.onnx", problem.x, problem.y, to="onnx")
    run = without_torch.OnnxStep(tmp_path / "step.onnx", tensors)
    for _ in range(3):
        run()
        fgd.step(problem.x, problem.y)
    for name, p in problem.model.named_parameters():
        torch.testing.assert_close(torch.as_tensor(run.arrays[name]), p.detach())


def test_the_size_of_a_package_counts_its_files_and_what_it_requires() -> None:
    sizes = without_torch.installed("onnxruntime")
    numpy = without_torch.installed("numpy")["alone"]
    assert sizes["with what it requires"] >= sizes["alone"] + numpy > numpy > 10 * MIB


def test_a_step_of_many_workers_on_paper() -> None:
    """Ten times the parameters are ten times the bytes of an all-reduce, and none of a gather."""
    ddp, normal, rank_one = scaling.METHODS
    assert scaling.sent(ddp, 1e6, 2) == 4e6
    assert scaling.sent(ddp, 1e7, 8) == 10 * scaling.sent(ddp, 1e6, 8)
    assert scaling.sent(normal, 1e7, 8) == scaling.sent(normal, 1e6, 8) == 7 * 48
    idle = scaling.Machine(operations=1e30, memory=1e30, latency=0.0)
    assert scaling.seconds(ddp, 1e6, 2, 1e9, idle) == pytest.approx(4e-3)
    assert scaling.seconds(rank_one, 1e6, 2, 48e3, idle) == pytest.approx(1e-3)
    busy = scaling.Machine(operations=2e6, memory=1e30, examples=1, latency=0.0)
    times = [scaling.seconds(m, 1e6, 1, 1e30, busy) for m in scaling.METHODS]
    assert times == pytest.approx([3.0, 3.0, 2.0])


def test_the_bytes_that_were_measured_are_those_of_the_formula() -> None:
    """Within what gloo says of its own: some 300 bytes a message."""
    result = json.loads((ROOT / "docs/results/distributed-cpu.json").read_text())
    checked = scaling.checks(result["entries"])
    assert len(checked) == 12
    for check in checked:
        assert 0 <= check["bytes"] - check["bytes predicted"] < 15_000


@linux
def test_methods_of_the_benchmark_of_workers_step_in_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(distributed.BATCH, "logistic-regression", 4)
    monkeypatch.setitem(distributed.COMPILED, "logistic-regression", False)
    made = distributed.runs("logistic-regression")
    expected = ["ddp", "backprop alone", "fgd normal", "fgd normal alone"]
    assert [*made] == [*expected, "fgd rank-one", "fgd rank-one alone"]
    for run in made.values():
        run()
    assert bytes_written(lambda: None, distributed.COUNTED) < 1000
