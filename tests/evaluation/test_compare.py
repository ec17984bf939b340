"""Comparisons of tiny models: samples are drawn once, checkpoints are candidates, bad input is refused before work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tiny_judges import write_dinov2

import fewstep
from fewstep.checkpoints import load_checkpoint
from fewstep.cli import main
from fewstep.commands import compare as command
from fewstep.embedded.build import TABLE_FILE, shipped
from fewstep.errors import FewstepError
from fewstep.evaluation.compare import Entry, compare
from fewstep.evaluation.page_pictures import page_id
from fewstep.evaluation.pictures import Candidate
from fewstep.evaluation.preferences import FORMAT, Vote
from fewstep.evaluation.quality import Cost
from fewstep.evaluation.scenes import evaluation_captions
from fewstep.evaluation.study import StudyOptions, Subject
from fewstep.models.student import Student, load_student
from fewstep.models.teacher import Teacher

PROMPTS = ["a frog", "a 3d frog", "a pizza", "a 3d pizza", "a red apple", "a red frog", "a blue apple"]
QUICK = ["--iterations", "2", "--batch", "4", "--warmup", "1", "--log-every", "1", "--no-tensorboard", "--steps", "2"]
CPU = torch.device("cpu")


def distil(out: Path, teacher: Path, *more: str, method: str = "tdm") -> Path:
    prompts = out.with_suffix(".txt")
    prompts.write_text("\n".join(PROMPTS))
    words = ["--teacher", str(teacher), "--prompts", str(prompts), "--out", str(out), *QUICK, *more]
    main(["distill", method, *words, "--checkpoint-every", "1", "--keep", "2"])
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    return distil(tmp_path_factory.mktemp("runs") / "mine", tiny_teacher, "--student-rate", "0.01")


@pytest.mark.parametrize("roles", ["adapters", "copies", "mixed", "unify"])
def test_the_last_checkpoint_is_the_student(roles: str, tmp_path: Path, tiny_teacher: Path, run: Path) -> None:
    if roles == "unify":
        more = ["--step-counts", "1", "2", "--roles", "copies"]
        run = distil(tmp_path / "run", tiny_teacher, *more, method="tdm-unify")
    elif roles != "adapters":
        run = distil(tmp_path / "run", tiny_teacher, "--roles", roles, "--student-rate", "0.01")
    first, last = (load_checkpoint(run / "checkpoints" / name) for name in ("000001", "000002"))
    student = load_student(run / "student")
    assert set(last.grids) == set(student.grids)
    expected = student.latents(PROMPTS[:2], [0, 1], 2)
    torch.testing.assert_close(last.latents(PROMPTS[:2], [0, 1], 2), expected)
    assert float((first.latents(PROMPTS[:2], [0, 1], 2) - expected).abs().max()) > 1e-3
    assert last.card["iteration"] == 2


def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path, run: Path) -> None:
    folder = tmp_path / "checkpoints" / "000002"
    folder.mkdir(parents=True)
    with pytest.raises(FewstepError, match="found no checkpoint"):
        load_checkpoint(folder)
    state = json.loads((run / "checkpoints" / "000002" / "state.json").read_text())
    state["configuration"]["method"]["name"] = "phased"
    for file in (run / "checkpoints" / "000002").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(FewstepError, match="found a checkpoint of phased"):
        load_checkpoint(folder)


def test_a_comparison_of_teachers_a_student_and_checkpoints(
    run: Path, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    space = f"dinov2={write_dinov2(tmp_path / 'dino')}"
    words = [
        "compare", f"{tiny_teacher}:2", f"plain={tiny_teacher}:2@1", str(run), f"{run}/checkpoints/000001:2",
        "--prompts", str(prompts), "--count", "2", "--scores", "7", "--spaces", space,
        "--samples", str(tmp_path / "samples"), "--out", str(tmp_path / "out"), "--seed", "5",
    ]  # fmt: skip
    main(words)
    html = (tmp_path / "out" / "compare.html").read_text()
    told = json.loads(html.split('id="data">')[1].split("</script>")[0])
    names = ["teacher, 2 steps", "plain", "mine student, 2 steps", "mine at 1 student, 2 steps"]
    assert [c["name"] for c in told["candidates"]] == names
    assert [c["calls"] for c in told["candidates"]] == [4, 2, 2, 2]
    assert (told["prompts"], told["seeds"]) == (PROMPTS[:2], [5, 6])
    assert "Fréchet distance, dinov2" in html
    assert 'class="line"' in html  # the run's curves
    drawn = sorted(path for path in (tmp_path / "samples").rglob("*.png"))
    assert len(drawn) == 4 * (7 + 2) + 7  # figures and pictures of each, and the reference

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("drawn again")

    cost = lambda *_: Cost(2, 0.1, 0.0)
    monkeypatch.setattr("fewstep.evaluation.compare.measure_cost", cost)
    monkeypatch.setattr("fewstep.evaluation.study.measure_cost", cost)
    monkeypatch.setattr(Student, "sample", refuse)
    monkeypatch.setattr(Teacher, "sample", refuse)
    vote = {"voter": "v", "prompt": PROMPTS[0], "seed": 5, "a": "plain", "b": names[0], "choice": "a"}
    votes = tmp_path / "votes.json"
    votes.write_text(json.dumps({"format": FORMAT, "page": told["page"], "votes": [vote]}))
    main([*words, "--votes", str(votes)])
    assert "1 blind votes of 1 voter" in (tmp_path / "out" / "compare.html").read_text().replace("\n", " ")
    assert sorted((tmp_path / "samples").rglob("*.png")) == drawn


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are only named: a student is called so."""

    def load(source: str, device: torch.device) -> Any:
        backbone = SimpleNamespace(source=source)
        if "student" in source or "checkpoints" in source:
            model: Any = Student.__new__(Student)
            model.grids, model.card = {1: None, 4: None}, {"teacher": "x"}
        else:
            model = Teacher.__new__(Teacher)
            model.steps, model.guidance_scale = 50, 3.5
        model.backbone = backbone
        return model

    monkeypatch.setattr(command, "load", load)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("emoji",), [("teacher, 50 steps", 50, None)]),
        (("emoji:8@1.5", "a/student:1"), [("teacher, 8 steps, guidance 1.5", 8, 1.5), ("student, 1 step", 1, None)]),
        (("a/student", "b/student:1"), [("a student, 4 steps", 4, None), ("b student, 1 step", 1, None)]),
        (
            ("runs/x/checkpoints/000500:4", "new=runs/x/checkpoints/001000"),
            [("x at 500 student, 4 steps", 4, None), ("new", 4, None)],
        ),
        (("owner/model:30", "other/model2@2"), [("model teacher, 30 steps", 30, None)]
         + [("model2 teacher, 50 steps, guidance 2", 50, 2.0)]),
    ],
)  # fmt: skip
def test_candidates_as_a_user_writes_them(given: tuple[str, ...], expected: list[Any], sources: None) -> None:
    found = command.read_entries(given, CPU)
    assert [(entry.name, entry.steps, entry.guidance_scale) for entry in found] == expected


