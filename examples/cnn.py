"""Figure 5: the convolution net of four layers of 64 channels on MNIST.

    python examples/cnn.py --data-root DIR

Five runs of each method at the paper's learning rate of 2e-4.
"""

from __future__ import annotations

from mnist import Experiment, script

from fwdcompile.models import cnn

EXPERIMENTS = (Experiment("cnn", cnn, 2e-4, 400, 50),)

if __name__ == "__main__":
    script(__doc__, "figure-5", *EXPERIMENTS)
