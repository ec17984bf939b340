"""Who may use the folder of a run."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import training_toy as toy
from safetensors.torch import save_file

from fewstep.core.files import checksum
from fewstep.errors import FewstepError
from fewstep.training import checkpoint, folder
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks


class _Usage(NamedTuple):
    total: int
    used: int
    free: int


def _everything(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_folder_with_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=3)
    before = _everything(tmp_path)
    with pytest.raises(FewstepError, match=r"found a run at iteration 3 .*--resume.* another --out"):
        toy.run(tmp_path, iterations=3)
    assert _everything(tmp_path) == before


def test_resume_where_there_is_no_run_begins_one(tmp_path: Path) -> None:
    assert toy.run(tmp_path / "new", iterations=2, resume=True).iteration == 2


def test_resume_names_every_option_that_differs(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=3)
    before = _everything(tmp_path)
    with pytest.raises(FewstepError) as error:
        toy.run(
            tmp_path, iterations=3, resume=True, seed=1, critic_rate=1e-3, method=toy.ToyMethod(toy.ToyOptions(steps=4))
        )
    for text in ("method.steps was 2, is 4", "train.seed was 0, is 1", "train.critic_rate was 0.0004, is 0.001"):
        assert text in str(error.value)
    assert "batch" not in str(error.value)
    assert _everything(tmp_path) == before


def test_an_option_that_an_earlier_version_did_not_know_may_have_its_default(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2)
    for file in (tmp_path / "run.json", tmp_path / "checkpoints" / "000002" / "state.json"):
        told = json.loads(file.read_text())
        del told["configuration"]["method"]["critic_updates"]
        told |= folder.describe(told["configuration"])
        file.write_text(json.dumps(told))
    listed = tmp_path / "checkpoints" / "000002" / "manifest.json"
    state = {"bytes": file.stat().st_size, "blake2b": checksum(file)}
    listed.write_text(json.dumps(json.loads(listed.read_text()) | {"state.json": state}))
    with pytest.raises(FewstepError, match=r"\(method.critic_updates was 'nothing', is 3\)"):
        toy.run(tmp_path, iterations=2, resume=True, method=toy.ToyMethod(toy.ToyOptions(critic_updates=3)))
    with pytest.warns(UserWarning, match="without method.critic_updates: the run goes on at their defaults"):
        toy.run(tmp_path, iterations=2, resume=True)


def test_resume_compares_with_a_run_that_died_before_its_first_checkpoint(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=3)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(FewstepError, match=r"found a run without a checkpoint"):
        toy.run(tmp_path, iterations=3)
    with pytest.raises(FewstepError, match=r"run.json \(train.seed was 0, is 1\)"):
        toy.run(tmp_path, iterations=3, resume=True, seed=1)
    toy.run(tmp_path, iterations=3, resume=True)
    assert [record["iteration"] for record in read_log(tmp_path / "log.jsonl")] == [2, 3]


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=3, schedule="constant")
    result = toy.run(tmp_path, iterations=5, schedule="constant", resume=True, log_every=1, microbatch=3, keep=1)
    assert result.iteration == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000005"]


def test_a_run_beyond_the_iterations_asked_for_is_an_error(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=5, schedule="constant")
    with pytest.raises(FewstepError, match=r"already at iteration 5, expected at most iterations = 4"):
        toy.run(tmp_path, iterations=4, schedule="constant", resume=True)


def test_other_networks_than_the_run_began_with_are_named(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2)
    with pytest.raises(
        FewstepError, match=r"student has inner.bias of shape \(8,\), expected \(9,\) \(3 tensors differ\)"
    ):
        toy.run(tmp_path, iterations=2, roles=toy.ToyRoles(hidden=9), resume=True)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with folder.locked(tmp_path), pytest.raises(FewstepError, match=r"in use by process \d+, expected to be alone"):
        toy.run(tmp_path, resume=True)
    assert not (tmp_path / "run.json").exists()


def test_a_disk_that_cannot_lock_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lustre without its flock option, and some network disks."""

    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="a second run in it would not be noticed"):
        assert toy.run(tmp_path).iteration == toy.run(tmp_path / "other").iteration


