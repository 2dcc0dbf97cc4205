"""Where the time of one step goes: its slowest calls, by torch's profiler.

python benchmarks/profile_step.py [--works mlp] [--device cuda --dtype tf32] [--out docs/results]

On a GPU the time is that of its kernels.
"""

from __future__ import annotations

import argparse

import torch
from results import DTYPES, THREADS, entry_name, parser, prepare
from steps import STEPS
from torch.profiler import ProfilerActivity, profile
from works import PAPER, WORKS

from fwdcompile.costs import device_name
from fwdcompile.measure import synchronize

METHODS = ("backprop-compiled", "fgd rademacher", "fgd rank-one")
WARM_UP, REPEATS, SHOWN = 5, 20, 7


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(works=PAPER, methods=METHODS)
    options = options.parse_args()
    prepare(options.dtype)
    torch._inductor.config.cpp.enable_kernel_profile = True
    parts = [part(work, method, options) for work in options.works for method in options.methods]
    machine = f"{device_name(torch.device(options.device))}, torch {torch.__version__}"
    threads = f", {THREADS} threads" if options.device == "cpu" else ""
    text = "\n".join([f"Self time of a step's slowest calls. {machine}{threads}.\n", *parts])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"profile-{options.device}.md").write_text(text)
    print(text)


def part(work: str, method: str, options: argparse.Namespace) -> str:
    """A table of the slowest calls of one method."""
    torch._dynamo.reset()
    batch, device = options.batch or WORKS[work].batch, torch.device(options.device)
    step = STEPS[method](WORKS[work].problem(batch, device, DTYPES[options.dtype], options.mode))
    for _ in range(WARM_UP):
        step()
    on_gpu = options.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], record_shapes=True) as found:
        for _ in range(REPEATS):
            step()
        synchronize(device)
    calls = found.key_averages(group_by_input_shape=True)
    times = [(c.self_device_time_total if on_gpu else c.self_cpu_time_total, c) for c in calls]
    times.sort(key=lambda pair: -pair[0])
    total = sum(time for time, _ in times)
    name = entry_name(work, batch, options.dtype, options.mode)
    rows = [f"| {name}, {method}: call | shapes | a step | ms a step | share |", "|---" * 5 + "|"]
    for time, call in times[:SHOWN]:
        shapes = ", ".join("x".join(map(str, s)) for s in call.input_shapes if s)
        count, ms, share = call.count / REPEATS, time / REPEATS / 1e3, time / total
        rows.append(f"| {_short(call.key)} | {shapes} | {count:g} | {ms:.3f} | {share:.0%} |")
    rows.append(f"| all | | | {total / REPEATS / 1e3:.3f} | |")
    return "\n".join(rows) + "\n"


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


if __name__ == "__main__":
    main()
