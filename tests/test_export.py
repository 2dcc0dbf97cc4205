"""Exported steps: the same numbers as the step that they come from, in each engine."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nets import Mlp, Tied
from torch import Tensor, nn
from torch.nn import functional as F

from fwdcompile import FGD, ExportError, Normal, Rademacher, Sphere, onnx_forms
from fwdcompile.words import stream_keys

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import export_step

EXAMPLES = Path(export_step.__file__).parent
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


class Affine(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def fgd_of(model: nn.Module, **settings: Any) -> FGD:
    return FGD(model, F.cross_entropy, lr=0.1, decay=0.1, seed=-5, compile=False, **settings)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def next_of(tensors: dict[str, Tensor], out: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: out.get(f"new.{name}", x) for name, x in tensors.items()}


def in_torch(path: Path) -> Run:
    program = torch.export.load(path).module()
    return lambda tensors: program(tensors)


def in_onnxruntime(path: Path | bytes) -> Run:
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = session.run(None, {name: x.numpy() for name, x in tensors.items()})
        return {name: torch.as_tensor(x) for name, x in zip(names, out, strict=True)}

    return run


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Mlp, {"directions": Normal()}),
        (Affine, {"directions": Rademacher(rank_one=True), "samples": 3, "clip": 0.2}),
        (Affine, {"directions": Sphere(orthogonal=True), "samples": 2, "store_directions": False}),
    ],
)
def test_an_exported_step_is_the_step(tmp_path: Path, model: Any, settings: Any) -> None:
    model = model().double()
    fgd, x = fgd_of(model, **settings), X.double()
    fgd.step(x, Y)
    tensors = fgd.export(tmp_path / "step.pt2", x, Y)
    assert [*tensors] == [*state_of(model), "step", "x", "target", "seed", "lr"]
    run = in_torch(tmp_path / "step.pt2")
    for iteration in (1, 2):
        before = {name: p.clone() for name, p in tensors.items()}
        rate = {"lr": torch.tensor(fgd.lr, dtype=torch.float64)}
        out = run(dict(reversed(tensors.items())) | rate)
        assert all(torch.equal(x, before[name]) for name, x in tensors.items())
        loss = fgd.step(x, Y)
        torch.testing.assert_close(out["loss"], loss, rtol=1e-14, atol=0)
        tensors = next_of(tensors, out)
        assert int(tensors["step"]) == fgd.iteration == iteration + 1
        for name, p in state_of(model).items():
            torch.testing.assert_close(tensors[name], p.detach(), rtol=1e-14, atol=1e-15)


def test_fixed_parameters_are_read_and_what_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    model = Tied()
    model.norm.weight.requires_grad_(False)
    tokens = torch.tensor([0, 1, 2, 3])
    tensors = fgd_of(model).export(tmp_path / "step.pt2", tokens, tokens)
    run = in_torch(tmp_path / "step.pt2")
    out = run(tensors)
    changed = {name.removeprefix("new.") for name in out if name.startswith("new.")}
    state = {name for name in state_of(model) if name != "norm.weight"}
    assert changed == state | {"step"} and "head.weight" not in tensors
    assert "norm.weight" in tensors and bool(out["finite"])
    out = run(tensors | {"embed.weight": torch.full((5, 4), math.inf)})
    assert not out["finite"] and int(out["new.step"]) == 1
    for name in state - {"embed.weight"}:
        assert torch.equal(out[f"new.{name}"], tensors[name])


def test_a_program_needs_torch_alone_and_refuses_another_batch_size(tmp_path: Path) -> None:
    tensors = fgd_of(nn.Linear(6, 3)).export(tmp_path / "step.pt2", X, Y)
    script = (
        "import sys, torch\n"
        "program = torch.export.load('step.pt2')\n"
        "out = program.module()(program.example_inputs[0][0])\n"
        "assert 'fwdcompile' not in sys.modules\n"
        "print(float(out['loss']))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path,
                          capture_output=True, text=True, check=True)  # fmt: skip
    loss = F.cross_entropy(F.linear(X, tensors["weight"], tensors["bias"]), Y)
    assert float(done.stdout) == pytest.approx(float(loss))
    with pytest.raises(AssertionError, match=r"\['input'\].size\(\)\[0\] == 16"):
        in_torch(tmp_path / "step.pt2")(tensors | {"input": X[:5], "target": Y[:5]})


def test_a_dynamic_step_takes_every_batch_size_and_says_so(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    fgd = fgd_of(model, dynamic=True)
    tensors = fgd.export(tmp_path / "step.pt2", X.clone(), Y.clone())
    run = in_torch(tmp_path / "step.pt2")
    for n in (16, 5, 2):
        out = run(tensors | {"input": X[:n], "target": Y[:n]})
        torch.testing.assert_close(out["loss"], F.cross_entropy(model(X[:n]), Y[:n]).detach())
    files = {"fwdcompile": ""}
    torch.export.load(tmp_path / "step.pt2", extra_files=files)
    interface = json.loads(files["fwdcompile"])
    first, *_, lr = interface["inputs"]
    assert first == {"name": "weight", "dtype": "float32", "shape": [3, 6]}
    assert lr == {"name": "lr", "dtype": "float64", "shape": []}
    batch = next(entry["shape"][0] for entry in interface["inputs"] if entry["name"] == "input")
    assert isinstance(batch, str)
    names = [entry["name"] for entry in interface["outputs"]]
    assert names == ["loss", "finite", "new.weight", "new.bias", "new.step"]


class Numbers(nn.Module):
    """The draws of all directions, and what else engines are known to get wrong."""

    kinds = (Normal(), Rademacher(), Rademacher(rank_one=True), Sphere())

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        keys = stream_keys(tensors["seed"], tensors["step"], 2, 3)
        drawn = {str(kind): kind.draw((333,), key=keys[1, 2], dtype=torch.float32)
                 for kind in self.kinds}  # fmt: skip
        w, x, v = tensors["w"], tensors["x"], tensors["v"]
        h = torch.relu((w @ x.mT).mT + 1)  # onnxruntime 1.32 moves the transpose into h @ v
        products = {"product": h @ v, "turned": w.mT @ h.mT, "left": v @ w}
        return {"keys": keys} | products | drawn


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Tensor]]:
    path = tmp_path_factory.mktemp("numbers") / "numbers.onnx"
    words = {"seed": torch.tensor(-7), "step": torch.tensor(1)}
    tensors = words | {"w": torch.randn(4, 3), "x": torch.randn(5, 3), "v": torch.randn(4)}
    exported = torch.export.export(Numbers(), (tensors,)).run_decompositions({})
    names = [*Numbers()(tensors)]
    onnx_forms.write(exported, path, tensors, names, {})
    return in_onnxruntime(path), tensors


@pytest.mark.parametrize("seed", [-7, 0, 2**31, -(2**40) - 3, 2**63 - 1])
@pytest.mark.parametrize("step", [0, 2**31 - 1, 2**33])
def test_an_engine_draws_the_numbers_that_torch_draws(numbers: Any, seed: int, step: int) -> None:
    run, tensors = numbers
    given = tensors | {"seed": torch.tensor(seed), "step": torch.tensor(step)}
    out, expected = run(given), Numbers()(given)
    for name in ("keys", str(Rademacher()), str(Rademacher(rank_one=True))):
        assert torch.equal(out[name], expected[name])
    for name, x in expected.items():
        torch.testing.assert_close(out[name], x, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[FGD, Path, dict[str, Tensor]]:
    """Tied weights and batch norm, for every batch size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tied") / "step.onnx"
    tokens = torch.tensor([0, 1, 2, 3])
    fgd = fgd_of(Tied(), dynamic=True)
    return fgd, path, fgd.export(path, tokens, tokens.clone(), to="onnx")


