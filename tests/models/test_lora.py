"""A student's LoRA in the stock pipelines, and by ComfyUI's names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_flows
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pixart import assert_latents_close, perturb
from torch import Tensor

import fewstep
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.exporting import export_student
from fewstep.models import Backbone, Roles, build_roles, load_backbone, load_student, save_student
from fewstep.models.comfyui import cogvideox_key, sdxl_key, unet_key, wan_key

PROMPTS = ["a frog", "a frog"]
VIDEO = {"height": 16, "width": 32, "num_frames": 5}
BUILT: dict[str, tuple[Callable[[], Any], dict[str, int]]] = {
    "qwen-image": (tiny_flows.qwen_image, {"height": 24, "width": 16}),
    "z-image": (tiny_flows.z_image, {"height": 12, "width": 16}),
    "cogvideox": (tiny_flows.cogvideox, {}),
    "wan": (tiny_flows.wan, VIDEO),
    "wan-a14b": (lambda: tiny_flows.wan("a14b"), VIDEO),
}
FAMILIES = ["sd15", "sdxl", "sd3", "flux-dev", "sana", *BUILT]


@dataclass(frozen=True)
class Case:
    """A family's teacher, a student of rank 4 and alpha 2, its LoRA on disk, and the difference of all its weights."""

    name: str
    backbone: Backbone
    roles: Roles
    folder: Path

    @property
    def first(self) -> str:
        return next(iter(self.backbone.network_parts))

    def stock(self) -> Any:
        """The teacher's pipeline as diffusers loads it."""
        return DiffusionPipeline.from_pretrained(self.backbone.source)

    def denoised(self, pipeline: Any) -> Tensor:
        """What the network, or networks, of a pipeline make of two noisy latents."""
        other = type(self.backbone)(pipeline, "other")
        other.set_size(self.backbone.told_size)
        with torch.no_grad():
            return other.call(other.network, *self.inputs())

    def wanted(self) -> Tensor:
        with torch.no_grad():
            return self.roles.student(*self.inputs())

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        x = torch.randn(2, *self.backbone.latent_shape, generator=torch.Generator().manual_seed(0))
        return x, torch.tensor([0.95, 0.3]), self.backbone.encode(PROMPTS)

    def differences(self) -> dict[str, dict[str, Tensor]]:
        """By part and layer: merged weight less the teacher's, where they differ."""
        merged, found = self.roles.student_network(), {}
        own = dict(self.backbone.network.named_parameters())
        for part, prefix in self.backbone.network_parts.items():
            rows = [name for name in own if name.startswith(prefix)]
            found[part] = {
                name.removeprefix(prefix).removesuffix(".weight"): merged.get_parameter(name) - own[name]
                for name in rows
                if not torch.equal(merged.get_parameter(name), own[name])
            }
        return found


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Read-only for tests."""
    name, place = request.param, tmp_path_factory.mktemp("family")
    if name in BUILT:
        build, size = BUILT[name]
        build().save_pretrained(place / name)
        backbone = load_backbone(place / name, size=size)
    else:
        backbone = load_backbone(tiny_families.save(name, place), size=tiny_families.FAMILIES[name].size)
    roles = build_roles(backbone, rank=4, alpha=2.0, critic=False)
    perturb(roles.student_parameters())
    grid = grids.uniform(4) if backbone.process.name == "discrete_vp" else grids.shifted(4, 3.0)
    return Case(name, backbone, roles, save_student(place / "lora", roles, [grid], method="tdm", form="lora"))


def loaded(case: Case, pipeline: Any, folder: Path | None = None, name: str = "student") -> Any:
    """`pipeline` with the LoRA in it, by nothing but diffusers."""
    folder = folder or case.folder
    pipeline.load_lora_weights(folder, adapter_name=name)
    if len(case.backbone.network_parts) == 2:
        file = "pytorch_lora_weights_2.safetensors"
        pipeline.load_lora_weights(folder, weight_name=file, adapter_name=name, load_into_transformer_2=True)
    return pipeline


def test_the_stock_pipeline_with_the_lora_is_the_merged_student(case: Case) -> None:
    wanted = case.wanted()
    assert_latents_close(case.denoised(loaded(case, case.stock())), wanted, 1e-5)
    assert (case.denoised(case.stock()) - wanted).abs().max() > 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("case", ["sd15", "flux-dev", "wan-a14b"], indirect=True)
def test_we_load_it_on_the_teacher_it_names_or_another(case: Case) -> None:
    wanted = case.wanted()
    for teacher in (None, case.backbone.source, fewstep.load_teacher(case.backbone.source, **case.backbone.told_size)):
        student = load_student(case.folder, teacher=teacher)
        with torch.no_grad():
            assert_latents_close(student.denoise(*case.inputs()), wanted, 1e-5)
    with torch.no_grad():  # the loaded teacher is still one
        untouched = teacher.backbone.call(teacher.backbone.network, *case.inputs())
    assert_latents_close(untouched, case.denoised(case.stock()), 1e-6)


def test_the_file_says_how_to_use_it(case: Case) -> None:
    with safe_open(case.folder / "pytorch_lora_weights.safetensors", "pt") as file:
        told = file.metadata()
    assert told["scale"] == "1.0"
    assert told["base_model"] == Path(case.backbone.source).name
    assert (told["method"], told["steps"]) == ("tdm", "4")
    assert len(json.loads(told["grids"])["4"]) == 5
    assert told["shift"] == ("1" if case.backbone.process.name == "discrete_vp" else "3")
    assert "without classifier-free guidance" in told["guidance"] or "3.5" in told["guidance"]
    assert told["fewstep_version"]
    assert (case.folder / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize("case", ["sd15", "wan-a14b"], indirect=True)
def test_what_the_readme_tells_users_to_type_works(case: Case, tmp_path: Path) -> None:
    """In the sizes of the tiny networks; the merged pipeline's picture."""
    usage = (case.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    usage = usage.replace("FOLDER", str(case.folder))
    lines = [line for line in usage.splitlines() if line]
    assert len(lines) <= 7
    call = "output_type='latent', generator=torch.Generator().manual_seed(0), "
    scope: dict[str, Any] = {"torch": torch}
    exec(usage.replace('("a prompt", ', f'("a frog", {call}'), scope)
    student = load_student(save_student(tmp_path / "whole", case.roles, [grids.uniform(4)], method="tdm"))
    result = scope["image" if case.backbone.output_name == "images" else "video"]
    if case.name == "sd15":
        assert_latents_close(result[None], student.latents(["a frog"], [0]), 1e-4)


SD, SGM, SPLIT, DOTS = "lora_unet_", "lora_unet_", "lora_transformer_", "diffusion_model."
ORIGINAL: dict[str, dict[str, list[tuple[str, str]]]] = {
    "sd15": {
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": [
            (SD + "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
             "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ],
        "middle_block.1.transformer_blocks.0.attn2.to_out.0": [
            (SD + "mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0",
             "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"),
        ],
    },
    "sdxl": {
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q": [
            (SGM + "input_blocks_1_1_transformer_blocks_0_attn1_to_q",
             "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
        ],
        "middle_block.1.transformer_blocks.1.attn2.to_out.0": [
            (SGM + "middle_block_1_transformer_blocks_1_attn2_to_out_0",
             "mid_block.attentions.0.transformer_blocks.1.attn2.to_out.0"),
        ],
        "output_blocks.3.1.transformer_blocks.0.ff.net.2": [
            (SGM + "output_blocks_3_1_transformer_blocks_0_ff_net_2",
             "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2"),
        ],
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": [
            (SPLIT + f"transformer_blocks_0_attn_to_{x}", f"transformer_blocks.0.attn.to_{x}") for x in "qkv"
        ],
        "joint_blocks.1.context_block.attn.qkv": [
            (SPLIT + f"transformer_blocks_1_attn_add_{x}_proj", f"transformer_blocks.1.attn.add_{x}_proj")
            for x in "qkv"
        ],
        "joint_blocks.0.context_block.mlp.fc1": [
            (SPLIT + "transformer_blocks_0_ff_context_net_0_proj", "transformer_blocks.0.ff_context.net.0.proj")
        ],
    },
    "flux-dev": {
        "double_blocks.0.txt_attn.qkv": [
            (SPLIT + f"transformer_blocks_0_attn_add_{x}_proj", f"transformer_blocks.0.attn.add_{x}_proj")
            for x in "qkv"
        ],
        "single_blocks.1.linear1": [
            *((SPLIT + f"single_transformer_blocks_1_attn_to_{x}", f"single_transformer_blocks.1.attn.to_{x}")
              for x in "qkv"),
            (SPLIT + "single_transformer_blocks_1_proj_mlp", "single_transformer_blocks.1.proj_mlp"),
        ],
        "single_blocks.0.linear2": [
            (SPLIT + "single_transformer_blocks_0_proj_out", "single_transformer_blocks.0.proj_out")
        ],
    },
    "qwen-image": {
        "transformer_blocks.0.attn.to_out.0": [
            (DOTS + "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_out.0")
        ],
        "transformer_blocks.1.img_mlp.net.0.proj": [
            (DOTS + "transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.1.img_mlp.net.0.proj")
        ],
    },
    "z-image": {
        "layers.1.attention.qkv": [(DOTS + f"layers.1.attention.to_{x}", f"layers.1.attention.to_{x}") for x in "qkv"],
        "layers.0.attention.out": [(DOTS + "layers.0.attention.to_out.0", "layers.0.attention.to_out.0")],
        "noise_refiner.0.feed_forward.w3": [
            (DOTS + "noise_refiner.0.feed_forward.w3", "noise_refiner.0.feed_forward.w3")
        ],
    },
    "cogvideox": {
        "blocks.0.q": [(DOTS + "blocks.0.q", "transformer_blocks.0.attn1.to_q")],
        "blocks.1.attn_out": [(DOTS + "blocks.1.attn_out", "transformer_blocks.1.attn1.to_out.0")],
        "blocks.0.ff_proj": [(DOTS + "blocks.0.ff_proj", "transformer_blocks.0.ff.net.0.proj")],
        "blocks.1.ff_out": [(DOTS + "blocks.1.ff_out", "transformer_blocks.1.ff.net.2")],
    },
    "wan": {
        "blocks.0.self_attn.q": [(DOTS + "blocks.0.self_attn.q", "blocks.0.attn1.to_q")],
        "blocks.1.self_attn.o": [(DOTS + "blocks.1.self_attn.o", "blocks.1.attn1.to_out.0")],
        "blocks.0.cross_attn.v": [(DOTS + "blocks.0.cross_attn.v", "blocks.0.attn2.to_v")],
        "blocks.1.ffn.0": [(DOTS + "blocks.1.ffn.0", "blocks.1.ffn.net.0.proj")],
        "blocks.0.ffn.2": [(DOTS + "blocks.0.ffn.2", "blocks.0.ffn.net.2")],
    },
}  # fmt: skip
"""Layers of the original checkpoints (ComfyUI's comfy/utils.py and models): the keys that its loader adds to their rows
in this order (comfy/lora.py), and what diffusers calls those rows."""
ORIGINAL["wan-a14b"] = ORIGINAL["wan"]
READ_BY_DIFFUSERS = ["sd15", "sdxl", "qwen-image", "z-image", "wan", "wan-a14b"]


def exported(case: Case, place: Path) -> tuple[Path, dict[str, Path]]:
    """The LoRA by ComfyUI's names: the folder, and the file for each part."""
    folder = export_student(case.folder, "comfyui", out=place / "comfyui")
    names = ["student_high_noise", "student_low_noise"] if case.name == "wan-a14b" else ["student"]
    files = [folder / f"{name}.safetensors" for name in names]
    assert sorted(folder.glob("*.safetensors")) == files
    return folder, dict(zip(case.backbone.network_parts, files, strict=True))


@pytest.mark.parametrize("case", list(ORIGINAL), indirect=True)
def test_comfyui_adds_to_the_original_layers_what_training_did(case: Case, tmp_path: Path) -> None:
    for part, file in exported(case, tmp_path)[1].items():
        tensors, differences = load_file(file), case.differences()[part]
        added = {}
        for key in (name.removesuffix(".alpha") for name in list(tensors) if name.endswith(".alpha")):
            alpha, down, up = (tensors.pop(key + end) for end in (".alpha", ".lora_down.weight", ".lora_up.weight"))
            added[key] = alpha.item() / len(down) * up @ down
        assert not tensors
        for rows in ORIGINAL[case.name].values():
            ours = torch.cat([added[key] for key, _ in rows])
            torch.testing.assert_close(ours, torch.cat([differences[layer] for _, layer in rows]), rtol=0, atol=1e-6)
        sizes = [sorted(float(value.double().norm()) for value in of.values()) for of in (added, differences)]
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)  # so that no layer is missing


