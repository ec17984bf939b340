from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.files import checksum
from fewstep.errors import FewstepError
from fewstep.training import checkpoint


def _save(parent: Path, iteration: int, keep: int = 3, value: float = 1.0) -> Path:
    groups = {"student": {"w": torch.full((2, 3), value), "steps": torch.tensor(7.0)}, "ema": {}}
    return checkpoint.save(parent, iteration, groups, {"configuration": {"a": 1}}, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    folder = _save(tmp_path, 100)
    assert folder == tmp_path / "000100"
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found.iteration, found.state["configuration"]) == (100, {"a": 1})
    torch.testing.assert_close(found.tensors("student"), {"w": torch.ones(2, 3), "steps": torch.tensor(7.0)})
    assert found.tensors("ema") == {}
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.json", "student.safetensors"]
    listed = json.loads((folder / "manifest.json").read_text())
    assert listed == {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": checksum(folder / name)}
        for name in ("state.json", "student.safetensors")
    }


def test_newest_is_by_number_not_by_name_and_old_ones_go(tmp_path: Path) -> None:
    for iteration in (999_999, 1_000_000, 1_000_001):
        _save(tmp_path, iteration, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1000000", "1000001"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.iteration == 1_000_001


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None


def test_a_complete_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    _save(tmp_path, 5, value=1.0)
    found = checkpoint.newest(_save(tmp_path, 5, value=2.0).parent)
    assert found is not None
    torch.testing.assert_close(found.tensors("student")["w"], torch.ones(2, 3))


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "flipped", "long"])
@pytest.mark.parametrize("file", ["state.json", "manifest.json", "student.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: str, file: str) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
        path.write_bytes({"short": data[:-4], "empty": b"", "flipped": flipped, "long": data + b"x"}[damage])
    with pytest.warns(UserWarning, match=rf"000002 is damaged \(.*{file}.*passed over"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.iteration == 1
    _save(tmp_path, 2, value=4.0)  # as the run does when it comes by again
    found = checkpoint.newest(tmp_path)
    assert found is not None
    torch.testing.assert_close(found.tensors("student")["w"], torch.full((2, 3), 4.0))


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (_save(tmp_path, 1) / "state.json").unlink()
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FewstepError, match="found 1 damaged"):
        checkpoint.newest(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path, 1) / "state.json"
    _forge(path, json.dumps(json.loads(path.read_text()) | {"format": 3}))
    with pytest.raises(FewstepError, match=r"format 3, expected at most 2, fix: update"):
        checkpoint.newest(tmp_path)


def _forge(path: Path, text: str) -> None:
    """Changes a file and what the manifest says of it."""
    path.write_text(text)
    manifest = path.with_name("manifest.json")
    told = {"bytes": path.stat().st_size, "blake2b": checksum(path)}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: told}))


def test_every_bit_of_a_checkpoint_counts(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, {"student": {"w": torch.ones(2)}}, {}, keep=1)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for place in range(len(data)):
            for bit in (1, 32):
                path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
                problem, found = checkpoint._inspect(folder)
                if path.name != "manifest.json" or json.loads(data) != _json(path):
                    assert problem, (path.name, place, bit)
                    assert found is None
        path.write_bytes(data)
    assert not checkpoint._inspect(folder)[0]


def _json(path: Path) -> Any:
    """What a flipped bit has left of it; spaces between words may differ."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_a_manifest_that_leads_elsewhere_is_damage(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("{}")
    manifest = _save(tmp_path, 1) / "manifest.json"
    for name in ("../elsewhere", str(tmp_path / "elsewhere")):
        told = {"bytes": 2, "blake2b": checksum(tmp_path / "elsewhere")}
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {name: told}))
        with pytest.warns(UserWarning, match="of files elsewhere"), pytest.raises(FewstepError, match="1 damaged"):
            checkpoint.newest(tmp_path)


def test_the_first_format_is_read_by_its_sizes(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    tensors = folder / "student.safetensors"
    state |= {"format": 1, "files": {tensors.name: tensors.stat().st_size}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "manifest.json").unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.tensors("student").keys() == {"w", "steps"}
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="student.safetensors has"), pytest.raises(FewstepError, match="1 damaged"):
        checkpoint.newest(tmp_path)


def test_a_damaged_newer_checkpoint_does_not_cost_the_sound_one_its_place(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (_save(tmp_path, 9) / "state.json").unlink()
    _save(tmp_path, 2, keep=1)
    with pytest.warns(UserWarning, match="000009 is damaged"):
        found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.iteration == 2
    _save(tmp_path, 10, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["000010"]


def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def full(folder: Path) -> None:
        (folder / "student").mkdir()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {}, {}, keep=1, extra=full)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.iteration == 1
    assert [p.name for p in tmp_path.iterdir()] == ["000001"]


class _Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def test_an_end_at_any_step_of_a_save_leaves_a_whole_checkpoint_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = -1  # file operations until the end; negative: none comes

    def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise _Killed
            return operation(*arguments, **settings)

        return wrapped

    for name in ("mkdir", "rename", "unlink", "rmdir", "fsync", "stat", "scandir"):
        monkeypatch.setattr(os, name, deadly(getattr(os, name)))
    monkeypatch.setattr(checkpoint, "_write", deadly(checkpoint._write))
    monkeypatch.setattr(Path, "write_text", deadly(Path.write_text))

    steps, seen = 0, set()
    while True:
        steps += 1
        parent = tmp_path / str(steps)
        _save(parent, 1, keep=1, value=1.0)
        left = steps
        try:
            _save(parent, 2, keep=1, value=2.0)
        except _Killed:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a damaged one would be warned of
                found = checkpoint.newest(parent)
            assert found is not None
            torch.testing.assert_close(found.tensors("student")["w"], torch.full((2, 3), float(found.iteration)))
            seen.add(found.iteration)
            checkpoint.clean(parent)
            _save(parent, 2, keep=1, value=2.0)
        else:
            break
        assert [p.name for p in parent.iterdir()] == ["000002"]
    assert seen == {1, 2}
    assert steps > 20


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def extra(folder: Path) -> None:
        (folder / "student").mkdir()
        (folder / "student" / "config.json").write_text("{}")

    folder = checkpoint.save(tmp_path, 1, {}, {}, keep=1, extra=extra)
    (folder / "student" / "config.json").write_text("")
    with pytest.warns(UserWarning, match="student/config.json has 0 bytes, not 2"), pytest.raises(FewstepError):
        checkpoint.newest(tmp_path)
