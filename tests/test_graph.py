from __future__ import annotations

from pathlib import Path

import networkx as nx
import torch
from nets import Mlp

import fwdcompile
from fwdcompile.graph import critical_path, draw, live_bytes, peak_bytes


def test_graph_holds_the_program(tmp_path: Path) -> None:
    fwd = fwdcompile.transform(Mlp())
    graph = fwd.lower(torch.zeros(4, 6), tangents=["fc1.weight"]).graph()
    assert nx.is_directed_acyclic_graph(graph)
    roles = nx.get_node_attributes(graph, "role")
    assert roles["tanh"] == "primal"
    assert roles["tanh_dot"] == "tangent"
    assert graph.nodes["tanh_dot"]["of"] == "tanh"
    assert graph.nodes["linear"]["shape"] == (4, 8)
    assert "nets.py" in graph.nodes["tanh"]["source"]
    draw(graph, tmp_path / "program.svg")
    assert "<svg" in (tmp_path / "program.svg").read_text()


def test_live_memory_and_critical_path_of_a_chain() -> None:
    fwd = fwdcompile.transform(lambda x: x.sin().exp())
    graph = fwd.lower(torch.zeros(10), tangents="inputs").graph()
    # sin | cos glue | sin_dot | exp | exp_dot: 40 bytes each, dead after their last use.
    live = live_bytes(graph)
    assert live["sin"] == 40
    assert live["sin_dot"] == 120
    assert live["exp"] == 120
    assert live["exp_dot"] == 120
    assert peak_bytes(graph) == 120
    path = critical_path(graph)
    assert path[0] == "x"
    assert path[-1] == "exp_dot"
