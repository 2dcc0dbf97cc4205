"""Trains on the digits by onnxruntime, an engine that has no training: no torch, no autograd.

python examples/export_step.py DIR           # once, where torch is
python examples/train_without_torch.py DIR   # anywhere; needs onnxruntime and numpy alone
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

Arrays = dict[str, np.ndarray]


def batches(images: np.ndarray, labels: np.ndarray, size: int, count: int) -> list[Arrays]:
    """Batches one behind the other, from the start again after the last whole one."""
    whole = len(images) // size * size
    starts = [size * i % whole for i in range(count)]
    return [{"input": images[i : i + size], "target": labels[i : i + size]} for i in starts]


def train(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    """Losses of all steps, and of images that were held out, before and after."""
    session = onnxruntime.InferenceSession(folder / "step.onnx")
    names = [output.name for output in session.get_outputs()]
    tensors, digits = dict(np.load(folder / "arguments.npz")), np.load(folder / "digits.npz")
    size = len(tensors["input"])

    def step(batch: Arrays, rate: np.ndarray) -> Arrays:
        given = {**tensors, **batch, "lr": rate}
        return dict(zip(names, session.run(None, given), strict=True))

    def held_out() -> float:
        """The mean loss of steps at rate 0, which change nothing."""
        images, labels = digits["held_out"], digits["held_out_labels"]
        each = batches(images, labels, size, len(images) // size)
        return float(np.mean([step(batch, np.array(0.0))["loss"] for batch in each]))

    losses, before = [], held_out()
    for batch in batches(digits["images"], digits["labels"], size, steps):
        out = step(batch, tensors["lr"])
        losses.append(float(out["loss"]))
        tensors |= {name: out[f"new.{name}"] for name in tensors if f"new.{name}" in out}
    return losses, [before, held_out()]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--steps", type=int, default=2000)
    chosen = options.parse_args()
    losses, (before, after) = train(chosen.folder, chosen.steps)
    for i in range(0, len(losses), max(1, len(losses) // 10)):
        print(f"step {i:5}  loss {losses[i]:.4f}")
    print(f"loss of held-out digits: {before:.4f} before, {after:.4f} after")


if __name__ == "__main__":
    main()
