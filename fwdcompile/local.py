"""Local losses: an output head after each block, and no gradient from one block to another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class Local(nn.Module):
    """Blocks in a row, each with a head of its own, whose gradients stop between blocks.

    In training mode the heads' outputs come as a list, for one loss each. Each block is fed with
    the output of the one before it, detached, so that it learns from its own head's loss alone. In
    evaluation mode the last head's output comes alone, and no gradient is stopped.

    The sum of such losses is another objective than the loss of the last head. It is greedy: a
    block moves towards what its own head can use, even where later blocks could make more of
    something else. As an estimate of the gradient of the last head's loss it is biased, whether by
    backpropagation or forward. What it brings to forward gradients: a block's loss moves with the
    directions of its own few layers, and those of no other block add noise to its estimate (Ren,
    Kornblith, Liao and Hinton, "Scaling forward gradient with local losses", 2023, section 4).

    Args:
        blocks: any modules; each takes what the one before returns, a tensor.
        heads: as many, each from what its block returns to logits.

    Raises:
        ValueError: no block, or not as many heads.

    Example:
        >>> model = Local([nn.Linear(8, 4), nn.Linear(4, 4)], [nn.Linear(4, 2), nn.Linear(4, 2)])
        >>> [out.shape for out in model(torch.zeros(3, 8))]
        [torch.Size([3, 2]), torch.Size([3, 2])]
        >>> model.eval()(torch.zeros(3, 8)).shape
        torch.Size([3, 2])
    """

    def __init__(self, blocks: Iterable[nn.Module], heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.heads = nn.ModuleList(blocks), nn.ModuleList(heads)
        if not self.blocks or len(self.blocks) != len(self.heads):
            raise ValueError(
                "each block has a head, and there is at least one; here are "
                f"{len(self.blocks)} blocks and {len(self.heads)} heads"
            )

    def forward(self, x: Tensor) -> Any:
        """The logits of every head in training mode, of the last head in evaluation mode."""
        outs: list[Tensor] = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x.detach() if outs else x)
            if self.training:
                outs.append(head(x))
        return outs or self.heads[-1](x)

    def end_to_end(self) -> nn.Sequential:
        """The same blocks below the last head, with no gradient stopped; shares all parameters."""
        return nn.Sequential(*self.blocks, self.heads[-1])
