"""Where the time of one step goes: its slowest calls, by torch's profiler.

python benchmarks/profile_step.py [--out docs/results]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from results import RESULTS, THREADS
from steps import STEPS
from torch.profiler import ProfilerActivity, profile
from works import PAPER, WORKS

from fwdcompile.costs import device_name

METHODS = ("backprop-compiled", "fgd rademacher", "fgd rank-one")
WARM_UP, REPEATS, SHOWN = 5, 20, 7


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=RESULTS)
    out = options.parse_args().out
    torch.set_num_threads(THREADS)
    torch._inductor.config.cpp.enable_kernel_profile = True
    parts = [part(work, method) for work in PAPER for method in METHODS]
    machine = f"{device_name(torch.device('cpu'))}, {THREADS} threads, torch {torch.__version__}"
    text = "\n".join([f"Self time of a step's slowest calls. {machine}.\n", *parts])
    (out / "profile-cpu.md").write_text(text)
    print(text)


def part(work: str, method: str) -> str:
    """A table of the slowest calls of one method."""
    torch._dynamo.reset()
    device = torch.device("cpu")
    step = STEPS[method](WORKS[work].problem(WORKS[work].batch, device, torch.float32))
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        for _ in range(REPEATS):
            step()
    calls = found.key_averages(group_by_input_shape=True)
    calls = sorted(calls, key=lambda call: call.self_cpu_time_total, reverse=True)
    total = sum(call.self_cpu_time_total for call in calls)
    rows = [f"| {work}, {method}: call | shapes | ms a step | share |", "|---|---|---|---|"]
    for call in calls[:SHOWN]:
        shapes = ", ".join("x".join(map(str, s)) for s in call.input_shapes if s)
        ms, share = call.self_cpu_time_total / REPEATS / 1e3, call.self_cpu_time_total / total
        rows.append(f"| {_short(call.key)} | {shapes} | {ms:.3f} | {share:.0%} |")
    return "\n".join(rows) + "\n"


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


if __name__ == "__main__":
    main()
