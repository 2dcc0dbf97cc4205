"""Measuring: clocks count steps, ratios pair turns, peaks are those of known tensors."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fwdcompile.measure import (
    ALLOCATOR,
    KEEPING,
    WARM_UP,
    in_fresh_process,
    ratio,
    take_turns,
    timed,
)

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_the_time_is_that_of_one_step() -> None:
    assert 0.01 <= timed(lambda: time.sleep(0.01), 5, CPU) < 0.04


def test_methods_take_turns_after_a_few_steps_that_do_not_count() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    turns = take_turns(runs, 2, CPU, 3)
    assert "".join(order) == "a" * WARM_UP + "b" * WARM_UP + "aabb" * 3
    assert {name: len(seconds) for name, seconds in turns.items()} == {"a": 3, "b": 3}


def test_a_pause_is_not_part_of_a_turn() -> None:
    turns = take_turns({"a": lambda: None}, 1, CPU, 2, pause=0.02)
    assert max(turns["a"]) < 0.02


def test_ratios_are_medians_over_paired_turns() -> None:
    # quotients 6, 1/2 and 1; that of the medians is 2
    turns = {"fgd": [6.0, 1.0, 4.0], "base": [1.0, 2.0, 4.0]}
    assert ratio(turns, "fgd", "base") == 1.0


KNOWN = """
import torch
from fwdcompile.measure import MIB, resident_peak

def three_after_two():
    a, b = torch.ones(8 * MIB), torch.ones(8 * MIB)
    del a
    c = torch.ones(8 * MIB)
    d = c + 1

kept = torch.ones(16 * MIB)
resident_peak(three_after_two)
for run in (lambda: torch.ones(16 * MIB), three_after_two, lambda: None):
    print(resident_peak(run) / MIB)
"""


@linux
def test_memory_counts_what_is_live_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KNOWN],
        env=os.environ | ALLOCATOR,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert [float(line) for line in done.stdout.split()] == pytest.approx([64, 96, 0], abs=2)


def test_a_fresh_process_answers_in_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "print('said before')\n"
        "print(json.dumps([sys.argv[1:], os.environ['MALLOC_TRIM_THRESHOLD_'], os.getpid()]))\n"
    )
    arguments, trim, pid = in_fresh_process(str(script), "--one", "mlp")
    assert (arguments, trim) == (["--one", "mlp"], ALLOCATOR["MALLOC_TRIM_THRESHOLD_"])
    assert pid != os.getpid()
    assert in_fresh_process(str(script), environment=KEEPING)[1] == "4000000000"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(subprocess.CalledProcessError):
        in_fresh_process(str(script))
