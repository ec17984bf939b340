"""Qwen-Image, Z-Image, CogVideoX, Wan and films: adapters are the families' own pipelines, students load in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flows
import torch
from diffusers import DiffusionPipeline
from tiny_flows import PROMPTS
from tiny_pixart import assert_latents_close, perturb
from torch import Tensor

import fewstep
from fewstep.api import RoleOptions, defaults
from fewstep.core.process import DiscreteVP
from fewstep.data.real import RealImages
from fewstep.errors import FewstepError
from fewstep.models import build_roles, choose_scheduler, load_backbone, seeded_noise
from fewstep.models.film import FilmPipeline
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher
from fewstep.models.wan_experts import WanExperts
from fewstep.training.options import TrainOptions

SEEDS = [4, 5, 6]


@dataclass(frozen=True)
class Family:
    """How a tiny pipeline is made, at which size, and how its call names what we call guidance."""

    build: Callable[[], Any]
    size: dict[str, int] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    scale: str = "guidance_scale"
    offset: float = 0.0
    """Their scale less ours."""

    @property
    def unguided(self) -> dict[str, Any]:
        """The argument with which the stock pipeline does not guide."""
        return {self.scale: 1 + int(self.offset)}


VIDEO = {"height": 16, "width": 32, "num_frames": 5}
COG = {"max_sequence_length": 12}
FAMILIES = {
    "qwen-image": Family(tiny_flows.qwen_image, {"height": 24, "width": 16}, {}, "true_cfg_scale"),
    "z-image": Family(tiny_flows.z_image, {"height": 12, "width": 16}, offset=-1),
    "cogvideox-2b": Family(tiny_flows.cogvideox, {}, COG),
    "cogvideox-5b": Family(lambda: tiny_flows.cogvideox("5b"), {"height": 24, "width": 16, "num_frames": 5}, COG),
    "cogvideox-1.5": Family(lambda: tiny_flows.cogvideox("1.5"), {}, COG),
    "wan2.1": Family(tiny_flows.wan, VIDEO),
    "wan2.2-a14b": Family(lambda: tiny_flows.wan("a14b"), VIDEO),
    "wan2.2-5b": Family(lambda: tiny_flows.wan("5b"), VIDEO),
    "film": Family(tiny_flows.film, VIDEO),
}


@dataclass(frozen=True)
class Case:
    """A family, its saved tiny pipeline, and the teacher that our loader makes of it."""

    family: Family
    folder: Path
    teacher: Teacher

    @property
    def two_networks(self) -> bool:
        return isinstance(self.teacher.backbone.network, WanExperts)

    def theirs(self, pipeline: Any, scale: float, steps: int, **more: Any) -> Any:
        """What a pipeline makes of the prompts at our guidance scale; latents unless told."""
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
        told = {self.family.scale: scale + self.family.offset, "negative_prompt": [""] * len(PROMPTS)}
        if scale == 1:
            told.pop("negative_prompt")
        call = {"output_type": "latent", "num_inference_steps": steps, **self.family.size, **self.family.call}
        output = pipeline(list(PROMPTS), generator=generators, **{**call, **told, **more})
        return output.frames if hasattr(output, "frames") else output.images

    def unpacked(self, latents: Tensor) -> Tensor:
        """As ours: the pipeline of Qwen-Image returns packed latents."""
        if self.family.scale != "true_cfg_scale":
            return latents
        from fewstep.models.pipelines import unpack

        return unpack(latents, self.teacher.backbone.latent_shape)


def stock(folder: Path) -> Any:
    """The pipeline of a folder as diffusers loads it, or the class of ours that it names."""
    ours = json.loads((folder / "model_index.json").read_text())["_class_name"] == "FilmPipeline"
    pipeline = (FilmPipeline if ours else DiffusionPipeline).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Read-only for tests."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("teacher") / request.param
    family.build().save_pretrained(folder)
    return Case(family, folder, fewstep.load_teacher(folder, **family.size))


def without_rescaling(pipeline: Any, scale: float, negative: tuple[Tensor, Tensor]) -> None:
    """Let the network of Qwen-Image's pipeline guide plainly by itself."""
    network = pipeline.transformer
    own = network.forward

    def forward(**told: Any) -> tuple[Tensor]:
        (conditional,) = own(**told)
        states, mask = negative
        (unconditional,) = own(**{**told, "encoder_hidden_states": states, "encoder_hidden_states_mask": mask})
        return (unconditional + scale * (conditional - unconditional),)

    network.forward = forward


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_the_teacher_samples_what_the_pipeline_samples(case: Case, scale: float) -> None:
    pipeline, told = stock(case.folder), scale
    if case.family.scale == "true_cfg_scale" and scale != 1:
        without_rescaling(pipeline, scale, pipeline.encode_prompt([""] * len(PROMPTS)))
        told = 1.0
    theirs = case.unpacked(case.theirs(pipeline, told, 4))
    ours = case.teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=scale)
    assert_latents_close(ours, theirs, 1e-5)
    if scale != 1:
        plain = case.teacher.latents(PROMPTS, SEEDS, 4, guidance_scale=1)
        assert (plain - ours).abs().max() > 3e-4 * ours.abs().max()  # so that guidance was seen


