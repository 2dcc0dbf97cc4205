"""The program as a networkx graph: live memory, the critical path, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .program import Program, location, output_nodes, value


def program_graph(program: Program) -> nx.DiGraph[str]:
    """Builds the data-flow graph of a program.

    Returns:
        A directed graph with one node for each value, in program order. Node attributes: `op`,
        `role` (`input`, `primal`, `tangent` or `glue`), `of` (the primal a tangent belongs to),
        `shape`, `dtype`, `bytes`, `source` (the user's line) and `module`. An edge runs from each
        value to those computed from it.

    Example:
        >>> graph = fwd.graph()
        >>> [name for name, role in graph.nodes(data="role") if role == "tangent"]
    """
    graph: nx.DiGraph[str] = nx.DiGraph(outputs=[n.name for n in output_nodes(program.graph)])
    for node in program.graph.nodes:
        if node.op != "output":
            graph.add_node(node.name, **_attributes(node))
            graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)
    return graph


def live_bytes(graph: nx.DiGraph[str]) -> dict[str, int]:
    """Bytes of computed values that are alive right after each op, inputs not counted.

    A value lives from the op that makes it to its last use; outputs live to the end. Views count
    as if they had memory of their own, so this is an upper estimate for eager execution.
    """
    order = [n for n, role in graph.nodes(data="role") if role != "input"]
    place = {name: i for i, name in enumerate(order)}
    end = len(order) - 1
    alive = [0] * (len(order) + 1)
    for name in order:
        uses = [place[user] for user in graph.successors(name)]
        last = end if name in graph.graph["outputs"] else max(uses, default=place[name])
        alive[place[name]] += graph.nodes[name]["bytes"]
        alive[last + 1] -= graph.nodes[name]["bytes"]
    total, live = 0, {}
    for name, change in zip(order, alive, strict=False):
        total += change
        live[name] = total
    return live


def peak_bytes(graph: nx.DiGraph[str]) -> int:
    """The largest of `live_bytes`."""
    return max(live_bytes(graph).values(), default=0)


def critical_path(graph: nx.DiGraph[str]) -> list[str]:
    """The longest chain of ops that wait for each other, from an input to an output."""
    path: list[str] = nx.dag_longest_path(graph)
    return path


def draw(graph: nx.DiGraph[str], path: str | Path) -> None:
    """Draws primal and tangent side by side, one row for each primal op; needs matplotlib.

    Args:
        graph: from `program_graph`.
        path: where to write; the suffix (`.svg`, `.png`, `.pdf`) chooses the format.
    """
    from matplotlib.figure import Figure

    rows = _rows(graph)
    height = max(rows[name][1] for name in graph) + 1
    figure = Figure(figsize=(9, 1 + 0.28 * height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    for source, target in graph.edges:
        axes.annotate(
            "", rows[target], rows[source],
            arrowprops={"arrowstyle": "->", "color": "0.75", "lw": 0.7, "shrinkA": 8, "shrinkB": 8},
        )  # fmt: skip
    colours = {"input": "#eeeeee", "primal": "#cfe2f3", "tangent": "#fce5cd", "glue": "#fff8ee"}
    for name, spot in rows.items():
        role = graph.nodes[name]["role"]
        label = f"{name}  {list(graph.nodes[name]['shape'])}"
        box = {
            "boxstyle": "round,pad=0.25",
            "fc": colours.get(role, "#ffffff"),
            "ec": "0.6",
            "lw": 0.5,
        }
        axes.text(*spot, label, ha="center", va="center", fontsize=6, bbox=box)
    axes.set_xlim(-0.8, 2.8)
    axes.set_ylim(height, -1.5)
    axes.text(0, -1, "primal", ha="center", weight="bold")
    axes.text(1.6, -1, "tangent", ha="center", weight="bold")
    figure.savefig(path)


def _rows(graph: nx.DiGraph[str]) -> dict[str, tuple[float, float]]:
    """Where each value stands: primals left, tangents right of their primal, glue further right."""
    columns = {"tangent": 1.4, "glue": 2.2}
    spots: dict[str, tuple[float, float]] = {}
    taken: set[tuple[float, float]] = set()
    row = -1.0
    for name, data in graph.nodes(data=True):
        column = columns.get(data["role"], 0.0)
        if data["op"] == "placeholder" and data["of"]:
            column = 1.4
        wanted = spots.get(data["of"], (0.0, row))[1] if data["of"] else row + 1
        while (column, wanted) in taken:
            wanted += 1
        row = max(row, wanted)
        spots[name] = (column, wanted)
        taken.add(spots[name])
    return spots


def _attributes(node: fx.Node) -> dict[str, Any]:
    out = value(node)
    tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
    is_input = node.op == "placeholder"
    return {
        "op": node.op if is_input else str(node.target),
        "role": "input" if is_input else node.meta.get("role", "primal"),
        "of": node.meta.get("of", ""),
        "shape": tuple(out.shape) if isinstance(out, Tensor) else (),
        "dtype": str(out.dtype) if isinstance(out, Tensor) else type(out).__name__,
        "bytes": 0 if not isinstance(out, Tensor) else sum(x.numel() * x.itemsize for x in tensors),
        "source": location(node),
        "module": node.meta.get("module", ""),
    }
