"""The processes that train one model together, and what they tell each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import MismatchError

Share = Literal["data", "directions"]
SHARES: tuple[str, ...] = get_args(Share)


@dataclass(frozen=True)
class Workers:
    """The processes of a group of torch.distributed; one process where there is none.

    Args:
        share: "data": all workers take the same directions, each on its own part of the batch.
            "directions": each worker takes directions of its own.
        group: as of `torch.distributed.new_group`; None is the default group.

    Example:
        >>> torch.distributed.init_process_group("gloo")
        >>> fgd = DistributedFGD(model, loss_fn, lr=2e-4, workers=Workers("directions"))
    """

    share: Share = "data"
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise ValueError(f'workers share "data" or "directions", not {self.share!r}')

    @property
    def size(self) -> int:
        """How many there are."""
        return dist.get_world_size(self.group) if _started() else 1

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        return dist.get_rank(self.group) if _started() else 0

    def part(self, x: Tensor) -> Tensor:
        """This worker's part of a batch: every `size`-th example, or all where data is not shared.

        Raises:
            ValueError: the parts would differ in size.
        """
        if self.share != "data" or self.size == 1:
            return x
        if len(x) % self.size:
            raise ValueError(f"{len(x)} examples cannot be shared by {self.size} workers alike")
        return x[self.rank :: self.size]

    def gather(self, numbers: Tensor) -> Tensor:
        """The numbers of all workers.

        Args:
            numbers: `[n]`, float64; n is the same everywhere.

        Returns:
            `[size, n]` on the CPU, the same bits in every worker.
        """
        if self.size == 1:
            return numbers.cpu()[None]
        own = numbers.to(self._device())
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return torch.stack(everyone).cpu()

    def agree(self, what: Mapping[str, Any]) -> None:
        """Refuses workers that differ.

        Args:
            what: things that can be pickled and have to be equal in all workers, by name.

        Raises:
            MismatchError: in every worker; names what differs and between whom.
        """
        if self.size == 1:
            return
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, dict(what), group=self.group)
        first = everyone[0]
        for rank, other in enumerate(everyone):
            for name in (*first, *(n for n in other if n not in first)):
                mine, theirs = first.get(name), other.get(name)
                if mine != theirs:
                    raise MismatchError(
                        f"{name} is {theirs} in worker {rank}, and {mine} in worker 0; nothing has "
                        "changed. Start all workers alike"
                    )

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors the values that they have in worker 0, one message for each dtype."""
        if self.size == 1:
            return
        device = self._device()
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for dtype in dict.fromkeys(x.dtype for x in tensors):
            these = [x for x in tensors if x.dtype == dtype]
            flat = torch.cat([x.detach().flatten() for x in these]).to(device)
            dist.broadcast(flat, source, group=self.group)
            for x, new in zip(these, torch.split(flat, [x.numel() for x in these]), strict=True):
                x.copy_(new.view(x.shape))

    def _device(self) -> torch.device:
        gpus = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, for as long as a `with` lasts.

    Args:
        device: "cuda" becomes the GPU that this process has on its machine.

    Yields:
        The device to use. Without torchrun there is nothing to join.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    gpu = device.startswith("cuda")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if gpu:
        torch.cuda.set_device(device)
    # torchrun's store outlives a restart, with the addresses of workers that are no more
    store, rank, size = next(rendezvous("env://"))
    fresh = PrefixStore(f"start {_restarts()}", store)
    dist.init_process_group("nccl" if gpu else "gloo", store=fresh, rank=rank, world_size=size)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this process anew, after one of the workers failed."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the bytes of tensors, in hexadecimal."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()
