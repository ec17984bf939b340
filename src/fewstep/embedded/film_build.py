"""Build the embedded video teacher: autoencoder (from the image teacher's), teacher, pipeline folder. Resumable.

As `fewstep.embedded.build`: a stage whose file is in the work folder is not repeated, and each training continues from
its last state. Several processes (`torchrun --standalone --nproc_per_node=2 -m fewstep teacher train-video`) share the
batch. What may change in a run that is continued: the number of iterations.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from fewstep.embedded.autoencoder import train_autoencoder
from fewstep.embedded.build import TEACHER_FOLDER, Report, make_autoencoder, run_training, shipped, write_folder
from fewstep.embedded.film_teacher import (
    FilmOptions,
    FilmTraining,
    build_film_autoencoder,
    build_film_pipeline,
    film_frames,
)
from fewstep.embedded.names import FILM_FOLDER


@dataclass(frozen=True)
class FilmBuildOptions:
    """How much each stage trains."""

    autoencoder_iterations: int = 4_000
    """Batches of 32 frames."""
    save_seconds: float = 300.0
    """How often the training state of teacher and autoencoder is saved."""


def build_film_teacher(
    out: Path, options: FilmOptions, build: FilmBuildOptions, *, device: str = "cpu", report: Report = print
) -> Path:
    """Run all stages in `out`; returns the pipeline folder. Cost: hours on two cores, minutes on a GPU."""
    from diffusers import AutoencoderTiny

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    say: Report = report if rank == 0 else lambda _: None
    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        image = AutoencoderTiny.from_pretrained(shipped(TEACHER_FOLDER) / "vae")
        start = build_film_autoencoder(image.float())
        train = partial(train_autoencoder, start=start, draw=film_frames, batch=32, bf16=options.bf16, device=device)
        make_autoencoder(out, build.autoencoder_iterations, build.save_seconds, say, train)
    if world > 1:
        dist.barrier()
    autoencoder = AutoencoderTiny.from_pretrained(out / "autoencoder")
    training = FilmTraining(autoencoder, options, device, rank, world)
    run_training(training, out / "teacher.safetensors", build.save_seconds, say)
    return export_films(training, out / FILM_FOLDER) if rank == 0 else out / FILM_FOLDER


def export_films(training: FilmTraining, folder: Path) -> Path:
    """Write the averaged teacher as a pipeline folder in half precision; returns it."""
    model = training.averaged()
    parts = (model.tokenizer, model.text_encoder, model.transformer, model.track_head)
    pipeline = build_film_pipeline(training.autoencoder, *parts)
    return write_folder(folder, pipeline, training)