def test_pictures_are_the_pipelines_own(case: Case) -> None:
    theirs = case.theirs(stock(case.folder), 1.0, 2, output_type="np")
    ours = case.teacher.sample(PROMPTS, SEEDS, 2, guidance_scale=1)
    assert ours.dtype == torch.uint8
    channels_last = np.asarray(ours.movedim(-3, -1))
    assert channels_last.shape == theirs.shape
    assert np.abs(channels_last / 255 - theirs).max() < 1.01 / 255


@pytest.mark.parametrize("method", ["tdm", "dmd2"])
def test_a_student_loads_in_the_stock_pipeline(case: Case, method: str, tmp_path: Path) -> None:
    """After three iterations by the family's recipe; DMD2 with its discriminator where the family has features."""
    backbone = case.teacher.backbone
    options, _, _ = defaults(case.teacher, method)
    if method == "dmd2":
        eta = 0.0 if isinstance(backbone.process, DiscreteVP) else 1.0  # pipelines of flows draw their noise unseeded
        options = replace(options, eta=eta, critic_updates=2, gan_weight=0.0 if case.two_networks else 5e-3)
    real = RealImages(backbone, case.teacher.sample(PROMPTS, SEEDS, 2, guidance_scale=1), PROMPTS)
    student = fewstep.distill(
        case.teacher, options, out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions(rank=4, checkpointing=True),
        real=real if method == "dmd2" and not case.two_networks else None,
        train_options=TrainOptions(iterations=3, batch=2, warmup=1, student_rate=1e-2, tensorboard=False),
    )  # fmt: skip
    ours = student.latents(PROMPTS, SEEDS)
    untrained = Student(backbone, backbone.network, student.grids, False, {}, student.eta).latents(PROMPTS, SEEDS)
    assert (ours - untrained).abs().max() > 1e-3 * ours.abs().max()
    assert student.backbone.latent_shape == backbone.latent_shape
    count = max(student.grids)
    call = {name: value for name, value in student.card["call"][str(count)].items() if name != "num_inference_steps"}
    theirs = case.unpacked(case.theirs(stock(tmp_path / "run" / "student"), 1.0, count, **call))
    assert_latents_close(ours, theirs, 1e-4)
    readme = (tmp_path / "run" / "student" / "README.md").read_text()
    told = {**case.family.unguided, **case.family.size, **case.family.call}
    assert all(f"{name}={value}" in readme for name, value in told.items())
    assert (".frames[0]" if len(backbone.latent_shape) == 4 else ".images[0]") in readme


def test_students_that_renoise_have_a_scheduler(case: Case) -> None:
    """On the family's own grid; that its samples are of our law is looked at before it is chosen."""
    backbone = case.teacher.backbone
    options: Any = defaults(case.teacher, "dmd2")[0]
    assert options.eta == 0
    chosen = choose_scheduler(backbone, [options.time_grid(4)], eta=0.0).scheduler
    discrete = isinstance(backbone.process, DiscreteVP)
    assert type(chosen).__name__ == "LCMScheduler" if discrete else chosen.config.stochastic_sampling