@pytest.mark.parametrize("case", READ_BY_DIFFUSERS, indirect=True)
def test_diffusers_reads_comfyuis_names_as_the_same_student(case: Case, tmp_path: Path) -> None:
    """By its own tables of names, which are not ours."""
    pipeline = case.stock()
    for part, file in exported(case, tmp_path)[1].items():
        second = {"load_into_transformer_2": True} if part == "transformer_2" else {}
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="student", **second)
    assert_latents_close(case.denoised(pipeline), case.wanted(), 1e-5)


@pytest.mark.parametrize("case", ["sd15", "wan-a14b"], indirect=True)
def test_comfyuis_card_says_where_files_go_and_the_noise_levels(case: Case, tmp_path: Path) -> None:
    folder, files = exported(case, tmp_path)
    text = (folder / "README.md").read_text()
    assert all(file.name in text for file in files.values())
    assert "cfg is 1. Sampler: euler." in text
    first = "14.6146" if case.name == "sd15" else "1, 0.9, 0.75, 0.5, 0"
    assert f"Sigmas of 4 steps: `{first}" in text
    with pytest.raises(FewstepError, match="exported to comfyui.*fix:"):
        load_student(folder)


@pytest.mark.parametrize("case", ["sana"], indirect=True)
def test_families_that_comfyui_does_not_know_are_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="family Sana for ComfyUI.*fix:"):
        export_student(case.folder, "comfyui", out=tmp_path / "comfyui")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["sdxl", "wan"], indirect=True)
