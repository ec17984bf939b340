"""Checkpoints that are either whole or not there.

A checkpoint is a folder `checkpoints/000100/` with one safetensors file per group of tensors, `state.json`, and
`manifest.json` with the size and the checksum of every other file. It is written under a temporary name, forced to disk
and renamed, so a folder with a number for a name is complete; nothing is unpickled. Before one is continued from, every
byte of it is compared with the manifest.

Sharded runs write the same files: the processes gather one tensor after the other, and the first one writes it before
the next. So a checkpoint does not depend on how many processes made it, and torch.distributed.checkpoint, whose
metadata is a pickle, has no part in it (docs/scaling.md). Checksums are of the numbers in memory, on their way to the
file, so that what the disk changes is noticed and nothing is read back (docs/resume.md has the cost).
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
from torch import Tensor

from fewstep.core.files import checksum, fingerprint, load_json, read_weights
from fewstep.core.shards import whole
from fewstep.errors import FewstepError

FORMAT = 2
MANIFEST = "manifest.json"
_STATE = "state.json"
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
    files: tuple[str, ...]
    """Their names, as the manifest lists them."""

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one group, on the CPU mapped from the file; empty if the group was empty when it was saved."""
        path = self.folder / f"{group}.safetensors"
        return read_weights(path, device) if path.name in self.files else {}


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
    checkpoint or not at all. A checkpoint of this iteration that is already sound is left as it is, a damaged one
    replaced. An error (disk full) passes through, leaves nothing of the new checkpoint, and the older ones untouched.
    """
    final = place(parent, iteration)
    if final.exists() and _inspect(final)[0]:
        _delete(final)
    if not final.exists():
        folder = unfinished(final)
        try:
            _fill(folder, groups, {"format": FORMAT, "iteration": iteration, **state}, extra)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.rename(folder, final)
        sync(parent)
    older = [folder for folder in _numbered(parent) if int(folder.name) < iteration]  # later ones are damaged
    for old in older[keep - 1 :]:
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


def newest(parent: Path, before: int | None = None) -> Checkpoint | None:
    """The newest sound checkpoint in `parent`, None if there is none at all. Reads every byte of it.

    `before`: only those of earlier iterations.

    Damaged ones (torn, flipped, edited, copied by halves) are passed over with a warning that names what is wrong;
    FewstepError if nothing but damaged ones is left or if the newest was written by a later version of the format.
    """
    found = [folder for folder in _numbered(parent) if before is None or int(folder.name) < before]
    for folder in found:
        problem, checkpoint = _inspect(folder)
        if checkpoint is not None:
            if checkpoint.state["format"] > FORMAT:
                raise FewstepError(
                    f"found checkpoint {folder} of format {checkpoint.state['format']}, expected at most {FORMAT}, "
                    "fix: update fewstep"
                )
            return checkpoint
        warnings.warn(f"checkpoint {folder} is damaged ({problem}) and is passed over", stacklevel=2)
    if found:
        raise FewstepError(
            f"found {len(found)} damaged checkpoints in {parent}, expected a sound one, "
            "fix: restore one from a backup or train again into another folder"
        )
    return None


def inspected(parent: Path, iteration: int) -> Checkpoint:
    """The checkpoint that `newest` has found sound in another process; its files are not compared again."""
    folder = place(parent, iteration)
    state, files = _listing(folder)
    return Checkpoint(folder, iteration, state, tuple(files))


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
    try:
        unfinished.write_text(text)
        sync(unfinished)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _fill(
    folder: Path,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    extra: Callable[[Path], None] | None,
) -> None:
    """All files of a checkpoint, the manifest last, forced to disk."""
    folder.mkdir(parents=True)
    files = {}
    for name, tensors in groups.items():
        if tensors:
            path = folder / f"{name}.safetensors"
            files[path.name] = _write(path, tensors)
    if extra is not None:
        extra(folder)
    (folder / _STATE).write_text(json.dumps(state, indent=1) + "\n")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name not in files:
            files[name] = checksum(path)
    listed = {name: {"bytes": (folder / name).stat().st_size, "blake2b": told} for name, told in sorted(files.items())}
    (folder / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file, written tensor by tensor: no more than one is ever whole on this machine. Its checksum."""
    places: dict[str, Any] = {}
    end = 0
    for name in _order(tensors):
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        places[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(places).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    hashed = fingerprint(header)
    with path.open("wb") as file:
        file.write(header)
        for name in places:
            value = whole(tensors[name]).cpu().contiguous().flatten()
            data = memoryview(value.view(torch.uint8).numpy())
            hashed.update(data)
            file.write(data)
    return hashed.hexdigest()


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names, those of wide numbers first, so that each number stands at a multiple of its size."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _numbered(parent: Path) -> list[Path]:
    folders = [p for p in parent.glob("*") if p.name.isdecimal()]
    return sorted(folders, key=lambda p: int(p.name), reverse=True)


def _inspect(folder: Path) -> tuple[str, Checkpoint | None]:
    """(what is wrong, None), or ("", the checkpoint). Reads every byte."""
    try:
        state, files = _listing(folder)
        iteration = int(state["iteration"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{_STATE} or {MANIFEST} cannot be read: {type(error).__name__}: {error}", None
    for name, (size, expected) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing", None
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}", None
        if expected is not None and checksum(path) != expected:
            return f"{name} and its checksum in {MANIFEST} disagree: some bytes have changed", None
    return "", Checkpoint(folder, iteration, state, tuple(files))


def _listing(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, str | None]]]:
    """state.json, and (bytes, checksum) of the files by name; those of format 1 have no checksums.

    Raises:
        OSError, ValueError, LookupError, TypeError, AttributeError: not what `save` writes.
    """
    state = load_json(folder / _STATE)
    if not isinstance(state["format"], int):
        raise ValueError(f"format {state['format']!r}")
    if state["format"] == 1:
        return state, {str(name): (int(size), None) for name, size in state["files"].items()}
    listed = load_json(folder / MANIFEST)
    if _STATE not in listed or any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
        raise ValueError(f"a manifest without {_STATE}, or of files elsewhere")
    return state, {name: (int(told["bytes"]), str(told["blake2b"])) for name, told in listed.items()}


def _delete(folder: Path) -> None:
    """Renames first, so that a half-deleted folder never looks like a checkpoint."""
    doomed = folder.with_name(f"{_UNFINISHED}{folder.name}-old")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