def test_onnx_trains_tied_weights_and_batch_norm_in_every_batch_size(tied: Any) -> None:
    fgd, path, tensors = tied
    run = in_onnxruntime(path)
    for n in (4, 5, 3):
        tokens = torch.arange(n)
        rate = torch.tensor(fgd.lr, dtype=torch.float64)
        out = run(tensors | {"tokens": tokens, "target": tokens, "lr": rate})
        tensors = next_of(tensors, out)
        torch.testing.assert_close(out["loss"], fgd.step(tokens, tokens.clone()))
        for name, p in state_of(fgd.objective.model).items():
            torch.testing.assert_close(tensors[name], p.detach(), rtol=1e-5, atol=1e-6)


def test_an_onnx_file_describes_itself_and_names_what_is_open(tied: Any) -> None:
    session = onnxruntime.InferenceSession(tied[1])
    interface = json.loads(session.get_modelmeta().custom_metadata_map["fwdcompile"])
    for entries, found in zip(
        interface.values(), (session.get_inputs(), session.get_outputs()), strict=True
    ):
        assert [e["name"] for e in entries] == [x.name for x in found]
        assert [len(e["shape"]) for e in entries] == [len(x.shape) for x in found]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    export_step.main(folder)
    return folder


def losses_of_digits(steps: int) -> list[float]:
    fgd, digits = export_step.fgd_of_digits()
    images, labels = digits.train
    size = export_step.BATCH
    starts = [size * i % (len(images) // size * size) for i in range(steps)]
    return [float(fgd.step(images[i : i + size], labels[i : i + size])) for i in starts]


def test_onnxruntime_trains_on_the_digits_without_torch(digits: Path) -> None:
    script = (
        "import sys, pathlib, train_without_torch as t\n"
        "losses, held_out = t.train(pathlib.Path(sys.argv[1]), 60)\n"
        "assert not {'torch', 'fwdcompile'} & sys.modules.keys()\n"
        "print(losses)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(digits)], cwd=EXAMPLES,
                          capture_output=True, text=True, check=True)  # fmt: skip
    np.testing.assert_allclose(json.loads(done.stdout), losses_of_digits(60), rtol=2e-5)


def test_the_lines_of_the_readme_train(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    (lines,) = re.findall(
        r"```python\n(import numpy as np, onnxruntime\n.*?)```", readme, re.DOTALL
    )
    text = lines.replace("tensors.npz", "arguments.npz").replace('"x":', '"input":')
    images, labels = (np.load(digits / "digits.npz")[name] for name in ("images", "labels"))
    monkeypatch.chdir(digits)
    exec(text, {"batches": [(images[i : i + 64], labels[i : i + 64]) for i in (0, 64, 128)]})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    np.testing.assert_allclose(losses, losses_of_digits(3), rtol=2e-5)


def test_onnx_refuses_another_batch_size(digits: Path) -> None:
    tensors = {n: torch.as_tensor(x) for n, x in np.load(digits / "arguments.npz").items()}
    run = in_onnxruntime(digits / "step.onnx")
    assert torch.isfinite(run(tensors)["loss"])
    with pytest.raises(Exception, match=r"(?s)input: (input|target) .*Got: 5 Expected: 64"):
        run(tensors | {"input": tensors["input"][:5], "target": tensors["target"][:5]})


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.linalg.inv(x))


def test_an_op_without_a_form_is_named_with_its_line(tmp_path: Path) -> None:
    fgd = fgd_of(Inverse())
    with pytest.raises(ExportError) as caught:
        fgd.export(tmp_path / "step.onnx", torch.eye(3), torch.arange(3), to="onnx")
    assert "tests/test_export.py" in str(caught.value)
    assert "return self.linear(torch.linalg.inv(x))" in str(caught.value)
    assert "linalg_inv" in str(caught.value) and 'to="torch"' in str(caught.value)
    assert not (tmp_path / "step.onnx").exists()


def test_an_engine_that_computes_something_else_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(onnx_forms._FORMS, torch.ops.aten.sin.default, onnx_forms.op.Cos)
    exported = torch.export.export(Sine(), ({"x": torch.ones(3)},))
    with pytest.raises(ExportError, match="gives another 'y' than torch"):
        onnx_forms.write(exported, tmp_path / "step.onnx", {"x": torch.ones(3)}, ["y"], {})
    assert not (tmp_path / "step.onnx").exists()


class Sine(nn.Module):
    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": torch.sin(tensors["x"])}


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.linear(x) * step


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fgd = fgd_of(nn.Linear(6, 3))
    with pytest.raises(ValueError, match='"torch", "inductor" or "onnx", not'):
        fgd.export(tmp_path / "step.pt2", X, Y, to="tensorflow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an export to onnx is a file \.onnx, not 'step\.pt2'"):
        fgd.export(tmp_path / "step.pt2", X, Y, to="onnx")
    with pytest.raises(ExportError, match="has a 'step' of its own"):
        fgd_of(Named()).export(tmp_path / "step.pt2", X, torch.ones(()), Y)
    monkeypatch.delitem(sys.modules, "fwdcompile.onnx_forms")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"pip install 'fwdcompile\[onnx\]'"):
        fgd.export(tmp_path / "step.onnx", X, Y, to="onnx")


@pytest.mark.compiled
@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch's CMake files want the CUDA toolkit that this build is for",
)
def test_a_cpp_program_trains_on_the_digits(tmp_path: Path) -> None:
    export_step.main(tmp_path, "inductor")
    package = torch._inductor.aoti_load_package(str(tmp_path / "step.pt2"))
    interface = json.loads(package.loader.get_metadata()["fwdcompile"])
    assert [entry["name"] for entry in interface["inputs"]][-4:] == [
        "input",
        "target",
        "seed",
        "lr",
    ]
    cmake = Path(sys.executable).with_name("cmake")
    build = tmp_path / "build"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for arguments in (["-S", EXAMPLES / "cpp", "-B", build, prefix], ["--build", build]):
        subprocess.run([cmake, *arguments], check=True, capture_output=True)
    train = [build / "train", tmp_path, "60"]
    done = subprocess.run(train, check=True, capture_output=True, text=True)
    losses = [float(line) for line in done.stdout.split()]
    np.testing.assert_allclose(losses, losses_of_digits(60), rtol=2e-5)
    assert len((EXAMPLES / "cpp" / "train.cpp").read_text().splitlines()) < 100
    saved = torch.load(tmp_path / "arguments.pt")
    *state, images, labels, seed, lr = saved["arguments"]
    saved["arguments"] = [*state, images[:5], labels[:5], seed, lr]
    torch.save(saved, tmp_path / "arguments.pt")
    refused = subprocess.run(train, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "expected: 64, but got: 5" in refused.stderr
