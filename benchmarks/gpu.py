"""Times of training steps on a GPU: runs of step.py that compile beside each other.

    python benchmarks/gpu.py [--only mlp:64:tf32,cnn:1024:bfloat16] [--out docs/results]

Compiled one after another they would keep the GPU for an hour, idle most of it. All start at once,
and are timed one by one when the last of them has compiled. What each says is in `runs/gpu`. An
entry that takes longer than `--limit` to compile is left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from results import RESULTS
from step import COMPILED
from works import PAPER

STEP, LOGS = Path(__file__).with_name("step.py"), Path("runs/gpu")
FEW = "base,backprop-compiled,fgd rank-one,fgd normal"
SOME = f"{FEW},backprop,fgd rademacher,fgd normal regenerated,torch-jvp-randn-compiled"
ALL = f"{SOME},torch-jvp,forward-ad,jax-jvp"
LARGE = ("resnet18:32:{}", "resnet18:256:{}", "vit-block:8:{}", "vit-block:64:{}")
LARGE += ("gpt2-block:8:{}", "gpt2-block:64:{}")
ENTRIES = {
    **{f"mlp-depth-100:{batch}:{kind}": FEW for batch, kind in ((64, "tf32"), (1024, "bfloat16"))},
    **{entry.format(kind): SOME for kind in ("tf32", "bfloat16") for entry in LARGE},
    **{f"mlp-depth-10:{b}:{kind}": SOME for kind in ("tf32", "bfloat16") for b in (64, 1024)},
    **{f"{w}:{b}:{k}": SOME for w in PAPER for b, k in ((1024, "tf32"), (64, "bfloat16"))},
    **{f"{w}:{b}:{k}": ALL for w in PAPER for b, k in ((64, "tf32"), (1024, "bfloat16"))},
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default=",".join(ENTRIES), help="work:batch:dtype, some of them")
    options.add_argument("--mode", default="reduce-overhead", help="torch.compile's")
    options.add_argument("--limit", type=float, default=900, help="seconds for compilation")
    options.add_argument("--out", type=Path, default=RESULTS)
    options = options.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    runs = {entry: start(entry, options) for entry in options.only.split(",")}
    latest = time.monotonic() + options.limit
    while time.monotonic() < latest and not all(
        compiled(entry) or run.poll() is not None for entry, run in runs.items()
    ):
        time.sleep(1)
    for entry, run in runs.items():
        if not compiled(entry):
            run.kill()
    failed = [entry for entry, run in runs.items() if run.wait()]
    for entry in failed:
        print(f"{entry} failed:\n{log(entry).read_text()[-3000:]}", flush=True)
    sys.exit(bool(failed))


def start(entry: str, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process for one entry, with products measured by itself."""
    work, batch, dtype = entry.split(":")
    arguments = {"--works": work, "--batch": batch, "--dtype": dtype, "--methods": ENTRIES[entry]}
    arguments |= {"--mode": options.mode, "--device": "cuda", "--out": str(options.out)}
    words = [word for pair in arguments.items() for word in pair]
    costs = {"FWDCOMPILE_COSTS": str(LOGS / f"{entry}.costs.json")}
    # as many processes as there are entries share the cores, and JAX would take the GPU's memory
    few = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with log(entry).open("w") as told:
        return subprocess.Popen(
            [sys.executable, str(STEP), *words, "--turns", str(LOGS / "turns")],
            env={**os.environ, **costs, **few},
            stdout=told,
            stderr=subprocess.STDOUT,
        )


def compiled(entry: str) -> bool:
    """Whether a run has compiled all that it times."""
    return COMPILED in log(entry).read_text()


def log(entry: str) -> Path:
    """What a run says."""
    return LOGS / f"{entry}.log"


if __name__ == "__main__":
    main()
