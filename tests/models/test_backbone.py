"""The PixArt adapter is the stock pipeline, number for number; what cannot be loaded is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pixart import PROMPTS, assert_latents_close, build_pipeline

from fewstep.core import grids
from fewstep.core.guidance import guided
from fewstep.core.process import DiscreteVP
from fewstep.core.solvers import ddim
from fewstep.errors import FewstepError
from fewstep.models import Backbone, load_backbone, register_backbone, seeded_noise
from fewstep.models.backbone import BACKBONES
from fewstep.models.pixart import MASK, STATES, PixArt


def our_samples(backbone: Backbone, prompts: list[str], noise: torch.Tensor, steps: int, scale: float) -> torch.Tensor:
    def teacher(x, t, condition):
        return backbone.call(backbone.network, x, t, condition)

    null = {name: value.expand(len(prompts), *value.shape[1:]) for name, value in backbone.null_condition().items()}
    with torch.no_grad():
        return ddim(
            lambda x, t, condition: guided(teacher, x, t, condition, null, scale),
            noise,
            grids.uniform(steps),
            backbone.process,
            backbone.encode(prompts),
        )


def test_loads_what_the_folder_says(backbone: Backbone) -> None:
    assert isinstance(backbone, PixArt)
    assert isinstance(backbone.process, DiscreteVP)
    assert backbone.prediction == "eps"
    assert backbone.latent_shape == (4, 8, 8)
    parts = [part for part in backbone.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(p.requires_grad for part in parts for p in part.parameters())


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("learned_sigma", [True, False])
def test_ddim_equals_the_stock_pipeline(steps: int, scale: float, learned_sigma: bool) -> None:
    pipeline = build_pipeline(learned_sigma=learned_sigma)
    pipeline.set_progress_bar_config(disable=True)
    backbone = PixArt(pipeline, "tiny")
    noise = seeded_noise([5, 6, 7], backbone.latent_shape)
    theirs = pipeline(
        PROMPTS, num_inference_steps=steps, guidance_scale=scale, latents=noise, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    assert_latents_close(our_samples(backbone, PROMPTS, noise, steps, scale), theirs)


def test_image_size_conditions_equal_the_stock_pipeline() -> None:
    """Networks for 1024-pixel images are also told the size of the image."""
    pipeline = build_pipeline(sample_size=128, heads=3, image_size=True)
    pipeline.set_progress_bar_config(disable=True)
    backbone = PixArt(pipeline, "tiny")
    noise = seeded_noise([5], backbone.latent_shape)
    theirs = pipeline(
        PROMPTS[:1], num_inference_steps=1, guidance_scale=1, latents=noise, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    assert_latents_close(our_samples(backbone, PROMPTS[:1], noise, 1, 1.0), theirs)


def test_encode_equals_the_pipelines_own(backbone: Backbone) -> None:
    states, mask, null_states, null_mask = backbone.pipeline.encode_prompt(PROMPTS)
    condition = backbone.encode(PROMPTS)
    assert torch.equal(condition[STATES], states)
    assert torch.equal(condition[MASK], mask)
    null = backbone.null_condition()
    assert torch.equal(null[STATES], null_states[:1])
    assert torch.equal(null[MASK], null_mask[:1])
    assert null[STATES].abs().max() > 0
    assert null[MASK].sum() == 1


def test_encode_in_parts_is_encode_at_once(backbone: Backbone) -> None:
    many = [PROMPTS[i % 3] for i in range(70)]
    condition = backbone.encode(many)
    torch.testing.assert_close(condition[STATES][66:69], backbone.encode(many[66:69])[STATES])
    assert len(condition[MASK]) == 70


def test_padding_left_out_changes_nothing(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    used = int(condition[MASK].sum(1).max())
    assert used < condition[MASK].shape[1]
    short = {name: value[:, :used] for name, value in condition.items()}
    ours = backbone.call(backbone.network, x, t, condition)
    assert torch.equal(ours, backbone.call(backbone.network, x, t, short))
    output = backbone.network(
        x, encoder_hidden_states=condition[STATES], encoder_attention_mask=condition[MASK], timestep=1000 * t - 1
    ).sample[:, :4]
    alpha, sigma = (f(t)[:, None, None, None] for f in (backbone.process.alpha, backbone.process.sigma))
    assert_latents_close(ours, (x - sigma * output) / alpha, 1e-5)


def test_a_row_of_only_padding_keeps_all_columns(backbone: Backbone, batch) -> None:
    """It attends evenly to the padding, in the stock pipeline and here."""
    x, t, condition = batch
    condition[MASK][1] = 0
    alone = backbone.call(backbone.network, x[1:2], t[1:2], {name: value[1:2] for name, value in condition.items()})
    together = backbone.call(backbone.network, x, t, condition)
    assert_latents_close(together[1:2], alone, 1e-5)


def test_decode_equals_the_pipelines_pictures(backbone: Backbone) -> None:
    latents = 0.5 * seeded_noise([1, 2], backbone.latent_shape)
    image = backbone.pipeline.vae.decode(latents / 0.7, return_dict=False)[0]
    pictures = backbone.pipeline.image_processor.postprocess(image, output_type="pil")
    theirs = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    ours = backbone.decode(latents)
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, theirs)


def test_seeded_noise_is_what_the_pipeline_draws(backbone: Backbone) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    theirs = backbone.pipeline.prepare_latents(2, 4, 32, 32, torch.float32, "cpu", generators)
    assert torch.equal(seeded_noise([4, 5], backbone.latent_shape), theirs)


def test_float64_samples_stay_float64(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    out = backbone.call(backbone.network, x.double(), t.double(), condition)
    assert out.dtype == torch.float64
    assert_latents_close(out.float(), backbone.call(backbone.network, x, t, condition), 1e-5)


def test_bfloat16_base(folder: Path, batch) -> None:
    x, t, condition = batch
    small = load_backbone(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in small.network.parameters()} == {torch.bfloat16}
    out = small.call(small.network, x, t, small.encode(PROMPTS))
    assert out.dtype == torch.float32
    assert bool(out.isfinite().all())


def damaged(folder: Path, tmp_path: Path, damage: str) -> str:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    if damage == "pickle":
        weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
    elif damage == "false name":
        torch.save({}, copy / "transformer" / "diffusion_pytorch_model.safetensors")
    elif damage == "cut off":
        os.truncate(copy / "vae" / "diffusion_pytorch_model.safetensors", 1000)
    elif damage == "index to a pickle":
        named = {"weight_map": {"proj_out.weight": "weights.bin"}}
        (copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(named))
    elif damage == "no weights":
        (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    elif damage == "no index":
        (copy / "model_index.json").unlink()
    elif damage == "broken index":
        (copy / "model_index.json").write_text("{")
    elif damage == "one part":
        return str(copy / "transformer")
    else:
        index |= {
            "unknown network": {"transformer": ["diffusers", "NewTransformer3DModel"]},
            "foreign part": {"vae": ["os", "path"]},
            "custom pipeline": {"_class_name": ["pipeline", "MyPipeline"]},
            "other pipeline": {"_class_name": "PixArtSomethingPipeline"},
        }[damage]
        (copy / "model_index.json").write_text(json.dumps(index))
    return str(copy)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("pickle", "safetensors"),
        ("false name", "found a pickle .*diffusion_pytorch_model.safetensors"),
        ("cut off", "found a damaged file at .*vae"),
        ("index to a pickle", "weights.bin.* beside it"),
        ("no weights", "diffusers cannot load"),
        ("no index", "model_index.json"),
        ("broken index", "model_index.json"),
        ("one part", "whole pipeline"),
        ("unknown network", "NewTransformer3DModel.*PixArtTransformer2DModel.*register_backbone"),
        ("foreign part", "'vae'.*'os'"),
        ("custom pipeline", "not run"),
        ("other pipeline", "PixArtSomethingPipeline"),
    ],
)
def test_refuses_with_a_reason(folder: Path, tmp_path: Path, damage: str, words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        load_backbone(damaged(folder, tmp_path, damage))


def test_refuses_what_is_neither_a_folder_nor_an_id() -> None:
    with pytest.raises(FewstepError, match="nothing at"):
        load_backbone("no/such/folder/here")


def test_a_new_family_can_be_registered(folder: Path, tmp_path: Path) -> None:
    @register_backbone("NewTransformer3DModel")
    class New(PixArt):
        @classmethod
        def pipeline_class(cls, name: str):
            raise FewstepError("the new adapter was asked")

    try:
        with pytest.raises(FewstepError, match="the new adapter was asked"):
            load_backbone(damaged(folder, tmp_path, "unknown network"))
    finally:
        del BACKBONES["NewTransformer3DModel"]
