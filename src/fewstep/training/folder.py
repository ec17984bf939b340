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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from fewstep.core.files import load_json
from fewstep.errors import FewstepError
from fewstep.training import checkpoint

RECORD = "run.json"
_MISSING = "nothing"
_PACKAGES = ("fewstep", "torch", "diffusers", "transformers", "peft", "numpy", "safetensors")
_NOTES: ContextVar[Mapping[str, Callable[[], Any]]] = ContextVar("_NOTES", default=MappingProxyType({}))


@contextmanager
def noted(**notes: Callable[[], Any]) -> Iterator[None]:
    """run.json of every run that begins within also holds what each of `notes` returns, JSON-able, by its name.

    For those who know where a run comes from (`fewstep.provenance`), however many runs follow from one call. Only the
    process that writes asks for them, and only when a run begins: one that is continued keeps those it began with.
    """
    token = _NOTES.set({**_NOTES.get(), **notes})
    try:
        yield
    finally:
        _NOTES.reset(token)


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder.

    Raises:
        FewstepError: there is none, or it is damaged.
    """
    path = folder / RECORD
    try:
        return _described(load_json(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FewstepError(
            f"found no readable {path} ({type(error).__name__}: {error}), expected what a run writes there, "
            "fix: check the path, or train again into another folder"
        ) from error


def _described(record: dict[str, Any]) -> dict[str, Any]:
    """`record`, if it says what `describe` does; else a ValueError, LookupError or TypeError."""
    if not isinstance(record["configuration"], dict) or not isinstance(record["versions"], dict):
        raise ValueError("no configuration, or no versions")
    record["configuration_hash"]
    return record


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
        except OSError as error:
            warnings.warn(
                f"{folder} is on a disk that cannot lock files ({error}): a second run in it would not be noticed",
                stacklevel=3,
            )
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
    folder: Path,
    configuration: Mapping[str, Any],
    notes: Mapping[str, Any],
    *,
    resume: bool,
    usual: Mapping[str, Any] = MappingProxyType({}),
) -> checkpoint.Checkpoint | None:
    """Makes `folder`, whose lock the caller holds, ready for a run of this configuration; where that is to continue.

    `notes` go to run.json as they are, with those of `noted`; one called "machine" is compared with the last start's,
    and a difference warned about. FewstepError if the folder holds a run and `resume` is False, or a run of another
    configuration. With `resume` and no run in it, a fresh run begins. An option that an earlier version did not know is
    no difference while it is as in `usual`, a configuration of defaults.
    """
    record = folder / RECORD
    if not resume:
        refuse_run(folder)
    found = checkpoint.newest(folder / "checkpoints")
    began = _began(folder, found) if record.exists() else {}
    if found is not None:
        try:
            state = _described(found.state)
        except (ValueError, LookupError, TypeError) as error:
            raise FewstepError(
                f"found a state.json in {found.folder} that does not say what it is of ({type(error).__name__}: "
                f"{error}), expected what a run writes, fix: move this checkpoint away, so that the one before is used"
            ) from error
        _refuse_other(state, configuration, found.folder, usual)
        _tell_other_machine(began.get("machine"), notes.get("machine"), found.folder)
    elif began:
        _refuse_other(began, configuration, record, usual)
    more = {name: began[name] if name in began else note() for name, note in _NOTES.get().items()}
    (folder / "checkpoints").mkdir(exist_ok=True)
    checkpoint.clean(folder / "checkpoints")
    checkpoint.write_text(record, json.dumps({**describe(configuration), **notes, **more}, indent=1) + "\n")
    return found


def _began(folder: Path, found: checkpoint.Checkpoint | None) -> dict[str, Any]:
    """run.json; where it is damaged and a checkpoint says enough, nothing."""
    try:
        return read_record(folder)
    except FewstepError as error:
        if found is None:
            raise
        warnings.warn(f"{folder / RECORD} is damaged and is written anew ({error})", stacklevel=3)
        return {}


def refuse_run(folder: Path) -> None:
    """FewstepError if the folder holds a run."""
    found = checkpoint.newest(folder / "checkpoints")
    if found is not None or (folder / RECORD).exists():
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
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
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


def defaults(options: Any) -> dict[str, Any]:
    """The default of every field of a dataclass that has one."""
    made = {field.name: field.default_factory() for field in fields(options) if field.default_factory is not MISSING}
    return made | {field.name: field.default for field in fields(options) if field.default is not MISSING}


def _refuse_other(
    found: Mapping[str, Any], configuration: Mapping[str, Any], where: Path, usual: Mapping[str, Any]
) -> None:
    now = describe(configuration)
    if found["configuration_hash"] != now["configuration_hash"]:
        old, new, default = (_flat(each) for each in (found["configuration"], now["configuration"], _plain(usual)))
        names = [name for name in sorted(old | new) if old.get(name, _MISSING) != new.get(name, _MISSING)]
        unknown = [name for name in names if name not in old and name in default and new[name] == default[name]]
        if unknown != names:
            listed = "; ".join(f"{n} was {old.get(n, _MISSING)!r}, is {new.get(n, _MISSING)!r}" for n in names)
            raise FewstepError(
                f"found another configuration in {where} ({listed}), expected the same one, "
                "fix: set these options back, or choose another output folder for the new run"
            )
        warnings.warn(
            f"{where} was written by a version without {', '.join(unknown)}: the run goes on at their defaults",
            stacklevel=2,
        )
    if changed := differing(found["versions"], now["versions"]):
        warnings.warn(
            f"{where} was written with other versions ({'; '.join(changed)}): the run goes on, but not to the bit",
            stacklevel=2,
        )


def _tell_other_machine(before: Any, now: Any, where: Path) -> None:
    """Warns where the start before this one was by another device, or by other numbers of threads or processes."""
    changed = differing(before, now) if isinstance(before, dict) and isinstance(now, dict) else []
    if changed:
        warnings.warn(
            f"{where} was written otherwise ({'; '.join(changed)}): the run goes on, but not to the bit", stacklevel=2
        )


def machine(device: torch.device) -> dict[str, Any]:
    """What of this machine and of the way a run is started may change the last bits of its numbers."""
    processes = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    here = {"device": device.type, "threads": torch.get_num_threads(), "processes": processes}
    return here | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs among the names that both have, in words."""
    return [f"{n} was {value!r}, is {now[n]!r}" for n, value in before.items() if n in now and value != now[n]]


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
