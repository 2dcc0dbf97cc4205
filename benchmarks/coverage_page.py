"""Writes docs/coverage.md: every row of the table, its formula and the samples that reach it.

python benchmarks/coverage_page.py
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from functools import partial
from pathlib import Path

import fwdcompile.rules  # noqa: F401  (fills the table)

from fwdcompile import rule

ROOT = Path(__file__).parents[1]
REACH = ROOT / "tests/rules/reach.json"
WIDTH, SHOWN = 90, 3


def formula(row: rule.Rule) -> str:
    """The source of a row's terms: a lambda's body, or the name of a function."""
    if row.word in ("linear", "multilinear"):
        return "op of the tangents of " + ", ".join(row.wrt)
    if row.word == "not_implemented":
        return row.reason
    return "; ".join(_term(name, term) for name, term in row.terms.items())


def _term(name: str, term: rule.Term) -> str:
    named = f"{name}: " if name else ""
    function = term.func if isinstance(term, partial) else inspect.unwrap(term)
    source = re.sub(r"\s+", " ", inspect.getsource(function))
    # of several lambdas in one row, the one given for this argument
    given = re.search(rf'\b{name}"?\s?[=:]\s?(?=lambda)', source)
    _, *body = re.split(r"lambda[^:]*: ?", source[given.end() if given else 0 :], maxsplit=1)
    if function.__name__ != "<lambda>" or not body:
        return f"{named}`{function.__name__}`"
    return f"{named}`{_balanced(body[0])[:WIDTH].strip()}`"


def _balanced(text: str) -> str:
    """The text up to the comma or bracket that ends its expression."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0 or (char == "," and not depth):
            return text[:i]
    return text


def page() -> str:
    """The page's text."""
    reached = json.loads(REACH.read_text())
    own = (row for row in rule.table.values() if row.where.startswith("rules/"))
    rows = sorted(own, key=lambda row: str(row.op))
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "rules").glob("*.py"))
    words = sorted({row.word for row in rows})
    counts = ", ".join(f"{sum(row.word == word for row in rows)} {word}" for word in words)
    table = [_line(row, reached.get(str(row.op), {}).get("entries", [])) for row in rows]
    head = [
        "# The rule table",
        "",
        f"{len(rows)} rows ({counts}) in {lines} lines of `rules/`.",
        "`make coverage` writes this page.",
        "Entries are those of torch's operator database whose samples reach the row; a row without",
        "one has a sample in `tests/rules/`.",
        "",
        "| op | word | formula | where | entries |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *table, *_refused(), ""])


def _refused() -> list[str]:
    """The entries that fwdcompile refuses, each with its reason."""
    sys.path[:0] = [str(ROOT / "tests/rules"), str(ROOT / "tests")]
    opinfo = importlib.import_module("opinfo")
    reasons: dict[str, str] = getattr(opinfo, "REFUSED", {})
    lines = [f"| {name} | {reason} |" for name, reason in sorted(reasons.items())]
    return (
        ["", "## Entries that are refused", "", "| entry | why |", "|---|---|", *lines]
        if lines
        else []
    )


def _line(row: rule.Rule, entries: list[str]) -> str:
    more = f" and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    text = formula(row).replace("|", "\\|")
    shown = ", ".join(entries[:SHOWN]) + more
    return f"| {row.op} | {row.word} | {text} | {row.where} | {shown} |"


if __name__ == "__main__":
    (ROOT / "docs/coverage.md").write_text(page())
