"""The documents show what the code does: their programs and numbers are checked, not trusted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_shows_the_program_its_example_prints(tmp_path: Path) -> None:
    example, program, *_ = blocks("README.md")
    script = tmp_path / "demo" / "net.py"
    script.parent.mkdir()
    script.write_text(example)
    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], check=True, capture_output=True, text=True
    ).stdout
    assert program in out


def test_readme_table_is_the_first_of_the_results_file() -> None:
    table, *_ = (ROOT / "docs/results/step-cpu.md").read_text().split("\n\n")
    assert table.startswith("| ms a step") and "| mlp |" in table and "fgd normal" in table
    assert f"\n\n{table}\n\n" in (ROOT / "README.md").read_text()


def test_walkthrough_shows_the_golden_program() -> None:
    golden = (ROOT / "tests/golden/tanh.py").read_text()
    body, table = blocks("docs/walkthrough.md")[-2:]
    assert body.strip() in golden
    assert table.strip() in golden
