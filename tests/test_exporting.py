"""`fewstep export`: what leaves the library, its card, and the Hub without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_pixart import assert_latents_close, perturb

import fewstep
from fewstep.api import RoleOptions
from fewstep.cli import main
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.exporting import export_student
from fewstep.models import build_roles, load_backbone, load_student, save_student
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple"]
LICENCE = {"license": "other", "license_name": "tiny-community", "license_link": "https://example.org/licence"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with a card of its own."""
    folder = tiny_families.save("sd15", tmp_path_factory.mktemp("teacher"))
    header = "\n".join(f"{name}: {value}" for name, value in LICENCE.items())
    (folder / "README.md").write_text(f"---\n{header}\n---\n# Tiny\n")
    return folder


@pytest.fixture(scope="module")
def run(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations whose last evaluation is in its log; read-only for tests."""
    out = tmp_path_factory.mktemp("run") / "out"
    fewstep.distill(
        teacher, "tdm", out=out, prompts=PROMPTS, roles=RoleOptions(rank=4, alpha=1.0),
        train_options=TrainOptions(iterations=2, batch=2, warmup=1, student_rate=0.1, tensorboard=False),
    )  # fmt: skip
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps({"iteration": 2, "evaluate/frechet, 4 steps": 12.5}) + "\n")
    return out


def exported(run: Path, out: Path, *words: str) -> Path:
    main(["export", str(run), "--out", str(out), *words])
    return out


def latents(pipeline: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    told = {"num_inference_steps": 4, "guidance_scale": 1, "output_type": "latent"}
    return pipeline(PROMPTS, generator=generators, **told).images


def test_a_run_of_adapters_leaves_its_student_twice(run: Path, teacher: Path) -> None:
    whole, lora = load_student(run / "student"), load_student(run / "lora")
    ours = lora.latents(PROMPTS, [1, 2])
    assert_latents_close(ours, whole.latents(PROMPTS, [1, 2]), 1e-5)
    untrained = latents(DiffusionPipeline.from_pretrained(teacher))
    assert (ours - untrained).abs().max() > 1e-3 * ours.abs().max()


@pytest.mark.parametrize("of", ["student", "lora"])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_to_diffusers(run: Path, tmp_path: Path, of: str, name: str, dtype: torch.dtype) -> None:
    folder = exported(run / of, tmp_path / "out", "--to", "diffusers", "--dtype", name)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    wanted = load_student(run / "student").latents(PROMPTS, [1, 2])
    tolerance = 1e-5 if name == "fp32" else 0.1
    assert_latents_close(latents(DiffusionPipeline.from_pretrained(folder)), wanted, tolerance)
    assert_latents_close(load_student(folder).latents(PROMPTS, [1, 2]), wanted, tolerance)


def test_to_lora_in_half_precision(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "out", "--to", "lora", "--dtype", "fp16")
    stored = load_file(folder / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    wanted = load_student(run / "student").latents(PROMPTS, [1, 2])
    assert_latents_close(load_student(folder).latents(PROMPTS, [1, 2]), wanted, 1e-2)


def test_to_merged_by_the_lines_of_its_readme(run: Path, tmp_path: Path) -> None:
    folder = exported(run / "lora", tmp_path / "out", "--to", "merged")
    assert not (folder / "text_encoder").exists()
    usage = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(folder))
    scope: dict[str, Any] = {}
    exec(usage, scope)
    assert scope["image"].size == (16, 16)
    wanted = load_student(run / "student").latents(PROMPTS, [1, 2])
    assert_latents_close(latents(scope["pipeline"]), wanted, 1e-5)


def test_the_card_is_one_that_the_hub_reads(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "out", "--to", "lora", "--base-model", "owner/tiny")
    card = ModelCard.load(folder / "README.md")
    assert {name: getattr(card.data, name) for name in LICENCE} == LICENCE
    assert (card.data.base_model, card.data.base_model_relation) == ("owner/tiny", "adapter")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-to-image", "diffusers")
    assert {"lora", "tdm", "distillation", "fewstep"} <= set(card.data.tags)
    for words in (
        "| frechet, 4 steps | 12.5 |", "eprint = {2503.06674}", "| rank | 4 |", "| alpha | 1.0 |", "| iterations | 2 |",
        "| student rate | 0.1 |", "tiny-community", 'DiffusionPipeline.from_pretrained("owner/tiny")',
        "guidance_scale=1",
    ):  # fmt: skip
        assert words in card.text, words
    told = (folder / "README.md").read_text() + (folder / "fewstep.json").read_text()
    assert str(run.parent.parent) not in told  # no folder of this machine


def test_a_teacher_without_a_card_is_said_to_have_none(tiny_teacher: Path, tmp_path: Path) -> None:
    roles = build_roles(load_backbone(tiny_teacher), rank=4)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(4)], method="tdm")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license is None
    assert "states none that could be found" in card.text


class StubApi:
    """In the place of HfApi: what was asked of it."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", {"token": token}))

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **told: self.calls.append((name, {"args": args, **told}))


