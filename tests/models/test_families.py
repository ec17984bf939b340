"""Every image family: our teacher is its stock pipeline, and a student exported from it is sampled by that pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES, PROMPTS, build_sd15, save, schedule
from tiny_pixart import assert_latents_close, perturb

from fewstep.api import RoleOptions, distill, load_teacher
from fewstep.core import grids
from fewstep.core.process import Flow
from fewstep.data.real import RealImages
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import build_roles, load_student, save_student
from fewstep.models.export import CARD
from fewstep.models.loading import _adapter_for
from fewstep.models.pipelines import unpack
from fewstep.models.schedulers import Sampling, _problem, _problem_of_law, choose_scheduler
from fewstep.models.teacher import Teacher
from fewstep.training.options import TrainOptions

SEEDS = [3, 4]
GLOBAL_NOISE = ("sd3", "sd35", "flux-dev", "flux-schnell")
"""Families whose pipelines draw what a step adds from torch's global generator, not from the one they are given."""
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved pipelines by family, made when first asked for; read-only."""
    root = tmp_path_factory.mktemp("families")

    class Folders(dict):
        def __missing__(self, family: str) -> Path:
            self[family] = save(family, root)
            return self[family]

    return Folders()


def load(folders: dict[str, Path], family: str) -> Teacher:
    return load_teacher(folders[family], **FAMILIES[family].size)


def stock(folder: Path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def theirs(pipeline, family: str, output: str = "latent", **call):
    kind = FAMILIES[family]
    images = pipeline(PROMPTS, generator=generators(), output_type=output, **kind.call, **call).images
    if output == "latent" and images.ndim == 3:  # FLUX's are packed
        images = pipeline._unpack_latents(images, *kind.size.values(), pipeline.vae_scale_factor)
    return images


@every_family
def test_the_teacher_is_its_pipeline(folders, family: str) -> None:
    """Four guided steps and four plain ones on the scheduler's own grid: text, time, sign, guidance and shift."""
    teacher, pipeline = load(folders, family), stock(folders[family])
    assert type(teacher.backbone).__name__ == FAMILIES[family].adapter
    for scale in (1.0, 4.0):
        expected = theirs(pipeline, family, num_inference_steps=4, **FAMILIES[family].guided(scale))
        assert_latents_close(teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=scale), expected, 1e-5)


@every_family
def test_pictures_are_the_pipelines(folders, family: str) -> None:
    teacher = load(folders, family)
    call = FAMILIES[family].guided(1.0)
    expected = theirs(stock(folders[family]), family, "pt", num_inference_steps=1, **call)
    ours = teacher.sample(PROMPTS, SEEDS, 1, guidance_scale=1)
    torch.testing.assert_close(ours.float(), expected * 255, rtol=0, atol=0.6)


@every_family
@pytest.mark.parametrize("method", ["tdm", "dmd2"])
def test_distil_export_and_sample_with_the_stock_pipeline(folders, family: str, method: str, tmp_path: Path) -> None:
    """Three iterations with adapters, discriminator and checkpointing; then what the README tells users to type."""
    teacher = load(folders, family)
    side = teacher.backbone.size["height"]
    options = preset("tdm") if method == "tdm" else replace(preset("dmd2"), critic_updates=1)
    real = RealImages(teacher.backbone, torch.rand(4, 3, side, side) * 2 - 1, PROMPTS * 2)
    student = distill(
        teacher, options, out=tmp_path, prompts=PROMPTS, real=real if method == "dmd2" else None,
        roles=RoleOptions(rank=4, checkpointing=True),
        train_options=TrainOptions(iterations=3, batch=2, warmup=0, student_rate=1e-2, tensorboard=False),
    )  # fmt: skip
    folder = tmp_path / "student"
    pipeline = stock(folder)
    call = student.card["call"]["4"]
    more = student.backbone.student_call
    told = {**call, **more}
    usage = (folder / "README.md").read_text()
    assert all(f"{name}={value!r}" in usage for name, value in told.items())
    images = pipeline(PROMPTS, generator=generators(), output_type="latent", **told).images
    if images.ndim == 3:
        images = unpack(images, student.backbone.latent_shape)
    ours = student.latents(PROMPTS, SEEDS, 4)
    if method == "dmd2" and family in GLOBAL_NOISE:  # its law is tested below
        assert not torch.allclose(ours, images, rtol=1e-2)
    else:
        assert_latents_close(ours, images)
    assert not torch.allclose(ours, teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=1), rtol=1e-3)


