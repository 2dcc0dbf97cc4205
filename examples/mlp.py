"""Figure 4: the MLP of 1024, 1024 and 10 units on MNIST at two learning rates.

    python examples/mlp.py --data-root DIR

Five runs of each method, 20,000 iterations as in the paper.
"""

from __future__ import annotations

from mnist import Experiment, script

from fwdcompile.models import mlp

EXPERIMENTS = (
    Experiment("mlp-2e-5", mlp, 2e-5, 20_000, 500),
    Experiment("mlp-2e-4", mlp, 2e-4, 20_000, 500),
)

if __name__ == "__main__":
    script(__doc__, "figure-4", *EXPERIMENTS)
