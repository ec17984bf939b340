"""All stages of building the embedded teacher, in miniature; what is shipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.data.scenes import COUNTS
from fewstep.embedded.autoencoder import LATENT_SHAPE
from fewstep.embedded.build import JUDGE_FILE, TEACHER_FOLDER, BuildOptions, build_teacher, shipped
from fewstep.embedded.judge import Judge, judge_accuracy
from fewstep.embedded.teacher import JITTERS, TeacherOptions
from fewstep.errors import FewstepError
from fewstep.models import load_backbone


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after all stages; random latents stand in for the two minutes of encoding."""
    out = tmp_path_factory.mktemp("build")
    latents = torch.randn(*COUNTS.values(), JITTERS, *LATENT_SHAPE).half()
    save_file({"latents": latents}, out / "latents.safetensors")
    stages = BuildOptions(autoencoder_iterations=1, judge_iterations=1)
    said: list[str] = []
    build_teacher(out, TeacherOptions(iterations=2, batch=4), stages, report=said.append)
    assert any("teacher 2/2" in line for line in said)
    return out


def test_the_result_is_a_pipeline_that_loads(built: Path) -> None:
    backbone = load_backbone(built / TEACHER_FOLDER)
    assert backbone.latent_shape == LATENT_SHAPE
    assert backbone.prediction == "eps"
    index = json.loads((built / TEACHER_FOLDER / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    notes = json.loads((built / TEACHER_FOLDER / "training.json").read_text())
    assert notes["iterations"] == 2


def test_a_finished_build_is_continued_not_repeated(built: Path) -> None:
    before = (built / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes()
    said: list[str] = []
    build_teacher(built, TeacherOptions(iterations=3, batch=4), BuildOptions(), report=said.append)
    assert "continuing the teacher from iteration 2" in said
    assert not any(line.startswith(("autoencoder", "judge")) for line in said)
    assert (built / "autoencoder" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    state = load_file(built / "teacher.safetensors")
    assert any(name.startswith("optimiser.") for name in state)


def test_the_shipped_judge_is_as_good_as_its_card_says() -> None:
    card = json.loads(shipped("emoji-judge.json").read_text())["held-out accuracy"]
    accuracy = judge_accuracy(Judge.load(shipped(JUDGE_FILE)), count=256)
    assert min(card.values()) > 0.98
    assert all(accuracy[name] > 0.97 for name in card)


def test_shipped_assets_stay_small_and_a_missing_one_is_named() -> None:
    folder = shipped(TEACHER_FOLDER).parent
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 30_000_000
    with pytest.raises(FewstepError, match="no-such-file"):
        shipped("no-such-file")
