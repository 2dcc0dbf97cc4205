"""Discrete Fourier transforms, all linear; every torch.fft function lowers to these three."""

from __future__ import annotations

import torch

from ..rule import linear

aten = torch.ops.aten

for _op in (aten._fft_r2c.default, aten._fft_c2r.default, aten._fft_c2c.default):
    linear(_op, wrt="self")
