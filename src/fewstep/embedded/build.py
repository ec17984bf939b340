"""Build the embedded teacher from nothing: autoencoder, latents, teacher, judge, pipeline folder. Resumable.

Everything is kept in one work folder; a stage whose file is there is not repeated, and the teacher's own training
continues from its last state. Several processes (`torchrun --standalone --nproc_per_node=2 -m fewstep teacher train`)
share the teacher's batch; the other stages run in the first.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fewstep.embedded.autoencoder import train_autoencoder
from fewstep.embedded.judge import Judge, judge_accuracy, train_judge
from fewstep.embedded.teacher import Latents, TeacherOptions, TeacherTraining, build_pipeline
from fewstep.embedded.training import Training
from fewstep.errors import FewstepError
from fewstep.models.export import save_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

Report = Callable[[str], None]
TEACHER_FOLDER = "emoji-teacher"
JUDGE_FILE = "emoji-judge.safetensors"
REFERENCE_FILE = "emoji-reference.safetensors"
TABLE_FILE = "emoji-table.json"


@dataclass(frozen=True)
class BuildOptions:
    """How much each stage trains."""

    autoencoder_iterations: int = 1_100
    """Batches of 64 crops of 32x32."""
    judge_iterations: int = 800
    """Batches of 64 scenes."""
    save_seconds: float = 300.0
    """How often the training state of teacher and autoencoder is saved."""
    from_shipped: bool = False
    """Start from the shipped autoencoder, judge and teacher instead of from nothing; the optimiser starts anew."""


def shipped(name: str) -> Path:
    """The path of a shipped asset."""
    path = Path(str(files("fewstep") / "assets" / name))
    if not path.exists():
        raise FewstepError(f"The shipped asset {name} is missing from {path.parent}; reinstall the package.")
    return path


def build_teacher(
    out: Path, options: TeacherOptions, build: BuildOptions, *, device: str = "cpu", report: Report = print
) -> Path:
    """Run all stages in `out`; returns the pipeline folder. Cost: hours on two cores, minutes on a GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    say: Report = report if rank == 0 else lambda _: None
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        if build.from_shipped:
            _take_shipped(out)
        train = partial(train_autoencoder, device=device)
        make_autoencoder(out, build.autoencoder_iterations, build.save_seconds, say, train)
        _latents(out, options, say)
    if world > 1:
        dist.barrier()
    training = TeacherTraining(_load_latents(out), options, device, rank, world)
    if build.from_shipped:
        training.start_from(shipped(TEACHER_FOLDER))
    run_training(training, out / "teacher.safetensors", build.save_seconds, say)
    if rank == 0:
        _judge(out, build, device, say)
        return export(training, out)
    return out / TEACHER_FOLDER


def _take_shipped(out: Path) -> None:
    if not (out / "autoencoder").exists():
        shutil.copytree(shipped(TEACHER_FOLDER) / "vae", out / "autoencoder")
    if not (out / JUDGE_FILE).exists():
        shutil.copy(shipped(JUDGE_FILE), out / JUDGE_FILE)


def make_autoencoder(
    out: Path, iterations: int, save_seconds: float, say: Report, train: Callable[..., AutoencoderTiny]
) -> None:
    """`train` one into `out`, unless it is there; one that was stopped goes on."""
    if (out / "autoencoder").exists():
        return
    state = out / "autoencoder.safetensors"
    autoencoder = train(
        iterations,
        lambda i, loss: say(f"autoencoder {i}/{iterations} loss {loss:.4f}"),
        state=state,
        save_seconds=save_seconds,
    )
    autoencoder.save_pretrained(out / "autoencoder.tmp")
    (out / "autoencoder.tmp").rename(out / "autoencoder")
    state.unlink(missing_ok=True)


def _latents(out: Path, options: TeacherOptions, say: Report) -> None:
    from diffusers import AutoencoderTiny
    from safetensors.torch import save_file

    path = out / "latents.safetensors"
    if path.exists():
        return
    say("encoding the scenes")
    latents = Latents.encode(AutoencoderTiny.from_pretrained(out / "autoencoder"), options.seed)
    save_file({"latents": latents.latents.contiguous()}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def _load_latents(out: Path) -> Latents:
    from safetensors.torch import load_file

    return Latents(load_file(out / "latents.safetensors")["latents"])


def run_training(training: Training, path: Path, save_seconds: float, say: Report) -> None:
    """Train to the end from the state in `path`, if there is one, saving it there from time to time."""
    if path.exists():
        training.load(path)
        say(f"continuing the teacher from iteration {training.iteration}")
    start, first, saved = time.monotonic(), training.iteration, time.monotonic()
    for iteration, loss in training.run():
        speed = (iteration - first) / (time.monotonic() - start)
        left = (training.options.iterations - iteration) / speed / 60
        say(f"teacher {iteration}/{training.options.iterations} loss {loss:.4f}, {left:.0f} min left")
        done = iteration == training.options.iterations
        if training.rank == 0 and (done or time.monotonic() - saved > save_seconds):
            training.save(path)
            saved = time.monotonic()


def _judge(out: Path, build: BuildOptions, device: str, say: Report) -> None:
    from diffusers import AutoencoderTiny

    if (out / JUDGE_FILE).exists():
        return
    autoencoder = AutoencoderTiny.from_pretrained(out / "autoencoder")
    total = build.judge_iterations
    judge = train_judge(autoencoder, total, lambda i, loss: say(f"judge {i}/{total} loss {loss:.4f}"), device=device)
    judge.save(out / JUDGE_FILE)
    accuracy = judge_accuracy(Judge.load(out / JUDGE_FILE))
    (out / "emoji-judge.json").write_text(json.dumps({"held-out accuracy": accuracy}, indent=1) + "\n")
    say("judge on held-out scenes: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in accuracy.items()))


def export(training: TeacherTraining, out: Path) -> Path:
    """Write the averaged teacher as an ordinary pipeline folder in half precision; returns it."""
    from diffusers import AutoencoderTiny

    model = training.averaged()
    autoencoder = AutoencoderTiny.from_pretrained(out / "autoencoder")
    pipeline = build_pipeline(autoencoder, model.tokenizer, model.text_encoder, model.transformer)
    return write_folder(out / TEACHER_FOLDER, pipeline, training)


def write_folder(folder: Path, pipeline: Any, training: Training) -> Path:
    """Write a teacher's pipeline in half precision with notes on its training; returns the folder."""
    save_pipeline(pipeline, folder, torch.float16)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json"):  # a name that transformers 4 knows, too
        path = folder / name
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    for path in folder.glob("*/config.json"):  # no paths of the machine it was made on
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    notes = {**asdict(training.options), "iterations": training.iteration}
    (folder / "training.json").write_text(json.dumps(notes, indent=1) + "\n")
    return folder
