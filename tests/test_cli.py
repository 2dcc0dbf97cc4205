from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fwdcompile import rule
from fwdcompile.__main__ import main as entry
from fwdcompile.cli import main
from fwdcompile.config import Config

TRAIN = ["train", "logistic-regression", "--no-compile", "--iterations", "4", "--every", "2"]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Sized(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()


def build() -> nn.Module:
    return Scale()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b


ready = Scale()
HERE = __name__


def run(*args: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    """What the command wrote to stdout and stderr; its exit code is checked."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert (stop.value.code or 0) == code
    out, err = capsys.readouterr()
    return out, err


def body(text: str) -> str:
    return text.split("def forward(")[1].split("# What the arguments")[0]


def test_training_has_the_defaults_of_a_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(build: object, data: object, config: Config, *rest: object) -> None:
        raise ValueError("as it is" if config == Config() else f"another one: {config}")

    monkeypatch.setattr("fwdcompile.cli.compare", stop)
    _, err = run("train", "mlp", capsys=capsys, code=2)
    assert "as it is" in err


def test_train_prints_the_table_and_leaves_log_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("fgd", "backprop", "torch-jvp")
    out, err = run(*TRAIN, "--methods", ",".join(methods), "--out", str(tmp_path), capsys=capsys)
    for word in (*methods, "accuracy", "Rf/Rb", "Tf/Tb", "base "):
        assert word in out
    assert "12/12" in err and "Traceback" not in err
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["config"]["iterations"] == 4
    assert [r["method"] for r in records if r["kind"] == "result"] == list(methods)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_train_takes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "8", "--lr", "0.5", "--decay", "0.25", "--runs", "2", "--seed", "7",
               "--directions", "rademacher", "--rank-one", "--samples", "3", "--device", "cpu",
               "--mode", "max-autotune", "--skip-nonfinite", "--tensorboard", "--resume",
               "--perturb", "activations", "--optimizer", "adam", "--clip", "9",
               "--share", "directions"]  # fmt: skip
    run(*TRAIN, "--methods", "fgd", "--out", str(tmp_path), *options, capsys=capsys)
    config = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])["config"]
    assert config == {
        "methods": ["fgd"], "iterations": 4, "batch": 8, "lr": 0.5, "decay": 0.25, "runs": 2,
        "seed": 7, "directions": "rademacher", "rank_one": True, "samples": 3, "every": 2,
        "perturb": "activations", "optimizer": "adam", "clip": 9.0,
        "compile": False, "mode": "max-autotune", "skip_nonfinite": True, "share": "directions",
    }  # fmt: skip
    assert len(list(tmp_path.glob("events*"))) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "transformer"], "no model is called 'transformer'; there are logistic-"),
        (["train", "mlp", "--data", "cifar"], "no data set is called 'cifar'"),
        (["train", "mlp", "--data", "mnist"], "mnist needs a directory: give --data-root DIR"),
        (["train", "mlp", "--data", "mnist", "--data-root", "/no/such"], "/no/such does not exist"),
        (["train", "mlp", "--methods", "adam"], "no method is called 'adam'"),
        (["train", "mlp", "--batch", "0"], "batch must be at least 1"),
        (["train", "mlp", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "mlp", "--device", "warp"], "the device 'warp' cannot be used"),
        (["train", "mlp", "--colour", "red"], "No such option: --colour"),
        (["train"], "Missing argument"),
        (["fly"], "No such command 'fly'"),
        (["show", "json"], "'json' is not module:name"),
        (["show", "no_such_module:f"], "No module named 'no_such_module'"),
        (["show", "json:nothing"], "json has no 'nothing'"),
        (["show", "math:pi"], "math:pi is a float"),
        (["show", f"{HERE}:Sized"], "needs width, depth; name a factory"),
        (["show", "torch:tanh", "--input", "2,x"], "--input is a shape"),
        (["show", "torch:tanh", "--input", "2:int65"], "--input is a shape"),
        (["show", "torch:tanh", "--lines", "3"], "--lines is a:b"),
        (["show", f"{HERE}:ready", "--input", "3", "--tangents", "bias"], "nothing is called"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    extra = ["--out", str(tmp_path / "out")] if args[:2] in (["train", "mlp"],) else []
    out, err = run(*args, *extra, capsys=capsys, code=2)
    assert err.startswith("fwdcompile: ") and message in err
    assert err.count("\n") == 1 and not out
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fwdcompile.runner.take_turns", None)
    (tmp_path / "file").touch()
    out, err = run(*TRAIN, "--out", str(tmp_path / "file" / "runs"), capsys=capsys, code=2)
    assert "Not a directory" in err.splitlines()[-1] and "Traceback" not in err and not out


def test_train_goes_on_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = run(*TRAIN, "--methods", "fgd", "--out", str(tmp_path), capsys=capsys)
    again = [*TRAIN, "--methods", "fgd", "--out", str(tmp_path), "--resume"]
    second, err = run(*again, capsys=capsys)
    assert second == first and "4/4" in err
    _, err = run(*again, "--lr", "0.5", capsys=capsys, code=2)
    assert "another comparison: lr was 0.0002, is 0.5" in err


@pytest.mark.parametrize("name", ["build", "Scale", "ready"])
def test_show_takes_factories_classes_and_modules(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run("show", f"{HERE}:{name}", "--input", "2,3", capsys=capsys)
    assert "weight_dot" in body(out) and "x_dot" not in body(out)
    compile(out, "shown", "exec")


def test_show_takes_functions_and_the_names_that_have_tangents(
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = ["show", f"{HERE}:product", "--input", "2,3", "--input", "2,3"]
    both, _ = run(*call, capsys=capsys)
    assert "a_dot" in body(both) and "b_dot" in body(both)
    one, _ = run(*call, "--tangents", "b", capsys=capsys)
    assert "b_dot" in body(one) and "a_dot:" not in body(one)
    inputs, _ = run("show", f"{HERE}:ready", "--input", "3", "--tangents", "inputs", capsys=capsys)
    assert "x_dot" in body(inputs) and "weight_dot" not in body(inputs)
    factors, _ = run(*call, "--rank-one", capsys=capsys)
    assert "a_dot_u: f32[2]" in factors and "b_dot_v: f32[3]" in factors


def test_show_takes_integer_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(
        "show", "torch.nn.functional:embedding", "--input", "4:int64", "--input", "5,2",
        "--tangents", "weight", capsys=capsys,
    )  # fmt: skip
    assert "i64[4]" in out and "weight_dot: f32[5, 2]" in out


def test_show_prints_the_lines_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = run("show", "torch:tanh", "--input", "2", capsys=capsys)
    part, _ = run("show", "torch:tanh", "--input", "2", "--lines", "3:5", capsys=capsys)
    assert part.splitlines() == whole.splitlines()[2:5]
    tail, _ = run("show", "torch:tanh", "--input", "2", "--lines", "9:", capsys=capsys)
    assert tail.splitlines() == whole.splitlines()[8:]


def test_show_draws_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "out.svg"
    run("show", f"{HERE}:ready", "--input", "3", "--picture", str(picture), capsys=capsys)
    assert "<svg" in picture.read_text(encoding="utf-8")


def test_calibrate_prints_the_fastest_forms(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["calibrate", "torch.nn.functional:linear", "--input", "4,3", "--input", "5,3"]
    with pytest.raises(SystemExit) as stop:
        main([*call, "--samples", "2"])
    assert not stop.value.code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "3 linear 4x3 by 5x3 float32",
        "1 linear 4x3 by 5x3 float32",
    ]
    assert {line.split(": ")[1] for line in lines} <= {
        "apart", "stacked", "turned", "stacked and turned",
    }  # fmt: skip


def test_rules_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run("rules", capsys=capsys)
    assert out.splitlines()[-1] == f"{len(rule.table)} rows"
    found, _ = run("rules", "aten.tanh.", capsys=capsys)
    line, count = found.splitlines()
    assert "pointwise" in line and "rules/elementwise.py:" in line and count == "1 rows"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run("--help", capsys=capsys)
    assert all(command in out for command in ("train", "show", "rules", "calibrate"))


def test_an_error_of_the_program_itself_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("fwdcompile.cli.transform", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["show", "torch:tanh"])


def test_the_process_arguments_are_the_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fwdcompile", "rules", "nothing-has-this-name"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out == "0 rows\n"


def test_what_the_command_line_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fwdcompile.cli")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'fwdcompile\[examples\]'"):
        entry()
