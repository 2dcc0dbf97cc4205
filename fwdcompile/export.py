"""Export: a training step as one file that runs without fwdcompile, and without torch or Python.

The step is a plain forward graph. As `torch.export` writes it, torch alone runs it; AOTInductor
compiles it for C++; as ONNX it trains in an inference engine.
"""

from __future__ import annotations

import importlib
import json
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.proxy import TracerBase

from .capture import quiet
from .errors import ExportError
from .lowered import Lowered
from .program import outputs_reached, value

Engine = Literal["torch", "inductor", "onnx"]
METADATA = "fwdcompile"
NEW, OWN = "new.", ("seed", "step", "lr", "loss", "finite")

# a comment of the generated program: the user's line that caused what stands below it
_COMMENT = re.compile(r" +# (.+?):(\d+)(?:: (.*))?$")


class Step(nn.Module):
    """A step as a function from tensors by name to tensors by name, which changes none of them.

    Args:
        lowered: the program of the step.
        move: `move(tensors, seed, step, lr)` changes parameters and buffers in place, and returns
            the loss and whether all was finite.
    """

    def __init__(self, lowered: Lowered, move: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._move = move
        program = lowered.program
        self.reads = [s.name for s in program.inputs if s.kind not in ("tangent", "constant")]
        reached = outputs_reached(program)
        written = {slot.name for slot in program.outputs if slot.kind in ("buffer", "input")}
        self.changes = [name for name in self.reads if reached.get(name) or name in written]

    def inputs(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the step takes, in its order: first those that it gives anew."""
        fixed = [name for name in self.reads if name not in self.changes]
        return {name: values[name] for name in (*self.changes, "step", *fixed, "seed", "lr")}

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss, whether all was finite, and the new value of each tensor that a step changes."""
        own = {name: tensors[name].clone() for name in self.changes}
        given = [own.get(name, tensors[name]) for name in self.reads]
        loss, finite = self._move(given, tensors["seed"], tensors["step"], tensors["lr"])
        new = own | {"step": tensors["step"] + 1}
        return {"loss": loss, "finite": finite} | {NEW + name: x for name, x in new.items()}


def export(
    path: str | Path,
    lowered: Lowered,
    move: Callable[..., tuple[Tensor, Tensor]],
    values: Mapping[str, Any],
    own: Mapping[str, Tensor],
    to: Engine,
) -> dict[str, Tensor]:
    """Writes a step to a file; see `FGD.export`, which is the public way here.

    Args:
        path: of the file.
        lowered: the program of the step.
        move: as of `Step`.
        values: parameters, buffers and inputs by name.
        own: `seed`, `step` and `lr`.
        to: the engine.

    Returns:
        The tensors that the step takes, in the order of its inputs.

    Raises:
        ExportError: two tensors have one name, or the engine cannot run an op.
    """
    if to not in ("torch", "inductor", "onnx"):
        raise ValueError(f'to is "torch", "inductor" or "onnx", not {to!r}')
    path, suffix = Path(path), ".onnx" if to == "onnx" else ".pt2"
    if path.suffix != suffix:
        raise ValueError(f"an export to {to} is a file {suffix}, not {path.name!r}")
    step = Step(lowered, move)
    _check_names(step)
    tensors = {name: x.detach().clone() for name, x in step.inputs({**values, **own}).items()}
    exported = _exported(step, tensors, lowered)
    interface = _interface(exported, list(tensors))
    metadata = {METADATA: json.dumps(interface)}
    with quiet():
        if to == "torch":
            torch.export.save(exported, path, extra_files=metadata)
        elif to == "inductor":
            configs = {"aot_inductor.metadata": metadata}
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(path), inductor_configs=configs
            )
        else:
            names = [entry["name"] for entry in interface["outputs"]]
            _onnx_forms().write(exported, path, tensors, names, metadata)
    return tensors


def _onnx_forms() -> ModuleType:
    """The module that needs the extra; fwdcompile itself does not."""
    try:
        return importlib.import_module(".onnx_forms", __package__)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{error.name} is not installed: pip install 'fwdcompile[onnx]', or export with "
            'to="torch" or to="inductor"'
        ) from error


def _check_names(step: Step) -> None:
    """Refuses names that the step has for something else."""
    taken = {*OWN, *(NEW + name for name in (*step.changes, "step"))}
    if clash := [name for name in step.reads if name in taken]:
        raise ExportError(f"an exported step has a {clash[0]!r} of its own: rename the model's")


def _exported(step: Step, tensors: dict[str, Tensor], lowered: Lowered) -> ExportedProgram:
    shapes = ({name: _open_sizes(lowered).get(name) for name in tensors},)
    try:
        with quiet(), _user_lines(lowered), torch.no_grad():
            exported = torch.export.export(step, (tensors,), dynamic_shapes=shapes, strict=False)
            functional: ExportedProgram = exported.run_decompositions({})
            return functional
    except Exception as error:
        raise ExportError(f"torch.export cannot take this step: {error}") from error


def _open_sizes(lowered: Lowered) -> dict[str, dict[int, Any]]:
    """The dimensions that the program leaves open, by the name of the input."""
    sizes: dict[str, dict[int, Any]] = {}
    names: dict[str, str] = {}
    for node, slot in lowered.program.placeholders():
        if slot.kind == "input":
            for dim, size in enumerate(value(node).shape):
                if isinstance(size, SymInt):
                    name = names.setdefault(str(size), f"batch{len(names) or ''}")
                    sizes.setdefault(slot.name, {})[dim] = Dim(name, min=2)
    return sizes


def _interface(exported: ExportedProgram, names: list[str]) -> dict[str, list[Any]]:
    """What the file says of itself: name, dtype and shape of each input and output."""
    given = [n for n in exported.graph.nodes if n.op == "placeholder"][-len(names) :]
    (results,) = exported.graph.output_node().args
    out_spec: Any = exported.call_spec.out_spec
    ends = {"inputs": (names, given), "outputs": (out_spec.context, results)}
    return {end: [*map(_entry, *pair)] for end, pair in ends.items()}


def _entry(name: str, node: fx.Node) -> dict[str, Any]:
    x = value(node)
    shape = [size if isinstance(size, int) else str(size) for size in x.shape]
    return {"name": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": shape}


@contextmanager
def _user_lines(lowered: Lowered) -> Iterator[None]:
    """Makes torch record the user's line for each op of the generated program."""
    program, lines = lowered.function.__code__.co_filename, lowered.code.splitlines()

    def keep(_: TracerBase, frames: traceback.StackSummary) -> traceback.StackSummary:
        inner = [frame.lineno or 0 for frame in frames if frame.filename == program]
        above = reversed(lines[: inner[-1]]) if inner else iter(())
        comment = next(filter(None, map(_COMMENT.match, above)), None)
        found = [(comment[1], int(comment[2]), "forward", comment[3] or "")] if comment else []
        return traceback.StackSummary.from_list(found)

    with mock.patch.object(TracerBase, "_filter_traceback_frames", keep):
        yield
