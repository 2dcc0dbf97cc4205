"""Kernels of a step on the CPU: what each writes over, and the order in which they run.

Inductor takes the update of a parameter for a reader of all that must be computed before it. So in
a step no kernel would write a result over what nothing else reads any more, and an order of kernels
would be chosen as if none did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import networkx as nx
from torch._inductor import memory
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.dependencies import MemoryDep, WeakDep
from torch._inductor.scheduler import (
    BaseSchedulerNode,
    FusedSchedulerNode,
    OutputNode,
    SchedulerBuffer,
    SchedulerNode,
)
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

try:
    from torch._inductor.custom_graph_pass import CustomSchedulerPass
except ImportError:  # torch 2.11
    CustomSchedulerPass = CustomGraphPass  # type: ignore[misc,assignment]

Nodes = list[BaseSchedulerNode]
Parts = dict[str, BaseSchedulerNode]


class StepKernels(CustomSchedulerPass):  # type: ignore[misc]
    """All of this module, in the form that Inductor takes; its own reordering has to be off."""

    def __call__(self, nodes: Nodes) -> Nodes:
        """Edits who reads what, and returns the nodes in their order."""
        for node in nodes:
            forget_orders(node)
        over: dict[str, str] = {}
        for node in nodes:
            over |= write_over(node)
        return in_little_memory(nodes, over) if nodes else nodes

    def uuid(self) -> bytes:
        """What the cache of compiled code knows it by."""
        return bytes(get_hash_for_files((__file__,)))


def forget_orders(node: BaseSchedulerNode) -> None:
    """Leaves among the readers of its buffers those that read them.

    A kernel that only has to run later, because it changes a parameter in place, is kept by its
    dependencies.
    """
    for buffer in node.get_outputs():
        buffer.users = [user for user in buffer.users if not _only_later(user, buffer)]


def _only_later(user: Any, buffer: SchedulerBuffer) -> bool:
    if not user.is_weak:
        return False
    deps = (dep for dep in user.node.unmet_dependencies if dep.name == buffer.get_name())
    return all(isinstance(dep, WeakDep) and dep.is_fake for dep in deps)


def write_over(node: BaseSchedulerNode) -> dict[str, str]:
    """Chooses for each buffer that a kernel is the last to read what is written over it.

    Before: `y = gelu(h); y_dot = h_dot * slope(h)`, one kernel that writes y beside h, which y_dot
    reads as well. After: `y_dot` over h_dot first, then `y` over h.

    Args:
        node: a kernel, of ops in an order that may change.

    Returns:
        Names: of what is written, with that of what it is written over. Inductor does so, as no
        other reader is left among the users of the latter.
    """
    parts = {part.get_name(): part for part in node.get_nodes()}
    if not all(_is_loop(part) for part in parts.values()):
        return {}
    buffers = node.scheduler.name_to_buf
    writers = {name: _writers(name, node, parts) for name in _read_from_outside(node)}
    order = _order(node, parts)
    chosen: dict[str, str] = {}
    for name in sorted(writers, key=lambda name: len(writers[name])):
        readers = {user.get_name() for user in buffers[name].users}
        for writer in writers[name]:
            (result,) = parts[writer].get_outputs()
            others = readers - {writer}
            too_early = any(nx.has_path(order, writer, other) for other in others)
            if result.get_name() in chosen or too_early:
                continue
            order.add_edges_from((other, writer) for other in others)
            chosen[result.get_name()] = name
            buffers[name].users = [u for u in buffers[name].users if u.get_name() == writer]
            break
    if chosen and _movable(node):
        places = {name: i for i, name in enumerate(parts)}
        names = nx.lexicographical_topological_sort(order, places.__getitem__)
        node.snodes[:] = [parts[name] for name in names]  # type: ignore[attr-defined]
    return chosen


def _is_loop(part: BaseSchedulerNode) -> bool:
    device = part.get_device()
    on_cpu = device is not None and device.type == "cpu"
    return isinstance(part, SchedulerNode) and not part.is_template() and on_cpu


def _movable(node: BaseSchedulerNode) -> bool:
    """Whether the ops of a kernel are one loop, or one after another: their order is a list."""
    return type(node) is FusedSchedulerNode


def _read_from_outside(node: BaseSchedulerNode) -> list[str]:
    own = node.get_buffer_names()
    names = (dep.name for dep in node.read_writes.reads if dep.name not in own)
    return [name for name in dict.fromkeys(names) if name in node.scheduler.name_to_buf]


def _writers(name: str, node: BaseSchedulerNode, parts: Parts) -> list[str]:
    """The ops that may write over a buffer, the last one first."""
    scheduler = node.scheduler
    buffer = scheduler.name_to_buf[name]
    mutated = name in scheduler.mutation_renames or name in scheduler.mutation_real_name
    reads = {dep for part in parts.values() for dep in part.read_writes.reads if dep.name == name}
    alike = len(reads) == 1 and isinstance(next(iter(reads)), MemoryDep)
    if mutated or not alike or not _only_in(buffer, parts):
        return []
    able = {user.get_name() for user in buffer.users if user.can_inplace}
    return [part for part in reversed(parts) if part in able and _fits(parts[part], buffer, parts)]


def _only_in(buffer: SchedulerBuffer, parts: Parts) -> bool:
    """Whether nothing but some ops reads a buffer."""
    users = buffer.users
    return all(not isinstance(user.node, OutputNode) and user.get_name() in parts for user in users)


def _fits(part: BaseSchedulerNode, buffer: SchedulerBuffer, parts: Parts) -> bool:
    """Whether the result of an op is kept, and has the size and the dtype of a buffer."""
    outputs = part.get_outputs()
    if len(outputs) != 1 or _only_in(outputs[0], parts) or outputs[0].get_mutations():
        return False
    mine, other = outputs[0].node, buffer.node
    return bool(mine.get_dtype() == other.get_dtype() and mine.get_numel() == other.get_numel())


def _order(node: BaseSchedulerNode, parts: Parts) -> nx.DiGraph[str]:
    """Which of its ops a kernel has to run before which."""
    makers = {out.get_name(): name for name, part in parts.items() for out in part.get_outputs()}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(parts)
    for name, part in parts.items():
        before = {makers[dep.name] for dep in part.unmet_dependencies if dep.name in makers}
        graph.add_edges_from((other, name) for other in before - {name})
    if not _movable(node):
        nx.add_path(graph, parts)
    return graph


def in_little_memory(nodes: Nodes, over: Mapping[str, str]) -> Nodes:
    """The kernels in the order that keeps the fewest bytes alive, of those that Inductor knows.

    Args:
        nodes: kernels, in an order that is right.
        over: names of buffers with those of what they are written over, which take no memory.
    """
    scheduler = nodes[0].scheduler
    buffers = scheduler.name_to_buf
    inputs, outputs = (
        OrderedSet(names) for names in (V.graph.graph_inputs, V.graph.get_output_names())
    )
    _, freed = memory.prepare_planning_info(
        nodes, buffers, scheduler.name_to_fused_node, inputs, outputs
    )
    for node in nodes:
        parts = {part.get_name(): part for part in node.get_nodes()}
        for buffer in node.get_outputs():
            if len(parts) > 1 and buffer.users and _only_in(buffer, parts):
                buffer.mpi_buffer.size_alloc = buffer.mpi_buffer.size_free = 0
    for written, read in over.items():
        buffers[written].mpi_buffer.size_alloc = buffers[read].mpi_buffer.size_free = 0
    for node in nodes:
        node.mpi_node.size = sum(b.mpi_buffer.size_alloc for b in node.get_outputs())
    found = [
        nodes,
        memory.topological_sort_lpmf(nodes, freed, buffers, outputs),
        memory.topological_sort_bfs(nodes),
        memory.topological_sort_dfs(nodes),
    ]
    orders = [order for each in found for order in (each, late(each))]
    return min(orders, key=lambda order: memory.estimate_peak_memory(order, freed, outputs)[0])


def late(nodes: Nodes) -> Nodes:
    """Puts kernels that take more memory than they free, as draws do, before their first reader.

    Before: `v1 = draw(); v2 = draw(); y = x @ v1; z = y @ v2`. After:
    `v1 = draw(); y = x @ v1; v2 = draw(); z = y @ v2`.
    """
    order: Nodes = []  # the last one first
    for node in reversed(nodes):
        planned = node.mpi_node
        last_read = (b for b in planned.pred_buffers if b.mpi_buffer.succ_nodes.isdisjoint(order))
        frees = sum(buffer.mpi_buffer.size_free for buffer in last_read)
        readers = [i for i, other in enumerate(order) if other in planned.succ_nodes]
        is_late = readers and planned.size >= frees
        order.insert(readers[-1] + 1 if is_late else len(order), node)
    return order[::-1]
