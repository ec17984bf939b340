"""`fewstep sample`: draw pictures with a student or the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from fewstep.api import EMOJI
from fewstep.commands.common import choose_device, guidance, load, parse
from fewstep.data.sources import read_prompts
from fewstep.data.told_files import lasting, read_told
from fewstep.errors import FewstepError
from fewstep.models.student import Student
from fewstep.models.teacher import Teacher

MOST = 10_000
"""Pictures of one call, as they go into one file."""


@dataclass(kw_only=True)
class Sample:
    """Draw pictures or videos: one file, a grid of them for several prompts, or a folder of files."""

    student: str = EMOJI
    """A student's folder; or a teacher: `emoji`, `films`, a pipeline folder or a Hub id."""
    prompt: tuple[str, ...] = ()
    """One or several prompts."""
    prompts: str | None = None
    """PATH or PATH:COLUMN (docs/prompts.md)."""
    steps: int | None = None
    """Solver steps; the model's own unless told (students: those they were trained for)."""
    guidance_scale: float | None = None
    """For teachers only: 1 means none."""
    tracks: Path | None = None
    """JSON, `[[x, y], null, ...]` in pixels: where things are to be, frame by frame, in all films that are asked for;
    for models that are told (docs/video.md)."""
    drives: Path | None = None
    """JSON, `[0.5, null, ...]` in [0, 1]: likewise, how loud it is."""
    motion_guidance: float | None = None
    """For teachers only, beside --tracks or --drives: guidance of these, 0 means none."""
    height: int = 0
    """For teachers only: in pixels; 0: what the pipeline makes."""
    width: int = 0
    """For teachers only: in pixels, likewise."""
    num_frames: int = 0
    """For teachers only: frames of a video; 0: as many as the pipeline makes."""
    seed: int = 0
    """Seed of the first picture; the next ones count up."""
    count: int = 1
    """Pictures per prompt."""
    out: Path = Path("sample.png")
    """File to write: .png; of videos also .gif, .webp, or .mp4 (needs the extra `video`); .png is a contact sheet.
    A name without an ending is a folder, which gets a file for each sample."""
    form: Literal["png", "gif", "webp", "mp4"] | None = None
    """Of the files in a folder; unless told, png for pictures and webp for videos."""
    columns: int = 8
    """Pictures, or videos, in a row of the grid; frames in a row of a contact sheet."""
    fps: int | None = None
    """Frames a second of videos, 1 to 60; unless told, those that the teacher's family is made for."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def main(arguments: list[str]) -> None:
    """Parse, sample, write the picture."""
    from fewstep.evaluation.clips import check_file, save_each, save_samples

    args = parse(Sample, "sample", arguments)
    texts = [*args.prompt, *(read_prompts(args.prompts) if args.prompts else [])]
    if not texts or not all(text.strip() for text in texts):
        raise FewstepError('found no prompt or an empty one, expected text, fix: pass --prompt "..." or --prompts FILE')
    if min(args.count, args.columns) < 1:
        raise FewstepError(f"found count {args.count}, columns {args.columns}, expected 1 or more, fix: change them")
    if args.form is not None and args.out.suffix:
        raise FewstepError(
            f"found --form {args.form} beside the file {args.out.name}, expected it with a folder (a name without an "
            "ending), fix: leave it out, and let the file's name end as it should be"
        )
    if len(texts) * args.count > MOST:
        raise FewstepError(
            f"found {len(texts) * args.count} pictures asked for, expected {MOST} at most, fix: lower --count"
        )
    texts = [text for text in texts for _ in range(args.count)]
    sides = {name: getattr(args, name) for name in ("height", "width", "num_frames") if getattr(args, name)}
    told = read_told(args.tracks, args.drives)
    model = load(args.student, choose_device(args.device), **sides)
    more = guidance(model, args.guidance_scale, args.motion_guidance) | _for_all(told, model, len(texts))
    is_video = model.backbone.output_name == "frames"
    form = args.form or ("webp" if is_video else "png")
    fps = model.backbone.frame_rate if args.fps is None else args.fps
    if args.fps is not None and not is_video:
        raise FewstepError(f"found fps = {args.fps} for a model of pictures, expected none, fix: leave it out")
    check_file(args.out if args.out.suffix else args.out / f"0000.{form}", is_video, fps)
    seeds = list(range(args.seed, args.seed + len(texts)))
    samples = model.sample(texts, seeds, args.steps, **more)
    if args.out.suffix:
        print(save_samples(args.out, samples, args.columns, fps))
    else:
        print(save_each(args.out, texts, seeds, samples, form, fps))


def _for_all(told: dict[str, Tensor], model: Teacher | Student, films: int) -> dict[str, Any]:
    """What the frames of `films` films are told, all of them the same."""
    if not told:
        return {}
    model.backbone.controls(**{"tracks": None, "drives": None} | told)  # refuses families that read none
    frames = model.backbone.latent_shape[1]
    whole = {name: lasting(value, frames) for name, value in told.items()}
    return {name: value.expand(films, *value.shape[1:]) for name, value in whole.items()}
