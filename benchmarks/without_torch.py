"""Exported steps: the time of one in each engine, and the size of what is installed for it.

    python benchmarks/without_torch.py [--works mlp] [--pairs 24] [--out docs/results]

All engines take turns in one process, each going on from the state that its last step gave.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from importlib.metadata import Distribution, distribution, version
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from packaging.requirements import Requirement
from results import RESULTS, THREADS, publish
from torch import Tensor
from torch.nn.functional import cross_entropy
from works import WORKS, Work

import fwdcompile
from fwdcompile.measure import MIB, ratio, take_turns
from fwdcompile.runner import environment

Run = Callable[[], Any]
CPU = torch.device("cpu")
DIRECTIONS = {
    "signs, rank-one": fwdcompile.Rademacher(rank_one=True),
    "normal": fwdcompile.Normal(),
}
PROGRAM, PACKAGE, MODEL = "program.pt2", "package.pt2", "model.onnx"
COMPILED = "FGD, compiled"
STEPS = 10  # a turn, at least


class OnnxStep:
    """A step by onnxruntime."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        self.session = onnxruntime.InferenceSession(path, options)
        self.arrays = {name: x.numpy() for name, x in tensors.items()}
        self.changed = list(self.arrays)[: len(self.session.get_outputs()) - 2]

    def __call__(self) -> None:
        _, _, *new = self.session.run(None, self.arrays)
        self.arrays.update(zip(self.changed, new, strict=True))


class PackageStep:
    """A step by the loader that a C++ program calls."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.loader = torch._inductor.aoti_load_package(str(path)).loader
        self.arguments = list(tensors.values())

    def __call__(self) -> None:
        _, _, *new = self.loader.run(self.arguments)
        self.arguments[: len(new)] = new


def measure(work: Work, directions: fwdcompile.Directions, pairs: int) -> dict[str, Any]:
    """Milliseconds of a step by engine, their ratio to compiled FGD, and bytes of the files."""

    def fgd(compile: bool) -> tuple[fwdcompile.FGD, Tensor, Tensor]:
        problem = work.problem(work.batch, CPU, torch.float32)
        made = fwdcompile.FGD(
            problem.model, cross_entropy, lr=2e-4, directions=directions, compile=compile
        )
        return made, problem.x, problem.y

    (eager, x, y), (compiled, *_) = fgd(False), fgd(True)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in (PROGRAM, PACKAGE, MODEL)}
        eager.export(paths[PROGRAM], x, y)
        tensors = eager.export(paths[PACKAGE], x, y, to="inductor")
        eager.export(paths[MODEL], x, y, to="onnx")
        runs: dict[str, Run] = {
            "onnxruntime": OnnxStep(paths[MODEL], tensors),
            "AOTInductor": PackageStep(paths[PACKAGE], tensors),
            COMPILED: lambda: compiled.step(x, y),
            "FGD, eager": lambda: eager.step(x, y),
        }
        # onnxruntime's threads wait by spinning, and would slow down whoever comes next
        turns = take_turns(runs, max(work.inner, STEPS), CPU, pairs, pause=0.05)
        files = {name: path.stat().st_size for name, path in paths.items()}
    cells = {
        name: {"ms": 1e3 * statistics.median(turns[name]), "ratio": ratio(turns, name, COMPILED)}
        for name in runs
    }
    torch._dynamo.reset()
    return {"batch": work.batch, "engines": cells, "files": files}


def installed(name: str) -> dict[str, int]:
    """Bytes on the disk of a package, alone and with all that it requires."""
    needed: dict[str, int] = {}

    def add(name: str) -> None:
        if name not in needed:
            found = distribution(name)
            needed[name] = size(found)
            for text in found.requires or ():
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    add(requirement.name)

    add(name)
    return {"alone": needed[name], "with what it requires": sum(needed.values())}


def size(package: Distribution) -> int:
    paths = (Path(str(file.locate())) for file in package.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def libraries() -> int:
    """Bytes of the shared libraries of torch that the C++ program loads."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp*")
    return sum(path.stat().st_size for name in names for path in folder.glob(name))


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    first = next(iter(result["works"].values()))
    names = list(first["engines"])
    lines = [f"| ms a step (ratio to compiled FGD) | {' | '.join(names)} |"]
    lines += ["|---" * (1 + len(names)) + "|"]
    for work, entry in result["works"].items():
        cells = [f"{c['ms']:.2f} ({c['ratio']:.2f})" for c in entry["engines"].values()]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    lines += ["", "| KiB | torch program | AOTInductor package | ONNX |", "|---|---|---|---|"]
    for work, entry in result["works"].items():
        cells = [f"{entry['files'][name] / 1024:,.0f}" for name in (PROGRAM, PACKAGE, MODEL)]
        lines.append(f"| {work} | {' | '.join(cells)} |")
    lines += ["", "| MiB installed | alone | with what it requires |", "|---|---|---|"]
    for name, sizes in result["installed"].items():
        lines.append(f"| {name} | {' | '.join(f'{n / MIB:,.0f}' for n in sizes.values())} |")
    machine = result["environment"]
    lines.append(
        f"\nThe shared libraries of torch that the C++ program loads have "
        f"{result['libraries'] / MIB:,.0f} MiB. {machine['device']}, {THREADS} threads, torch "
        f"{machine['torch']}, onnxruntime {result['onnxruntime']}, float32, batch "
        f"{first['batch']}, load average {result['load']:.1f} at the start. Written by "
        "`make bench-without-torch`."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default="logistic-regression,mlp")
    parser.add_argument("--pairs", type=int, default=24, help="turns that each engine takes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    load = os.getloadavg()[0]
    works = {
        f"{work}, {name}": measure(WORKS[work], directions, options.pairs)
        for work in options.works.split(",")
        for name, directions in DIRECTIONS.items()
    }
    result = {
        "environment": environment(CPU),
        "onnxruntime": version("onnxruntime"),
        "load": load,
        "works": works,
        "installed": {name: installed(name) for name in ("onnxruntime", "torch")},
        "libraries": libraries(),
    }
    publish(options.out, "without-torch-cpu", result, page(result))


if __name__ == "__main__":
    main()