@every_family
@pytest.mark.parametrize("layers", ["attention+ff", "all-linear"])
def test_adapters_are_exact_under_checkpointing_and_merged(folders, family: str, layers: str) -> None:
    """The student's gradient with recomputation, after a critic's call in between, and the merged copy's output."""
    backbone = load(folders, family).backbone
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.9])
    condition = backbone.encode(PROMPTS)
    found = []
    for checkpointing in (False, True):
        roles = build_roles(backbone, rank=2, layers=layers, checkpointing=checkpointing)
        perturb([*roles.student_parameters(), *roles.critic_parameters()], scale=0.1)
        loss = roles.student(x, t, condition).square().mean()
        with torch.no_grad():
            roles.critic(x, t, condition)
        found.append(torch.autograd.grad(loss, roles.student_parameters()))
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-3, atol=1e-5 * float(plain.abs().max()) + 1e-12)
    with torch.no_grad():
        ours, teacher = roles.student(x, t, condition), roles.teacher(x, t, condition)
        assert_latents_close(backbone.call(roles.student_network(), x, t, condition), ours, 1e-5)
        assert_latents_close(backbone.call(backbone.network, x, t, condition), teacher, 1e-6)
        assert not torch.allclose(ours, teacher, rtol=1e-3)


@every_family
def test_a_base_in_bfloat16(folders, family: str) -> None:
    """Half the memory for what is frozen: float32 outside, and near the float32 base."""
    full = load(folders, family).backbone
    half = load_teacher(folders[family], dtype=torch.bfloat16, **FAMILIES[family].size).backbone
    x, t = torch.randn(2, *full.latent_shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.6])
    with torch.no_grad():
        exact, rough = (part.call(part.network, x, t, part.encode(PROMPTS)) for part in (full, half))
    assert half.network.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert_latents_close(rough, exact, 0.05)


@every_family
def test_a_discriminator_reads_tokens(folders, family: str) -> None:
    backbone = load(folders, family).backbone
    roles = build_roles(backbone, rank=2, discriminator="critic")
    logits = roles.discriminator(torch.randn(2, *backbone.latent_shape), torch.rand(2), backbone.encode(PROMPTS))
    assert logits.shape == (2, len(backbone.tapped_blocks(backbone.network)))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux-dev", "sana"])
def test_only_pixart_can_be_told_its_step_count(folders, family: str, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="told its step count.*tdm instead of tdm-unify"):
        distill(load(folders, family), "tdm-unify", out=tmp_path / "run", prompts=PROMPTS)


@pytest.mark.parametrize(
    ("family", "wide"), [("pixart-alpha", 48), ("sd15", 24), ("sdxl", 24), ("sd3", 24), ("flux-dev", 24), ("sana", 96)]
)
def test_another_size(folders, family: str, wide: int, tmp_path: Path) -> None:
    """Wide images; students keep the size, and say so in the call that samples them."""
    height = wide - wide // 3
    teacher = load_teacher(folders[family], height=height, width=wide)
    size = {"height": height, "width": wide}
    expected = stock(folders[family])(
        PROMPTS, generator=generators(), output_type="pt", num_inference_steps=2, **FAMILIES[family].guided(4.0),
        **FAMILIES[family].call | size,
    ).images  # fmt: skip
    ours = teacher.sample(PROMPTS, SEEDS, 2, guidance_scale=4)
    torch.testing.assert_close(ours.float(), expected * 255, rtol=0, atol=0.6)
    roles = build_roles(teacher.backbone, rank=2)
    student = load_student(save_student(tmp_path / "student", roles, [grids.uniform(1)], method="tdm"))
    told = {**student.card["call"]["1"], **student.backbone.student_call}
    images = stock(tmp_path / "student")(PROMPTS, generator=generators(), output_type="pt", **told).images
    torch.testing.assert_close(student.sample(PROMPTS, SEEDS).float(), images * 255, rtol=0, atol=0.6)
    with pytest.raises(FewstepError, match="found width = 13, expected a multiple of"):
        load_teacher(folders[family], width=13)


