"""Weights left on disk: read later they are what loading at once gives, and until then nothing needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_flows
import torch
from tiny_pixart import PROMPTS, build_pipeline

from fewstep import load_teacher
from fewstep.api import RoleOptions, distill
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import Backbone, build_roles, choose_scheduler, load_backbone
from fewstep.models.sharding import shard
from fewstep.models.teacher import Teacher
from fewstep.training.options import TrainOptions

FAMILIES = ["pixart", "sd15", "sd3", "flux-dev", "qwen_image", "z_image", "cogvideox", "wan", "wan-a14b"]


def saved(family: str, folder: Path) -> Path:
    """A tiny pipeline of the family."""
    if family == "pixart":
        build_pipeline().save_pretrained(folder / family, max_shard_size="40KB")  # several files with an index
    elif family in tiny_families.FAMILIES:
        return tiny_families.save(family, folder)
    else:
        name, _, kind = family.partition("-")
        getattr(tiny_flows, name)(*[kind] if kind else []).save_pretrained(folder / family)
    return folder / family


def tensors(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {**dict(backbone.network.named_parameters()), **dict(backbone.network.named_buffers())}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_later_are_the_same(tmp_path: Path, family: str) -> None:
    folder = saved(family, tmp_path)
    dtype = torch.bfloat16 if family.startswith("wan") else torch.float32  # Wan keeps some layers in float32
    whole, later = load_backbone(folder, dtype=dtype), load_backbone(folder, dtype=dtype, defer=True)
    assert all(parameter.is_meta for parameter in later.network.parameters())
    assert later.device == torch.device("cpu")
    if dtype == torch.float32:  # looks at the network, calls another
        choose_scheduler(later, [preset("tdm").time_grid(4)], 1.0, "fresh")
    expected = build_roles(whole, "mixed", rank=2)
    roles = build_roles(later, "mixed", rank=2)
    shard(roles)
    assert later.at_hand
    for name, value in tensors(whole).items():
        assert tensors(later)[name].dtype == value.dtype, name
        assert torch.equal(tensors(later)[name], value), name
    for state in ("student_state", "critic_state"):  # a float32 copy read from disk, and adapters drawn
        found = getattr(roles, state)()
        for name, value in getattr(expected, state)().items():
            assert torch.equal(found[name].float(), value.float()), name
            assert found[name].dtype == value.dtype


def test_what_needs_the_weights_says_so(folder: Path, tmp_path: Path) -> None:
    teacher = load_teacher(folder, defer=True)
    with pytest.raises(FewstepError, match="on disk"):
        teacher.sample(["a frog"], [0], 2)
    with pytest.raises(FewstepError, match="left on disk.*--shard"):
        distill(teacher, "tdm", out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 3}, "batch = 3 for 2 processes"),
        ({"precision": "fp16"}, "fp16 for sharded roles"),
        ({"optimiser": "adamw8bit"}, "optimiser = adamw8bit for a sharded run"),
    ],
)
def test_a_sharded_run_is_refused_before_prompts_are_encoded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    """As torchrun's processes ask it, before they have met."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = TrainOptions(**{"batch": 4, **options})
    with pytest.raises(FewstepError, match=words):
        distill(folder, "tdm", out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions(shard=True), train_options=told)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FewstepError, match="samples of the teacher.*pairs="):
        distill(folder, "dmd", out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions(shard=True))


def test_a_rounded_base_is_not_sharded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="defer with a base in int8"):
        load_backbone(folder, quantised="int8", defer=True)
    backbone = load_backbone(folder)
    backbone.quantised = "int8"
    with pytest.raises(FewstepError, match="base in int8 for a sharded run.*--shard off"):
        distill(Teacher(backbone), "tdm", out=tmp_path / "run", prompts=PROMPTS, roles=RoleOptions(shard=True))


def test_a_folder_of_other_names_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("sd15", tmp_path)
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({name.replace("conv_in", "conv_0"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(FewstepError, match="names .* that only one of"):
        load_backbone(folder, defer=True)
