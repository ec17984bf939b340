"""The public names, and any function as a teacher."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.api import RoleOptions
from fewstep.data.real import RealImages
from fewstep.errors import FewstepError
from fewstep.losses.moments import element_moments
from fewstep.material import with_moments
from fewstep.methods import preset
from fewstep.models import Backbone
from fewstep.several import distill_part
from fewstep.training.log import read_log
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]
QUICK = TrainOptions(iterations=2, batch=4, warmup=1, log_every=1, tensorboard=False)


def test_importing_fewstep_is_light() -> None:
    code = "import sys, fewstep; assert 'torch' not in sys.modules; print(fewstep.__version__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    with pytest.raises(AttributeError):
        fewstep.nonsense  # noqa: B018


@pytest.mark.parametrize("roles", ["adapters", "copies", "mixed"])
def test_five_lines_distil_a_student_that_samples(roles: str, tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    student = fewstep.distill(
        teacher, "tdm", out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions(roles=roles), train_options=QUICK
    )
    images = fewstep.sample(student, PROMPTS, seeds=5, steps=4)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.uint8
    again = fewstep.sample(tmp_path / "run" / "student", PROMPTS, seeds=[5, 6, 7])
    assert torch.equal(images, again)


def test_the_saved_student_is_the_averaged_one_in_training(tmp_path: Path, tiny_teacher: Path) -> None:
    from fewstep.live import LiveStudent
    from fewstep.training.loop import Hooks

    seen: list[torch.Tensor] = []
    made: list[LiveStudent] = []
    original = LiveStudent.__init__

    def watch(self: LiveStudent, seats: object, options: object) -> None:
        original(self, seats, options)  # type: ignore[arg-type]
        made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveStudent, "__init__", watch)
        fewstep.distill(tiny_teacher, "tdm-unify", out=tmp_path / "a", prompts=PROMPTS, train_options=QUICK)
    hooks = Hooks(sample=lambda iteration: seen.append(made[0].latents(PROMPTS, [1, 2, 3], 2)))
    assert made[0].grids.keys() == {1, 2, 4, 8}
    student = fewstep.load_student(tmp_path / "a" / "student")
    assert student.steps_aware
    assert hooks.sample is not None
    hooks.sample(2)  # the roles hold the last weights here, the folder the average: near, not equal
    saved = student.latents(PROMPTS, [1, 2, 3], 2)
    assert 0 < float((seen[0] - saved).norm() / saved.norm()) < 0.1


def test_options_of_a_method_can_be_replaced(tmp_path: Path, tiny_teacher: Path) -> None:
    options = replace(preset("tdm"), steps=2, guidance_scale=1.0)  # type: ignore[type-var]
    student = fewstep.distill(tiny_teacher, options, out=tmp_path / "run", prompts=PROMPTS, train_options=QUICK)
    assert student.grids.keys() == {2}
    assert student.card["details"]["method"]["guidance_scale"] == 1.0


def test_prompts_are_needed_and_must_not_be_empty(tmp_path: Path, tiny_teacher: Path) -> None:
    for prompts in ([], ["a frog", " "]):
        with pytest.raises(FewstepError, match="empty prompt"):
            fewstep.distill(tiny_teacher, out=tmp_path / "run", prompts=prompts, train_options=QUICK)
    with pytest.raises(FewstepError, match="--prompts"):
        fewstep.distill(tiny_teacher, out=tmp_path / "run", train_options=QUICK)
    assert not (tmp_path / "run").exists()


def test_the_embedded_teacher_and_its_judge_load_and_sample() -> None:
    from fewstep.evaluation.run import evaluate_scenes, reference_features
    from fewstep.evaluation.scenes import evaluation_captions

    teacher = fewstep.load_teacher()
    images = fewstep.sample(teacher, ["a red apple on a white background"], steps=2)
    assert images.shape == (1, 3, 64, 64)
    reference = reference_features()
    assert len(reference) >= 256
    assert reference.shape[1] == 128
    result = evaluate_scenes(teacher, steps=1, count=16)
    assert result.calls == 2
    assert result.scores.images == 16
    assert len(evaluation_captions(16)) == 16


def test_evaluation_refuses_other_picture_sizes(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(FewstepError, match="fewstep compare"):
        fewstep.evaluate(fewstep.load_teacher(tiny_teacher), steps=1, count=16)


def real_images(backbone: Backbone) -> RealImages:
    images = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 32, 32)
    return RealImages(backbone, images, PROMPTS)


@pytest.mark.parametrize("roles", [RoleOptions(), RoleOptions(roles="copies", discriminator="teacher")])
@pytest.mark.parametrize("method", ["dmd2", "f-distill"])
def test_methods_with_a_discriminator_distil_from_real_images(
    method: str, roles: RoleOptions, tmp_path: Path, tiny_teacher: Path
) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    options = replace(preset(method), critic_updates=1, steps=2)  # type: ignore[type-var]
    student = fewstep.distill(
        teacher, options, out=tmp_path, prompts=PROMPTS, real=real_images(teacher.backbone), roles=roles,
        train_options=QUICK,
    )  # fmt: skip
    assert fewstep.sample(student, PROMPTS, seeds=5).shape == (3, 3, 32, 32)
    features = "teacher" if roles.discriminator == "teacher" or method == "f-distill" else "critic"
    assert student.card["details"]["roles"]["discriminator"] == features


def test_real_data_are_asked_for_before_any_work(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(FewstepError, match=r"found no real data for dmd2 .*RealImages"):
        fewstep.distill(tiny_teacher, "dmd2", out=tmp_path / "run", prompts=PROMPTS, train_options=QUICK)
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_discriminator_is_described_as_before(tmp_path: Path, tiny_teacher: Path) -> None:
    """So that runs begun before there were any can be resumed."""
    student = fewstep.distill(tiny_teacher, "tdm", out=tmp_path, prompts=PROMPTS, train_options=QUICK)
    assert student.card["details"]["roles"].keys() == {"roles", "rank", "critic_rank", "layers"}


def test_dmd_makes_its_own_pairs(tmp_path: Path, tiny_teacher: Path) -> None:
    """With the guidance it distils: the regression is to what the guided teacher makes."""
    teacher = fewstep.load_teacher(tiny_teacher)
    teacher.steps = 2
    student = fewstep.distill(teacher, "dmd", out=tmp_path, prompts=PROMPTS, train_options=QUICK)
    assert student.grids.keys() == {1}
    record = read_log(tmp_path / "log.jsonl")[-1]
    assert record["metric/student/regression_loss"] > 0


def test_what_no_pipeline_could_sample_is_refused_before_any_work(tmp_path: Path, tiny_teacher: Path) -> None:
    options = replace(preset("sid-none"), chain_noise="fixed")  # type: ignore[type-var]
    settings = {"out": tmp_path / "run", "prompts": PROMPTS, "train_options": QUICK}
    with pytest.raises(FewstepError, match=r"found chain_noise 'fixed' for students of 4 steps"):
        fewstep.distill(tiny_teacher, options, **settings)
    with pytest.raises(FewstepError, match="chain_noise 'fixed'"):
        distill_part(tiny_teacher, 1, parts=2, dm=options, **settings)
    assert not (tmp_path / "run").exists()


def test_moments_are_measured_on_the_teachers_own_latents_unless_given(tmp_path: Path, tiny_teacher: Path) -> None:
    teacher = fewstep.load_teacher(tiny_teacher)
    teacher.steps = 2
    options = replace(preset("decoupled"), regulariser="mean_variance", steps=2)  # type: ignore[type-var]
    settings = {"out": tmp_path, "prompts": PROMPTS, "train_options": QUICK}
    student = fewstep.distill(teacher, options, **settings)
    texts = [PROMPTS[n % len(PROMPTS)] for n in range(64)]
    latents = teacher.latents(texts, range(64), guidance_scale=options.guidance_scale)
    made = student.card["details"]["method"]
    assert (made["moment_mean"], made["moment_variance"]) == pytest.approx(element_moments(latents), rel=5e-3)
    record = read_log(tmp_path / "log.jsonl")[-1]
    assert record["metric/student/moment_loss"] > 0
    assert not [name for name in record if name.endswith("/critic")]  # no forwards, no loss: there is none
    again = fewstep.distill(teacher, options, **settings, resume=True)
    assert again.card["details"]["method"] == made

    given = replace(options, moment_mean=0.075, moment_variance=0.81)
    assert with_moments(given, teacher, PROMPTS) is given
    half = with_moments(replace(options, moment_mean=0.075), teacher, PROMPTS)
    assert (half.moment_mean, half.moment_variance) == (0.075, made["moment_variance"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoupled", "adapters"),
        ("decoupled", "copies"),
        ("decoupled-constrained", "mixed"),
        ("decoupled-shared", "adapters"),
    ],
)
def test_decoupled_presets_distil(name: str, kind: str, tmp_path: Path, tiny_teacher: Path) -> None:
    options = replace(preset(name), critic_updates=1, steps=2)  # type: ignore[type-var]
    student = fewstep.distill(
        tiny_teacher, options, out=tmp_path, prompts=PROMPTS, roles=RoleOptions(roles=kind), train_options=QUICK
    )
    assert fewstep.sample(student, PROMPTS, seeds=5).shape == (3, 3, 32, 32)
    record = read_log(tmp_path / "log.jsonl")[-1]
    assert record["forwards/teacher"] == (2 if name == "decoupled-shared" else 3)
    assert record["metric/student/guidance_pull"] > 0


def test_a_gan_in_the_place_of_matching_distils_without_a_critic(tmp_path: Path, tiny_teacher: Path) -> None:
    """Heads on the frozen teacher; named, those of a critic that is nothing but the discriminator's."""
    teacher = fewstep.load_teacher(tiny_teacher)
    options = replace(preset("decoupled"), regulariser="gan", gan_weight=0.1, critic_updates=1, steps=2)  # type: ignore
    for features, forwards in (("method", "forwards/teacher"), ("critic", "forwards/discriminator")):
        out, roles = tmp_path / features, RoleOptions(discriminator=features)
        fewstep.distill(
            teacher, options, out=out, prompts=PROMPTS, real=real_images(teacher.backbone), roles=roles,
            train_options=QUICK,
        )  # fmt: skip
        record = read_log(out / "log.jsonl")[-1]
        assert "forwards/critic" not in record
        assert record[forwards] > 0
        saved = load_file(out / "checkpoints" / "000002" / "critic.safetensors")
        assert all(name.startswith("discriminator.") for name in saved) == (features == "method")


def test_the_embedded_teacher_brings_its_own_real_data(tmp_path: Path) -> None:
    options = replace(preset("dmd2"), critic_updates=1, steps=1)  # type: ignore[type-var]
    quick = replace(QUICK, iterations=1, batch=2)
    fewstep.distill(method=options, out=tmp_path, roles=RoleOptions(rank=2), train_options=quick)
    assert read_log(tmp_path / "log.jsonl")[-1]["forwards/discriminator"] == 3