def test_a_style_lora_of_the_teacher_acts_with_the_students(case: Case, tmp_path: Path) -> None:
    """Both loaded by diffusers: each alone, both together, and the sum of what they add to the weights."""
    style = {}
    generator = torch.Generator().manual_seed(5)
    for name, value in load_file(case.folder / "pytorch_lora_weights.safetensors").items():
        if ".to_q." in name or ".to_v." in name:
            rank = {"A": (6, value.shape[1]), "B": (value.shape[0], 6)}["A" if "lora_A" in name else "B"]
            style[name] = 0.1 * torch.randn(*rank, generator=generator)
    save_file(style, tmp_path / "pytorch_lora_weights.safetensors")
    pipeline = loaded(case, loaded(case, case.stock()), tmp_path, "style")
    outputs = {}
    for active in (["student"], ["style"], ["student", "style"]):
        pipeline.set_adapters(active)
        outputs[" ".join(active)] = case.denoised(pipeline)
    both = outputs.pop("student style")
    assert_latents_close(outputs["student"], case.wanted(), 1e-5)
    assert all((both - alone).abs().max() > 1e-3 * both.abs().max() for alone in outputs.values())
    merged = case.stock()
    network = getattr(merged, case.first)
    with torch.no_grad():
        for layer, difference in case.differences()[case.first].items():
            network.get_submodule(layer).weight += difference
        for name in (name for name in style if ".lora_A." in name):
            layer = name.removeprefix(f"{case.first}.").removesuffix(".lora_A.weight")
            network.get_submodule(layer).weight += style[name.replace(".lora_A.", ".lora_B.")] @ style[name]
    assert_latents_close(case.denoised(merged), both, 1e-5)


