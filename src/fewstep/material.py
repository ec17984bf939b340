"""What a run is made of beside its networks: prompts, real data, sizes, and what is measured of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewstep.data.film_clips import ClipData, FilmClips
from fewstep.data.film_paths import SIDE
from fewstep.data.films import film_training_captions
from fewstep.data.pairs import StateSampler, TeacherTrajectories
from fewstep.data.prompts import PromptData, training_captions
from fewstep.data.real import RealFilms, RealImages, RealScenes
from fewstep.data.sources import FILMS, Prompts, read_prompts
from fewstep.embedded.names import EMOJI, name_of
from fewstep.errors import FewstepError
from fewstep.losses.moments import element_moments
from fewstep.methods import CausalInitOptions, DecoupledOptions, Options
from fewstep.methods.base import Needs
from fewstep.models.backbone import Backbone
from fewstep.models.sizes import SizeList
from fewstep.models.teacher import Teacher
from fewstep.training.loop import Hooks, RealData

_MEASURED = 64


def training_prompts(backbone: Backbone, prompts: Sequence[str] | str | Path | None) -> Sequence[str]:
    """`prompts` as texts; those of an embedded teacher's own data where there are none.

    Raises:
        FewstepError: none for another teacher, empty ones, or clips for a teacher that reads neither tracks nor drives.
    """
    if isinstance(prompts, str | Path):
        prompts = read_prompts(prompts)
    if isinstance(prompts, FilmClips):
        backbone.controls(**prompts.told([0], backbone.latent_shape[1]))
    if isinstance(prompts, Prompts):  # checked as they were read, and perhaps too many for a list
        return prompts
    if prompts is not None:
        texts = [text.strip() for text in prompts]
        if not texts or not all(texts):
            raise FewstepError("found an empty prompt, or none, expected text, fix: drop empty prompts")
        return texts
    if backbone.makes_films:
        return film_training_captions()
    if name_of(backbone.source) == EMOJI:
        return training_captions()
    raise FewstepError(
        f"found no prompts for the teacher {backbone.source}, expected texts of the kind it was trained on, "
        "fix: pass a prompts file (one prompt a line) with --prompts, or prompts=[...]"
    )


def encoded_by_run(real: RealData | None, backbone: Backbone) -> RealData | None:
    """`real`; images encoded by the run's own `backbone`, whichever teacher object they were made with.

    Else their texts would be encoded by text encoders of a second teacher, past the run's cache of prompts.
    """
    return real.encoded_by(backbone) if isinstance(real, RealImages) else real


def prompt_data(backbone: Backbone, texts: Sequence[str], seed: int) -> PromptData:
    """Conditions of `texts` for the trainer, with tracks and drives where they come with them."""
    return ClipData(backbone, texts, seed) if isinstance(texts, FilmClips) else PromptData(backbone.encode, texts, seed)


def own_data(backbone: Backbone, texts: Sequence[str], method: str, seed: int) -> RealData:
    """An embedded teacher's data: scenes, or films as long as it makes them, told as `texts` are.

    Raises:
        FewstepError: it is another teacher, whose data we do not have, or at another size.
    """
    if backbone.makes_films:
        height, width, frames = (backbone.size[name] for name in ("height", "width", "num_frames"))
        if (height, width) != (SIDE, SIDE):
            raise FewstepError(
                f"found a teacher of films at {width}x{height} for {method}, whose data are {SIDE}x{SIDE}, expected "
                "that size, fix: leave --width and --height out, or pass real=... in Python"
            )
        return RealFilms(backbone, frames, seed, controls=isinstance(texts, FilmClips))
    if name_of(backbone.source) == EMOJI:
        return RealScenes(backbone, seed)
    raise FewstepError(
        f"found no real data for {method} with the teacher {backbone.source}, expected some for its discriminator, "
        "fix: pass real=fewstep.data.real.RealImages(teacher.backbone, images, texts) in Python, or set gan_weight to "
        "0 (and divergence to reverse_kl)"
    )


def trajectories(
    teacher: StateSampler, options: CausalInitOptions, texts: Sequence[str], seed: int
) -> TeacherTrajectories:
    """Those that the causal initialisation imitates, made as they are needed."""
    require_clips(options, texts)
    keep = options.time_grid(options.steps)[:-1]
    return TeacherTrajectories(
        teacher,
        texts,
        grid=options.path_grid,
        keep=keep,
        guidance_scale=options.guidance_scale,
        motion_guidance=options.motion_guidance,
        seed=seed,
    )


def require_clips(options: Options, texts: Sequence[str]) -> None:
    """Refuses motion guidance where prompts say nothing of motion.

    Raises:
        FewstepError: it is above 0, and the prompts are no `FilmClips`.
    """
    motion = getattr(options, "motion_guidance", 0.0)
    if motion and not isinstance(texts, FilmClips):
        raise FewstepError(
            f"found motion_guidance {motion} with prompts that say nothing of motion, expected prompts that come with "
            f"tracks, fix: --prompts {FILMS} (prompts=fewstep.data.film_clips.FilmClips()) with a teacher of "
            "controlled films, or motion_guidance 0"
        )


def with_moments(options: Options, teacher: Teacher, texts: Sequence[str]) -> Options:
    """`options`, with the moments that Decoupled DMD wants of the student measured where nobody has given them.

    On 64 latents of the teacher with the guidance that is distilled, to three digits, so that it is the same on every
    machine; costs that many samples of the teacher.
    """
    if not isinstance(options, DecoupledOptions) or not options.measures:
        return options
    prompts = [texts[n % len(texts)] for n in range(_MEASURED)]
    parts = [
        teacher.latents(prompts[n : n + 16], range(n, n + 16), guidance_scale=options.guidance_scale)
        for n in range(0, _MEASURED, 16)
    ]
    mean, variance = (float(f"{value:.3g}") for value in element_moments(torch.cat(parts)))
    return replace(
        options,
        moment_mean=mean if options.moment_mean is None else options.moment_mean,
        moment_variance=variance if options.moment_variance is None else options.moment_variance,
    )


def size_list(backbone: Backbone, sizes: Sequence[str], needs: Needs, seed: int) -> SizeList | None:
    """The sizes that a run is told, the backbone at the first of them; None where it is told none.

    Raises:
        FewstepError: several for a method whose real data or pairs have one size, or one that cannot be made.
    """
    if len(sizes) > 1 and (needs.real_data or needs.pairs):
        what = "real data" if needs.real_data else "pairs"
        raise FewstepError(
            f"found the sizes {list(sizes)} for a method with {what}, expected one, as all of these have one size, "
            "fix: name one size, or choose a method without a discriminator and regression (such as tdm)"
        )
    return SizeList(backbone, sizes, seed) if sizes else None


def at_first_size(listed: SizeList, hooks: Hooks) -> Hooks:
    """Hooks that draw, score and save at the first size."""
    return replace(
        hooks,
        sample=listed.at_first(hooks.sample),
        evaluate=listed.at_first(hooks.evaluate),
        save=listed.at_first(hooks.save),
    )


def fingerprint(texts: Sequence[str]) -> dict[str, Any]:
    """Enough of the prompts to notice on resume that they changed."""
    from hashlib import blake2b

    hashed = blake2b(digest_size=8)
    for place, text in enumerate(texts):
        hashed.update(f"\n{text}".encode() if place else text.encode())
    if isinstance(texts, FilmClips):
        hashed.update(repr(texts.left_out).encode())
    return {"count": len(texts), "hash": hashed.hexdigest()}