def test_adapters_sit_in_all_named_layers_and_checkpointing_changes_no_gradient(case: Case) -> None:
    backbone, gradients = case.teacher.backbone, []
    x, t = seeded_noise(SEEDS[:2], backbone.latent_shape), torch.tensor([0.95, 0.3])
    condition = backbone.encode(PROMPTS[:2])
    for checkpointing in (False, True):
        roles = build_roles(backbone, "adapters", rank=2, checkpointing=checkpointing)
        perturb(roles.student_parameters())
        denoised = roles.student(x, t, condition)
        roles.teacher(x, t, condition)  # leaves another adapter active
        denoised.square().mean().backward()
        named = zip(roles.student_state(), roles.student_parameters(), strict=True)
        gradients.append({name: parameter.grad for name, parameter in named})
    plain, checkpointed = gradients
    for layer in backbone.adapter_layers:
        assert any(f".{layer}.lora_A" in name for name in plain), layer
    unreached = [name for name, gradient in plain.items() if gradient is None]
    assert unreached == [name for name, gradient in checkpointed.items() if gradient is None]
    assert all("txt_mlp" in name or "to_add_out" in name or "add_q_proj" in name for name in unreached)
    for name in plain.keys() - set(unreached):
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_copies_start_as_the_teacher(case: Case) -> None:
    backbone = case.teacher.backbone
    roles = build_roles(backbone, "copies")
    x, t = seeded_noise(SEEDS[:2], backbone.latent_shape), torch.tensor([0.95, 0.3])
    condition = backbone.encode(PROMPTS[:2])
    with torch.no_grad():
        wanted = roles.teacher(x, t, condition)
        assert_latents_close(roles.student(x, t, condition), wanted, 1e-6)
        perturb(roles.student_parameters())
        assert (roles.student(x, t, condition) - wanted).abs().max() > 1e-3
        assert_latents_close(roles.teacher(x, t, condition), wanted, 1e-6)


def test_encoded_pictures_have_the_scale_of_the_latents(case: Case) -> None:
    """Decoding what encoding gives is what the autoencoder itself makes of the pictures."""
    backbone = case.teacher.backbone
    pictures = case.teacher.sample(PROMPTS[:1], SEEDS[:1], 2, guidance_scale=1).float() / 127.5 - 1
    latents = backbone.encode_images(pictures)
    assert latents.shape[1:] == backbone.latent_shape
    ours = backbone.decode(latents).float() / 127.5 - 1
    vae, inputs = backbone.pipeline.vae, pictures
    if pictures.ndim == 5:
        inputs = pictures.transpose(1, 2)
    elif type(vae).__name__ == "AutoencoderKLQwenImage":
        inputs = pictures.unsqueeze(2)
    with torch.no_grad():
        if type(vae).__name__ == "AutoencoderTiny":  # of films, frame by frame
            frames = [vae.decode(vae.encode(frame).latents, return_dict=False)[0] for frame in inputs.unbind(2)]
            theirs = torch.stack(frames, 2)
        else:
            theirs = vae.decode(vae.encode(inputs).latent_dist.mode(), return_dict=False)[0]
    theirs = theirs.transpose(1, 2) if pictures.ndim == 5 else theirs.reshape(pictures.shape)
    torch.testing.assert_close(ours, theirs.clamp(-1, 1), rtol=0, atol=1.01 / 127.5)


def test_bfloat16_bases_are_called_and_answer_in_float32(case: Case) -> None:
    small = load_backbone(case.folder, dtype=torch.bfloat16, size=case.family.size or None)
    x = seeded_noise(SEEDS, small.latent_shape)
    with torch.no_grad():
        out = small.call(small.network, x, torch.tensor([0.2, 0.6, 1.0]), small.encode(PROMPTS))
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())
    exact = case.teacher.backbone
    with torch.no_grad():
        wanted = exact.call(exact.network, x, torch.tensor([0.2, 0.6, 1.0]), exact.encode(PROMPTS))
    assert_latents_close(out, wanted, 0.05)


@pytest.mark.parametrize(("size", "words"), [({"height": 13}, "height = 13"), ({"depth": 8}, "depth = 8")])
def test_sizes_that_cannot_be_made_are_refused(case: Case, size: dict[str, int], words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        load_backbone(case.folder, size=size)
