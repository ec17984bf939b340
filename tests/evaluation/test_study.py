"""Samples that are kept, and a whole study on tiny networks: planted differences have to show."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from tiny_judges import write_clip, write_dinov2

import fewstep
from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation.intervals import drawn_counts
from fewstep.evaluation.quality import Measured, Reference, measure, quality
from fewstep.evaluation.samples import SampleSet, fingerprint, read_sample
from fewstep.evaluation.study import StudyOptions, Subject, study
from fewstep.models.teacher import Teacher
from fewstep.training.parallel import Group

PROMPTS = ["a frog", "a 3d frog", "a pizza", "a 3d pizza", "a red apple", "a red frog", "a blue apple"]


@dataclass(frozen=True)
class Apart(Group):
    """One of several processes, without the others."""

    def wait(self) -> None:
        return


class Painter:
    """Draws a sample that says its seed, and counts."""

    def __init__(self, frames: int = 0) -> None:
        self.seeds: list[int] = []
        self._shape = (frames, 3, 4, 6) if frames else (3, 4, 6)

    def __call__(self, prompts: list[str], seeds: list[int]) -> Tensor:
        self.seeds += seeds
        return torch.stack([torch.full(self._shape, seed, dtype=torch.uint8) for seed in seeds])


def test_samples_are_drawn_once_and_shared_among_processes(tmp_path: Path) -> None:
    samples, painter = SampleSet(tmp_path, {"steps": 4}), Painter()
    prompts, seeds = ["a", "b", "a", "c", "d"], [0, 1, 2, 3, 4]
    assert samples.complete(prompts[:3], seeds[:3], painter, 2, Apart(0, 1)) == 3
    for rank in (0, 1):
        samples.complete(prompts, seeds, painter, 2, Apart(rank, 2))
    assert sorted(painter.seeds) == seeds
    assert samples.complete(prompts, seeds, painter, 2, Apart(0, 1)) == 0
    read = torch.cat(list(samples.read(prompts, seeds, batch=2)))
    assert read[:, 0, 0, 0].tolist() == seeds
    assert json.loads((samples.folder / "samples.json").read_text()) == {"steps": 4}
    assert SampleSet(tmp_path, {"steps": 2}).folder != samples.folder
    assert not list(tmp_path.rglob(".unfinished*"))


def test_a_run_that_is_killed_keeps_what_it_drew(tmp_path: Path) -> None:
    samples, painter = SampleSet(tmp_path, {}), Painter()

    def killed(prompts: list[str], seeds: list[int]) -> Tensor:
        if 2 in seeds:
            raise KeyboardInterrupt
        return painter(prompts, seeds)

    with pytest.raises(KeyboardInterrupt):
        samples.complete(["a"] * 4, range(4), killed, 2, Group(0, 1))
    assert samples.complete(["a"] * 4, range(4), painter, 2, Group(0, 1)) == 2
    assert painter.seeds == [0, 1, 2, 3]


def test_videos_come_back_to_the_bit(tmp_path: Path) -> None:
    samples = SampleSet(tmp_path, {})
    video = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples.complete(["a"], [0], lambda prompts, seeds: video[None], 1, Group(0, 1))
    assert torch.equal(read_sample(samples.path("a", 0)), video)
    samples.path("a", 0).write_bytes(b"no picture")
    with pytest.raises(FewstepError, match="no readable picture"):
        read_sample(samples.path("a", 0))


def test_a_fingerprint_is_of_every_byte_and_of_a_loras_teacher(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for folder in (teacher, student):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    (student / "fewstep.json").write_text(json.dumps({"form": "lora", "teacher": str(teacher)}))
    first = fingerprint(student)
    (teacher / "model.safetensors").write_bytes(b"weighty")
    second = fingerprint(student)
    (student / "model.safetensors").write_bytes(b"weighty")
    assert len({first, second, fingerprint(student)}) == 3
    assert fingerprint("owner/name") == "owner/name"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_planted_loss_of_variety_shows_with_its_interval() -> None:
    """Sixty prompts, three seeds each; one student half as varied, one that forgets the seed."""
    places, counts = 3 * normal(60, 1, 4, seed=0), drawn_counts(60, 100)

    def features(scale: float, seed: int) -> Tensor:
        return (places + scale * normal(60, 3, 4, seed=seed)).view(180, 1, 4)

    reference = Reference({"x": features(1, 11)}, by_prompt=True)
    rows = [quality(Measured({"x": features(scale, 12)}), counts, reference=reference) for scale in (1, 0.5, 1e-6)]
    ratios = [row["variety ratio/x"] for row in rows]
    assert ratios[0].low < 1 < ratios[0].high
    assert ratios[1].low < 0.5 < ratios[1].high < 0.6
    assert ratios[2].high < 1e-3
    assert rows[0]["kernel/x"].low < 0 < rows[0]["kernel/x"].high


def test_planted_mode_loss_shows_with_its_interval() -> None:
    """Forty prompts, two samples each; every second sample lies in a second mode, which the student has lost."""
    counts, second = drawn_counts(40, 100), 20.0 * (torch.arange(80) % 2)[:, None]
    reference = Reference({"x": (normal(80, 4, seed=1) + second)[:, None]}, by_prompt=True)
    whole = quality(Measured({"x": (normal(80, 4, seed=2) + second)[:, None]}), counts, reference=reference)
    lost = quality(Measured({"x": normal(80, 1, 4, seed=3)}), counts, reference=reference)
    for name in ("recall/x", "coverage/x"):
        assert lost[name].value <= 0.5
        assert lost[name].high < 0.6 < whole[name].low
    assert lost["precision/x"].low > 0.8
    # Half of the mass is 20 away along each of four axes: (10^2 of the mean, and about 10^2 of the spread) x 4.
    assert lost["frechet/x"].value == pytest.approx(800, rel=0.15)
    assert whole["frechet/x"].high < 10


def test_each_sample_meets_its_own_prompt_and_partner() -> None:
    images = torch.arange(0, 250, 25, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 8, 8).contiguous()
    texts = [str(n) for n in range(10)]
    seen: list[str] = []

    def score(part: Tensor, prompts: list[str]) -> Tensor:
        seen.extend(prompts)
        return part.float().mean((1, 2, 3))

    spaces = {"mean": lambda part: part.float().mean((2, 3))}
    partners = (images + 51).split(4)
    found = measure(images.split(4), texts, spaces, {"light": score}, partners=partners)
    assert seen == texts
    assert found.features["mean"][:, 0, 0].tolist() == list(range(0, 250, 25))
    assert found.numbers["paired/pixels"][:8].tolist() == pytest.approx([0.2] * 8)
    row = quality(found, drawn_counts(5, 0), paired=Measured({"mean": found.features["mean"] + 3}))
    assert row["score/light"].value == pytest.approx(112.5)
    assert row["paired/mean"].value == pytest.approx(27**0.5)
    assert row["paired/mean"].low is None

    video = torch.zeros(2, 12, 3, 8, 8, dtype=torch.uint8)
    video[:, 6:] = 51
    found = measure([video], ["a", "b"], spaces, {"light": score})
    assert found.features["mean"].shape == (2, 8, 3)
    assert found.numbers["score/light"].tolist() == pytest.approx([25.5, 25.5])
    assert found.numbers["flicker"].tolist() == pytest.approx([0.2 / 11] * 2)
    assert found.numbers["motion"].tolist() == [0, 0]


@pytest.fixture(scope="module")
def teacher(tiny_teacher: Path) -> Teacher:
    loaded = fewstep.load_teacher(tiny_teacher)
    loaded.steps = 2
    return loaded


def test_a_study_of_two_step_counts(
    teacher: Teacher, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = StudyOptions(
        per_prompt=2, paired=True, resamples=5, samples=tmp_path / "samples",
        spaces=(f"dinov2={write_dinov2(tmp_path / 'dino')}",), scores=(f"clip={write_clip(tmp_path / 'clip')}",),
    )  # fmt: skip
    subject = Subject(teacher, str(tiny_teacher))
    results = study(subject, subject, PROMPTS, [1, 2], options)
    assert results is not None
    assert list(results) == ["teacher", "1 steps", "2 steps"]
    assert results["2 steps"].cost.calls == 4
    assert results["2 steps"].row["paired/pixels"].value == 0  # the teacher at its own steps, from the same noise
    assert results["2 steps"].row["paired/dinov2"].value == 0
    assert results["1 steps"].row["paired/pixels"].value > 0
    assert results["2 steps"].row["frechet/dinov2"] == results["teacher"].row["frechet/dinov2"]
    expected = {"frechet", "kernel", "precision", "recall", "density", "coverage", "variety", "variety ratio"}
    assert {f"{name}/dinov2" for name in expected} | {"score/clip"} <= results["teacher"].row.keys()

    def refuse(*arguments: object, **named: object) -> Tensor:
        assert len(arguments[0]) == 1, "drawn again"  # type: ignore[arg-type]  # only to measure the cost
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(teacher, "sample", refuse)
    again = study(subject, subject, PROMPTS, [1, 2], options)
    assert again is not None
    assert {name: result.row for name, result in again.items()} == {name: r.row for name, r in results.items()}


def test_the_command_writes_numbers_and_a_curve_against_pictures(tiny_teacher: Path, tmp_path: Path) -> None:
    prompts, pictures = tmp_path / "prompts.txt", tmp_path / "pictures"
    prompts.write_text("\n".join(PROMPTS))
    painted = SampleSet(pictures, {})
    noise = torch.randint(0, 256, (8, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    painted.complete(["a"] * 8, range(8), lambda prompts, seeds: noise[seeds], 8, Group(0, 1))
    words = ["evaluate", "--student", tiny_teacher, "--prompts", prompts, "--steps", "2", "1", "--resamples", "3"]
    words += ["--spaces", f"dinov2={write_dinov2(tmp_path / 'dino')}", "--reference", painted.folder]
    words += ["--samples", tmp_path / "samples", "--out", tmp_path / "out.json", "--device", "cpu"]
    main([str(word) for word in words])
    told = json.loads((tmp_path / "out.json").read_text())
    assert list(told["rows"]) == ["2 steps", "1 steps"]
    row = told["rows"]["1 steps"]
    assert row["calls"] == 2
    low, value, high = (row["metrics"]["frechet/dinov2"][name] for name in ("low", "value", "high"))
    assert low <= value <= high
    assert row["metrics"]["recall/dinov2"]["low"] is None  # pictures belong to no prompt
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "steps", "prompts", "expected"),
    [
        ({}, [1], PROMPTS, "found the space judge"),
        ({"per_prompt": 0}, [1], PROMPTS, "--per-prompt"),
        ({"reference": "/nowhere"}, [1], PROMPTS, "found no folder /nowhere"),
        ({}, [0], PROMPTS, "found steps = 0"),
        ({}, [1], PROMPTS[:5], "found 5 prompts"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    changes: dict, steps: list[int], prompts: list[str], expected: str, teacher: Teacher, tmp_path: Path
) -> None:
    options = StudyOptions(samples=tmp_path / "samples", **changes)
    subject = Subject(teacher, "somewhere")
    with pytest.raises(FewstepError, match=expected):
        study(subject, subject, prompts, steps, options)
    assert not list(tmp_path.iterdir())
