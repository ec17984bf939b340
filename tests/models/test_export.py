"""A saved student is an ordinary diffusers folder that samples what our sampler samples."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pixart import PROMPTS, assert_latents_close, perturb
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.core import grids
from fewstep.core.process import Flow
from fewstep.errors import FewstepError
from fewstep.models import Backbone, Roles, build_roles, choose_scheduler, load_backbone, load_student, save_student
from fewstep.models.adapters import cpu_copy
from fewstep.models.export import written_atomically
from fewstep.planning.trace import Ledger

SEEDS = [3, 4, 5]
PLAIN = {"guidance_scale": 1, "output_type": "latent", "use_resolution_binning": False}


def trained_roles(backbone: Backbone, kind: str = "adapters", **options) -> Roles:
    roles = build_roles(backbone, kind, rank=4, **options)
    perturb(roles.student_parameters())
    return roles


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def load_stock(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


DIFFUSERS_ALONE = """
import sys
import torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
folder, out, *prompts = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder)
generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
latents = pipeline(prompts, num_inference_steps=4, guidance_scale=1, generator=generators, output_type="latent",
                   use_resolution_binning=False).images
assert not [name for name in sys.modules if name.startswith("fewstep")]
torch.save(latents, out)
"""


def test_diffusers_alone_samples_what_we_sample(backbone: Backbone, tmp_path: Path) -> None:
    """In a process of its own that has never heard of fewstep."""
    save_student(tmp_path / "student", trained_roles(backbone), [grids.uniform(4)], method="tdm")
    arguments = [str(tmp_path / "student"), str(tmp_path / "latents.pt"), *PROMPTS]
    subprocess.run([sys.executable, "-c", DIFFUSERS_ALONE, *arguments], check=True, capture_output=True)
    theirs = torch.load(tmp_path / "latents.pt", weights_only=True)
    ours = load_student(tmp_path / "student").latents(PROMPTS, SEEDS)
    assert_latents_close(ours, theirs)
    assert not torch.allclose(ours, trained_latents_of_teacher(backbone), rtol=0.01)


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for left in (
        f".student.{ended.pid}.new",
        f".student.{ended.pid}.old",
        ".student.1.new",
        ".other.1.new",
        ".student.x",
    ):
        (tmp_path / left / "unet").mkdir(parents=True)
    with written_atomically(tmp_path / "student") as place:
        (place / "fewstep.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.1.new", ".student.1.new", ".student.x", "student"]


def trained_latents_of_teacher(backbone: Backbone) -> torch.Tensor:
    pipeline = backbone.pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPTS, num_inference_steps=4, generator=generators(), **PLAIN).images


@pytest.mark.parametrize("kind", ["adapters", "copies", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(backbone: Backbone, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    roles = trained_roles(backbone, kind)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(1), grids.uniform(4)], method="tdm", dtype=dtype)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    pipeline = load_stock(folder)
    student = load_student(folder)
    assert {part.dtype for part in (pipeline.transformer, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    for steps in (1, 4):
        theirs = pipeline(PROMPTS, num_inference_steps=steps, generator=generators(), **PLAIN).images
        assert_latents_close(student.latents(PROMPTS, SEEDS, steps), theirs)
    condition = backbone.encode(PROMPTS)
    x, t = torch.randn(3, *backbone.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        expected = roles.student(x, t, condition)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert_latents_close(student.denoise(x, t, student.backbone.encode(PROMPTS)), expected, tolerance)


def test_pictures_equal_the_pipelines(backbone: Backbone, tmp_path: Path) -> None:
    folder = save_student(tmp_path / "student", trained_roles(backbone), [grids.uniform(2)], method="tdm")
    pictures = load_stock(folder)(
        PROMPTS, num_inference_steps=2, generator=generators(), guidance_scale=1, output_type="pt",
        use_resolution_binning=False,
    ).images  # fmt: skip
    ours = load_student(folder).sample(PROMPTS, SEEDS, batch=2)
    assert ours.dtype == torch.uint8
    assert ours.shape == (3, 3, 32, 32)
    torch.testing.assert_close(ours.float(), pictures * 255, rtol=0, atol=1.0)


def test_lora_is_read_by_peft_and_by_us(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler
    from peft import PeftModel

    roles = trained_roles(backbone, alpha=8.0)
    saved = save_student(tmp_path / "lora", roles, [grids.uniform(4)], method="tdm", form="lora")
    assert not (saved / "model_index.json").exists()
    pipeline = load_stock(folder)
    pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, saved)
    pipeline.scheduler = DDIMScheduler.from_pretrained(saved, subfolder="scheduler")
    theirs = pipeline(PROMPTS, num_inference_steps=4, generator=generators(), **PLAIN).images
    student = load_student(saved)
    assert_latents_close(student.latents(PROMPTS, SEEDS, 4), theirs)
    whole = save_student(tmp_path / "whole", roles, [grids.uniform(4)], method="tdm")
    assert_latents_close(load_student(whole).latents(PROMPTS, SEEDS, 4), theirs)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_steps_aware_student(backbone: Backbone, tmp_path: Path, kind: str) -> None:
    from fewstep.models.steps_aware import StepsAwarePixArtPipeline

    roles = trained_roles(backbone, kind, steps_aware=True)
    counts = [1, 2, 4, 8]
    folder = save_student(tmp_path / "student", roles, [grids.uniform(count) for count in counts], method="tdm-unify")
    pipeline = StepsAwarePixArtPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    student = load_student(folder)
    assert student.steps_aware
    assert sorted(student.grids) == counts
    for steps in counts:
        theirs = pipeline(
            PROMPTS, num_inference_steps=steps, guidance_scale=1, generator=generators(), output_type="latent"
        ).images
        assert_latents_close(student.latents(PROMPTS, SEEDS, steps), theirs)
    condition = {**student.backbone.encode(PROMPTS), "steps": torch.tensor([1.0, 2.0, 8.0])}
    x, t = torch.randn(3, *backbone.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert_latents_close(student.denoise(x, t, condition), roles.student(x, t, condition), 1e-5)


def test_a_student_can_be_a_teacher(backbone: Backbone, tmp_path: Path) -> None:
    """Also a steps-aware one, whose roles then start as it is when told the same K."""
    folder = save_student(
        tmp_path / "student", trained_roles(backbone, steps_aware=True), [grids.uniform(4)], method="tdm"
    )
    again = load_backbone(folder)
    roles = build_roles(again, "adapters", rank=4, steps_aware=True)
    condition = {**again.encode(PROMPTS), "steps": torch.full((3,), 4.0)}
    x, t = torch.randn(3, *again.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(roles.student(x, t, condition), again.call(again.network, x, t, condition))


@pytest.mark.parametrize(
    ("grid", "name", "call"),
    [
        (grids.uniform(1), "DDIMScheduler", {"num_inference_steps": 1}),
        (grids.uniform(4), "DDIMScheduler", {"num_inference_steps": 4}),
        (grids.uniform(4, 0.9), "DDIMScheduler", {"num_inference_steps": 4}),
        (grids.uniform(8, 0.8), "DDIMScheduler", {"num_inference_steps": 8}),
        (grids.explicit([999, 666, 332], 1000), "DPMSolverMultistepScheduler", {"num_inference_steps": 3}),
        (
            grids.explicit([999, 856, 665, 399], 1000),
            "DPMSolverMultistepScheduler",
            {"timesteps": [999, 856, 665, 399]},
        ),
    ],
)
def test_the_scheduler_follows_the_grid(backbone: Backbone, tmp_path: Path, grid, name: str, call: dict) -> None:
    """DDIM where it can; for K = 3 it lands beside its next call, and DPM-Solver of order 1 is DDIM done right."""
    sampling = choose_scheduler(backbone, [grid])
    assert type(sampling.scheduler).__name__ == name
    assert sampling.calls == {len(grid) - 1: call}
    folder = save_student(tmp_path / "student", trained_roles(backbone), [grid], method="tdm")
    theirs = load_stock(folder)(PROMPTS, generator=generators(), **call, **PLAIN).images
    assert_latents_close(load_student(folder).latents(PROMPTS, SEEDS), theirs)


@pytest.mark.parametrize(
    ("grid", "call"),
    [
        (grids.uniform(1), {"num_inference_steps": 1}),
        (grids.uniform(4), {"num_inference_steps": 4}),
        (grids.uniform(4, 0.9), {"num_inference_steps": 4}),
        (grids.explicit([999, 856, 665, 399], 1000), {"timesteps": [999, 856, 665, 399]}),
    ],
)
def test_students_that_renoise_are_sampled_with_fresh_noise(backbone: Backbone, tmp_path: Path, grid, call) -> None:
    folder = save_student(tmp_path / "student", trained_roles(backbone), [grid], method="dmd2", eta=0.0)
    student, pipeline = load_student(folder), load_stock(folder)
    assert type(pipeline.scheduler).__name__ == ("DDIMScheduler" if len(grid) == 2 else "LCMScheduler")
    theirs = pipeline(PROMPTS, generator=generators(), **call, **PLAIN).images
    assert_latents_close(student.latents(PROMPTS, SEEDS), theirs)
    if len(grid) > 2:
        assert not torch.allclose(student.latents(PROMPTS, SEEDS, solver="ddim"), theirs, rtol=0.01)


def test_no_scheduler_renoises_in_part(backbone: Backbone) -> None:
    with pytest.raises(FewstepError, match="eta = 0.5 on the process"):
        choose_scheduler(backbone, [grids.uniform(4)], 0.5)


def test_no_scheduler_renoises_with_the_noise_of_the_start(backbone: Backbone) -> None:
    """Which single calls and deterministic paths have no use for."""
    with pytest.raises(FewstepError, match=r"chain_noise 'fixed' for students of 4 steps.*fix:"):
        choose_scheduler(backbone, [grids.uniform(1), grids.uniform(4)], 0.0, "fixed")
    for grid, eta in ((grids.uniform(1), 0.0), (grids.uniform(4), 1.0)):
        fixed, fresh = (choose_scheduler(backbone, [grid], eta, noise) for noise in ("fixed", "fresh"))
        assert fixed.scheduler.config == fresh.scheduler.config


def test_no_scheduler_follows_fractions_of_an_index(backbone: Backbone) -> None:
    with pytest.raises(FewstepError, match="665.667.*whole training indices"):
        choose_scheduler(backbone, [grids.uniform(3)])


@pytest.mark.parametrize("grid", [grids.uniform(1), grids.uniform(4), grids.shifted(4, 3.0)])
def test_flow_students_of_pixart_have_a_scheduler_of_ours(folder: Path, tmp_path: Path, grid) -> None:
    """PixArt's pipeline cannot drive diffusers' flow schedulers; ours is loaded by name once imported."""
    backbone = load_backbone(folder)
    backbone.process, backbone.prediction = Flow(), "flow"
    saved = save_student(tmp_path / "student", trained_roles(backbone), [grid], method="tdm")
    student = load_student(saved)
    assert isinstance(student.backbone.process, Flow)
    assert student.backbone.prediction == "flow"
    steps = len(grid) - 1
    theirs = load_stock(saved)(PROMPTS, num_inference_steps=steps, generator=generators(), **PLAIN).images
    assert_latents_close(student.latents(PROMPTS, SEEDS), theirs)


def test_the_card_says_what_it_is(backbone: Backbone, tmp_path: Path) -> None:
    details = {"iterations": 30}
    folder = save_student(
        tmp_path / "student", trained_roles(backbone), [grids.uniform(4)], method="tdm", details=details
    )
    card = json.loads((folder / "fewstep.json").read_text())
    assert card["method"] == "tdm"
    assert card["details"] == details
    assert card["teacher"] == backbone.source
    assert card["grids"] == {"4": [1.0, 0.75, 0.5, 0.25, 0.0]}
    assert card["call"] == {"4": {"num_inference_steps": 4}}


@pytest.mark.parametrize("what", ["pipeline", "lora", "steps-aware", "flow"])
def test_what_the_readme_tells_users_to_type_works(folder: Path, tmp_path: Path, what: str) -> None:
    backbone = load_backbone(folder)
    if what == "flow":
        backbone.process, backbone.prediction = Flow(), "flow"
    roles = trained_roles(backbone, steps_aware=what == "steps-aware")
    form = "lora" if what == "lora" else "pipeline"
    saved = save_student(tmp_path / "student", roles, [grids.uniform(1), grids.uniform(4)], method="tdm", form=form)
    usage = (saved / "README.md").read_text().split("```python\n")[1].split("```")[0].replace("FOLDER", str(saved))
    scope: dict = {}
    exec(usage, scope)
    assert usage.count("image = ") == 2
    assert scope["image"].size == (32, 32)


def test_replaces_a_student_and_nothing_else(backbone: Backbone, tmp_path: Path) -> None:
    roles = trained_roles(backbone)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(4)], method="first")
    save_student(folder, roles, [grids.uniform(4)], method="second")
    assert load_student(folder).card["method"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(FewstepError, match="not a student"):
        save_student(precious, roles, [grids.uniform(4)], method="tdm")
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_a_failure_leaves_the_old_student(backbone: Backbone, tmp_path: Path, monkeypatch) -> None:
    roles = trained_roles(backbone)
    folder = save_student(tmp_path / "student", roles, [grids.uniform(4)], method="first")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(backbone.pipeline), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_student(folder, roles, [grids.uniform(4)], method="second")
    assert load_student(folder).card["method"] == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


class OnGpu(Ledger):
    """Bytes on the GPU beyond those that were there."""

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "cuda":
            super()._count(tensor)


def on_gpu(networks: list[torch.nn.Module]) -> dict[int, torch.Tensor]:
    """Puts shapes on a GPU that need not be there in the place of all tensors (within FakeTensorMode)."""
    moved: dict[int, torch.Tensor] = {}
    for module in (module for network in networks for module in network.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "cpu":
                    there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    if isinstance(tensor, torch.nn.Parameter):
                        there = torch.nn.Parameter(there, tensor.requires_grad)
                    tensors[name] = moved.setdefault(id(tensor), there)
    return moved


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_a_student_is_copied_to_the_cpu_and_not_on_the_gpu(backbone: Backbone, kind: str) -> None:
    """There, no more than the update of one layer (and its multiple by the scale) is made at a time."""
    backbone = copy.copy(backbone)
    backbone.network = copy.deepcopy(backbone.network)
    roles, encoder = build_roles(backbone, kind, rank=4, alpha=2.0), copy.deepcopy(backbone.pipeline.text_encoder)
    seats = [roles._teacher, roles.student_seat, roles._critic]
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = on_gpu([backbone.network, encoder, *(seat.network for seat in seats)])
        with OnGpu(there.values()) as gpu:
            student = roles.student_network()
            text_encoder = cpu_copy(encoder, torch.bfloat16)
    largest = max(tensor.nbytes for tensor in student.parameters())
    assert gpu.most <= (2 * largest if kind == "adapters" else 0)
    assert {(p.device.type, p.dtype) for p in student.parameters()} == {("cpu", torch.float32)}
    assert {(p.device.type, p.dtype) for p in text_encoder.parameters()} == {("cpu", torch.bfloat16)}


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_the_roles_can_be_trained_on_after_an_export(backbone: Backbone, tmp_path: Path, kind: str) -> None:
    roles = trained_roles(backbone, kind, checkpointing=True)
    before = {name: value.clone() for name, value in roles.student_state().items()}
    save_student(tmp_path / "student", roles, [grids.uniform(4)], method="tdm", dtype=torch.float16)
    assert all(torch.equal(before[name], value) for name, value in roles.student_state().items())
    condition, x, t = backbone.encode(PROMPTS), torch.randn(3, *backbone.latent_shape), torch.tensor([0.2, 0.5, 0.9])
    roles.student(x, t, condition).mean().backward()
    assert all(p.grad is not None for p in roles.student_parameters())
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no card", "a pipeline without a student's card"),
        ("no pipeline", "model_index.json"),
        ("empty", "no student"),
        ("broken card", "unreadable"),
        ("wrong grid", "unreadable"),
        ("newer", "unreadable"),
        ("pickle", "safetensors"),
    ],
)
def test_load_student_refuses(backbone: Backbone, tmp_path: Path, damage: str, words: str) -> None:
    folder = save_student(tmp_path / "student", trained_roles(backbone), [grids.uniform(4)], method="tdm")
    path = folder / "fewstep.json"
    card = json.loads(path.read_text())
    if damage == "no card":
        path.unlink()
    elif damage == "no pipeline":
        (folder / "model_index.json").unlink()
    elif damage == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif damage == "broken card":
        path.write_text("{")
    elif damage == "wrong grid":
        path.write_text(json.dumps({**card, "grids": {"2": card["grids"]["4"]}}))
    elif damage == "newer":
        path.write_text(json.dumps({**card, "format": 99}))
    else:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FewstepError, match=words):
        load_student(folder)


def test_sampling_refuses(backbone: Backbone, tmp_path: Path) -> None:
    student = load_student(
        save_student(tmp_path / "student", trained_roles(backbone), [grids.uniform(4)], method="tdm")
    )
    for arguments, words in [
        ((PROMPTS, SEEDS, 3), "steps = 3.*\\[4\\]"),
        ((PROMPTS, SEEDS[:2]), "2 seeds"),
        (([], []), "no prompt"),
    ]:
        with pytest.raises(FewstepError, match=words):
            student.sample(*arguments)
    with pytest.raises(FewstepError, match="solver"):
        student.sample(PROMPTS, SEEDS, solver="euler")


@pytest.mark.parametrize(("kind", "steps_aware"), [("copies", False), ("adapters", True)])
def test_lora_needs_plain_adapters(backbone: Backbone, tmp_path: Path, kind: str, steps_aware: bool) -> None:
    roles = build_roles(backbone, kind, rank=4, steps_aware=steps_aware)
    with pytest.raises(FewstepError, match="saved as a LoRA"):
        save_student(tmp_path / "lora", roles, [grids.uniform(4)], method="tdm", form="lora")
