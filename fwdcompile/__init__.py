"""fwdcompile: forward-mode automatic differentiation for PyTorch, by source transformation."""

from __future__ import annotations

__version__ = "0.1.0"

from . import rule
from .errors import (
    CaptureError,
    FwdcompileError,
    MissingRuleError,
    NonFiniteError,
    RuleError,
    TangentError,
)
from .forward import Forward, Lowered, jvp, transform

__all__ = [
    "CaptureError",
    "Forward",
    "FwdcompileError",
    "Lowered",
    "MissingRuleError",
    "NonFiniteError",
    "RuleError",
    "TangentError",
    "jvp",
    "rule",
    "transform",
]
