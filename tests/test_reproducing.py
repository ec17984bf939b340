"""A run tells where it comes from, and is made again to the bit; what is not equal is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.api import RoleOptions, TextOptions
from fewstep.cli import main
from fewstep.data.real import RealImages
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.methods.tdm_options import TDMOptions
from fewstep.reproducing import OF_THE_MOMENT, _compare_logs, _compare_students, _compare_weights
from fewstep.several import distill_part
from fewstep.training.folder import RECORD
from fewstep.training.log import read_log
from fewstep.training.loop import Hooks
from fewstep.training.options import TrainOptions

QUICK = ["--iterations", "2", "--batch", "2", "--warmup", "1", "--log-every", "1", "--no-tensorboard", "--steps", "2"]
SHORT = TrainOptions(iterations=2, batch=2, warmup=1, log_every=1, tensorboard=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A teacher, prompts, and a finished run of the command line in `run`."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_teacher, place / "teacher")
    (place / "prompts.jsonl").write_text('{"text": "a frog"}\n{"text": "a red apple"}\n{"text": "a 3d pizza"}\n')
    words = ["--teacher", str(place / "teacher"), "--prompts", f"{place / 'prompts.jsonl'}:text"]
    main(["distill", "tdm", *words, "--out", str(place / "run"), "--roles", "adapters", "--rank", "4", *QUICK])
    return place


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / RECORD).read_text())


def test_a_run_tells_where_it_comes_from(place: Path) -> None:
    told = record(place / "run")
    assert {"python", "fewstep", "torch", "diffusers", "transformers", "peft"} <= told["versions"].keys()
    assert told["command"][:3] == ["fewstep", "distill", "tdm"]
    assert told["options"]["seed"] == told["configuration"]["train"]["seed"] == 0
    assert told["configuration"]["prompts"]["count"] == 3
    assert len(told["data"]["teacher"]) == 24
    assert told["embedding_cache"]["key"] in {path.name for path in (place / "cache").iterdir()}
    assert told["papers"][0]["arxiv"] == "2503.06674"
    assert told["papers"][0]["bibtex"].startswith("@misc")
    origin = told["origin"]
    assert origin["prompts"] == f"{place / 'prompts.jsonl'}:text"
    assert origin["roles"]["rank"] == 4
    assert origin["machine"] == {"device": "cpu", "threads": torch.get_num_threads(), "processes": 1}


def test_a_run_is_made_again_to_the_bit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["reproduce", str(place / "run")])
    said = capsys.readouterr().out
    assert "equal to the bit" in said
    assert "2 log lines" in said
    again = place / "run-again"
    first, second = ({**record(run), "command": None} for run in (place / "run", again))
    assert first == second
    weights = "checkpoints/000002/student.safetensors"
    assert (again / weights).read_bytes() == (place / "run" / weights).read_bytes()
    assert fewstep.reproduce(place / "run").equal  # it is there already: only compared


def test_a_run_that_began_with_a_student_and_has_held_out_prompts_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another folder and without the file of prompts; not where the student has become another."""
    shutil.copytree(place / "run" / "student", tmp_path / "first")
    held_out, texts = tmp_path / "held-out.txt", ["a blue frog", "a dog"]
    held_out.write_text("\n".join(texts))
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", str(place / "teacher"), "--prompts", f"{place / 'prompts.jsonl'}:text", "--roles", "copies"]
    more = ["--start", "first", "--held-out", str(held_out), "--evaluate-every", "1", "--text-encoder", "keep"]
    main(["distill", "tdm", *words, *more, "--out", "run", *QUICK])
    run = tmp_path / "run"
    told = record(run)
    assert (told["origin"]["start"], told["origin"]["held_out"]) == (str(tmp_path / "first"), texts)
    assert told["origin"]["given"] == []
    assert told["configuration"]["held_out"]["count"] == 2
    with pytest.raises(FewstepError, match=r"held_out.hash was '[0-9a-f]+', is "):
        fewstep.distill(
            place / "teacher", replace(preset("tdm"), steps=2), out=run, prompts=f"{place / 'prompts.jsonl'}:text",  # type: ignore[type-var]
            start="first", held_out=["a cat", "a dog"], roles=RoleOptions(roles="copies"), resume=True,
            train_options=replace(SHORT, evaluate_every=1), text=TextOptions(text_encoder="keep"),
        )  # fmt: skip
    held_out.unlink()
    monkeypatch.chdir(place)
    found = fewstep.reproduce(run)
    assert found.equal, found.report()
    scores = [line["evaluate/score"] for line in read_log(tmp_path / "run-again" / "log.jsonl")]
    assert scores == [line["evaluate/score"] for line in read_log(run / "log.jsonl")]
    card = tmp_path / "first" / "fewstep.json"
    card.write_text(card.read_text() + " ")
    with pytest.raises(FewstepError, match="found other files in .*first than those of the student"):
        fewstep.reproduce(run)


