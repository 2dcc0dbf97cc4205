"""ONNX: an exported step as a model for inference engines, checked by onnxruntime."""

# annotations are not postponed: onnxscript reads those of a form of an op
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnxscript import INT32, INT64, UINT32, UINT64, opset18
from torch import Tensor, fx
from torch.export import ExportedProgram

from .errors import ExportError
from .hazards import source_of
from .program import is_random, value

aten = torch.ops.aten
op: Any = opset18
_OP = re.compile(r"call_function\[target=torch\.ops\.([\w.]+)\]")
# torch's own forms of these take the running statistics in place of the batch's
_BATCH_NORMS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.default,
    aten.native_batch_norm.default,
)


def write(
    exported: ExportedProgram,
    path: Path,
    tensors: dict[str, Tensor],
    outputs: list[str],
    metadata: dict[str, str],
) -> None:
    """Writes an exported step as ONNX, and runs it once beside torch before.

    Args:
        exported: the step, a function of one dict.
        path: of the file.
        tensors: its arguments, by name and in order.
        outputs: the names of its results.
        metadata: goes into the file.

    Raises:
        ExportError: an op has no form in ONNX, or the engine's results are others than torch's.
    """
    lowered = exported.run_decompositions(_lowerings())
    _inline(lowered.graph_module)
    try:
        program = torch.onnx.export(
            lowered,
            dynamo=True,
            verbose=False,
            input_names=list(tensors),
            output_names=outputs,
            custom_translation_table=_FORMS,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_without_form(error, lowered)) from error
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces, which are most of a small file
    program.model.metadata_props.update(metadata)
    _check(program.model_proto.SerializeToString(), exported, tensors)
    program.save(path)


def _lowerings() -> dict[Any, Callable[..., Any]]:
    """What must not reach the exporter or the engine as it is."""
    table: dict[Any, Callable[..., Any]] = torch._decomp.get_decompositions(_BATCH_NORMS)
    return table | {aten.matmul.default: _by_matrices, aten.mv.default: _by_matrices}


def _by_matrices(x: Tensor, y: Tensor) -> Tensor:
    """A product with a vector as one of matrices: onnxruntime fuses a transpose into the first.

    What its MatmulTransposeFusion makes of that, a FusedMatMul with a vector, is wrong in 1.32.
    """
    if x.ndim == 1:
        return (x.unsqueeze(0) @ y).squeeze(0) if y.ndim == 2 else NotImplemented
    return (x @ y.unsqueeze(1)).squeeze(-1) if y.ndim == 1 else NotImplemented


def _shift_left(self: INT32, other: INT32) -> INT32:
    """ONNX shifts unsigned numbers alone."""
    word, bits = op.Cast(self, to=UINT32.dtype), op.Cast(other, to=UINT32.dtype)
    shifted: INT32 = op.Cast(op.BitShift(word, bits, direction="LEFT"), to=INT32.dtype)
    return shifted


def _shift_right(self: INT32 | INT64, other: int) -> INT32 | INT64:
    """The sign goes down with all bits, to bit `low`: it is turned there and taken off.

    Torch's own form is right, too, and takes twice the time.
    """
    size, unsigned = (64, UINT64) if self.dtype == INT64.dtype else (32, UINT32)
    bits = op.Cast(op.Constant(value_int=other), to=unsigned.dtype)
    word = op.BitShift(op.Cast(self, to=unsigned.dtype), bits, direction="RIGHT")
    low = op.Cast(op.Constant(value_int=1 << (size - 1 - other)), to=self.dtype)
    shifted: INT32 = op.Sub(op.BitwiseXor(op.Cast(word, to=self.dtype), low), low)
    return shifted


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.__lshift__.Tensor: _shift_left,
    aten.__rshift__.Scalar: _shift_right,
}


def _inline(module: fx.GraphModule) -> None:
    """Takes out the views of a tensor as itself, which only Inductor has a use for."""
    for node in module.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        x, size, stride, *offset = node.args
        if not any(offset) and (value(x).shape, value(x).stride()) == (tuple(size), tuple(stride)):
            node.replace_all_uses_with(x)
            module.graph.erase_node(node)
    module.recompile()


def _check(model: bytes, exported: ExportedProgram, tensors: dict[str, Tensor]) -> None:
    """Refuses a model that onnxruntime cannot run, or runs to other results than torch does."""
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        given = {name: x.cpu().numpy() for name, x in tensors.items()}
        found = session.run(None, given)
    except Exception as error:
        raise ExportError(f"onnxruntime cannot run this step: {error}") from error
    if any(map(is_random, exported.graph.nodes)):
        return
    names = [output.name for output in session.get_outputs()]
    with torch.no_grad():
        expected = exported.module()(tensors)
    for name, mine in zip(names, found, strict=True):
        before = tensors.get(name.removeprefix("new."), torch.zeros(()))
        if not _alike(torch.as_tensor(mine), expected[name].cpu(), before.cpu()):
            raise ExportError(
                f"the ONNX form of this step is wrong: onnxruntime gives another {name!r} than "
                'torch does; export it with to="torch" or to="inductor"'
            )


def _alike(mine: Tensor, theirs: Tensor, before: Tensor) -> bool:
    """Whether one is the other but for rounding, where a step moved a tensor from `before`."""
    mine, theirs, before = (x.double().nan_to_num() for x in (mine, theirs, before))
    bound = 1e-5 * theirs.abs().max() + 1e-2 * (theirs - before).abs().max()
    return bool(((mine - theirs).abs() <= bound).all())


def _without_form(error: BaseException, exported: ExportedProgram) -> str:
    """Which op has no form in ONNX, and the user's line that it comes from."""
    reasons = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        reasons.append(str(error))
    found = _OP.search("\n".join(reasons))
    if found is None:
        return f"the ONNX exporter cannot take this step: {reasons[-1]}"
    name = found[1]
    programs = (exported, exported.run_decompositions())
    nodes = [n for p in programs for n in p.graph.nodes if str(n.target) == name]
    source = next(filter(None, map(source_of, nodes)), None)
    where = "{}:{}: {}".format(*source) if source else "No line of the model, but its directions:"
    why = "" if reasons[-1].startswith("No ONNX function") else f" ({reasons[-1]})"
    return (
        f"{where}\n  {name} has no form in ONNX{why}.\n  Write it as other ops, take other "
        'directions if it is theirs, or export with to="torch" or to="inductor".'
    )
