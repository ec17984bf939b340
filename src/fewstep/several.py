"""Distillations that are chains of runs: experts trained one after the other, and students for parts of the prompts.

    distill_phases("emoji", preset("phased"), out="runs/phased")            # out/phase-1, phase-2, student

    for part in range(1, 5):                                                # or each on a machine of its own
        distill_part("emoji", part, out="runs/msd", parts=4, depth=0.5)     # out/router.json, part-1/{tsm,dm,student}
    load_student("runs/msd").sample(["a frog"], [0])

Machines that share no disk are given a copy of the first one's router.json, and their part folders are put together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.api import EMOJI, MEMORY_ONLY, STUDENT_FOLDER, RoleOptions, check_sharding, export, load_teacher
from fewstep.conditions import Encoding, TextOptions
from fewstep.data.film_clips import FilmClips
from fewstep.data.pairs import TeacherPairs
from fewstep.data.prompts import PromptData
from fewstep.data.real import RealScenes
from fewstep.data.sources import Prompts
from fewstep.errors import FewstepError
from fewstep.live import usual_hooks
from fewstep.material import (
    at_first_size,
    encoded_by_run,
    fingerprint,
    own_data,
    prompt_data,
    require_clips,
    size_list,
    training_prompts,
    with_moments,
)
from fewstep.methods.base import Needs, Options
from fewstep.methods.matching_options import MatchingOptions
from fewstep.methods.msd import Part, Stage, msd_stages
from fewstep.methods.phased import PhasedOptions
from fewstep.methods.tdm_options import TDMOptions
from fewstep.methods.tsm import TSMOptions
from fewstep.models.adapters import shared_copy
from fewstep.models.backbone import Backbone
from fewstep.models.expert_networks import refuse_others
from fewstep.models.experts import build_expert_roles, switch_times
from fewstep.models.roles import Roles, build_roles
from fewstep.models.router import Router, part_folder, pooled
from fewstep.models.schedulers import choose_scheduler
from fewstep.models.sharding import collected, shard
from fewstep.models.smaller import build_smaller_roles, smaller_network
from fewstep.models.student import ROUTER, Student, load_student
from fewstep.models.teacher import Teacher
from fewstep.provenance import OWN, recorded
from fewstep.training.folder import refuse_run, room
from fewstep.training.loop import Hooks, RealData, TrainResult
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group, process_group
from fewstep.training.phases import State, Turn, train_in_turn


def distill_phases(
    teacher: Teacher | str | Path = EMOJI,
    options: PhasedOptions | None = None,
    *,
    out: str | Path,
    prompts: Sequence[str] | str | Path | None = None,
    real: RealData | None = None,
    roles: RoleOptions | None = None,
    train_options: TrainOptions | None = None,
    text: TextOptions | None = None,
    sizes: Sequence[str] = (),
    hooks: Hooks | None = None,
    resume: bool = False,
) -> Student:
    """Train one expert per phase, in order, and save the student they are together in `out`/student; returns it loaded.

    Arguments are those of `fewstep.distill`. Each phase is a run of `train_options` in `out`/phase-<n>: its expert and
    its critic begin as the teacher, the experts before it are frozen. `resume` goes on in the phase that was reached.
    """
    options, roles, train_options = options or PhasedOptions(), roles or RoleOptions(), train_options or TrainOptions()
    options.validate()
    train_options.validate()
    loaded, texts = _begin(teacher, options, prompts, roles, [train_options])
    backbone = loaded.backbone
    refuse_others(backbone.network)
    fresh = _fresh_networks(backbone, roles)
    switches = switch_times(options.time_grid(options.steps), options.ends)
    needs = options.build().needs
    listed = size_list(backbone, sizes, needs, train_options.seed)
    real = encoded_by_run(real, backbone)
    if needs.real_data and real is None:
        real = own_data(backbone, texts, "phased", train_options.seed)

    def turn(phase: int) -> Turn:
        own, folder = replace(options, phase=phase), Path(out) / f"phase-{phase}"

        def seats(before: Sequence[State]) -> Roles:
            fresh()
            more = _role_options(roles, needs, train_options.seed)
            made = build_expert_roles(backbone, roles.roles, switches, before, **more)
            if roles.shard:
                shard(made, train_options.precision)
            return made

        def looks(made: Any) -> Hooks:
            all_hooks = hooks or usual_hooks(made, own, texts, folder, train_options.evaluate_every > 0)
            return all_hooks if listed is None else at_first_size(listed, all_hooks)

        return Turn(folder.name, own.build(), seats, train_options, hooks=looks)

    encoding = Encoding.of(backbone, text, Path(out), texts, real, own=bool(hooks))
    configuration = {**_configuration(backbone, roles, texts), **encoding.lossy}
    configuration |= {"sizes": list(sizes)} if sizes else {}
    turns = [turn(phase) for phase in range(1, len(options.phase_calls) + 1)]
    with process_group(backbone.device) as group:
        if group.leads and not resume:
            refuse_run(Path(out) / turns[0].name)  # rather than after all prompts are encoded
        with encoding.ready(group):
            data = prompt_data(backbone, texts, train_options.seed)
            shape = listed or backbone.latent_shape
            result, seats = train_in_turn(
                turns, data, out, noise_shape=shape, real=real, configuration=configuration, resume=resume
            )
        if listed is not None:
            listed.first()
        _save(result, seats, options, Path(out), configuration, group)
    return load_student(Path(out) / STUDENT_FOLDER)


def distill_part(
    teacher: Teacher | str | Path = EMOJI,
    part: int = 1,
    *,
    out: str | Path,
    parts: int | Sequence[Sequence[str]] = 4,
    dm: MatchingOptions | None = None,
    gan_weight: float = 0.0,
    tsm: TSMOptions | None = None,
    depth: float = 1.0,
    width: float = 1.0,
    prompts: Sequence[str] | str | Path | None = None,
    real: RealData | None = None,
    roles: RoleOptions | None = None,
    train_options: TrainOptions | Mapping[str, TrainOptions] | None = None,
    text: TextOptions | None = None,
    resume: bool = False,
) -> Student:
    """Train the student of one part of the prompts and save it in `out`/part-<part>/student; returns it loaded.

    When all parts are there, `load_student(out)` is all of them together. Parts know nothing of one another, so they
    may be trained in any order, at once, and on different machines. A regression to the teacher's samples
    (`regression_weight`) has pairs of the prompts of *all* parts: conditions are cut, pairs are not, else modes are
    lost (card msd.md, section 2).

    Args:
        teacher: a loaded teacher, or what `load_teacher` takes.
        part: 1 to the number of parts.
        out: folder of all parts. The router is made there by whoever comes first, and then used by all.
        parts: how many, of equal size and contiguous in the space of text embeddings; or the prompts of each.
        dm: how the student is matched to the teacher; TDM's defaults unless told.
        gan_weight: above 0, a further stage with a discriminator.
        tsm: options of the first stage of smaller students.
        depth: share of the teacher's layers that the student has, in (0, 1]; half of them take half the time.
        width: share of the teacher's attention heads, in (0, 1].
        prompts: all prompts, of which the part's are trained on; those of the parts if they are given.
        real: clean data *of this part* for the discriminator; for the embedded teacher its own scenes unless told.
        roles: how networks share weights; a smaller student is trained in full, whatever they say.
        train_options: of every stage, or of each by its name, "tsm", "dm" or "adm".
        text: how prompts are encoded while it trains, as for `fewstep.distill`; the router encodes all of them before.
        resume: go on in the stage that was reached.

    Raises:
        FewstepError: bad options, before any work.
    """
    dm, roles, out = dm or TDMOptions(), roles or RoleOptions(), Path(out)
    smaller = depth != 1 or width != 1
    if smaller and dm.steps_condition:
        raise FewstepError(
            "found a smaller student that is to be told its step count, expected one of the teacher's shape, fix: "
            "leave depth and width at 1, or train for one step count"
        )
    stages = msd_stages(dm, smaller=smaller, gan_weight=gan_weight, tsm=tsm)
    roles.validate(stages[-1].options.build().needs)
    settings = _by_stage(train_options, [stage.name for stage in stages])
    if not isinstance(parts, int) and prompts is None:
        prompts = [prompt for given in parts for prompt in given]
    if smaller and roles.shard:
        raise FewstepError(
            "found --shard for a student with fewer weights than the teacher, expected one of its shape, as each "
            "process reads its rows of the teacher's files, fix: leave --shard off, or depth and width at 1"
        )
    loaded, texts = _begin(teacher, dm, prompts, roles, list(settings.values()))
    backbone = loaded.backbone
    if isinstance(texts, FilmClips):
        raise FewstepError(
            "found prompts that come with tracks and drives for MSD, whose router knows texts alone, expected texts, "
            "fix: leave --prompts out, or list(clips) in Python"
        )
    if smaller and backbone.quantised is not None:
        raise FewstepError(
            f"found a base in {backbone.quantised} to cut a smaller student from, expected whole weights, "
            "fix: --base-dtype bfloat16"
        )
    router = _router(backbone, texts, parts, out)
    if not 1 <= part <= router.parts:
        raise FewstepError(f"found part {part} of {router.parts}, expected 1 to {router.parts}, fix: name one of these")

    def embed(some: Sequence[str]) -> Tensor:
        return pooled(backbone.encode(some))

    mine = (router.route(texts, embed) == part - 1).tolist()
    own = [text for text, here in zip(texts, mine, strict=True) if here]
    home, first = part_folder(out, part - 1), settings[stages[0].name]
    asked = Part(part, router.parts, gan_weight, tsm, depth, width, fingerprint(texts))
    read_from = OWN if prompts is None else texts.source if isinstance(texts, Prompts) else None
    real = encoded_by_run(real, backbone)
    given = [] if real is None else ["real"]
    told: dict[str, Any] = {"roles": roles, "text": text or TextOptions(), "part": asked}
    origin = recorded(loaded, dm, read_from, [], given, real=real, **told)
    if real is None and any(stage.options.build().needs.real_data for stage in stages):
        if not isinstance(own_data(backbone, texts, "msd", first.seed), RealScenes):
            raise FewstepError(
                "found the teacher of films for a discriminator of MSD, expected real films of this part's captions, "
                "fix: pass real=... in Python, or set gan_weight to 0"
            )
        real = ScenesOfPart(backbone, first.seed, router, part - 1)
    pairs = None
    if stages[-1].options.build().needs.pairs:
        pairs = TeacherPairs(loaded, texts, guidance_scale=dm.guidance_scale, seed=first.seed)
    stages = tuple(replace(stage, options=with_moments(stage.options, Teacher(backbone), own)) for stage in stages)
    shape = {"depth": depth, "width": width} if smaller else {}
    fresh = _fresh_networks(backbone, roles)

    def turn(stage: Stage) -> Turn:
        name, options, needs = stage.name, stage.options, stage.options.build().needs

        def seats(before: Sequence[State]) -> Roles:
            fresh()
            more = _role_options(roles, needs, settings[name].seed)
            if smaller:
                small = smaller_network(backbone.network, seed=settings[name].seed, **shape)
                made = build_smaller_roles(backbone, small, **more)
            else:
                made = build_roles(backbone, roles.roles, **more)
            if roles.shard:
                shard(made, settings[name].precision)
            if before:
                made.load_student_state(before[-1])
            return made

        def hooks(made: Any) -> Hooks:
            return usual_hooks(made, options, own, home / name, settings[name].evaluate_every > 0)

        return Turn(name, options.build(), seats, settings[name], stage.keeps_critic, hooks)

    turns = [turn(stage) for stage in stages]
    encoding = Encoding.of(backbone, text, out, texts if pairs else own, real, own=False)
    configuration = {**_configuration(backbone, roles, own), "part": part, "parts": router.parts, **shape}
    configuration |= encoding.lossy
    with origin, process_group(backbone.device) as group:
        if group.leads and not resume:
            refuse_run(home / turns[0].name)  # rather than after all prompts are encoded
        with encoding.ready(group):
            data, noise = PromptData(backbone.encode, own, first.seed), backbone.latent_shape
            result, made = train_in_turn(
                turns, data, home, noise_shape=noise, real=real, pairs=pairs, configuration=configuration, resume=resume
            )
        _save(result, made, stages[-1].options, home, configuration, group)
    return load_student(home / STUDENT_FOLDER)


class ScenesOfPart(RealScenes):
    """The scenes of the embedded data set whose captions belong to one part: what its discriminator may see.

    With data of other parts among them it would learn, beside the quality, which part a picture is of (card msd 8.8).
    """

    def __init__(self, backbone: Backbone, seed: int, router: Router, part: int) -> None:
        super().__init__(backbone, seed)
        self._router, self._part, self._encode = router, part, backbone.encode

    def scene(self, sample: int) -> tuple[Tensor, str]:
        """Image and caption of a global sample number: the first of its own endless sequence that is of the part."""
        while True:
            image, caption = super().scene(sample)
            if int(self._router.route([caption], lambda some: pooled(self._encode(some)))) == self._part:
                return image, caption
            sample += 1 << 40


def _begin(
    teacher: Teacher | str | Path,
    options: Options,
    prompts: Sequence[str] | str | Path | None,
    roles: RoleOptions,
    train_options: Sequence[TrainOptions],
) -> tuple[Teacher, Sequence[str]]:
    """Teacher and prompts; refuses a student that no pipeline could sample, and what cannot be sharded."""
    loaded = teacher if isinstance(teacher, Teacher) else load_teacher(teacher, defer=roles.shard)
    backbone = loaded.backbone
    for settings in train_options:
        check_sharding(backbone, roles, settings, makes_pairs=options.build().needs.pairs)
    choose_scheduler(backbone, [options.time_grid(count) for count in options.counts], options.eta, options.chain_noise)
    texts = training_prompts(backbone, prompts)
    require_clips(options, texts)
    return loaded, texts


def _router(backbone: Backbone, texts: Sequence[str], parts: int | Sequence[Sequence[str]], out: Path) -> Router:
    """The router in `out`, made there if there is none.

    Raises:
        FewstepError: there is one of another number of parts.
    """
    wanted = parts if isinstance(parts, int) else len(parts)
    if (out / ROUTER).is_file():
        router = Router.load(out)
        if router.parts != wanted:
            raise FewstepError(
                f"found a router of {router.parts} parts in {out}, expected {wanted}, fix: choose another --out"
            )
        return router

    def embed(some: Sequence[str]) -> Tensor:
        return pooled(backbone.encode(some))

    router = Router.contiguous(texts, embed, parts) if isinstance(parts, int) else Router.given(parts, embed)
    if _leads():
        router.save(out)
    return router


def _role_options(roles: RoleOptions, needs: Needs, seed: int) -> dict[str, Any]:
    """Arguments of `build_roles` but the kind."""
    features = needs.features if roles.discriminator == "method" else roles.discriminator
    return {
        "rank": roles.rank,
        "critic_rank": roles.critic_rank,
        "alpha": roles.alpha,
        "layers": roles.layers,
        "checkpointing": roles.checkpointing,
        "compile_backend": "inductor" if roles.compile else None,
        "critic": needs.critic or (needs.discriminator and features == "critic"),
        "discriminator": features if needs.discriminator else "none",
        "steps_aware": needs.steps_condition or needs.landing_condition,
        "sparse": roles.sparse,
        "seed": seed,
    }


def _configuration(backbone: Backbone, roles: RoleOptions, texts: Sequence[str]) -> dict[str, Any]:
    kept = {name: value for name, value in asdict(roles).items() if name not in MEMORY_ONLY}
    if roles.alpha is None:
        del kept["alpha"]  # runs that began before there was one go on
    if not roles.sparse.on:
        del kept["sparse"]
    size = {"size": backbone.told_size} if backbone.told_size else {}
    return {"teacher": backbone.source, "roles": kept, "prompts": fingerprint(texts), **size}


def _by_stage(
    train_options: TrainOptions | Mapping[str, TrainOptions] | None, names: Sequence[str]
) -> Mapping[str, TrainOptions]:
    if not isinstance(train_options, Mapping):
        return dict.fromkeys(names, train_options or TrainOptions())
    if set(train_options) != set(names):
        raise FewstepError(
            f"found train options for {sorted(train_options)}, expected them for {sorted(names)}, fix: name each stage"
        )
    return train_options


def _fresh_networks(backbone: Backbone, roles: RoleOptions) -> Callable[[], None]:
    """What gives `backbone`, before each turn, its network as it is now: spread roles leave it in parts."""
    network, deferred = backbone.network, backbone.deferred

    def fresh() -> None:
        if roles.shard:
            backbone.network, backbone.deferred = shared_copy(network), deferred

    return fresh


def _save(
    result: TrainResult, seats: Any, options: Options, home: Path, configuration: dict[str, Any], group: Group
) -> None:
    """The student to `home`/student, by the first process; the others wait for it."""
    with result.ema.applied(), room(home):
        student = collected(seats)
        if group.leads and student is not None:
            export(student, options, home / STUDENT_FOLDER, {"iterations": result.iteration, **configuration})
    group.wait()


def _leads() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
