"""Result files: one entry for each work, so that a long benchmark can be made in parts."""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from steps import STEPS
from works import PAPER, WORKS

from fwdcompile.config import MODES
from fwdcompile.runner import environment

THREADS = 2
# "tf32": factors rounded to ten bits in the products of a GPU, torch's and JAX's alike
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path("docs/results")
Cells = dict[str, dict[str, Any]]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that timing and memory share."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--works", type=_names(WORKS), help=f"of {', '.join(WORKS)}")
    every = list(STEPS)
    options.add_argument(
        "--methods", type=_names(STEPS), default=every, help=f"of {', '.join(every)}"
    )
    options.add_argument("--batch", type=int, help="in place of each work's own")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--dtype", default="float32", choices=DTYPES)
    options.add_argument("--mode", default="default", choices=MODES, help="torch.compile's")
    options.add_argument("--out", type=Path, default=RESULTS)
    return options


def prepare(dtype: str) -> None:
    """Threads and the precision of products, as all methods have them."""
    torch.set_num_threads(THREADS)
    rounded = dtype == "tf32"
    torch.set_float32_matmul_precision("high" if rounded else "highest")
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = rounded


def publish(directory: Path, name: str, result: dict[str, Any], page: str) -> None:
    """Writes a result as JSON and its page, and prints the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (directory / f"{name}.md").write_text(page)
    print(page)


def entry_name(work: str, batch: int, dtype: str, mode: str = "default") -> str:
    """The work, and what of the run is not the default."""
    name = work if batch == WORKS[work].batch else f"{work}, batch {batch}"
    unusual = [x for x, usual in ((dtype, "float32"), (mode, "default")) if x != usual]
    return ", ".join([name, *unusual])


def header(work: str, batch: int, dtype: str, device: str) -> dict[str, Any]:
    """What an entry says of its run: the work, the machine, and how busy that was."""
    return {
        "work": work,
        "batch": batch,
        "dtype": dtype,
        "load": os.getloadavg()[0],
        "environment": environment(torch.device(device)) | {"jax": jax_version()},
        "vectors": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if "MALLOC" in name},
    }


def jax_version() -> str | None:
    try:
        return version("jax")
    except PackageNotFoundError:
        return None


def load(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "works" in found else {"works": {}}


def save(path: Path, results: dict[str, Any]) -> None:
    """Writes the file with the works in their own order, whatever order they were run in."""
    order = list(WORKS)
    works = sorted(results["works"].items(), key=lambda item: order.index(item[1]["work"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results | {"works": dict(works)}, indent=1) + "\n")


def replace(path: Path, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Puts one entry in the place of its namesake; all others stay as they are."""
    results = load(path)
    results["works"][name] = entry
    save(path, results)
    return load(path)


def table(
    title: str,
    columns: dict[str, Cells],
    text: Callable[[dict[str, Any]], str],
    methods: Iterable[str] = STEPS,
    refused: str = "refused",
) -> str:
    """A row for each method that some work has, a column for each work."""
    rows = [f"| {title} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in methods:
        cells = [column.get(method) for column in columns.values()]
        if any(cells):
            texts = ["" if c is None else refused if "refused" in c else text(c) for c in cells]
            rows.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(rows) + "\n"


def tables(title: str, works: dict[str, Any], text: Callable[[dict[str, Any]], str]) -> list[str]:
    """For each batch, dtype and mode the paper's three works first, the others below."""
    groups: dict[tuple[str, bool], dict[str, Cells]] = {}
    for name, entry in works.items():
        work, _, conditions = name.partition(", ")
        groups.setdefault((conditions, work not in PAPER), {})[work] = entry["methods"]
    ordered = sorted(groups.items(), key=lambda item: item[0])
    return [
        table(", ".join(filter(None, (title, conditions))), columns, text)
        for (conditions, _), columns in ordered
    ]


def with_ratio(number: str, cell: dict[str, Any]) -> str:
    """A number, and behind it the ratio to compiled backpropagation where there is one."""
    return f"{number} ({cell['ratio']:.2f})" if "ratio" in cell else number


def refusals(works: dict[str, Any]) -> str:
    """A line for each peer that could not run a work, with its own words."""
    return "".join(
        f"- {name}, {method}: `{cell['refused']}`\n"
        for name, entry in works.items()
        for method, cell in entry["methods"].items()
        if "refused" in cell
    )


def conditions(works: dict[str, Any]) -> str:
    """The sentence below the tables: the hardware, and what each entry was run under."""
    entries = list(works.values())
    machines = {(hardware(e), e["environment"]["threads"]) for e in entries}
    torches = sorted({e["environment"]["torch"] for e in entries})
    jaxes = sorted({e["environment"]["jax"] for e in entries if "jax-jvp" in e["methods"]} - {None})
    dtypes = sorted({e["dtype"] for e in entries})
    loads = [e["load"] for e in entries]
    return (
        f"{' and '.join(f'{device}, {threads} threads' for device, threads in sorted(machines))}, "
        f"torch {' and '.join(torches)}, {''.join(f'JAX {v}, ' for v in jaxes)}"
        f"{' and '.join(dtypes)}, load average {min(loads):.1f} to "
        f"{max(loads):.1f} at the starts{batches(works)}."
    )


def hardware(entry: dict[str, Any]) -> str:
    """The GPU; or the processor, with its vector instructions where they are known."""
    device: str = entry["environment"]["device"]
    vectors = entry.get("vectors")
    return f"{device} with {vectors}" if vectors else device


def batches(works: dict[str, Any]) -> str:
    """The batch of entries whose names do not say it."""
    sizes = {name: entry["batch"] for name, entry in works.items() if "batch" not in name}
    if not sizes:
        return ""
    usual = statistics.mode(sizes.values())
    others = ", ".join(f"{name} {size}" for name, size in sizes.items() if size != usual)
    return f", batch {usual}" + (f" ({others})" if others else "")


def refusal(error: Exception) -> dict[str, str]:
    """The first line of what a peer says where it cannot run a work."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return {"refused": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")}


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}")
        return text.split(",")

    return names
