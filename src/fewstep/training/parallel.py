"""The processes that train together: each has a share of the samples, and all weights or, sharded, a part of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The processes that train together. With `size` 1 every method returns at once."""

    rank: int
    size: int

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and calls hooks."""
        return self.rank == 0

    def share(self, samples: Tensor) -> Tensor:
        """(B,) global sample indices -> the ones of this process, a contiguous piece; sizes differ by at most one."""
        return samples.tensor_split(self.size)[self.rank]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor, in place, by its sum over all processes."""
        if self.size > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def same_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor, in place, by that of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def largest(self, value: int, device: torch.device) -> int:
        """The largest `value` of any process."""
        if self.size == 1:
            return value
        everyone = torch.tensor(value, device=device)
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
        return int(everyone)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


def agreement() -> Callable[[bool], bool]:
    """A question to all processes at once: any(mine) is whether it is True in one of them. All call this, and it.

    It goes from processor to processor (gloo), so that no GPU waits for it.
    """
    group = dist.new_group(backend="gloo")

    def any_of(mine: bool) -> bool:
        everyone = torch.tensor(int(mine))
        dist.all_reduce(everyone, op=dist.ReduceOp.MAX, group=group)
        return bool(everyone)

    return any_of


def processes() -> int:
    """How many `process_group` joins, or will join, asked at any time."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the process that writes files: the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """The group this process belongs to.

    An initialised torch.distributed is used as it is. Under torchrun (WORLD_SIZE above 1) one is initialised, nccl
    for a CUDA `device` and gloo otherwise, and closed at the end. Else the group is this process alone. A CUDA `device`
    becomes the current one.
    """
    owned = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if owned:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Group(0, 1)
    finally:
        if owned:
            dist.destroy_process_group()
