"""Generate, read, save, edit, load, run: a forward-mode program is a file of plain torch.

    python examples/inspect_code.py [FILE]

The edit is one that people make: a quantiser has the derivative zero, which stops training; in the
file its tangent is passed straight through.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import fwdcompile


class Quantised(nn.Module):
    """Activations rounded to quarters, by the usual idiom but without its detach()."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc1(x))
        h = h + (torch.round(4 * h) / 4 - h)
        return self.fc2(h)


def straight_through(code: str) -> str:
    """The program with the tangent of the rounded values replaced by that of tanh."""
    lines = code.splitlines(keepends=True)
    (place,) = (i for i, line in enumerate(lines) if line.strip().startswith("add_dot:"))
    declared = lines[place].split("=")[0]
    lines[place] = f"{declared}= tanh_dot  # straight through: rounding counts as the identity\n"
    return "".join(lines)


def main(path: str | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = Quantised(), torch.randn(5, 3)
    w_dot = torch.randn_like(model.fc1.weight)
    file = Path(path or Path(tempfile.mkdtemp()) / "quantised.py")

    forward = fwdcompile.transform(model)
    _, y_dot = forward(x, tangents={"fc1.weight": w_dot})
    forward.save(file)
    print(forward.code)
    print(f"as generated, saved to {file}: y_dot = {y_dot.detach().flatten().tolist()}\n")

    file.write_text(straight_through(file.read_text()))
    edited = fwdcompile.load(file, model)
    _, passed = edited(x, tangents={"fc1.weight": w_dot})
    print(f"edited by hand: y_dot = {passed.detach().flatten().tolist()}")
    return y_dot.detach(), passed.detach()


if __name__ == "__main__":
    main(*sys.argv[1:2])
