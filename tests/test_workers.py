from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdcompile.config import Config
from fwdcompile.data import load
from fwdcompile.history import read as read_history
from fwdcompile.log import read
from fwdcompile.models import MODELS
from fwdcompile.runner import Runner
from fwdcompile.workers import Workers, digest, joined, restarted

HERE = Path(__file__).parent
ITERATIONS, EVERY = 30, 10
TRAIN = ("train", "logistic-regression", "--lr", "0.05", "--batch", "32", "--no-compile")
TRAIN = (*TRAIN, "--iterations", str(ITERATIONS), "--every", str(EVERY))
METHODS = ("fgd", "fgd:optimizer=adam", "backprop")


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), *arguments]
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read(folder / "log.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two workers that nothing stopped."""
    out = tmp_path_factory.mktemp("through")
    done = torchrun("-m", "fwdcompile", *TRAIN, "--methods", ",".join(METHODS), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fgd:optimizer=adam") == 1  # only worker 0 prints the table
    return out


def test_workers_train_as_one_process_does(through: Path) -> None:
    data = load("digits")
    config = Config(
        methods=METHODS, lr=0.05, batch=32, iterations=ITERATIONS, every=EVERY, compile=False
    )

    def build() -> nn.Module:
        return MODELS["logistic-regression"](data.shape, data.classes)

    report = Runner(build, data, config).run()
    assert records(through, "header")[0]["workers"] == 2
    for trace in report.traces:
        own = [line for line in records(through, "step") if line["method"] == trace.method]
        assert [line["iteration"] for line in own] == trace.iterations
        losses = [line["validation_loss"] for line in own]
        assert losses == pytest.approx(trace.validation_loss, rel=1e-4)
        assert losses[-1] < losses[0]


def test_a_killed_worker_is_started_anew_and_ends_with_the_same_weights(
    through: Path, tmp_path: Path
) -> None:
    """Three steps to warm up and 24 turns come first; the kill falls between two checkpoints."""
    at = 2 * 27 + 15
    arguments = [str(HERE / "killed_worker.py"), str(at), "fwdcompile", *TRAIN]
    arguments += ["--methods", "fgd,fgd:optimizer=adam", "--out", str(tmp_path)]
    done = torchrun(*arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("worker 1 is killed") == 1
    mine = {line["method"]: line["weights"] for line in records(tmp_path, "end")}
    theirs = {line["method"]: line["weights"] for line in records(through, "end")}
    assert mine == {method: theirs[method] for method in mine}
    looks = [line["iteration"] for line in records(tmp_path, "step") if line["method"] == "fgd"]
    assert looks == [0, 10, 20, 30]


def test_a_restart_replays_the_history_behind_the_last_checkpoint(tmp_path: Path) -> None:
    """The kill falls behind step 25: the checkpoint has 20, the history the others."""
    script, killed = HERE.parent / "examples/many_workers.py", HERE / "killed_worker.py"
    options = ["--steps", "40", "--every", "20"]
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    done = torchrun(str(script), *options, "--out", str(through))
    assert done.returncode == 0, done.stderr
    again = torchrun(str(killed), "25", str(script), *options, "--out", str(stopped), restarts=1)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("worker 1 is killed") == 1
    assert again.stdout == f"went on at 25, {done.stdout}"
    assert done.stdout.startswith("40 steps, accuracy 0.")
    assert moves(stopped) == moves(through)


def moves(folder: Path) -> list[Any]:
    return [record for record in read_history(folder / "history") if "m" in record]


def test_one_process_is_a_worker_alone() -> None:
    workers = Workers()
    assert (workers.size, workers.rank) == (1, 0)
    numbers = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert workers.gather(numbers).tolist() == [[1.0, 2.0]]
    workers.agree({"anything": 1})
    workers.follow([numbers])
    assert workers.part(numbers) is numbers
    with joined("cpu") as device:
        assert device == "cpu"
    assert not restarted()


def test_digest_tells_values_and_order() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3])
    assert digest([one, two]) == digest([one.clone(), two.clone()])
    assert len({digest([one, two]), digest([two, one]), digest([one, two + 1])}) == 3
    assert digest([one.to(torch.bfloat16)]) != digest([one])


def test_a_batch_is_shared_in_equal_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "size", property(lambda self: 3))
    monkeypatch.setattr(Workers, "rank", property(lambda self: 1))
    assert Workers().part(torch.arange(6)).tolist() == [1, 4]
    assert Workers("directions").part(torch.arange(7)).tolist() == list(range(7))
    with pytest.raises(ValueError, match="7 examples cannot be shared by 3 workers alike"):
        Workers().part(torch.arange(7))
    with pytest.raises(ValueError, match="torch-jvp runs in one process"):
        Runner(lambda: nn.Linear(2, 2), load("digits"), Config(methods=("torch-jvp",)))
