"""The errors of fwdcompile; all but those of settings are a `FwdcompileError`.

Settings that cannot be, such as a negative learning rate, raise ValueError.
"""

from __future__ import annotations


class FwdcompileError(Exception):
    """Base of what is raised on purpose about models, tangents, losses, data and files."""


class CaptureError(FwdcompileError):
    """The model cannot be captured as a graph (data-dependent control flow, say)."""


class DecisionError(CaptureError):
    """The model decides in Python by the value of a tensor, which is not known."""


class RuleError(FwdcompileError):
    """A row of the rule table is malformed, raised, or returned a tangent that cannot be right."""


class MissingRuleError(FwdcompileError):
    """A tangent reaches an op that the rule table has no row for, or that it refuses."""


class TangentError(FwdcompileError, ValueError):
    """A tangent has a wrong name, shape, dtype or device, or none is active."""


class NonFiniteError(FwdcompileError, ArithmeticError):
    """The loss or its directional derivative is infinite or not a number."""


class LossError(FwdcompileError, ValueError):
    """An objective is called wrongly, or returns no loss.

    A loss is a floating-point tensor of no dimensions, or several in a tuple or list; where
    activations are perturbed, also a vector with one for each example.
    """


class DataError(FwdcompileError, ValueError):
    """A data set is unknown, or its files are missing."""


class CheckpointError(FwdcompileError, OSError):
    """A checkpoint cannot be written or read, or belongs to another comparison."""


class MismatchError(FwdcompileError, ValueError):
    """Workers that train together differ in what has to be equal."""


class HistoryError(FwdcompileError, ValueError):
    """A history of steps is damaged, cut short, or of another run."""


class ExportError(FwdcompileError):
    """A training step cannot be written for an engine: it has no form of an op, say."""