@pytest.mark.parametrize(
    ("given", "votes", "message"),
    [
        (("emoji:4", "emoji:4"), [], "expected each candidate once"),
        (("emoji", "a/student:3"), [], r"found 3 steps for 'student, 3 steps', expected one of \[1, 4\]"),
        (("emoji", "a/student@2"), [], "guidance for teachers only"),
        (("emoji",), [Vote("p", "v", "x", 0, "teacher, 50 steps", "gone", "a")], r"found votes on \['gone'\]"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_work(
    given: tuple[str, ...], votes: list[Vote], message: str, sources: None, tmp_path: Path
) -> None:
    with pytest.raises(FewstepError, match=message):
        compare(command.read_entries(given, CPU), ["x"], 0, tmp_path / "out", votes=votes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--count", "0"], ["--scores", "-1"], ["--megabytes", "0.5"]])
def test_numbers_out_of_range_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "emoji", *words])
    assert f"change {words[0]}" in capsys.readouterr().err


def test_the_shipped_table_spares_the_teachers_samples(tmp_path: Path) -> None:
    teacher = fewstep.load_teacher()
    subject = Subject(teacher, teacher.backbone.source)
    options = StudyOptions(samples=tmp_path / "samples")
    page, _ = compare(
        [Entry("teacher", subject, 1, 1.0)], ["a frog"], 0, tmp_path, scored=evaluation_captions(256), options=options,
        teacher=subject, from_table=True,
    )  # fmt: skip
    row = json.loads(shipped(TABLE_FILE).read_text())["1 steps, guidance 1"]
    html = page.read_text()
    assert f"{row['frechet']:.0f}</td>" in html
    assert 'id="variety"' in html
    assert len(list((tmp_path / "samples").rglob("*.png"))) == 1


def test_settings_tell_a_candidate_from_another(run: Path, tiny_teacher: Path) -> None:
    def settings(source: Path, model: Any, steps: int, scale: float | None = None) -> dict[str, Any]:
        return Entry("x", Subject(model, str(source)), steps, scale).settings()

    teacher, student = fewstep.load_teacher(tiny_teacher), load_student(run / "student")
    found = [
        settings(tiny_teacher, teacher, 2),
        settings(tiny_teacher, teacher, 2, 1.0),
        settings(run / "student", student, 2),
    ]
    ids = {page_id([Candidate("x", torch.zeros(1, 3, 4, 4, dtype=torch.uint8), 1, None, {}, each)]) for each in found}
    assert len(ids) == 3
    assert json.loads(json.dumps(found[2]))["details"]["method"]["steps"] == 2
    assert found[0]["times"][0] == 1.0
