"""Costs: which form of a product is fastest on a device, as it was measured there."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .compiling import recorded
from .measure import timed

GAIN = 0.95  # a form has to beat the plain one by this much to be taken
ROUNDS = 30
RECORDED = 10  # runs in a CUDA graph: one would be over before it is launched


@dataclass(frozen=True)
class Product:
    """What decides the cost of products that share a weight.

    Attributes:
        op: name of the op, as `linear` or `conv2d`.
        shapes: of one left operand and of the weight.
        count: how many left operands there are, of equal shape.
        options: stride and the like, by name.
        dtype: of all operands.
        device: they are on.
    """

    op: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    count: int
    options: tuple[tuple[str, Any], ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        """The product in one line, without its device."""
        x, w = ("x".join(map(str, shape)) for shape in self.shapes)
        options = "".join(f" {name}={value}" for name, value in self.options)
        return f"{self.count} {self.op} {x} by {w} {str(self.dtype).split('.')[1]}{options}"


def best_form(product: Product) -> str | None:
    """The form that was measured to be the fastest; None where nothing was measured."""
    form: str | None = _known(costs_path()).get(_device(product.device), {}).get(product.key)
    return form


def calibrate(products: Iterable[Product], forms: Callable[[Product], Mapping[str, Any]]) -> None:
    """Measures every form of every product and keeps the fastest ones in the costs file.

    Args:
        products: what to measure; those of one device.
        forms: the forms of a product by name, the plain one first, each a function of the left
            operands (a list of tensors) and the weight.
    """
    found: dict[str, dict[str, str]] = {}
    for product in dict.fromkeys(products):
        form = _fastest(product, forms(product))
        found.setdefault(_device(product.device), {})[product.key] = form
    path = costs_path()
    known = _known(path)
    merged = {d: known.get(d, {}) | found.get(d, {}) for d in sorted({*known, *found})}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    draft.replace(path)
    _read.cache_clear()


def costs_path() -> Path:
    """The costs file: $FWDCOMPILE_COSTS, or fwdcompile/costs.json in the user's cache."""
    if "FWDCOMPILE_COSTS" in os.environ:
        return Path(os.environ["FWDCOMPILE_COSTS"])
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fwdcompile" / "costs.json"


@torch.no_grad()
def _fastest(product: Product, forms: Mapping[str, Callable[..., Any]]) -> str:
    left, weight = (
        torch.randn(shape, dtype=product.dtype, device=product.device) for shape in product.shapes
    )
    xs = [left.clone() for _ in range(product.count)]
    calls = {name: functools.partial(form, xs, weight) for name, form in forms.items()}
    runs = {name: _many(call, product.device) for name, call in calls.items()}
    for run in runs.values():
        timed(run, 1, product.device)
    turns = [{n: timed(run, 1, product.device) for n, run in runs.items()} for _ in range(ROUNDS)]
    plain = next(iter(runs))
    ratios = {n: statistics.median(turn[n] / turn[plain] for turn in turns) for n in runs}
    winner = min(ratios, key=ratios.__getitem__)
    return winner if ratios[winner] < GAIN else plain


def _many(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """On CUDA some runs as one graph: alone, a small product takes less time than its launch."""
    if device.type != "cuda":
        return run
    run()
    return recorded(lambda: [run() for _ in range(RECORDED)], device)


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor, that a device is."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return _processor()


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _device(device: torch.device) -> str:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return device_name(device) + threads


def _known(path: Path) -> dict[str, dict[str, str]]:
    return _read(path, path.stat().st_mtime_ns) if path.exists() else {}


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> dict[str, dict[str, str]]:
    known: dict[str, dict[str, str]] = json.loads(path.read_text())
    return known
