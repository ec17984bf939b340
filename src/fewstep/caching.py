"""Making the cache of encoded prompts: its key, its shards, and what is checked before.

A cache belongs to its prompts, to the encoders' weights and configurations, to the tokenizers, and to what else decides
what a pipeline makes of a prompt; a hash of all of it is the name of its folder, so that no other is ever read. How it
lies on disk is in `data/cache.py`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from hashlib import blake2b
from importlib.metadata import version
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fewstep.core.tensors import Condition
from fewstep.data import cache
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone
from fewstep.models.pipelines import ENCODE_BATCH, MASK, STATES
from fewstep.models.text_encoders import encoder_parts, text_encoders
from fewstep.training.checkpoint import write_text
from fewstep.training.folder import AGAIN, locked, room
from fewstep.training.parallel import Group
from fewstep.training.phases import digest
from fewstep.training.progress import Progress

FORMAT = 1
INDEX = "index.json"
_SHARD_BYTES = 2**28
_MOST_ROWS = 4096
_PROBE = 16


def make_cache(
    backbone: Backbone, texts: Sequence[Sequence[str]], parent: Path, dtype: torch.dtype, group: Group
) -> cache.ConditionCache:
    """The cache of `texts` in a folder of `parent`; what is not there yet, or is damaged, is made.

    The processes of the group make every `group.size`-th shard each. Whole shards stay: a kill costs the shards that
    were being made. Every shard's checksum is looked at, which reads the whole cache once.

    Args:
        backbone: with its text encoders.
        texts: several sequences of prompts, duplicates welcome.
        parent: made if it is not there.
        dtype: of floating-point conditions on disk.
        group: the processes that make it together, on a disk that they share.

    Raises:
        FewstepError: too little disk, or another process making the same cache.
    """
    every = _Joined(texts)
    hashes, places = cache.distinct(every)
    condition = backbone.null_condition()
    tensors = {name: (tuple(value.shape[1:]), value.dtype) for name, value in condition.items()}
    row_bytes = sum(value[0].numel() * dtype.itemsize for value in condition.values())
    rows = max(1, min(_MOST_ROWS, _SHARD_BYTES // max(row_bytes, 1)))
    identity = {**_encoder(backbone), "dtype": str(dtype), "format": FORMAT, "rows": rows} if group.leads else {}
    folder = parent / _key(identity, hashes, group, backbone.device)
    count = -(-len(hashes) // rows)

    def encoded(at: np.ndarray) -> Condition:
        starts = range(0, len(at), ENCODE_BATCH)
        parts = [backbone.encode([every[int(place)] for place in at[start : start + ENCODE_BATCH]]) for start in starts]
        return _without_padding({name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})

    with ExitStack() as stack:
        stack.enter_context(room(folder, AGAIN))
        if group.leads:
            stack.enter_context(locked(folder))
            _begin(folder, {**identity, "prompts": len(hashes), "shards": count})
            cache.write_tensors(folder, cache.NULL, cache.packed(condition, dtype))
        group.wait()
        mine = [shard for shard in range(count)[group.rank :: group.size] if _missing(folder, shard)]
        if mine and group.leads:
            some = places[np.linspace(0, len(places) - 1, _PROBE).astype(int)]
            each = sum(value.nbytes for value in cache.packed(encoded(some), dtype).values()) / _PROBE
            _require_space(folder, each * min(rows * len(mine) * group.size, len(places)))
        progress = stack.enter_context(closing(Progress(len(mine), 0, shown=group.leads and bool(mine))))
        for done, shard in enumerate(mine, start=1):
            part = encoded(places[shard * rows : (shard + 1) * rows])
            cache.write_tensors(folder, cache.shard_name(shard), cache.packed(part, dtype))
            progress.show(done, f"shards of {rows} encoded prompts in {folder}")
        group.wait()
    return cache.ConditionCache(folder, hashes, rows, tensors, backbone.device)


class _Joined(Sequence[str]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[str]]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(len(part) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: Any) -> Any:
        part = bisect_right(self._starts, place) - 1
        return self._parts[part][place - self._starts[part]]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._parts)


def _key(identity: dict[str, Any], hashes: np.ndarray, group: Group, device: torch.device) -> str:
    """Name of the cache's folder; the first process says it to all, as hashing an encoder takes a while."""
    number = 0
    if group.leads:
        hashed = blake2b(json.dumps(identity, sort_keys=True, default=str).encode() + hashes.tobytes(), digest_size=8)
        number = int.from_bytes(hashed.digest(), "little") >> 1
    return f"{group.largest(number, device):016x}"


