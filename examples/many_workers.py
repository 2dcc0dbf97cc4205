"""Many workers train by forward gradients, and go on when one of them dies.

    torchrun --nproc-per-node 2 --max-restarts 3 examples/many_workers.py [--steps 500] [--out DIR]

In each step a worker tells the others six numbers. Worker 0 writes those of all steps to a history
and, now and then, a checkpoint. After a restart all workers load the checkpoint and replay what the
history has behind it: no step is computed again, and the weights are those of a run without fault.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from torch import manual_seed, nn
from torch.nn.functional import cross_entropy

from fwdcompile import Rademacher, checkpoint
from fwdcompile.data import batches, load
from fwdcompile.distributed import DistributedFGD, Workers
from fwdcompile.workers import digest, joined

BATCH = 64


def train(out: Path, steps: int, every: int) -> float:
    """Trains on scikit-learn's digits; returns the share of held-out digits that it tells."""
    workers, data = Workers("data"), load("digits")
    manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, data.classes))
    source = Rademacher(rank_one=True)
    fgd = DistributedFGD(model, cross_entropy, lr=0.02, directions=source, workers=workers,
                         history=out / "history", compile=False)  # fmt: skip
    go_on(model, fgd, out)
    start = fgd.iteration
    for x, y in islice(batches(data.train, BATCH, 0, start), steps - start):
        fgd.step(workers.part(x), workers.part(y))
        if fgd.iteration % every == 0 and workers.rank == 0:
            state = {"model": model.state_dict(), "fgd": fgd.state_dict()}
            checkpoint.save(out / "checkpoint.pt", state)
    fgd.close()
    images, labels = data.validation
    right = float((model(images).argmax(1) == labels).float().mean())
    if workers.rank == 0:
        told = f"went on at {start}, " if start else ""
        print(f"{told}{fgd.iteration} steps, accuracy {right:.3f}, {digest(model.parameters())}")
    return right


def go_on(model: nn.Module, fgd: DistributedFGD, out: Path) -> None:
    """To where the run was: the last checkpoint, and then the steps of the history."""
    if state := checkpoint.load(out / "checkpoint.pt"):
        model.load_state_dict(state["model"])
        fgd.load_state_dict(state["fgd"])
    if (out / "history").exists():
        fgd.replay(unfinished=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--out", type=Path, default=Path("runs/many-workers"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with joined("cpu"):
        train(chosen.out, chosen.steps, chosen.every)
