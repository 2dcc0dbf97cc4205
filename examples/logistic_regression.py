"""Figure 3: logistic regression on MNIST, forward gradients beside backpropagation.

    python examples/logistic_regression.py --data-root DIR

Five runs of each method at the paper's learning rate of 1e-4.
"""

from __future__ import annotations

from mnist import Experiment, script

from fwdcompile.models import logistic_regression

EXPERIMENTS = (Experiment("logistic-regression", logistic_regression, 1e-4, 20_000, 500),)

if __name__ == "__main__":
    script(__doc__, "figure-3", *EXPERIMENTS)