def _encoder(backbone: Backbone) -> dict[str, Any]:
    """All that decides what a prompt is encoded to, besides the prompt."""
    pipeline = backbone.pipeline
    options = {
        name: value
        for name, value in pipeline.config.items()
        if not name.startswith("_") and name not in pipeline.components
    }
    encoders = text_encoders(backbone)
    parts: dict[str, Any] = {}
    for name, part in encoder_parts(backbone).items():
        parts[name] = {"class": type(part).__name__}
        if name in encoders:
            told = {key: value for key, value in part.config.to_dict().items() if key not in _NOT_OF_ENCODERS}
            parts[name] |= {"config": told, "weights": weights_digest(part)}
        else:
            parts[name]["files"] = _files(part)
    return {
        "adapter": f"{type(backbone).__module__}.{type(backbone).__qualname__}",
        "pipeline": type(pipeline).__name__,
        "options": options,
        "parts": parts,
        "versions": {package: version(package) for package in ("diffusers", "transformers")},
    }


_NOT_OF_ENCODERS = ("_name_or_path", "transformers_version")
_NOT_OF_TOKENIZERS = ("is_local", "local_files_only", "name_or_path")


def weights_digest(encoder: nn.Module) -> str:
    """A fingerprint of every bit of the weights; one tensor at a time, as they may be on a GPU."""
    hashed = blake2b(digest_size=16)
    for name, value in encoder.state_dict().items():
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)} {digest({name: value.detach().cpu()})}".encode())
    return hashed.hexdigest()


def _files(tokenizer: Any) -> str:
    """A fingerprint of what a tokenizer saves of itself, but for where it came from."""
    hashed = blake2b(digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            data = path.read_bytes()
            if path.name == "tokenizer_config.json":
                told = {key: value for key, value in json.loads(data).items() if key not in _NOT_OF_TOKENIZERS}
                data = json.dumps(told, sort_keys=True).encode()
            hashed.update(path.name.encode() + data)
    return hashed.hexdigest()


def _without_padding(condition: Condition) -> Condition:
    """Text states with zeros where they are padding, which networks mask; texts of nothing but padding stay."""
    if not {STATES, MASK} <= condition.keys():
        return condition
    words = condition[MASK].bool()
    padding = ~words & words.any(1, keepdim=True)
    return {**condition, STATES: condition[STATES].masked_fill(padding[:, :, None], 0)}


def _begin(folder: Path, index: dict[str, Any]) -> None:
    """Writes what the cache is, and clears away what a kill has left."""
    for left in folder.glob(".*.unfinished"):
        left.unlink()
    write_text(folder / INDEX, json.dumps(index, indent=1, default=str) + "\n")


def _missing(folder: Path, shard: int) -> bool:
    """Whether a shard has to be made; damaged files of it are deleted."""
    whole, damaged = cache.whole_shard(folder, shard)
    for path in damaged:
        warnings.warn(f"{path} is damaged (its checksum is another); it is made again", stacklevel=3)
        path.unlink()
    return whole is None


def _require_space(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise FewstepError(
            f"found {free / 1e9:.2f} GB free on the disk of {folder}, expected {1.1 * needed / 1e9:.2f} GB for encoded "
            "prompts, fix: free some, choose another --cache, pass fewer prompts, or --text-encoder offload"
        )
