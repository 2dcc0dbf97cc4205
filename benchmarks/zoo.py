"""Writes docs/models.md: models of many libraries, each program against an oracle.

    python benchmarks/zoo.py [--models resnet18,"gpt2 causal"] [--families timm] [--minutes 60]

The oracle is reverse mode or torch.func.jvp. Every model runs in training and in evaluation mode,
with a random direction in all plain parameters and the images, on float64 weights, or float32 for
those that are quantized or have more than `HEAVY` parameters. An entry is written as soon as it is
measured; entries that the file has are kept unless they are named.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import zoo_transformers
from results import RESULTS
from zoo_models import STOPPED, build, families

from fwdcompile.parts import inner_tensors
from fwdcompile.program import is_differentiable
from fwdcompile.runner import environment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from oracle import Case, compare  # noqa: E402

FILE, PAGE = RESULTS / "zoo-cpu.json", ROOT / "docs/models.md"
HEAD = "| model | parameters | dtype | ops | generated | error, train | error, eval | seconds |"
HEAVY = 150_000_000


def measure(name: str, training: bool) -> dict[str, Any]:
    """The error of one model's program, its size, and how long it took to make."""
    model, inputs = build(name)
    parameters = sum(p.numel() for p in model.parameters())
    quantized = any(map(inner_tensors, model.parameters()))  # of float32
    dtype = torch.float32 if parameters > HEAVY or quantized else torch.float64
    torch.manual_seed(1)
    inputs = tuple(x.to(dtype) if is_differentiable(x) else x for x in inputs)
    case = Case.of(model.to(dtype).train(training), inputs)
    compared = compare(case, ("jvp",) if name in STOPPED else ("reverse", "jvp"))
    graphs = compared.lowered.stages
    return {
        "parameters": parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "oracle": compared.oracle,
        "primal_error": compared.primal_error,
        "error": compared.error,
        "right": compared.is_right(dtype),
        "nodes": len(graphs["capture"].nodes),
        "generated": len(list(graphs.values())[-1].nodes),
        "seconds": round(compared.seconds, 1),
    }


def fresh(name: str) -> dict[str, dict[str, Any]]:
    """`measured` in a new process, so that memory goes back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measured, name).result()
        except BrokenProcessPool as error:
            return {mode: {"failed": str(error)} for mode in ("train", "eval")}


def measured(name: str) -> dict[str, dict[str, Any]]:
    """`measure` in both modes, or the first line of an error."""
    warnings.simplefilter("ignore")
    result = {}
    for mode in ("train", "eval"):
        try:
            result[mode] = measure(name, mode == "train")
        except Exception as error:
            text = re.sub(r"\S*site-packages/", "", f"{type(error).__name__}: {error}")
            result[mode] = {"failed": text.splitlines()[0]}
    return result


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    entries: dict[str, dict[str, Any]] = result["entries"]
    lines = [
        "# Models",
        "",
        "The generated program of each model against reverse mode: u'(Jv) = (J'u)'v for a random",
        "u and a direction v in all parameters and inputs. Outputs and buffers agree as well.",
        "Written by `make zoo`. Seconds are capture, transform, passes and printing. Models of",
        "language are Hugging Face's, in small; most compute in float32 here and there. Of timm",
        "there is the smallest of each family that torchvision has not, below 90 million",
        "parameters.",
    ]
    for family, names in families().items():
        found = {n: entries[n] for n in names if n in entries}
        right = sum(all(m.get("right") for m in e.values()) for e in found.values())
        lines += ["", f"## {family.capitalize()}: {right} of {len(names)}", ""]
        lines += [HEAD, "|---" * 8 + "|", *(_row(name, e) for name, e in found.items())]
    left = ", ".join(zoo_transformers.LEFT_OUT)
    why = "their sizes depend on each other, or they take no float64, or stop at torch.no_grad"
    lines += ["", f"Left out, as {why}: {left}."]
    machine = result["environment"]
    return "\n".join([*lines, "", f"torch {machine['torch']}, {machine['device']}.", ""])


def _row(name: str, modes: dict[str, dict[str, Any]]) -> str:
    train, evaluated = modes["train"], modes["eval"]
    cells = [f"{m['error']:.0e}" if "error" in m else m["failed"][:80] for m in (train, evaluated)]
    known = train if "error" in train else evaluated
    if "error" not in known:
        return f"| {name} | | | | | {cells[0]} | {cells[1]} | |"
    counts = f"{known['parameters']:,} | {known['dtype']} | {known['nodes']} | {known['generated']}"
    return f"| {name} | {counts} | {cells[0]} | {cells[1]} | {known['seconds']} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=lambda text: text.split(","))
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(families()))
    parser.add_argument("--minutes", type=float, default=600, help="begin no model after these")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result = json.loads(FILE.read_text()) if FILE.exists() else {"entries": {}}
    result["environment"] = environment(torch.device("cpu"))
    names = [name for family in families().values() for name in family]
    began = time.monotonic()
    missing = (n for family in options.families for n in families()[family])
    for name in options.models or [n for n in missing if n not in result["entries"]]:
        if time.monotonic() - began > 60 * options.minutes:
            break
        result["entries"][name] = fresh(name)
        print(name, result["entries"][name], flush=True)
        kept = {n: result["entries"][n] for n in names if n in result["entries"]}
        _write(FILE, json.dumps(result | {"entries": kept}, indent=1) + "\n")
        _write(PAGE, page(result))


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    main()
