"""Exports a training step and the digits to a folder, for programs that have no fwdcompile.

    python examples/export_step.py DIR [--to onnx|inductor]

`train_without_torch.py DIR` then trains by onnxruntime, `cpp/train.cpp` by AOTInductor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fwdcompile
from fwdcompile import data

BATCH = 64


def fgd_of_digits() -> tuple[fwdcompile.FGD, data.Dataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    directions = fwdcompile.Rademacher(rank_one=True)
    fgd = fwdcompile.FGD(model, cross_entropy, lr=0.02, directions=directions, compile=False)
    return fgd, data.load("digits").centred()


def main(folder: Path, to: str = "onnx") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fgd, digits = fgd_of_digits()
    images, labels = digits.train
    path = folder / ("step.onnx" if to == "onnx" else "step.pt2")
    tensors = fgd.export(path, images[:BATCH], labels[:BATCH], to=to)
    if to == "onnx":
        np.savez(folder / "arguments.npz", **{name: x.numpy() for name, x in tensors.items()})
        held_out = dict(zip(("held_out", "held_out_labels"), digits.validation, strict=True))
        np.savez(folder / "digits.npz", images=images, labels=labels, **held_out)
    else:
        everything = {"arguments": list(tensors.values()), "images": images, "labels": labels}
        torch.save(everything, folder / "arguments.pt")


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--to", choices=("onnx", "inductor"), default="onnx")
    main(**vars(options.parse_args()))