def test_another_number_of_threads_is_told_when_a_run_goes_on(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=2, schedule="constant")
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["machine"] == {"device": "cpu", "threads": torch.get_num_threads(), "processes": 1}
    record["machine"] |= {"threads": 7, "processes": 2}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=r"threads was 7, is 1; processes was 2, is 1\): the run goes on, but not"):
        toy.run(tmp_path, iterations=3, schedule="constant", resume=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toy.run(tmp_path, iterations=4, schedule="constant", resume=True)


def test_lines_that_the_log_has_lost_are_told(tmp_path: Path) -> None:
    toy.run(tmp_path, iterations=4, schedule="constant", log_every=1)
    log = tmp_path / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with pytest.warns(UserWarning, match="has 2 whole lines up to iteration 4, where it had 4 when"):
        toy.run(tmp_path, iterations=5, schedule="constant", log_every=1, resume=True)
    assert [record["iteration"] for record in read_log(log)] == [1, 2, 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once: the next checkpoint knows
        toy.run(tmp_path, iterations=6, schedule="constant", log_every=1, resume=True)


@pytest.mark.parametrize("odd", [{"watch": {}}, {"best": []}, {"roll_backs": "x"}, {"watch": {"streaks": 1}}])
def test_a_state_that_monitors_cannot_read_is_refused(tmp_path: Path, odd: dict[str, object]) -> None:
    toy.run(tmp_path, iterations=2)
    place = tmp_path / "checkpoints" / "000002"
    state = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps(state | {"monitors": state["monitors"] | odd}))
    listed = json.loads((place / "manifest.json").read_text())
    told = {"bytes": (place / "state.json").stat().st_size, "blake2b": checksum(place / "state.json")}
    (place / "manifest.json").write_text(json.dumps(listed | {"state.json": told}))
    with pytest.raises(FewstepError, match="tells nothing that monitors can go on from"):
        toy.run(tmp_path, iterations=2, resume=True)


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(0, 0, 5_999))
    folder.require_space(tmp_path / "a" / "b", checkpoint_bytes=2_999, keep=1)
    with pytest.raises(FewstepError, match=r"GB free on the disk .*3 checkpoints.*fix: free some space, lower --keep"):
        folder.require_space(tmp_path / "a" / "b", checkpoint_bytes=2_000, keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(0, 0, 0))
    with pytest.raises(FewstepError, match="GB free"):
        toy.run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_there_already_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.run(tmp_path, iterations=6)  # leaves two
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(0, 0, 1_500))
    folder.require_space(tmp_path, checkpoint_bytes=1_000, keep=2)
    with pytest.raises(FewstepError, match="GB free"):
        folder.require_space(tmp_path, checkpoint_bytes=1_000, keep=3)


def test_the_space_asked_for_is_that_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(folder, "require_space", lambda out, size, keep: asked.append(size))
    result = toy.run(tmp_path, iterations=3, roles=toy.ToyRoles(hidden=2000))
    written = sum(p.stat().st_size for p in result.checkpoint.glob("*.safetensors"))
    assert asked[0] == pytest.approx(written, rel=0.02)


def _limited(out: Path, limit: int, hook: str) -> None:
    """In a child: a run whose files may not be longer than `limit` bytes, from its fourth iteration on."""

    def full(iteration: int, record: object) -> None:
        if iteration == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def export(iteration: int, folder: Path) -> None:
        if hook == "export":
            (folder / "student").mkdir()
            save_file({"w": torch.zeros(100_000)}, folder / "student" / "w.safetensors")

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what is said goes to a file here, too
    hooks = Hooks(log=full, save=export)
    try:
        toy.run(out, hooks=hooks, roles=toy.ToyRoles(hidden=200), resume=True, tensorboard=hook == "log")
    except FewstepError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        out.with_name("said").write_text(str(error))
        os._exit(2)
    os._exit(0)


@pytest.mark.parametrize(("limit", "hook"), [(10_000, "checkpoint"), (100_000, "export"), (1, "log")])
def test_a_full_disk_is_named_and_costs_nothing_that_was_there(tmp_path: Path, limit: int, hook: str) -> None:
    out = tmp_path / "run"
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(out, limit, hook))
    process.start()
    process.join(300)
    assert process.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert f"found no room left while writing in {out} (" in said
    assert "fix: free some space on its disk, then resume" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    assert found.iteration == 3
    assert not list(out.rglob("*.unfinished*"))
    assert toy.run(out, roles=toy.ToyRoles(hidden=200), resume=True).iteration == 12
    assert [record["iteration"] for record in read_log(out / "log.jsonl")] == [2, 4, 6, 8, 10, 12]
