"""Explain: what torch says of a failed capture, in the words of a user."""

from __future__ import annotations

import traceback

from torch import nn

from .errors import CaptureError, DecisionError
from .hazards import line_of, user_frame

_MODULE = nn.modules.module.__file__
_LAYERS = _MODULE.removesuffix("module.py")


def explain(error: Exception) -> CaptureError:
    """What went wrong in capture, with the user's line in front."""
    text = _first_line(str(error))
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        what, *_ = text.split(". Hint:")
        return DecisionError(
            f"{_raised_at(error)}The model decides in Python by the value of a tensor ({what}): it "
            "may by tensors that it closes over, and not by inputs.\n  A program has one path for "
            "all values: use torch.where or torch.cond, or move the decision out of the model."
        )
    return CaptureError(_raised_at(error) + _explained(error, text))


def _raised_at(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    layers = [f for f in frames if f.filename.startswith(_LAYERS) and f.filename != _MODULE]
    frame = user_frame(frames) or next(reversed(layers), None)
    return f"{line_of(frame)}\n  " if frame else ""


def _explained(error: Exception, text: str) -> str:
    if "FunctionalTensor on its own" in text:
        return (
            "A branch or loop body makes a tensor from numbers (torch.tensor), which "
            "torch.export cannot capture there.\n  Make it before, or with torch.full."
        )
    if "Trying to backward through fwdcompile.attached" in text:
        return (
            "torch.autograd.grad goes through a torch.autograd.Function here, which cannot "
            "keep its derivative there.\n  Write its forward as plain ops, or as a custom op."
        )
    if isinstance(error, SyntaxError):
        return (
            "A submodule, parameter or buffer has a keyword of Python for a name, such as 'in', "
            "which torch.export cannot write.\n  Rename it."
        )
    if "must be tuple of ints,but got FakeTensor" in text:
        return (
            "A size is the value of a tensor, as in a packed sequence, and a program has "
            "one shape.\n  Leave sequences padded, and mask what is behind their ends."
        )
    if (kind := "torch._C.Generator") in text:
        return no_tensor(kind)
    return f"The model cannot be captured: {type(error).__name__}: {text}"


def no_tensor(kind: str) -> str:
    """Says that a program cannot have an object for an input."""
    return (
        f"The model uses a {kind} here, and a program takes tensors alone.\n  Random numbers may "
        "come from the generator that torch.manual_seed seeds."
    )


def _first_line(text: str) -> str:
    """The first line of an error that says what is wrong."""
    lines = [line.strip() for line in text.strip().split("\n") if line.strip()]
    if lines and lines[0].endswith("Got graph break/error:"):  # in a branch or a loop body
        hints = [line for line in lines if line.startswith("Hint:")]
        return ". ".join([*lines[1:2], *hints[:1]])
    return lines[0] if lines else ""
