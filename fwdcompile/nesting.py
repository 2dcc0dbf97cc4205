"""A transform of a transform: how a transformed program is seen as a plain one."""

from __future__ import annotations

from dataclasses import replace

from torch.utils import _pytree as pytree

from .errors import TangentError
from .program import Kind, OutSpec, Program, Slot


def as_primal(program: Program, suffix: str = "_dot") -> Program:
    """A transformed program seen as a plain one, that is `(inputs, tangents) -> (out, out_dot)`.

    Args:
        program: a result of `transform` with one direction.
        suffix: what the names of tangents get behind their primal's name, as inputs and outputs.

    Raises:
        TangentError: an input or output of the model has such a name itself.
    """

    def plain(slots: tuple[Slot, ...], kind: Kind) -> tuple[Slot, ...]:
        writes = ("buffer", "input") if kind == "output" else ()
        taken = {slot.name for slot in slots if slot.kind not in ("tangent", *writes)}
        for slot in slots:
            if slot.kind == "tangent" and slot.name + suffix in taken:
                raise TangentError(
                    f"{kind} {slot.name + suffix!r} of {program.title} has the name of the tangent "
                    f"of {slot.name!r} in a transform of a transform: rename it"
                )
        return tuple(Slot(kind, s.name + suffix) if s.kind == "tangent" else s for s in slots)

    inputs, outputs = plain(program.inputs, "input"), plain(program.outputs, "output")
    tree, leaves = program.out_spec.tree, program.out_spec.leaves
    tangents = {slot.name for slot in program.outputs if slot.kind == "tangent"}
    dots = tuple(
        (True, name + suffix) if named and name in tangents else (False, None)
        for named, name in leaves
    )
    structure = pytree.tree_unflatten([0] * len(leaves), tree)
    pair = pytree.tree_structure((structure, structure))
    return replace(program, inputs=inputs, outputs=outputs, out_spec=OutSpec(pair, leaves + dots))


def tie(program: Program, suffix: str) -> Program:
    """Lets the tangents of the inner transform serve the outer one as well.

    Args:
        program: a transform of `as_primal(inner, suffix)` by the names inner was transformed by.
        suffix: the one that `as_primal` got.

    Returns:
        The program without its own tangent inputs. With one direction at both levels the inner
        tangents reappear in the outer ones, so cse computes them once: u = v in v'Hu.
    """
    program = program.copy()
    inputs = {slot.name: node for node, slot in program.placeholders()}
    kept = []
    for node, slot in list(program.placeholders()):
        if slot.kind == "tangent" and slot.name + suffix in inputs:
            node.replace_all_uses_with(inputs[slot.name + suffix])
            program.graph.erase_node(node)
        else:
            kept.append(slot)
    return replace(program, inputs=tuple(kept))