def test_pushing_asks_the_hub_for_a_repository_and_uploads(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", StubApi)
    monkeypatch.setenv("HF_TOKEN", "secret")
    StubApi.calls.clear()
    folder = exported(run, tmp_path / "out", "--to", "lora", "--base-model", "owner/tiny", "--push", "me/tiny-4-steps")
    (_, token), (create, told), (upload, where) = StubApi.calls
    assert token == {"token": "secret"}
    assert (create, told["args"], told["exist_ok"], told["private"]) == (
        "create_repo",
        ("me/tiny-4-steps",),
        True,
        False,
    )
    assert (upload, where["repo_id"], where["folder_path"]) == ("upload_folder", "me/tiny-4-steps", str(folder))
    assert "https://huggingface.co/me/tiny-4-steps" in capsys.readouterr().out
    assert not [path for path in folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()]


@pytest.mark.parametrize(
    ("token", "words", "message"),
    [(None, ["--base-model", "owner/tiny"], "no HF_TOKEN"), ("secret", [], "--base-model")],
)
def test_pushing_refuses_before_any_work(run: Path, tmp_path: Path, monkeypatch, capsys, token, words, message) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", StubApi)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit):
        exported(run, tmp_path / "out", "--to", "lora", "--push", "me/tiny", *words)
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_full_students_are_not_made_into_loras(tiny_teacher: Path, tmp_path: Path) -> None:
    roles = build_roles(load_backbone(tiny_teacher), "copies")
    folder = save_student(tmp_path / "student", roles, [grids.uniform(4)], method="tdm")
    for to in ("lora", "comfyui"):
        with pytest.raises(FewstepError, match="all its weights.*fix:.*--roles adapters"):
            export_student(folder, to, out=tmp_path / "out")
    with pytest.raises(FewstepError, match="found no student.*fix:"):
        export_student(tmp_path / "nothing", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_alpha_of_the_options_is_that_of_the_adapters(teacher: Path, tmp_path: Path, monkeypatch) -> None:
    class Stopped(Exception):
        pass

    def record(*args: Any, alpha: float, **told: Any) -> None:
        raise Stopped(alpha)

    monkeypatch.setattr("fewstep.api.build_roles", record)
    with pytest.raises(Stopped, match="3.0"):
        fewstep.distill(teacher, "tdm", out=tmp_path / "out", prompts=PROMPTS, roles=RoleOptions(rank=4, alpha=3.0))
    with pytest.raises(FewstepError, match="alpha 0.*above 0"):
        build_roles(load_backbone(teacher), rank=4, alpha=0.0)


def test_students_of_an_earlier_version_are_to_be_saved_again(run: Path, tmp_path: Path) -> None:
    card = json.loads((run / "lora" / "fewstep.json").read_text())
    del card["usage"]
    (tmp_path / "fewstep.json").write_text(json.dumps(card))
    with pytest.raises(FewstepError, match="earlier version.*fix:.*--resume"):
        export_student(tmp_path, "lora", out=tmp_path / "out")


def test_networks_of_our_own_are_not_exported_alone(tiny_teacher: Path, tmp_path: Path) -> None:
    roles = build_roles(load_backbone(tiny_teacher), rank=4, steps_aware=True)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(4)], method="tdm-unify")
    with pytest.raises(FewstepError, match="fewstep's own kind.*fix:"):
        export_student(folder, "merged", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_pixart_goes_through_peft_and_to_comfyui(tiny_teacher: Path, tmp_path: Path) -> None:
    """Its pipeline loads no LoRA; ComfyUI knows its layers by diffusers' names."""
    from peft import PeftModel

    roles = build_roles(load_backbone(tiny_teacher), rank=4, alpha=2.0)
    perturb(roles.student_parameters())
    lora = save_student(tmp_path / "lora", roles, [grids.uniform(4)], method="tdm", form="lora")
    again = export_student(lora, "lora", out=tmp_path / "again")
    network = PeftModel.from_pretrained(DiffusionPipeline.from_pretrained(tiny_teacher).transformer, again)
    merged, layer = roles.student_network(), "transformer_blocks.1.attn2.to_v"
    wanted = merged.get_submodule(layer).weight - roles.backbone.network.get_submodule(layer).weight
    found = network.base_model.model.get_submodule(layer)
    torch.testing.assert_close(found.get_delta_weight("default"), wanted, rtol=0, atol=1e-6)
    tensors = load_file(export_student(lora, "comfyui", out=tmp_path / "comfyui") / "student.safetensors")
    key = f"transformer.{layer}"
    update = tensors[f"{key}.alpha"] / 4 * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    torch.testing.assert_close(update, wanted, rtol=0, atol=1e-6)


def test_a_failure_leaves_what_was_there(run: Path, tmp_path: Path, monkeypatch) -> None:
    folder = exported(run, tmp_path / "out", "--to", "lora")

    def fail(*args: Any, **told: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_student(run, "comfyui", out=folder)
    assert load_student(folder).card["form"] == "lora"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
