"""MSD: what a partition buys in closed form, the order of stages, and chains of runs on the tiny pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fewstep
from fewstep.api import RoleOptions
from fewstep.conditions import TextOptions
from fewstep.core.process import Flow
from fewstep.data.prompts import training_captions
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, MixtureTeacher
from fewstep.evaluation.known_answers_msd import affine_error, evenly, imitation
from fewstep.evaluation.toy import LinearStudent, PolynomialCritic, distil
from fewstep.methods import DecoupledOptions, preset
from fewstep.methods.msd import msd_stages
from fewstep.methods.tdm import TDM
from fewstep.methods.tdm_options import TDMOptions
from fewstep.methods.tsm import TSMOptions
from fewstep.models.router import Router, contiguous_split, pooled
from fewstep.several import ScenesOfPart, distill_part
from fewstep.training.log import read_log
from fewstep.training.options import TrainOptions

WORDS = ["a frog", "a red apple", "a 3d pizza", "a blue frog", "a red pizza", "a background", "on a blue apple", "3d"]
QUICK = TrainOptions(iterations=2, batch=4, warmup=1, log_every=1, tensorboard=False)


@pytest.mark.parametrize(("parts", "expected"), [(1, 5.556e-3), (2, 3.472e-4), (4, 2.170e-5), (8, 1.356e-6)])
def test_contiguous_parts_multiply_capacity_by_k_to_the_fourth(parts: int, expected: float) -> None:
    """Card 8.3's numbers; that the limit is 1 / (180 K^4) is in the known answers."""
    y = evenly(40_000)
    assert affine_error(y, contiguous_split(y[:, None], parts).part(y[:, None])) == pytest.approx(expected, rel=1e-3)