@pytest.mark.parametrize("case", ["sd15"], indirect=True)
def test_a_style_fused_into_the_teacher_is_distilled(case: Case) -> None:
    """As docs/outputs.md says: fuse, unload, then build roles or call distill."""
    teacher = fewstep.load_teacher(case.backbone.source)
    loaded(case, teacher.backbone.pipeline)
    teacher.backbone.pipeline.fuse_lora()
    teacher.backbone.pipeline.unload_lora_weights()
    roles = build_roles(teacher.backbone, rank=4)
    perturb(roles.student_parameters(), seed=1)
    with torch.no_grad():
        assert_latents_close(roles.teacher(*case.inputs()), case.wanted(), 1e-5)
        assert not torch.allclose(roles.student(*case.inputs()), case.wanted(), rtol=1e-2)


@pytest.mark.parametrize("case", ["sd15"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "words"), [("shape", "a weight of"), ("layer", "no such layer"), ("gone", "found no")]
)
def test_loading_refuses(case: Case, tmp_path: Path, damage: str, words: str) -> None:
    for path in case.folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    if damage == "gone":
        file.unlink()
    else:
        value = tensors.pop(name)
        other = tensors.pop(name.replace("lora_A", "lora_B"))
        name = name if damage == "shape" else name.replace("to_q", "to_z").replace("to_k", "to_z")
        tensors[name] = value[:, :-1].contiguous() if damage == "shape" else value
        tensors[name.replace("lora_A", "lora_B")] = other
        save_file(tensors, file)
    with pytest.raises(FewstepError, match=f"{words}.*fix:"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    ("key", "layer", "wanted"),
    [
        (sdxl_key, "down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        (sdxl_key, "down_blocks.2.resnets.1.time_emb_proj", "lora_unet_input_blocks_8_0_emb_layers_1"),
        (sdxl_key, "mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
        (sdxl_key, "up_blocks.1.attentions.2.proj_out", "lora_unet_output_blocks_5_1_proj_out"),
        (sdxl_key, "add_embedding.linear_2", "lora_unet_label_emb_0_2"),
        (unet_key, "time_embedding.linear_1", "lora_unet_time_embedding_linear_1"),
        (wan_key, "condition_embedder.time_proj", "diffusion_model.time_projection.1"),
        (wan_key, "condition_embedder.text_embedder.linear_2", "diffusion_model.text_embedding.2"),
        (wan_key, "proj_out", "diffusion_model.head.head"),
        (cogvideox_key, "time_embedding.linear_2", "diffusion_model.time_embedding_linear_2"),
        (cogvideox_key, "transformer_blocks.3.norm1.linear", "diffusion_model.blocks.3.norm1.linear"),
    ],
)
def test_layers_beyond_attention_have_names_too(key: Callable[..., str], layer: str, wanted: str) -> None:
    """Of networks in their released size (two layers a block)."""
    assert key(layer, {"layers_per_block": 2}) == wanted


def test_layers_that_the_original_does_not_have_are_refused() -> None:
    with pytest.raises(FewstepError, match="time_embedding.cond_proj.*fix:"):
        unet_key("time_embedding.cond_proj", {"layers_per_block": 2})
