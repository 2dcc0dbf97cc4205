"""fwdcompile: forward-mode automatic differentiation for PyTorch, by source transformation."""

from __future__ import annotations

__version__ = "0.1.0"

from . import distributed, rule
from .directions import Directions, Normal, Rademacher, RankOne, Sphere
from .errors import (
    CaptureError,
    CheckpointError,
    DataError,
    DecisionError,
    ExportError,
    FwdcompileError,
    HistoryError,
    LossError,
    MismatchError,
    MissingRuleError,
    NonFiniteError,
    RuleError,
    TangentError,
)
from .fgd import FGD, ForwardGradient
from .forward import Forward
from .functional import jvp, transform
from .jacobian import jacfwd
from .laplacian import Laplacian, laplacian
from .lowered import Lowered
from .saved import Saved, load

__all__ = [
    "FGD",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "DecisionError",
    "Directions",
    "ExportError",
    "Forward",
    "ForwardGradient",
    "FwdcompileError",
    "HistoryError",
    "Laplacian",
    "LossError",
    "Lowered",
    "MismatchError",
    "MissingRuleError",
    "NonFiniteError",
    "Normal",
    "Rademacher",
    "RankOne",
    "RuleError",
    "Saved",
    "Sphere",
    "TangentError",
    "distributed",
    "jacfwd",
    "jvp",
    "laplacian",
    "load",
    "rule",
    "transform",
]
