"""Passes over the graph of a step that torch.compile has made and Inductor is about to lower."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._ops import OpOverload

aten = torch.ops.aten
# so few parts are in so few kernels that copies would not pay
FEW = 8
_VIEWS = aten.reshape.default, aten.view.default, aten._unsafe_view.default
_PRODUCTS = aten.mm.default, aten.addmm.default


class StepPasses(CustomGraphPass):  # type: ignore[misc]
    """All of them, in the form that Inductor takes."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrites the graph in place."""
        sums_of_products(graph)
        addends_on_the_way(graph)
        parts_apart(graph)
        images_in_order(graph)

    def uuid(self) -> bytes:
        """What the cache of compiled code knows them by."""
        return bytes(get_hash_for_files((__file__,)))


def sums_of_products(graph: fx.Graph) -> None:
    """Adds two products before they are viewed, so that the second is added onto the first.

    Before: `view(mm(x_dot, w)) + view(addmm(b_dot, x, w_dot))`, which keeps both until a kernel
    adds them. After: `view(mm(x_dot, w) + addmm(b_dot, x, w_dot))`, of which Inductor makes an
    addmm.
    """
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        products = [_viewed_product(arg) for arg in node.args]
        if len(products) != 2 or node.kwargs or None in products or products[0] is products[1]:
            continue
        first, second = products
        if first.meta["val"].shape != second.meta["val"].shape:  # type: ignore[union-attr]
            continue
        with graph.inserting_before(node):
            total = graph.call_function(aten.add.Tensor, (first, second))
        total.meta = dict(first.meta)  # type: ignore[union-attr]
        views = node.all_input_nodes
        node.target, node.args = aten.reshape.default, (total, [*node.meta["val"].shape])
        for view in views:
            graph.erase_node(view)


def _viewed_product(arg: object) -> fx.Node | None:
    """The product of which a node is the only view, and which has no other use."""
    if not isinstance(arg, fx.Node) or arg.target not in _VIEWS or len(arg.users) != 1:
        return None
    (source,) = arg.all_input_nodes
    return source if source.target in _PRODUCTS and len(source.users) == 1 else None


def addends_on_the_way(graph: fx.Graph) -> None:
    """Keeps what is computed element by element out of addmm, which wants its addend in memory.

    Before: `mm(x, w) + u * v`, of which Inductor makes an addmm for the CPU. After:
    `mm(x, w) - -(u * v)`, which it leaves to the kernel that reads the sum.
    """
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        terms = {getattr(arg, "target", None): arg for arg in node.args}
        if terms.keys() != {aten.mm.default, aten.mul.Tensor} or node.kwargs:
            continue
        product, addend = terms[aten.mm.default], terms[aten.mul.Tensor]
        # what is added to floats as bytes or bools has no negative of its own
        if addend.meta["val"].dtype == product.meta["val"].dtype:
            with graph.inserting_before(node):
                negative = graph.call_function(aten.neg.default, (addend,))
            negative.meta = dict(addend.meta)
            node.target, node.args = aten.sub.Tensor, (product, negative)


def parts_apart(graph: fx.Graph) -> None:
    """Gives the directions that a step draws together memory of their own, on the CPU.

    Before: `split_with_sizes(numbers, ...)`, views that each kernel reads at a place of its own,
    so that layers which are alike have kernels which are not. After:
    `split_with_sizes_copy(numbers, ...)`: one kernel is compiled for all of them.
    """
    for node in graph.find_nodes(op="call_function", target=aten.split_with_sizes.default):
        drawn, sizes = node.args[:2]
        on_cpu = drawn.meta["val"].device.type == "cpu"
        if on_cpu and drawn.target is aten.as_strided.default and len(sizes) > FEW:
            node.target = _as_it_is(aten.split_with_sizes_copy.default)


def images_in_order(graph: fx.Graph) -> None:
    """Has images with channels last put in order before they are flattened, on the CPU.

    Before: `reshape(clone(image), [n, m])`, inlined into a loop over m, which reads numbers one by
    one. After: `reshape(as_strided(clone(image), ...), [n, m])`: a copy that vectorises.
    """
    for node in graph.find_nodes(op="call_function", target=aten.clone.default):
        image = node.meta["val"]
        flat = [u for u in node.users if u.target in _VIEWS and u.meta["val"].ndim == 2]
        known = all(isinstance(size, int) for size in image.shape)
        if image.device.type == "cpu" and image.ndim > 2 and flat and known:
            with graph.inserting_after(node):
                args = node, [*image.shape], [*image.stride()]
                copy = graph.call_function(aten.as_strided.default, args)
            copy.meta = dict(node.meta)
            for user in flat:
                user.replace_input_with(node, copy)


def _as_it_is(op: OpOverload) -> OpOverload:
    """The op as a call: Inductor would want it decomposed, into the views again."""
    from torch._inductor.lowering import lowerings, make_fallback

    if op not in lowerings:
        make_fallback(op, warn=False, override_decomp=True)  # type: ignore[no-untyped-call]
    return op
