"""`fewstep stream`: a film chunk by chunk, written as it comes, by one process or by several under torchrun."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fewstep.attention import CachedMemory
from fewstep.attention.layout import Kept
from fewstep.commands.common import choose_device, load, parse
from fewstep.data.told_files import lasting, read_told
from fewstep.errors import FewstepError
from fewstep.streaming.student import CausalStudent


@dataclass(kw_only=True)
class Stream:
    """Make a film with a causal student, chunk by chunk; Ctrl-C ends it after the chunk, and it plays.

    `torchrun --standalone --nproc_per_node=N -m fewstep stream ...` spreads the student's calls over N processes, one
    for each call at most and one more that decodes, and writes the same file (docs/live-avatar.md).
    """

    student: str
    """A causal student's folder, or a checkpoint of its run."""
    prompt: tuple[str, ...]
    """What to make; several follow one another."""
    every: int = 0
    """Chunks of each of several prompts, 1 or more; the last one stays."""
    chunks: int = 0
    """Length in chunks; 0: see `seconds`."""
    seconds: float = 0.0
    """Length, rounded up to whole chunks; 0: see `chunks`; both 0: until Ctrl-C."""
    out: Path = Path("stream.mp4")
    """File to write: .mp4 (needs the extra `video`)."""
    fps: int | None = None
    """Frames a second, 1 to 60; unless told, those that the teacher's family is made for."""
    tracks: Path | None = None
    """JSON, `[[x, y], null, ...]` in pixels: where the thing is to be, frame by frame from the first; nothing is said
    after its end. For students that are told (docs/causal.md)."""
    drives: Path | None = None
    """JSON, `[0.5, null, ...]` in [0, 1]: likewise, how loud it is."""
    seed: int = 0
    """Of the noise."""
    steps: int | None = None
    """Network calls per chunk; those that the student was trained for unless told."""
    sink: int | None = None
    """First chunks that are never forgotten; as trained unless told."""
    window: int | None = None
    """Chunks before the current one that are remembered; as trained unless told."""
    kept: Kept | None = None
    """What is kept of a finished chunk: `clean`, `noisy` or `last`; as trained unless told."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ...; each of torchrun's processes has its own GPU."""


def main(arguments: list[str]) -> None:
    """Parse, stream, write the film; the last process prints how fast it was."""
    from fewstep.streaming.film import FilmFile
    from fewstep.streaming.pipeline import Order, run_chain, shares
    from fewstep.training.parallel import process_group
    from fewstep.training.signals import StopRequest

    args = parse(Stream, "stream", arguments)
    _check(args)
    told = read_told(args.tracks, args.drives)
    device = choose_device(args.device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    student = load(args.student, device)
    if not isinstance(student, CausalStudent):
        raise FewstepError(
            f"found a model at {args.student} that makes whole samples, expected a causal student, fix: fewstep sample"
        )
    layout = student.endless(sink=args.sink, window=args.window, kept=args.kept)
    memory, noise, grid = student.begin(args.prompt[:1], [args.seed], args.steps, layout)
    begun = _steering(student, memory, told)
    if processes > 1 and layout.kept == "clean":
        raise FewstepError(
            f"found {processes} processes for a student that reads every finished chunk once more (kept 'clean'), "
            "expected calls that do not wait for one another, fix: a student of live-avatar, --kept noisy, or a "
            "single process"
        )
    shares(len(grid) - 1, processes)
    fps = student.backbone.frame_rate if args.fps is None else args.fps
    film = FilmFile(args.out, fps)
    chunks = _length(args, fps, layout.chunk, student.backbone.pipeline.vae_scale_factor_temporal)
    backbone, decode = student.backbone, student.backbone.stream_decoder()
    request = StopRequest()
    start, first = time.perf_counter(), 0.0

    def orders(chunk: int) -> Order:
        number, begins = divmod(chunk, args.every) if args.every else (0, chunk)
        changes = chunk and not begins and number < len(args.prompt)
        more = not request.code and (not chunks or chunk < chunks)
        return Order(more, args.prompt[number] if changes else "")

    def deliver(latents: Tensor) -> None:
        nonlocal first
        film.write(decode(latents)[0])
        first = first or time.perf_counter() - start

    with ExitStack() as stack:
        stack.callback(request.close)
        group = stack.enter_context(process_group(device))
        if group.rank == group.size - 1:
            stack.enter_context(film)
        made = run_chain(
            memory, noise, grid, backbone.process, group, orders=orders,
            tell=lambda prompt: memory.tell(backbone.encode([prompt])), deliver=deliver, begun=begun, eta=student.eta,
        )  # fmt: skip
    if film.frames:
        spent = time.perf_counter() - start
        print(
            f"{args.out}: {film.frames} frames in {made} chunks, {film.frames / spent:.1f} frames a second, the first "
            f"after {first:.2f} s, {group.size} process{'es' if group.size > 1 else ''}"
        )


def _steering(student: CausalStudent, memory: CachedMemory, told: dict[str, Tensor]) -> Callable[[], None] | None:
    """What tells each chunk its own of the tracks and drives; the same in every process, which all read the files."""
    if not told:
        return None
    student.backbone.controls(**{"tracks": None, "drives": None} | told)  # refuses families that read none
    chunk = memory.layout.chunk
    whole = {name: lasting(value, -(-value.shape[1] // chunk) * chunk) for name, value in told.items()}
    return student.steering(memory, 1, whole.get("tracks"), whole.get("drives"))


def _check(args: Stream) -> None:
    if not args.prompt or not all(text.strip() for text in args.prompt):
        raise FewstepError('found no prompt or an empty one, expected text, fix: pass --prompt "..."')
    if (len(args.prompt) > 1) != (args.every > 0) or args.every < 0:
        raise FewstepError(
            f"found {len(args.prompt)} prompts and every = {args.every}, expected several prompts with the chunks of "
            "each, or one without, fix: --every 10"
        )
    if args.chunks < 0 or not 0 <= args.seconds < math.inf or (args.chunks and args.seconds):
        raise FewstepError(
            f"found chunks {args.chunks} and seconds {args.seconds}, expected one of them at most, a number of 0 or "
            "more, fix: leave one out"
        )


def _length(args: Stream, fps: int, chunk: int, frames_per_latent: int) -> int:
    """Chunks to make; 0 is no end. The first latent frame is one frame, all others are `frames_per_latent`."""
    if not args.seconds:
        return args.chunks
    latents = 1 + -(-(max(1, round(args.seconds * fps)) - 1) // frames_per_latent)
    return -(-latents // chunk)
