"""Writes docs/reference.md: signatures and docstrings of all that users call.

python benchmarks/reference_page.py
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fwdcompile

ROOT = Path(__file__).parents[1]
PACKAGE, WIDTH = "fwdcompile", 100
# what users take from other modules than the package itself
MORE = {
    "fwdcompile.distributed": ("DistributedFGD", "DistributedForwardGradient", "Workers"),
    "fwdcompile.rule": (
        "linear", "multilinear", "pointwise", "zero", "jvp", "joint", "not_implemented",
    ),
    "fwdcompile.local": ("Local",),
    "fwdcompile.models": ("logistic_regression", "mlp", "cnn", "deep_mlp", "local_mlp"),
    "fwdcompile.measure": (
        "take_turns", "ratio", "timed", "resident_peak", "cuda_peak", "in_fresh_process",
    ),
}  # fmt: skip
HEAD = """# Reference

All that users call, with its signature and docstring; what a class has from another one is told
there. `Model` is an nn.Module, or a function of tensors and pytrees; `Tangents` are a mapping from
names to tensors, each like its primal, or to `RankOne`. `make reference` writes this page.
"""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")
ITEM = re.compile(r"^    (\*{0,2}\w+(?:, \w+)*): ")


def page() -> str:
    """The page's text."""
    members, told = {PACKAGE: fwdcompile.__all__} | MORE, set[Any]()
    return "\n".join(
        [HEAD, *(line for name in members for line in _module(name, members[name], told))]
    )


def _module(name: str, members: Collection[str], told: set[Any]) -> Iterator[str]:
    module = importlib.import_module(name)
    found = {each: getattr(module, each) for each in members}
    found = {each: thing for each, thing in found.items() if not inspect.ismodule(thing)}
    errors = [each for each, thing in found.items() if _is_error(thing)]
    yield f"## {name}\n"
    for each, thing in found.items():
        if each not in errors:
            yield from _entry(each, thing, "###")
            yield from _methods(each, thing, told)
    if errors:
        yield "### Errors\n"
        yield "\n".join(_error(found[each]) for each in errors) + "\n"


def _is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Exception)


def _error(thing: type) -> str:
    (base,) = thing.__bases__[:1]
    about = " ".join((inspect.getdoc(thing) or "").split())
    return f"- `{thing.__name__}` (a `{base.__name__}`): {about}"


def _methods(owner: str, thing: Any, told: set[Any]) -> Iterator[str]:
    """Public methods and properties of a class, those of its bases too unless they are `told`."""
    bases = [base for base in getattr(thing, "__mro__", ()) if base.__module__.startswith(PACKAGE)]
    for name in sorted({name for base in bases for name in vars(base)}):
        member = getattr(thing, name)
        public = name == "__call__" or not name.startswith("_")
        callable_or_property = inspect.isroutine(member) or isinstance(member, property)
        if public and callable_or_property and member.__doc__ and member not in told:
            told.add(member)
            yield from _entry(f"{owner}.{name}", member, "####")


def _entry(name: str, thing: Any, level: str) -> Iterator[str]:
    yield f"{level} {name}\n"
    if not isinstance(thing, property):
        yield f"```python\n{_signature(name.rsplit('.', 1)[-1], thing)}\n```\n"
    yield _markdown(inspect.getdoc(thing) or "") + "\n"


def _signature(name: str, thing: Any) -> str:
    """A signature as one would write it, on one line if it fits."""
    signature = inspect.signature(thing)
    given = [p for p in signature.parameters.values() if p.name != "self"]
    texts = [_parameter(one) for one in given]
    for place, one in enumerate(given):
        if one.kind is one.KEYWORD_ONLY:
            starred = any(p.kind is p.VAR_POSITIONAL for p in given[:place])
            texts[place:place] = [] if starred else ["*"]
            break
    returns = signature.return_annotation
    end = "" if inspect.isclass(thing) or returns is signature.empty else f" -> {returns}"
    line = f"{name}({', '.join(texts)}){end}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in texts), f"){end}"])


def _parameter(one: inspect.Parameter) -> str:
    stars = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
    about = "" if one.annotation is one.empty else f": {one.annotation}"
    if one.default is one.empty:
        return f"{stars}{one.name}{about}"
    default = getattr(one.default, "__qualname__", None) or repr(one.default)
    return f"{one.name}{about} = {default}"


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists, and its examples as code."""
    out: list[str] = []
    section = ""
    for line in doc.splitlines():
        if SECTION.match(line):
            section = line[:-1]
            out += [f"**{section}**", "", *(["```python"] if section == "Example" else [])]
        elif section and line and not line.startswith("    "):
            out += ["```", ""] if section == "Example" else []
            section = ""
            out.append(line)
        elif section == "Example":
            out.append(line[4:])
        elif section and ITEM.match(line):
            out.append(ITEM.sub(r"- `\1`: ", line))
        elif section and line:
            out.append(
                "  " + line.strip() if section not in ("Returns", "Yields") else line.strip()
            )
        else:
            out.append(line)
    if section == "Example":
        out.append("```")
    return "\n".join(out)


if __name__ == "__main__":
    (ROOT / "docs/reference.md").write_text(page())
