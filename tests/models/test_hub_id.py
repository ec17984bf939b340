"""A teacher by its Hub id: as from its folder, and named by that id in what its student leaves. Without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny_families
import torch
from huggingface_hub import ModelCard, constants
from safetensors import safe_open

import fewstep
from fewstep.api import RoleOptions
from fewstep.exporting import export_student
from fewstep.planning.build import blueprint
from fewstep.training.options import TrainOptions

TEACHER, COMMIT = "tiny/teacher", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Stable Diffusion in the Hub's cache on this disk, as a download leaves it; returns its folder there."""
    place = tmp_path / "hub" / f"models--{TEACHER.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    shutil.copytree(tiny_families.save("sd15", tmp_path), snapshot)
    (snapshot / "README.md").write_text("---\nlicense: openrail++\n---\n")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_is_a_folder_and_stays_its_name(folder: Path, tmp_path: Path) -> None:
    teacher, local = fewstep.load_teacher(TEACHER), fewstep.load_teacher(folder)
    assert teacher.backbone.source == TEACHER
    drawn = [each.latents(["a frog"], [0], 2) for each in (teacher, local)]
    assert torch.equal(*drawn)
    planned = blueprint(TEACHER).backbone.network
    assert {n: p.shape for n, p in planned.named_parameters()} == {
        n: p.shape for n, p in local.backbone.network.named_parameters()
    }
    student = fewstep.distill(
        TEACHER, "tdm", out=tmp_path / "run", prompts=["a frog"], roles=RoleOptions(rank=2),
        train_options=TrainOptions(iterations=1, batch=1, warmup=0, student_rate=1e-2, tensorboard=False),
    )  # fmt: skip
    lora = tmp_path / "run" / "lora"
    card = ModelCard.load(lora / "README.md")
    assert (card.data.base_model, card.data.license) == (TEACHER, "openrail++")
    again = fewstep.load_student(lora)  # the LoRA names its teacher, which is found
    torch.testing.assert_close(again.latents(["a frog"], [0]), student.latents(["a frog"], [0]), rtol=1e-4, atol=1e-4)
    comfyui = export_student(tmp_path / "run", "comfyui", out=tmp_path / "comfyui")
    with safe_open(comfyui / "student.safetensors", "pt") as file:
        assert file.metadata()["base_model"] == TEACHER
