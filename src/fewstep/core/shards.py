"""Tensors of which every process holds a part: whole again, and filled from whole ones.

FSDP2 makes of a parameter a `DTensor` that is cut along its first axis into pieces of ceil(n / processes) rows, the
last ones shorter or empty. Everything here takes plain tensors as well and does with them what one would expect.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of `tensor`."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, detached. A sharded one is gathered, for which every process has to call this."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()  # type: ignore[operator]


@torch.no_grad()
def fill_(target: Tensor, value: Any, through: torch.dtype | None = None) -> None:
    """Copies `value` into `target`, in place; into a sharded one only the rows that this process holds.

    `value` is a whole tensor of the shape of `target`, of any dtype and device, or a slice of a safetensors file
    (`safe_open(...).get_slice(name)`), of which then no other rows are read. `through`: a dtype it is rounded to first.
    """
    if not is_sharded(target):
        whole_value: Tensor = value[:] if target.ndim else value
        target.copy_(whole_value.to(through or whole_value.dtype))
        return
    local: Tensor = target.to_local()  # type: ignore[operator]
    if local.numel():
        rows: Tensor = value[own_rows(target)]
        local.copy_(rows.to(through or rows.dtype))


def own_rows(tensor: Tensor) -> slice:
    """The rows of the whole that this process holds of a sharded `tensor`."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    rows = len(tensor)
    piece = math.ceil(rows / mesh.size())
    start = min(piece * mesh.get_local_rank(), rows)
    return slice(start, min(start + piece, rows))
