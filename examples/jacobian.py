"""The Jacobian of a robot arm by forward mode, all columns from one program, and what it is for.

An arm of n joints maps its angles to the place and the direction of its hand. One run of the
generated program gives the place and a batch of n tangents, the columns of the Jacobian. Damped
Gauss-Newton steps with it move many arms to their targets at once.

    python examples/jacobian.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import fwdcompile


class Arm:
    """A planar arm of links that are all as long: angles `[arms, joints]` to hands `[arms, 3]`."""

    def __init__(self, joints: int) -> None:
        self.joints = joints
        self.forward = fwdcompile.transform(self.hand, batched=True)

    def hand(self, angles: Tensor) -> Tensor:
        turned = angles.cumsum(-1)
        place = torch.stack([turned.cos().sum(-1), turned.sin().sum(-1)], -1) / self.joints
        return torch.cat([place, turned[:, -1:]], -1)

    def jacobian(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """The hands, `[arms, 3]`, and their derivatives by each angle, `[arms, 3, joints]`."""
        units = torch.eye(self.joints, dtype=angles.dtype)[:, None].expand(-1, *angles.shape)
        hands, columns = self.forward(angles, tangents={"angles": units})
        return hands, columns.movedim(0, -1)


def reach(arm: Arm, angles: Tensor, targets: Tensor, steps: int) -> Tensor:
    """Gauss-Newton, the more damped the more is missed: angles that bring hands to targets."""
    for step in range(steps):
        hands, jacobian = arm.jacobian(angles)
        missed = targets - hands
        print(f"step {step:2}  farthest hand {float(missed.norm(dim=-1).max()):.1e} away")
        damping = missed.square().sum(-1)[:, None, None] * torch.eye(3, dtype=angles.dtype)
        system = jacobian @ jacobian.mT + damping
        angles = angles + (jacobian.mT @ torch.linalg.solve(system, missed)[..., None])[..., 0]
    return angles


def main(arms: int = 1000, joints: int = 7, steps: int = 12) -> float:
    torch.manual_seed(0)
    arm = Arm(joints)
    start = 0.3 + 0.2 * torch.randn(arms, joints, dtype=torch.float64)
    targets = arm.hand(start + 0.2 * torch.randn_like(start))

    _, jacobian = arm.jacobian(start)
    by_torch = torch.func.vmap(torch.func.jacfwd(lambda a: arm.hand(a[None])[0]))(start)
    print(arm.forward.code)
    print(
        f"largest difference from torch.func.jacfwd: {float((jacobian - by_torch).abs().max()):.0e}"
    )
    angles = reach(arm, start, targets, steps)
    missed = float((targets - arm.hand(angles)).norm(dim=-1).max())
    print(f"in the end {missed:.1e}")
    return missed


if __name__ == "__main__":
    main()
