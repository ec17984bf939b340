"""Named random numbers: every draw is a function of (seed, iteration, path of names, global sample index).

No generator state survives a draw, so results do not depend on the order of draws, on how samples are spread over
processes or micro-batches, or on where a run was interrupted. Numbers are made on the CPU and are the same on every
device; float32 normals are cast, so that every dtype sees the same noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


class Streams:
    """All randomness of a run, rooted in one integer `seed`."""

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)

    def at(self, iteration: int, samples: Tensor | Iterable[int]) -> Draw:
        """The numbers of one iteration for the given global sample indices, (B,) long tensor or integers."""
        indices = samples.tolist() if isinstance(samples, Tensor) else [int(index) for index in samples]
        return Draw((self.seed, int(iteration)), indices)


class Draw:
    """Numbers for a batch of B samples; sample b's depend on its own global index and on nothing else in the batch.

    Asking twice for one name gives the same numbers twice: choose a new name, or a `sub` draw, for new numbers.
    """

    def __init__(self, key: tuple[int | str, ...], samples: Sequence[int]) -> None:
        self._key = key
        self.samples = torch.tensor(samples, dtype=torch.long)
        self._indices = list(samples)

    def sub(self, name: str | int) -> Draw:
        """An independent draw for the same samples, such as one per critic update."""
        return Draw((*self._key, "sub", name), self._indices)

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal (B, *shape); `shape` is that of one sample, without the batch axis."""
        rows = torch.empty(len(self._indices), *shape)
        for row, index in zip(rows, self._indices, strict=True):
            generator = torch.Generator().manual_seed(self._hash("normal", name, index) >> 1)
            row.copy_(torch.randn(tuple(shape), generator=generator))
        return rows.to(device=device, dtype=dtype)

    def uniform(self, name: str) -> Tensor:
        """Uniform in [0, 1), float64 on the CPU, (B,)."""
        return torch.tensor([_unit(self._hash("uniform", name, index)) for index in self._indices], dtype=torch.float64)

    def integers(self, name: str, high: int | Tensor) -> Tensor:
        """Uniform in {0, ..., high - 1}, long on the CPU, (B,); `high` is one number or (B,) of them."""
        uniform = torch.tensor(
            [_unit(self._hash("integers", name, index)) for index in self._indices], dtype=torch.float64
        )
        return (uniform * torch.as_tensor(high).cpu()).floor().long()

    def common(self, name: str) -> float:
        """One number in [0, 1) that all samples, and so all processes, share."""
        return _unit(self._hash("common", name, 0))

    def _hash(self, kind: str, name: str, index: int) -> int:
        """64 bits that belong to this number alone; `repr` keeps the parts of the key apart."""
        text = repr((self._key, kind, name, index))
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _unit(bits: int) -> float:
    """The leading 53 of 64 random bits as a number in [0, 1)."""
    return (bits >> 11) * 2.0**-53
