from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the suite says the same of the same code; an example's time says nothing on a shared machine
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--regenerate-golden", action="store_true", help="write tests/golden anew, do not compare"
    )


@pytest.fixture(autouse=True, scope="session")
def _rare_collections() -> None:
    """Captures make many objects: looking for dead ones among all of a suite's takes long."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def _seeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FWDCOMPILE_COSTS", str(tmp_path / "costs.json"))
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
