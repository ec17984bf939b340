"""Encoded prompts on disk: safetensors shards that are mapped into memory, looked up by the prompt's text.

A cache is a folder: `index.json` (written first), one file per shard, and `null.safetensors`. A row is a distinct
prompt; rows are in the order of the prompts' hashes, so that a prompt's row is found without a list of texts. A row of
a tensor is flattened and loses the zeros at its end: what a family pads with zeros, to 512 tokens say, takes no room.

A shard's file name has its checksum in it. It is written under another name, forced to disk and renamed: a kill leaves
no half of one, and a damaged one is told from a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.core.files import checksum
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError

NULL = "null.safetensors"
_OFFSETS = ".offsets"
_OPEN = 64
"""Shards that are mapped at a time."""


def text_hash(text: str) -> int:
    """64 bits that stand for a prompt."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def distinct(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the distinct texts, ascending, and where each stands in `texts` first; uint64 and int64.

    Raises:
        FewstepError: two different texts have one hash, which has a chance of 3e-6 among ten million.
    """
    hashes = np.fromiter((text_hash(text) for text in texts), np.uint64, len(texts))
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    for at in repeats:
        one, other = texts[int(order[at])], texts[int(order[at + 1])]
        if one != other:
            raise FewstepError(f"found the prompts {one!r} and {other!r} of one hash, fix: change one of them")
    kept = np.delete(order, repeats + 1)
    return hashes[kept], kept


def packed(rows: Condition, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard holds of a condition: numbers end to end without each row's zeros at its end, and where rows begin.

    Floats in `dtype`, integers as they are.
    """
    tensors = {}
    for name, value in rows.items():
        kind = dtype if value.is_floating_point() else value.dtype
        flat = value.detach().flatten(1).to("cpu", kind)
        used = (flat != 0) * torch.arange(1, flat.shape[1] + 1)
        lengths = used.amax(1) if flat.shape[1] else used.sum(1)
        tensors[name] = torch.cat([row[:length] for row, length in zip(flat, lengths.tolist(), strict=True)])
        tensors[name + _OFFSETS] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return tensors


def write_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Path:
    """The file `folder`/`name`, or `name`-<checksum>.safetensors where `name` has no suffix: whole or not there."""
    from safetensors.torch import save_file

    unfinished = folder / f".{name}.{os.getpid()}.unfinished"
    try:
        save_file(dict(tensors), unfinished)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        final = folder / (name if Path(name).suffix else f"{name}-{checksum(unfinished)}.safetensors")
        unfinished.replace(final)
    except OSError as error:
        raise FewstepError(
            f"found no way to write {folder / name} ({error}), expected room on its disk, fix: free some, or choose "
            "another --cache; what is finished is kept"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return final


def shard_name(shard: int) -> str:
    return f"{shard:06d}"


def whole_shard(folder: Path, shard: int) -> tuple[Path | None, list[Path]]:
    """The file of a shard whose checksum is right, if there is one, and those that are damaged."""
    found = sorted(folder.glob(f"{shard_name(shard)}-*.safetensors"))
    whole = [path for path in found if path.stem.partition("-")[2] == checksum(path)]
    return (whole[0] if whole else None), [path for path in found if path not in whole]


class ConditionCache:
    """The conditions of a finished cache.

    Args:
        folder: of the cache.
        hashes: of its rows, ascending.
        shard_rows: rows of a shard.
        tensors: name -> shape of a row and dtype that `encode` of the family gives.
        device: where conditions are wanted.
    """

    def __init__(
        self,
        folder: Path,
        hashes: np.ndarray,
        shard_rows: int,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        device: torch.device,
    ) -> None:
        self.folder = folder
        self._hashes, self._rows, self._tensors, self._device = hashes, shard_rows, dict(tensors), device
        count = -(-len(hashes) // shard_rows)
        by_number = {int(path.stem.partition("-")[0]): path for path in folder.glob("[0-9]*-*.safetensors")}
        self._files = [by_number[shard] for shard in range(count)]
        self._null = folder / NULL
        self._open = lru_cache(maxsize=_OPEN)(_mapped)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """What `Backbone.encode` of `prompts` gave when the cache was made, in the cache's precision.

        Raises:
            FewstepError: a prompt that is not in it.
        """
        return self._gathered([divmod(self._row(prompt), self._rows) for prompt in prompts])

    def null(self) -> Condition:
        """The null condition, one row."""
        return self._built([(_mapped(self._null), 0)])

    def _row(self, prompt: str) -> int:
        wanted = np.uint64(text_hash(prompt))
        row = int(np.searchsorted(self._hashes, wanted))
        if row == len(self._hashes) or self._hashes[row] != wanted:
            raise FewstepError(
                f"found the prompt {prompt!r}, which is not in the cache of encoded prompts, expected one of its "
                f"{len(self._hashes)}, as the text encoder is out of memory during training, fix: --text-encoder "
                "offload"
            )
        return row

    def _gathered(self, places: Iterable[tuple[int, int]]) -> Condition:
        return self._built([(self._open(self._files[shard]), row) for shard, row in places])

    def _built(self, rows: Sequence[tuple[Any, int]]) -> Condition:
        condition = {}
        for name, (shape, dtype) in self._tensors.items():
            pieces = [_piece(file, name, row) for file, row in rows]
            flat = torch.zeros(len(rows), int(np.prod(shape)), dtype=pieces[0].dtype)
            for row, piece in zip(flat, pieces, strict=True):
                row[: len(piece)] = piece
            condition[name] = flat.reshape(-1, *shape).to(self._device).to(dtype)
        return condition


def _mapped(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, "pt")


def _piece(file: Any, name: str, row: int) -> Tensor:
    begin, end = file.get_slice(name + _OFFSETS)[row : row + 2].tolist()
    return file.get_slice(name)[begin:end]