def test_random_parts_gain_nothing() -> None:
    """Card 8.3: 1000 classes in 4 parts, contiguous 2.170e-5, random 5.53e-3 (one draw of it)."""
    y = evenly(1000)
    contiguous = contiguous_split(y[:, None], 4).part(y[:, None])
    assert affine_error(y, contiguous) == pytest.approx(2.170e-5, rel=1e-3)
    random = contiguous[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    assert affine_error(y, random) == pytest.approx(5.53e-3, rel=0.01)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_a_student_that_is_not_trained_fails_the_known_answer_of_imitation(kind: str) -> None:
    (answer,) = imitation(Flow(), kind, iterations=0)  # type: ignore[arg-type]
    assert answer.measured > 0.5
    assert not answer.passed


def test_where_there_is_no_limit_of_capacity_parts_gain_nothing() -> None:
    """Card 8.2: students that are tables reach the same optimum alone and together, the data's law."""
    spreads = [0.5, 2.0]
    covariances = torch.stack([torch.eye(4) * spread for spread in spreads])
    teacher = MixtureTeacher(Flow(), torch.ones(2), torch.zeros(2, 4), covariances, classes=[0, 1])
    method = TDM(TDMOptions(steps=1, guidance_scale=1.0))
    grid = method.options.time_grid(1)
    each = [MixtureTeacher(Flow(), torch.ones(1), torch.zeros(1, 4), covariances[label][None]) for label in (0, 1)]

    class Table(torch.nn.Module):
        def __init__(self, kind: type) -> None:
            super().__init__()
            self.rows = torch.nn.ModuleList(kind(own, {1: grid}) for own in each)

        def forward(self, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
            parts = torch.stack([row(x, t, {}) for row in self.rows])
            return parts[condition[LABEL], torch.arange(len(x))]

    def trained(labels: list[int]) -> list[float]:
        """The variance that a student of these classes ends with, for each."""
        student, critic = Table(LinearStudent), Table(PolynomialCritic)
        choices = torch.tensor(labels)

        def draw(generator: torch.Generator) -> dict[str, Tensor]:
            return {LABEL: choices[torch.randint(len(choices), (512,), generator=generator)]}

        distil(method, teacher, student, critic, iterations=400, batch=512, student_rate=8e-3, critic_rate=0.02,
               condition=draw)  # fmt: skip
        weights = [student.rows[label].weight.detach() for label in labels]
        return [float((weight.T @ weight).diagonal().mean()) for weight in weights]

    together, alone = trained([0, 1]), [*trained([0]), *trained([1])]
    assert together == pytest.approx(spreads, rel=0.05)
    assert alone == pytest.approx(spreads, rel=0.05)


def test_stages_come_in_the_papers_order() -> None:
    dm = TDMOptions(steps=2, shift=3.0)
    assert [stage.name for stage in msd_stages(dm)] == ["dm"]
    assert [stage.name for stage in msd_stages(dm, smaller=True)] == ["tsm", "dm"]
    tsm, plain, adversarial = msd_stages(dm, smaller=True, gan_weight=0.003)
    assert (tsm.name, plain.name, adversarial.name) == ("tsm", "dm", "adm")
    assert tsm.options == TSMOptions(steps=2, shift=3.0)
    assert plain.options == dm
    assert adversarial.options == replace(dm, gan_weight=0.003)
    assert [stage.keeps_critic for stage in (tsm, plain, adversarial)] == [False, False, True]
    with pytest.raises(FewstepError, match="gan_weight of the dm stage"):
        msd_stages(replace(dm, gan_weight=0.1))


def test_parts_are_trained_apart_and_sampled_together(tiny_teacher: Path, tmp_path: Path) -> None:
    """Two machines with the same router; their folders put together are one student."""
    teacher = fewstep.load_teacher(tiny_teacher)
    settings = {"parts": 2, "prompts": WORDS, "train_options": QUICK, "dm": TDMOptions(steps=2)}
    first = distill_part(teacher, 1, out=tmp_path / "here", **settings)
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "router.json", tmp_path / "there")
    second = distill_part(teacher, 2, out=tmp_path / "there", **settings)
    with pytest.raises(FewstepError, match="no student for part-2 of 2"):
        fewstep.load_student(tmp_path / "here")
    shutil.copytree(tmp_path / "there" / "part-2" / "student", tmp_path / "here" / "part-2" / "student")

    student = fewstep.load_student(tmp_path / "here")
    part = student.router.route(WORDS, student._embed).tolist()
    assert sorted(part) == [0, 0, 0, 0, 1, 1, 1, 1]
    seeds = list(range(8))
    latents = student.latents(WORDS, seeds)
    for row, number in enumerate(part):
        own = (first, second)[number].latents(WORDS, seeds)
        torch.testing.assert_close(latents[row], own[row], rtol=1e-4, atol=1e-4)
    images = fewstep.sample(tmp_path / "here", WORDS, seeds)
    assert images.shape == (8, 3, 32, 32)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_each_stage_begins_with_the_students_of_the_last_to_the_bit(
    tiny_teacher: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card 8.7, also for a student of half the size: its critic and optimisers are new."""
    import fewstep.training.phases as phases

    began: dict[str, dict[str, Tensor]] = {}
    original = phases.train

    def watched(method, roles, data, options, out, hooks, **more):
        began[out.name] = {name: value.clone() for name, value in roles.student_state().items()}
        assert (out.name, bool(more["configuration"]["before"])) in [("tsm", False), ("dm", True)]
        if out.name == "tsm":
            assert not roles.critic_parameters()  # and no memory for it
            return original(method, roles, data, options, out, hooks, **more)
        x, t = torch.randn(2, 4, 8, 8), torch.ones(2)
        condition = data(1, torch.arange(2))
        with torch.no_grad():
            assert torch.equal(roles.critic(x, t, condition), roles.teacher(x, t, condition))  # new
        return original(method, roles, data, options, out, hooks, **more)

    monkeypatch.setattr(phases, "train", watched)
    settings = {"dm": TDMOptions(steps=2), "tsm": TSMOptions(path_steps=2), "depth": 0.5, "parts": 2, "prompts": WORDS}
    student = distill_part(
        tiny_teacher, 1, out=tmp_path, roles=RoleOptions(roles=kind), train_options=QUICK, **settings
    )
    ended = load_file(tmp_path / "part-1" / "tsm" / "checkpoints" / "000002" / "ema.safetensors")
    assert began["dm"].keys() == ended.keys()
    assert all(torch.equal(value, ended[name]) for name, value in began["dm"].items())
    assert student.network.config.num_layers == 1
    saved = load_file(tmp_path / "part-1" / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
    ended = load_file(tmp_path / "part-1" / "dm" / "checkpoints" / "000002" / "ema.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in ended.items())

    with pytest.raises(FewstepError, match="found a run"):
        distill_part(tiny_teacher, 1, out=tmp_path, train_options=QUICK, roles=RoleOptions(roles=kind), **settings)
    again = distill_part(
        tiny_teacher, 1, out=tmp_path, train_options=QUICK, roles=RoleOptions(roles=kind), resume=True, **settings
    )
    torch.testing.assert_close(again.latents(WORDS, range(8)), student.latents(WORDS, range(8)), rtol=0, atol=0)


def test_mistakes_are_refused_before_any_work(tiny_teacher: Path, tmp_path: Path) -> None:
    quick = {"out": tmp_path, "prompts": WORDS, "train_options": QUICK}
    with pytest.raises(FewstepError, match="part 3 of 2"):
        distill_part(tiny_teacher, 3, parts=2, **quick)
    with pytest.raises(FewstepError, match="router of 2 parts"):
        distill_part(tiny_teacher, 1, parts=4, **quick)
    with pytest.raises(FewstepError, match="train options for"):
        distill_part(tiny_teacher, 1, parts=2, out=tmp_path, prompts=WORDS, train_options={"adm": QUICK})
    with pytest.raises(FewstepError, match="no real data"):
        distill_part(tiny_teacher, 1, parts=2, gan_weight=0.1, **quick)
    unify = TDMOptions(step_counts=(2, 4), steps_condition=True)
    with pytest.raises(FewstepError, match="told its step count"):
        distill_part(tiny_teacher, 1, parts=2, dm=unify, depth=0.5, **quick)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["router.json"]


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_the_last_stage_adds_a_discriminator_to_student_and_critic_of_the_second(
    tiny_teacher: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fewstep.training.phases as phases

    began: dict[str, dict[str, Tensor]] = {}
    original = phases.train

    def watched(method, roles, data, options, out, hooks, **more):
        began[out.name] = {name: value.clone() for name, value in roles.critic_state().items()}
        return original(method, roles, data, options, out, hooks, **more)

    monkeypatch.setattr(phases, "train", watched)
    teacher = fewstep.load_teacher(tiny_teacher)

    def real(iteration: int, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        texts = [WORDS[int(n) % len(WORDS)] for n in samples]
        return torch.randn(len(samples), 4, 8, 8, generator=torch.Generator().manual_seed(iteration)), (
            teacher.backbone.encode(texts)
        )

    rates = {"dm": QUICK, "adm": replace(QUICK, student_rate=1e-6)}
    dm = TDMOptions(steps=2)
    distill_part(
        teacher, 2, out=tmp_path, parts=[WORDS[:5], WORDS[5:]], dm=dm, gan_weight=0.01, real=real, train_options=rates,
        roles=RoleOptions(roles=kind),
    )  # fmt: skip
    logs = {name: (tmp_path / "part-2" / name / "log.jsonl").read_text() for name in ("dm", "adm")}
    assert "discriminator_loss" in logs["adm"]
    assert "discriminator_loss" not in logs["dm"]
    dm_end, adm_end = (
        load_file(tmp_path / "part-2" / name / "checkpoints" / "000002" / "ema.safetensors") for name in ("dm", "adm")
    )
    assert dm_end.keys() == adm_end.keys()
    moved = max(float((dm_end[name] - value).abs().max()) for name, value in adm_end.items())
    assert 0 < moved < 1e-5  # it went on from there, at its own rate
    critic = load_file(tmp_path / "part-2" / "dm" / "checkpoints" / "000002" / "critic.safetensors")
    heads = {name for name in began["adm"] if name.startswith("discriminator.")}
    assert heads
    assert began["adm"].keys() - heads == critic.keys()
    assert all(torch.equal(began["adm"][name], value) for name, value in critic.items())
    assert any(not torch.equal(began["dm"][name], value) for name, value in critic.items())


def test_a_part_is_held_at_moments_measured_for_its_own_prompts(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.material._MEASURED", 16)
    dm = DecoupledOptions(regulariser="mean_variance", steps=2)
    made = {}
    for part in (1, 2):
        student = distill_part(tiny_teacher, part, out=tmp_path, parts=2, dm=dm, prompts=WORDS, train_options=QUICK)
        made[part] = student.card["details"]["method"]["moment_mean"]
        assert not (tmp_path / f"part-{part}" / "dm" / "checkpoints" / "000002" / "critic.safetensors").exists()
    assert made[1] != made[2]


@pytest.mark.parametrize("mode", ["cache", "keep"])
def test_conditions_are_cut_to_the_part_and_pairs_are_not(
    tiny_teacher: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Card 8.6: what is matched has prompts of the part alone, what is regressed to has all prompts."""
    import fewstep.training.phases as phases

    asked: dict[str, set[int]] = {}
    original = phases.train
    teacher = fewstep.load_teacher(tiny_teacher)
    teacher.steps = 1

    def watched(method, roles, data, options, out, hooks, **more):
        def which(condition: dict[str, Tensor]) -> set[int]:
            known = teacher.backbone.encode(WORDS)["text_states"]
            far = (condition["text_states"][:, None] - known[None]).flatten(2).abs().amax(2)
            return set(far.argmin(1).tolist())

        asked["matched"] = which(data(1, torch.arange(32)))
        asked["regressed"] = which(more["pairs"](1, torch.arange(32))[2])
        return original(method, roles, data, options, out, hooks, **more)

    monkeypatch.setattr(phases, "train", watched)
    distill_part(
        teacher, 2, out=tmp_path, parts=[WORDS[:5], WORDS[5:]], dm=preset("dmd"), train_options=QUICK,  # type: ignore[arg-type]
        text=TextOptions(text_encoder=mode),  # type: ignore[arg-type]
    )  # fmt: skip
    assert asked == {"matched": {5, 6, 7}, "regressed": set(range(8))}
    assert read_log(tmp_path / "part-2" / "dm" / "log.jsonl")[-1]["metric/student/regression_loss"] > 0


def test_the_discriminator_of_a_part_sees_scenes_of_that_part_alone() -> None:
    """By a stand-in for the text encoder: the length of a caption."""

    class ByLength:
        def encode(self, prompts: list[str]) -> dict[str, Tensor]:
            return {"states": torch.tensor([float(len(prompt)) for prompt in prompts])[:, None, None]}

    captions = training_captions(200)
    router = Router.contiguous(captions, lambda some: pooled(ByLength().encode(some)), 2)
    shorter, longer = (ScenesOfPart(ByLength(), 0, router, part) for part in (0, 1))
    lengths = [[len(scenes.scene(n)[1]) for n in range(6)] for scenes in (shorter, longer)]
    assert max(lengths[0]) < min(lengths[1])
    assert shorter.scene(3)[1] == shorter.scene(3)[1]