def test_embedded_guidance_is_told_to_all_and_kept(folders, tmp_path: Path) -> None:
    teacher = load(folders, "flux-dev")
    backbone = teacher.backbone
    assert (backbone.embedded_guidance, teacher.guidance_scale, teacher.steps) == (3.5, 1.0, 28)
    assert load(folders, "flux-schnell").backbone.embedded_guidance is None
    before = teacher.latents(PROMPTS, SEEDS, 2)
    backbone.embedded_guidance = 1.5
    expected = theirs(stock(folders["flux-dev"]), "flux-dev", num_inference_steps=2, guidance_scale=1.5)
    assert_latents_close(teacher.latents(PROMPTS, SEEDS, 2), expected, 1e-5)
    assert not torch.allclose(before, expected, rtol=1e-3)
    folder = save_student(tmp_path / "student", build_roles(backbone, rank=2), [grids.uniform(2)], method="tdm")
    assert "guidance_scale=1.5" in (folder / "README.md").read_text()
    assert load_student(folder).backbone.embedded_guidance == 1.5
    assert (folder / CARD).is_file()


def teacher_of(build, folder: Path, **options) -> Teacher:
    torch.manual_seed(0)
    build(folder / "files", **options).save_pretrained(folder / "teacher")
    return load_teacher(folder / "teacher")


def test_stable_diffusion_2_predicts_v(tmp_path: Path) -> None:
    teacher = teacher_of(build_sd15, tmp_path, prediction="v_prediction")
    assert teacher.backbone.prediction == "v"
    expected = theirs(stock(tmp_path / "teacher"), "sd15", num_inference_steps=4, guidance_scale=5.0)
    assert_latents_close(teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=5.0), expected, 1e-5)


def test_unets_with_the_guidance_scale_embedded(tmp_path: Path) -> None:
    """Latent consistency models: one call, told the scale; the pipeline does the same at any scale it is given."""
    teacher = teacher_of(build_sd15, tmp_path, time_cond_proj_dim=8)
    assert (teacher.backbone.embedded_guidance, teacher.guidance_scale) == (7.5, 1.0)
    pipeline = stock(tmp_path / "teacher")
    expected = theirs(pipeline, "sd15", num_inference_steps=4, guidance_scale=7.5)
    assert_latents_close(teacher.latents(PROMPTS, SEEDS, 4), expected, 1e-5)
    other = theirs(pipeline, "sd15", num_inference_steps=4, guidance_scale=2.0)
    assert not torch.allclose(other, expected, rtol=1e-3)


def test_the_teacher_with_pndm_is_ddim_of_its_spacing(tmp_path: Path) -> None:
    """SD 1.5 is released with PNDM, whose times repeat; it ends at its own lowest level, a teacher of ours at 0."""
    leading = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    teacher = teacher_of(build_sd15, tmp_path, scheduler=schedule("PNDMScheduler", **leading))
    from diffusers import DDIMScheduler

    pipeline = stock(tmp_path / "teacher")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True, clip_sample=False)
    expected = theirs(pipeline, "sd15", num_inference_steps=4, guidance_scale=5.0)
    assert_latents_close(teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=5.0), expected, 1e-5)


def test_sana_with_its_released_scheduler(folders) -> None:
    """DPM-Solver of order 2: equal at the solver's own times, near where it rounds down what the network is told."""
    from diffusers import DPMSolverMultistepScheduler

    class Unrounded(DPMSolverMultistepScheduler):
        def set_timesteps(self, *args, **kwargs) -> None:
            super().set_timesteps(*args, **kwargs)
            self.timesteps = self.sigmas[:-1] * 1000

    pipeline, teacher = stock(folders["sana"]), load(folders, "sana")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    released = DPMSolverMultistepScheduler(**flow, final_sigmas_type="zero")
    teacher.backbone.pipeline.scheduler = released
    ours = teacher.latents(PROMPTS, SEEDS, 8, guidance_scale=4.5, solver="dpmpp_2m")
    for scheduler, tolerance in ((Unrounded.from_config(released.config), 1e-5), (released, 2e-2)):
        pipeline.scheduler = scheduler
        expected = theirs(pipeline, "sana", num_inference_steps=8, guidance_scale=4.5)
        assert_latents_close(ours, expected, tolerance)


