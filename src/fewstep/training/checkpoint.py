"""Checkpoints that are either whole or not there.

A checkpoint is a folder `checkpoints/000100/` with one safetensors file per group of tensors and `state.json`. It is
written under a temporary name, forced to disk and renamed, so a folder with a number for a name is complete; nothing
is unpickled.

Sharded runs write the same files: the processes gather one tensor after the other, and the first one writes it before
the next. So a checkpoint does not depend on how many processes made it, and torch.distributed.checkpoint, whose
metadata is a pickle, has no part in it (docs/scaling.md).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fewstep.core.shards import whole
from fewstep.errors import FewstepError

FORMAT = 1
_UNFINISHED = ".unfinished-"  # being written, or being deleted
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Dtypes as safetensors writes them."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `state` is its state.json."""

    folder: Path
    iteration: int
    state: dict[str, Any]

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one group, on the CPU mapped from the file; empty if the group was empty when it was saved."""
        path = self.folder / f"{group}.safetensors"
        return load_file(path, device=str(device)) if path.name in self.state["files"] else {}


def save(
    parent: Path,
    iteration: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Writes `parent/<iteration>` and then deletes all but the newest `keep` checkpoints. Returns the folder.

    `extra(folder)` may add files of its own while the folder still has its temporary name: they appear with the
    checkpoint or not at all. A checkpoint of this iteration that is already complete is left as it is, a damaged one
    replaced. An OSError (disk full) passes through and leaves the older checkpoints untouched.
    """
    final = place(parent, iteration)
    if final.exists() and _inspect(final)[0]:
        _delete(final)
    if not final.exists():
        folder = unfinished(final)
        folder.mkdir(parents=True)
        for name, tensors in groups.items():
            if tensors:
                _write(folder / f"{name}.safetensors", tensors)
        if extra is not None:
            extra(folder)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        text = json.dumps({"format": FORMAT, "iteration": iteration, **state, "files": files}, indent=1)
        (folder / "state.json").write_text(text + "\n")
        for path in (*folder.rglob("*"), folder):
            sync(path)
        os.rename(folder, final)
        sync(parent)
    for old in _numbered(parent)[keep:]:
        _delete(old)
    return final


def place(parent: Path, iteration: int) -> Path:
    """The folder of a checkpoint."""
    return parent / f"{iteration:06d}"


def unfinished(folder: Path) -> Path:
    """Where the checkpoint `folder` is while it is being written."""
    return folder.with_name(f"{_UNFINISHED}{folder.name}")


def give(groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """For the processes that do not write while the first one is in `save` with its parts of the same tensors."""
    for tensors in groups.values():
        for name in _order(tensors):
            whole(tensors[name])


def newest(parent: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `parent`, None if there is none at all.

    Damaged ones (copied by halves, edited) are passed over with a warning; FewstepError if nothing but damaged ones
    is left or if the newest was written by a later version of the format.
    """
    found = _numbered(parent)
    for folder in found:
        problem, state = _inspect(folder)
        if not problem:
            if state["format"] > FORMAT:
                raise FewstepError(
                    f"found checkpoint {folder} of format {state['format']}, expected at most {FORMAT}, "
                    "fix: update fewstep"
                )
            return Checkpoint(folder, state["iteration"], state)
        warnings.warn(f"checkpoint {folder} is damaged ({problem}) and is passed over", stacklevel=2)
    if found:
        raise FewstepError(
            f"found {len(found)} damaged checkpoints in {parent}, expected a complete one, "
            "fix: restore one from a backup or train again into another folder"
        )
    return None


def clean(parent: Path) -> None:
    """Deletes what an interrupted save or deletion left behind. Only for the process that holds the run's lock."""
    for left in parent.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(left)


def sync(path: Path) -> None:
    """Forces a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces the file `path` by one with `text`, whole or not at all."""
    unfinished = path.with_name(f"{_UNFINISHED}{path.name}")
    unfinished.write_text(text)
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written tensor by tensor: no more than one is ever whole on this machine."""
    places: dict[str, Any] = {}
    end = 0
    for name in _order(tensors):
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(places).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in places:
            value = whole(tensors[name]).cpu().contiguous().flatten()
            file.write(memoryview(value.view(torch.uint8).numpy()))


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, those of wide numbers first, so that each number stands at a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _numbered(parent: Path) -> list[Path]:
    folders = [p for p in parent.glob("*") if p.name.isdecimal()]
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def _inspect(folder: Path) -> tuple[str, dict[str, Any]]:
    """(what is wrong or "", state)."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        return f"state.json cannot be read: {error}", {}
    for name, size in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or does not have its {size} bytes", state
    return "", state


def _delete(folder: Path) -> None:
    """Renames first, so that a half-deleted folder never looks like a checkpoint."""
    doomed = folder.with_name(f"{_UNFINISHED}{folder.name}-old")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
