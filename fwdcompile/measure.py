"""How steps are measured: time by paired turns, memory by its peak in a process of its own.

On the CPU the peak is the kernel's high-water mark of resident memory, set back once everything is
compiled, less what was resident before the measured steps. On CUDA it is what the caching
allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3
STEPS_EACH = 3
MIB = 2**20
# what a step frees goes back to the kernel at once, so that resident is what is live
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MKL_DISABLE_FAST_MM": "1",
}
# the same memory serves the next step: handing it back costs thousands of page faults a step
KEEPING = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4000000000"}


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all its work; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Times a step.

    Args:
        run: does one step.
        repeats: steps between two looks at the clock.
        device: what the step runs on.

    Returns:
        Mean seconds of a step.

    Example:
        >>> timed(lambda: fgd.step(x, target), 10, x.device)
    """
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - began) / repeats


def take_turns(
    runs: dict[str, Callable[[], Any]],
    inner: int,
    device: torch.device,
    pairs: int,
    pause: float = 0.0,
) -> dict[str, list[float]]:
    """Times several methods in turn, so that what slows the machine for a while slows all of them.

    Args:
        runs: one step of each method, by name.
        inner: steps a turn.
        device: what the steps run on.
        pairs: turns that each method takes, after `WARM_UP` steps that do not count.
        pause: seconds of rest before each turn, and a step after it that does not count.

    Returns:
        For each method the seconds of a step, one number a turn.

    Example:
        >>> turns = take_turns({"base": base, "fgd": step}, 1, torch.device("cpu"), 20)
        >>> ratio(turns, "fgd", "base")
    """
    for run in runs.values():
        timed(run, WARM_UP, device)
    turns: dict[str, list[float]] = {method: [] for method in runs}
    for _ in range(pairs):
        for method, run in runs.items():
            if pause:
                time.sleep(pause)
                run()
            turns[method].append(timed(run, inner, device))
    return turns


def ratio(turns: dict[str, list[float]], method: str, other: str) -> float:
    """The time of one method relative to another's.

    Args:
        turns: seconds a step by method, as from `take_turns`.
        method: above the line.
        other: below the line.

    Returns:
        The median over paired turns of their quotients.
    """
    pairs = zip(turns[method], turns[other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def resident_peak(run: Callable[[], Any], settle: Callable[[], Any] = gc.collect) -> int:
    """The peak of a step's memory on the CPU, by the count of Linux.

    Args:
        run: does one step, and has done some before.
        settle: frees what earlier steps left and what shall not count as there before.

    Returns:
        Bytes that `STEPS_EACH` steps hold at most beyond what is resident before them. Exact to a
        few pages in a process that was started with `ALLOCATOR`, as by `in_fresh_process`.
    """
    settle()
    ctypes.CDLL(None).malloc_trim(0)
    # 5 sets the high-water mark back to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(STEPS_EACH):
        run()
    return max(0, _status("VmHWM") - before)


def cuda_peak(run: Callable[[], Any], settle: Callable[[], Any] = gc.collect) -> int:
    """The peak of a step's memory on the GPU, by the count of torch's own allocator.

    Arguments and result as for `resident_peak`; no other process is needed.
    """
    settle()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(STEPS_EACH):
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bytes_written(run: Callable[[], Any], repeats: int) -> float:
    """Bytes a step that this process writes, sockets and files, as the Linux kernel counts them.

    Args:
        run: does one step.
        repeats: steps to take the mean over.

    Example:
        >>> bytes_written(lambda: fgd.step(x, target), 20)
    """

    def total() -> int:
        return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])

    before = total()
    for _ in range(repeats):
        run()
    return (total() - before) / repeats


def in_fresh_process(
    script: str, *arguments: str, environment: Mapping[str, str] = ALLOCATOR
) -> Any:
    """Runs a script in a new process, where nothing that ran before has moved a peak or a clock.

    Args:
        script: path of a Python file.
        arguments: of its command line.
        environment: variables beside those of this process: `ALLOCATOR` for memory, `KEEPING` for
            time.

    Returns:
        What its last line of output says as JSON.

    Raises:
        CalledProcessError: the script failed; what it said is on the standard error.

    Example:
        >>> in_fresh_process(__file__, "--one", "mlp", "64")
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """Bytes of a field that Linux tells in kibibytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(field + ":"))
    return int(found.split()[1]) * 1024