def test_real_images_are_kept_by_their_hash_and_others_are_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    teacher, prompts = fewstep.load_teacher(tiny_teacher), ["a frog", "a 3d pizza"]
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    right = RealImages(teacher.backbone, images, prompts)
    fewstep.distill(
        teacher, TDMOptions(steps=2, gan_weight=0.1), out=tmp_path / "run", prompts=prompts, real=right,
        roles=RoleOptions(rank=2), train_options=replace(SHORT, iterations=1, warmup=0),
    )  # fmt: skip
    assert record(tmp_path / "run")["data"]["real"] == right.digest()
    changed = images.clone()
    changed[1, 2, 3, 4] += 1
    others = [
        RealImages(teacher.backbone, changed, prompts),
        RealImages(teacher.backbone, images, prompts[::-1]),
        RealImages(teacher.backbone, images, prompts, seed=1),
        lambda iteration, samples: right(iteration, samples),
    ]
    for other in others:
        with pytest.raises(FewstepError, match="found other real data than the run was made with"):
            fewstep.reproduce(tmp_path / "run", prompts=prompts, real=other)
    assert not (tmp_path / "run-again").exists()
    found = fewstep.reproduce(tmp_path / "run", prompts=prompts, real=right)
    assert found.equal, found.report()


def test_what_differs_is_named_and_since_when(place: Path, tmp_path: Path) -> None:
    run, out = place / "run", tmp_path / "out"
    shutil.copytree(run, out)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lines[0]["time/data"] = 1e9
    lines[1]["loss/student"] += 1e-9
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    count, (said,) = _compare_logs(run, out, OF_THE_MOMENT)
    assert count == 2
    assert "since iteration 2: loss/student was" in said

    folder = out / "checkpoints" / "000002"
    tensors = load_file(folder / "student.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 0.5
    shutil.rmtree(out / "checkpoints" / "000002")
    from fewstep.training import checkpoint

    checkpoint.save(out / "checkpoints", 2, {"student": tensors}, {"iteration": 2}, keep=3)
    _, said_of_weights = _compare_weights(run, out)
    assert any("student.safetensors: by 0.5 at most" in one for one in said_of_weights)
    assert any("critic.safetensors: other tensors" in one for one in said_of_weights)

    weights = next((out / "student").rglob("*.safetensors"))
    values = load_file(weights)
    save_file({key: value + 1 for key, value in values.items()}, weights)
    assert len(_compare_students(run / "student", out / "student")[1]) == 1


def test_other_versions_are_told_and_a_difference_exits_with_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    shutil.copytree(place / "run", tmp_path / "run-again")
    told = record(run)
    told["versions"]["torch"] = "1.0"
    (run / RECORD).write_text(json.dumps(told))
    (run / "log.jsonl").write_text((run / "log.jsonl").read_text().replace('"loss/student": ', '"loss/student": 1'))
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", str(run)])
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "other surroundings: torch was '1.0', is '" in said
    assert "since iteration 1: loss/student was 1" in said


def test_what_cannot_be_made_again_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)

    def refused(expected: str, **more: Any) -> None:
        with pytest.raises(FewstepError, match=expected):
            fewstep.reproduce(run, **more)
        assert not (tmp_path / "run-again").exists()

    refused("found .* as the run and its copy", out=run)
    told = record(run)
    (tmp_path / "others.txt").write_text("a frog\n")
    refused("found other prompts", prompts=tmp_path / "others.txt")
    for change, expected in (
        ({"data": {"teacher": "0"}}, "found other files in the teacher's folder"),
        ({"origin": None}, "found no 'origin' in"),
        ({"origin": told["origin"] | {"prompts": None}}, "found a run with prompts that were passed in Python"),
        ({"origin": told["origin"] | {"given": ["real"]}}, "found a run with real passed in Python"),
        ({"origin": told["origin"] | {"given": ["start"]}}, "found a run with start .* fix: repeat the call"),
        ({"origin": told["origin"] | {"roles": {"shard": False, "colour": 3}}}, r"found the options \['colour'\]"),
        ({"options": told["options"] | {"iterations": 3}}, "at iteration 2, expected it finished at iteration 3"),
    ):
        (run / RECORD).write_text(json.dumps(told | change))
        refused(expected)
    (run / RECORD).write_text("{")
    refused("found no readable .*run.json")
    (run / RECORD).unlink()
    refused("found no run.json in")


def test_phases_and_python_calls_are_made_again(tiny_teacher: Path, tmp_path: Path) -> None:
    prompts = ["a frog", "a 3d pizza"]
    options: Any = replace(preset("phased"), steps=2, phase_calls=(1, 1), critic_updates=1)  # type: ignore[type-var]
    fewstep.distill(
        tiny_teacher, options, out=tmp_path / "run", prompts=prompts, roles=RoleOptions(rank=2),
        train_options=replace(SHORT, iterations=1, warmup=0),
    )  # fmt: skip
    found = fewstep.reproduce(tmp_path / "run", prompts=prompts)
    assert found.equal, found.report()
    assert [one.split(" of ")[1] for one in found.compared] == ["phase-1", "phase-2", "the student"]
    assert record(tmp_path / "run" / "phase-2")["origin"]["given"] == []


