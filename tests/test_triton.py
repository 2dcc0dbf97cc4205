"""What Inductor writes for a GPU has the numbers of the CPU: `interpreted.py` runs it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fwdcompile.measure import in_fresh_process

CASES = [
    "mlp/rank-one",
    "mlp/regenerated",
    "mlp/activations",
    "tied/rank-one",
    "block/normal",
    "lstm/gradient",
    "small cnn/normal",
    "small cnn/rank-one",
]


@pytest.fixture(scope="module")
def found() -> Any:
    pytest.importorskip("triton")
    script = str(Path(__file__).with_name("interpreted.py"))
    return in_fresh_process(script, *CASES, environment={"TRITON_INTERPRET": "1"})


@pytest.mark.compiled
@pytest.mark.parametrize("case", CASES)
def test_a_step_for_a_gpu(case: str, found: Any) -> None:
    assert "failed" not in found[case], found[case]["failed"]
    assert found[case]["kernels"] > 0 and found[case]["error"] < 1e-12
