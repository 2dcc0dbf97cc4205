"""Runs a script or a module whose worker 1 is killed in the middle of a step, the first time."""

from __future__ import annotations

import os
import runpy
import signal
import sys

from torch import Tensor

from fwdcompile.workers import Workers, restarted

AT, TARGET = int(sys.argv.pop(1)), sys.argv.pop(1)
calls = iter(range(10_000))
gather = Workers.gather


def killed(self: Workers, numbers: Tensor) -> Tensor:
    if next(calls) == AT and self.rank == 1 and not restarted():
        print("worker 1 is killed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return gather(self, numbers)


if __name__ == "__main__":
    Workers.gather = killed  # type: ignore[method-assign]
    run = runpy.run_path if TARGET.endswith(".py") else runpy.run_module
    run(TARGET, run_name="__main__")