def test_pixart_for_1024_pixels_is_told_the_size(tmp_path: Path) -> None:
    """Loaded from a folder, sampled and exported, with the added conditions of the released 1024-pixel network."""
    from tiny_pixart import build_pipeline

    def build(files: Path):
        pipeline = build_pipeline(sample_size=128, heads=3, image_size=True)
        perturb(list(pipeline.transformer.adaln_single.emb.parameters()))
        return pipeline

    teacher = teacher_of(build, tmp_path)
    added = teacher.backbone._added_conditions(teacher.backbone.network, torch.zeros(1, 4, 128, 128), {})
    assert added["resolution"].tolist() == [[512, 512]]  # of the tiny autoencoder
    expected = theirs(stock(tmp_path / "teacher"), "pixart-alpha", num_inference_steps=2, guidance_scale=4.5)
    assert_latents_close(teacher.latents(PROMPTS, SEEDS, 2, guidance_scale=4.5), expected, 1e-5)
    roles = build_roles(teacher.backbone, rank=2)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(1)], method="tdm")
    expected = theirs(stock(folder), "pixart-alpha", num_inference_steps=1, guidance_scale=1)
    assert_latents_close(load_student(folder).latents(PROMPTS, SEEDS), expected)


def test_a_safety_checker_is_heeded(folders) -> None:
    """What it refuses is black, as from the pipeline."""
    backbone = load(folders, "sd15").backbone
    backbone.pipeline.run_safety_checker = lambda images, device, dtype: (images, [False, True])
    images = backbone.decode(torch.randn(2, *backbone.latent_shape))
    assert images[0].any()
    assert not images[1].any()


def test_the_released_parts_of_stable_diffusion_are_read(folders, tmp_path: Path) -> None:
    """Its safety checker is a class of a package within diffusers, and is loaded as such."""
    index = json.loads((folders["sd15"] / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert _adapter_for(index, "somewhere").__name__ == "StableDiffusion"


@pytest.mark.parametrize("family", ["sd3", "flux-dev", "sana"])
def test_flow_students_that_renoise_have_the_law_checked(folders, family: str) -> None:
    """The chosen scheduler renoises; one that keeps the noise, or lands elsewhere, is seen through."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    backbone, grid = load(folders, family).backbone, grids.shifted(4, 3.0)
    sampling = choose_scheduler(backbone, [grid], eta=0.0)
    assert sampling.scheduler.config.stochastic_sampling
    for wrong, words in (({}, "keeps"), ({"stochastic_sampling": True, "shift": 2.0}, "calls the network at")):
        other = Sampling(FlowMatchEulerDiscreteScheduler(**wrong), {4: {"sigmas": grid[:-1].tolist()}})
        assert words in str(_problem(backbone, other, grid, 0.0))
    assert _problem(backbone, sampling, grid, 0.0) is None
    assert _problem(backbone, sampling, grid, 1.0) is not None


def test_the_law_is_seen_to_be_wrong() -> None:
    """A path whose noise is too wide, or whose last sample is not the last prediction."""
    process, grid = Flow(), grids.uniform(2)
    first, fresh = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def denoise(x, t, condition):
        return torch.sin(x)

    def second(spread: float) -> torch.Tensor:
        return 0.5 * torch.sin(first) + 0.5 * spread * fresh

    def found(x: torch.Tensor, last: torch.Tensor) -> str | None:
        return _problem_of_law(process, denoise, [first, x], last, grid)

    assert found(second(1.0), torch.sin(second(1.0))) is None
    assert "spread of 2.17" in str(found(second(2.0), torch.sin(second(2.0))))
    assert "ends" in str(found(second(1.0), second(1.0)))


def test_fluxs_last_layer_takes_no_adapter_but_its_namesakes_do(folders) -> None:
    backbone = load(folders, "flux-dev").backbone
    adapted = {name.split(".lora")[0] for name in build_roles(backbone, rank=2).student_state()}
    assert {"single_transformer_blocks.0.proj_out", "transformer_blocks.0.ff_context.net.2"} <= adapted
    assert "proj_out" not in adapted
