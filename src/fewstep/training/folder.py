"""The folder of a run: who may use it, what it holds, whether there is room."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.training import checkpoint

_MISSING = "nothing"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates `folder` and holds it against every other process; the lock goes with this process, however it ends.

    FewstepError if another process holds it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise FewstepError(
                f"found {folder} in use by process {file.read() or 'unknown'}, expected to be alone, "
                "fix: wait for it, stop it, or choose another output folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


RESUME = "then resume (--resume, resume=True): the newest checkpoint is as it was"
AGAIN = "then run the same again: what is finished is kept"


@contextmanager
def room(folder: Path, then: str = RESUME) -> Iterator[None]:
    """FewstepError in the place of what a full disk, a quota or a limit on file sizes raises within.

    `then` says what to do when there is space again.
    """
    try:
        yield
    except Exception as error:  # that of tokenizers is no other
        if not _is_full(error):
            raise
        raise FewstepError(
            f"found no room left while writing in {folder} ({error}), expected some for its files, "
            f"fix: free some space on its disk, {then}"
        ) from error


def begin(
    folder: Path, configuration: Mapping[str, Any], notes: Mapping[str, Any], *, resume: bool
) -> checkpoint.Checkpoint | None:
    """Makes `folder`, whose lock the caller holds, ready for a run of this configuration; where that is to continue.

    `notes` go to run.json as they are. FewstepError if the folder holds a run and `resume` is False, or a run of
    another configuration. With `resume` and no run in it, a fresh run begins.
    """
    record = folder / "run.json"
    if not resume:
        refuse_run(folder)
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None:
        _refuse_other(found.state, configuration, found.folder)
    elif record.exists():
        _refuse_other(json.loads(record.read_text()), configuration, record)
    (folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint.clean(folder / "checkpoints")
    checkpoint.write_text(record, json.dumps({**describe(configuration), **notes}, indent=1) + "\n")
    return found


def refuse_run(folder: Path) -> None:
    """FewstepError if the folder holds a run."""
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None or (folder / "run.json").exists():
        at = f"at iteration {found.iteration}" if found else "without a checkpoint"
        raise FewstepError(
            f"found a run {at} in {folder}, expected a folder without one, "
            "fix: resume it (--resume) or choose another --out"
        )


def describe(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json and every state.json say about the run: configuration, its hash, and versions."""
    return {
        "configuration": _plain(configuration),
        "configuration_hash": hashlib.sha256(json.dumps(_plain(configuration), sort_keys=True).encode()).hexdigest(),
        "versions": {"python": platform.python_version()}
        | {n: _version(n) for n in ("fewstep", "torch", "safetensors")},
    }


def require_space(folder: Path, checkpoint_bytes: int, keep: int) -> None:
    """FewstepError if the disk of `folder` (which need not exist) has no room for `keep` + 1 checkpoints.

    The one more is the checkpoint that is being written while the oldest is still there; those already in the folder
    count.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    there = len([p for p in (folder / "checkpoints").glob("*") if p.name.isdecimal()])
    needed = max(keep + 1 - there, 1) * checkpoint_bytes
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise FewstepError(
            f"found {free / 1e9:.2f} GB free on the disk of {folder}, expected {needed / 1e9:.2f} GB for "
            f"{keep + 1} checkpoints of {checkpoint_bytes / 1e9:.2f} GB, "
            "fix: free some space, lower --keep or choose another --out"
        )


def _refuse_other(found: Mapping[str, Any], configuration: Mapping[str, Any], where: Path) -> None:
    now = describe(configuration)
    if found["configuration_hash"] != now["configuration_hash"]:
        old, new = _flat(found["configuration"]), _flat(now["configuration"])
        names = [name for name in sorted(old | new) if old.get(name, _MISSING) != new.get(name, _MISSING)]
        listed = "; ".join(f"{n} was {old.get(n, _MISSING)!r}, is {new.get(n, _MISSING)!r}" for n in names)
        raise FewstepError(
            f"found another configuration in {where} ({listed}), expected the same one, "
            "fix: set these options back, or choose another output folder for the new run"
        )
    if found["versions"] != now["versions"]:
        warnings.warn(
            f"{where} was written with {found['versions']}, this is {now['versions']}: "
            "the run goes on, but not to the bit",
            stacklevel=2,
        )


def _plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON: tuples are lists, keys strings."""
    return json.loads(json.dumps(configuration))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _is_full(error: BaseException) -> bool:
    """safetensors and tokenizers tell the number of an error in words only."""
    told = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