def test_parts_of_msd_are_made_again_all_or_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of half the size, in two stages; by the command, whose prompts are in a file."""
    run = tmp_path / "msd"
    words = ["--teacher", str(place / "teacher"), "--prompts", f"{place / 'prompts.jsonl'}:text", "--out", str(run)]
    for part in ("1", "2"):
        main(["msd", "tdm", "--part", part, "--parts", "2", "--depth", "0.5", *words, *QUICK])
    main(["reproduce", str(run)])
    said = capsys.readouterr().out
    assert "equal to the bit" in said
    assert all(f"2 log lines and {count} tensors of part-1/{stage}" in said for count, stage in counted(run / "part-1"))
    assert "of part-2/dm" in said
    told, again = (record(tmp_path / name / "part-2" / "dm") for name in ("msd", "msd-again"))
    assert {**told, "command": None} == {**again, "command": None}
    assert told["origin"]["part"]["prompts"]["count"] == 3 > told["configuration"]["prompts"]["count"]

    found = fewstep.reproduce(run / "part-2")
    assert found.equal, found.report()
    assert sorted(path.name for path in (run / "part-2-again").iterdir()) == ["part-2", "router.json"]
    with pytest.raises(FewstepError, match="found pairs for a part of MSD"):
        fewstep.reproduce(run / "part-2", pairs=lambda *_: None)  # type: ignore[arg-type,return-value]
    found = fewstep.reproduce(run, tmp_path / "msd-again")  # they are there, and part-2-again is no part
    assert (found.equal, len(found.compared)) == (True, 6)
    shutil.rmtree(run / "part-1" / "dm" / "checkpoints")
    with pytest.raises(FewstepError, match="part-1/dm without a checkpoint, expected it finished at iteration 2"):
        fewstep.reproduce(run, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def counted(part: Path) -> list[tuple[int, str]]:
    """Tensors of the last checkpoint of each stage."""
    files = {stage: (part / stage / "checkpoints" / "000002").glob("*.safetensors") for stage in ("tsm", "dm")}
    return [(sum(len(load_file(file)) for file in of_stage), stage) for stage, of_stage in files.items()]


def test_a_part_of_given_prompts_with_data_of_its_own_is_made_again(tiny_teacher: Path, tmp_path: Path) -> None:
    """What was passed in Python is asked for: the prompts of all parts in their order, and the data."""
    teacher, parts = fewstep.load_teacher(tiny_teacher), [["a frog", "a blue frog"], ["a 3d pizza"]]

    def real(iteration: int, samples: torch.Tensor) -> Any:
        noise = torch.randn(len(samples), 4, 8, 8, generator=torch.Generator().manual_seed(iteration))
        return noise, teacher.backbone.encode(["a 3d pizza"] * len(samples))

    distill_part(
        teacher, 2, out=tmp_path / "msd", parts=parts, dm=TDMOptions(steps=2), gan_weight=0.01, real=real,
        train_options={"dm": SHORT, "adm": replace(SHORT, iterations=1, student_rate=1e-5)}, roles=RoleOptions(rank=2),
    )  # fmt: skip
    given = {"prompts": [text for part in parts for text in part], "real": real}
    with pytest.raises(FewstepError, match="found a run with real passed in Python"):
        fewstep.reproduce(tmp_path / "msd" / "part-2", prompts=given["prompts"])  # type: ignore[arg-type]
    found = fewstep.reproduce(tmp_path / "msd" / "part-2", tmp_path / "again", **given)  # type: ignore[arg-type]
    assert found.equal, found.report()
    assert [one.split(" of ")[1] for one in found.compared] == ["adm", "dm", "the student"]
    assert record(tmp_path / "again" / "part-2" / "adm")["options"]["student_rate"] == 1e-5


def test_a_run_that_patience_ended_is_finished(tiny_teacher: Path, tmp_path: Path) -> None:
    scores = iter([1.0, 2.0] * 2)
    hooks = Hooks(evaluate=lambda iteration: {"score": next(scores)})
    early = replace(SHORT, iterations=5, evaluate_every=1, patience=1, ema_decay=0.0)
    prompts = ["a frog"]
    fewstep.distill(
        tiny_teacher, TDMOptions(steps=2), out=tmp_path / "run", prompts=prompts, roles=RoleOptions(rank=2),
        train_options=early, hooks=hooks,
    )  # fmt: skip
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["000002"]
    found = fewstep.reproduce(tmp_path / "run", prompts=prompts, hooks=hooks)
    assert found.equal, found.report()
