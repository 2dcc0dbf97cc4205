"""Labels: what the nodes of a transformed program are for, and what they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import getitem

from torch import fx

from .program import op_name, origin, rename

# The tangent of a node: a node, one entry for each output of an op of several, or none.
Dot = fx.Node | tuple[fx.Node | None, ...] | None


def mark(node: fx.Node, dots: Sequence[Dot], added: Iterable[fx.Node]) -> None:
    """Labels what was added for the tangents of a node: those themselves, and glue."""
    tangents = _tangents(node, dots)
    for one in added:
        of, direction = tangents.get(one, (node.name, 0))
        role = "tangent" if one in tangents else "glue"
        one.meta |= {"role": role, "of": of, "direction": direction}
        one.meta |= origin(node)


def _tangents(node: fx.Node, dots: Sequence[Dot]) -> dict[fx.Node, tuple[str, int]]:
    """The tangents of a node, or of its items, with the primal's name and their direction."""
    items = {user.args[1]: user.name for user in node.users if user.target is getitem}
    found: dict[fx.Node, tuple[str, int]] = {}
    for k, dot in enumerate(dots):
        if isinstance(dot, fx.Node):
            found[dot] = (node.name, k)
        for i, part in enumerate(dot if isinstance(dot, tuple) else ()):
            if part is not None and i in items:
                found[part] = (items[i], k)
    return found


def rename_all(
    graph: fx.Graph, primals: Mapping[fx.Node, fx.Node], ending: Callable[[int], str]
) -> None:
    """Primals keep their names, tangents get `<primal>_dot`, all else what is left.

    Args:
        graph: of labelled nodes.
        primals: the copies of a program's nodes, by these.
        ending: what the name of a tangent in a direction has behind that of its primal.
    """
    names = {copy: node.name for node, copy in primals.items()}
    for node in graph.nodes:
        if node.meta.get("role") == "tangent":
            factor = f"_{node.meta['factor']}" if node.meta.get("factor") else ""
            names[node] = node.meta["of"] + ending(node.meta["direction"]) + factor
    glue = (node for node in graph.nodes if node.meta.get("role") == "glue")
    names |= {node: _glue_name(node, names) for node in glue if node not in names}
    rename(graph, names)


def _glue_name(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.target is not getitem:
        return op_name(node)
    source, index = node.args
    return f"{names.get(source, op_name(source))}_out{index}"  # type: ignore[call-overload,arg-type]
