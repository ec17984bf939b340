"""The five public names: load_teacher, distill, load_student, sample, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from fewstep.attention.sparse import SparseOptions
from fewstep.caching import make_cache
from fewstep.conditions import CACHE_FOLDER, Encoding, TextOptions
from fewstep.data.pairs import TeacherPairs
from fewstep.data.sources import Prompts
from fewstep.embedded.names import EMOJI, FILMS, name_of, named
from fewstep.errors import FewstepError
from fewstep.evaluation.held_out import PROMPTS
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
    trajectories,
    with_moments,
)
from fewstep.methods import METHODS, CausalInitOptions, Method, Options, PhasedOptions, preset
from fewstep.methods.base import Needs
from fewstep.methods.reward_forcing import Reward, RewardForcing, RewardForcingOptions
from fewstep.methods.self_forcing import layout_of
from fewstep.models.backbone import Backbone
from fewstep.models.export import Form, save_student
from fewstep.models.loading import adapter_of, load_backbone
from fewstep.models.recipes import Setting, applied
from fewstep.models.roles import Roles, build_roles
from fewstep.models.schedulers import choose_scheduler
from fewstep.models.sharding import collected, shard
from fewstep.models.student import Student, load_student
from fewstep.models.teacher import Teacher
from fewstep.provenance import OWN, recorded
from fewstep.training.folder import refuse_run, room
from fewstep.training.loop import Hooks, PairData, RealData, train
from fewstep.training.monitors.best import FOLDER as BEST_FOLDER
from fewstep.training.monitors.best import GROUP, read_best
from fewstep.training.monitors.guard import Alarmed
from fewstep.training.options import TrainOptions, refuse_sharded
from fewstep.training.parallel import Group, process_group, processes
from fewstep.training.trainee import copy_tensors
from fewstep.unread import refuse_unread

STUDENT_FOLDER, LORA_FOLDER = "student", "lora"
_OF_ROLES = ("roles", "rank", "alpha", "student_rate", "critic_rate")  # hold for a recipe's kind of roles alone
_LARGEST_RANK = 2**14
MEMORY_ONLY = ("checkpointing", "compile", "shard")
"""Options of roles that change memory or speed and not the result: a run may be resumed with others."""

__all__ = [
    "EMOJI",
    "FILMS",
    "RoleOptions",
    "TextOptions",
    "cache_prompts",
    "defaults",
    "distill",
    "evaluate",
    "export",
    "load_student",
    "load_teacher",
    "sample",
]


@dataclass(frozen=True, kw_only=True)
class RoleOptions:
    """How teacher, student and critic share weights."""

    roles: Literal["adapters", "copies", "mixed"] = "adapters"
    """`adapters`: one frozen base, LoRA for student and critic; `copies`: three networks; `mixed`: a full student, a
    critic adapter on the teacher."""
    rank: int = 32
    """Rank of the student's adapter, 1 or more."""
    critic_rank: int | None = None
    """Rank of the critic's adapter; the student's unless told."""
    alpha: Annotated[float | None, tyro.conf.arg(name="lora-alpha")] = None
    """LoRA alpha, above 0: adapters are scaled by alpha / rank; each adapter's own rank unless told, scale 1."""
    layers: Literal["attention+ff", "all-linear"] = "attention+ff"
    """Which layers take adapters."""
    checkpointing: bool = False
    """Keep only block inputs for the backward pass: less memory for about a third more time."""
    shard: bool = False
    """Spread all weights, gradients, moments and averages over the processes (FSDP2): see docs/scaling.md."""
    compile: bool = False
    """Translate blocks by torch.compile: seconds to minutes once, then faster on a GPU; no gain on a CPU."""
    discriminator: Literal["method", "critic", "teacher"] = "method"
    """Whose features a discriminator reads, for methods that have one: as in the `method`'s paper, or named."""

    sparse: SparseOptions = SparseOptions()
    """What the student's self-attention sees (docs/sparse.md)."""

    def features(self, needs: Needs) -> Literal["critic", "teacher"]:
        """Whose features a discriminator of a method with such needs reads."""
        return needs.features if self.discriminator == "method" else self.discriminator

    def validate(self, needs: Needs, *usual: RoleOptions) -> None:
        """Refuses options that nothing reads with a method of such needs; see `refuse_unread` for `usual`.

        Raises:
            FewstepError: with what would read them, or of a size that no layer has.
        """
        for name in ("rank", "critic_rank"):
            if (value := getattr(self, name)) is not None and not 1 <= value <= _LARGEST_RANK:
                raise FewstepError(
                    f"found {name} = {value}, expected at least 1 and at most {_LARGEST_RANK}, fix: 16 to 64 are usual"
                )
        critic = needs.critic or (needs.discriminator and self.features(needs) == "critic")
        self.sparse.validate(critic)
        if self.sparse.on and (needs.causal or self.shard or self.compile):
            raise FewstepError(
                "found a sparse student that is causal, sharded or compiled, expected none of these with it, "
                "fix: leave --sparse at dense, or --shard and --compile off"
            )
        of_student, of_critic = self.roles == "adapters", critic and self.roles != "copies"
        for names, read, beside in (
            (["rank"], of_student or (of_critic and self.critic_rank is None), "an adapter that takes it (--roles)"),
            (["critic_rank"], of_critic, "a critic that is an adapter"),
            (["alpha", "layers"], of_student or of_critic, "adapters"),
            (["discriminator"], needs.discriminator, "a method with a discriminator (gan_weight above 0)"),
        ):
            if not read:
                refuse_unread(self, names, beside, *usual)


def load_teacher(
    source: str | Path = EMOJI,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    defer: bool = False,
    quantised: Literal["int8", "nf4"] | None = None,
) -> Teacher:
    """A teacher: "emoji" or "films" (embedded, no download), a diffusers pipeline folder, or a Hub id.

    Args:
        source: what to load.
        dtype: of its weights; bfloat16 halves the memory of a frozen base.
        device: where to put it.
        height: of its samples in pixels, for families that make several sizes; the pipeline's own unless told.
        width: likewise.
        num_frames: of its videos, likewise.
        defer: leave the network's weights on disk until a sharded distillation (`RoleOptions.shard`) reads them, each
            process its part; until then the teacher cannot sample.
        quantised: round the blocks of its network to 8 or 4 bits, for roles of adapters (`fewstep.models.quantised`).

    Raises:
        FewstepError: nothing usable there, or a size it cannot make; says what was found and what to do.
    """
    folder = named(source)
    sides = {"height": height, "width": width, "num_frames": num_frames}
    size = {name: value for name, value in sides.items() if value is not None}
    return Teacher(load_backbone(folder, dtype=dtype, device=device, size=size, defer=defer, quantised=quantised))


def defaults(
    teacher: Teacher | str | Path = EMOJI, method: str = "tdm", roles: str | None = None
) -> tuple[Options, RoleOptions, TrainOptions]:
    """The options of a method, of roles and of training that `distill` uses for `teacher` where it is given none.

    They are the presets' and our own, with the recipe of the teacher's family (docs/backbones.md) in their place where
    it has one. Recipes' learning rates are for the kind of roles they name; for another kind they are ours.

    Args:
        teacher: loaded, or what `load_teacher` takes; only its `model_index.json` is read.
        method: a name of `fewstep methods`.
        roles: the kind of roles; the recipe's unless told.
    """
    settings = _recipe(teacher, method, roles)
    options, role_options, train_options = preset(method), RoleOptions(), TrainOptions()
    return applied(options, settings), applied(role_options, settings), applied(train_options, settings)


def _recipe(teacher: Teacher | str | Path, method: str, roles: str | None) -> dict[str, Setting]:
    """The settings of the teacher's family, less those for another kind of roles; none for the embedded teacher."""
    source = teacher.backbone.source if isinstance(teacher, Teacher) else str(named(teacher))
    if name_of(source) == EMOJI:
        return {}
    kind = type(teacher.backbone) if isinstance(teacher, Teacher) else adapter_of(source)
    settings = kind.recipe.settings(method)
    if roles is not None and "roles" in settings and roles != settings["roles"].value:
        settings = {name: setting for name, setting in settings.items() if name not in _OF_ROLES}
    return settings


def distill(
    teacher: Teacher | str | Path = EMOJI,
    method: str | Options = "tdm",
    *,
    out: str | Path,
    prompts: Sequence[str] | str | Path | None = None,
    real: RealData | None = None,
    pairs: PairData | None = None,
    reward: Reward | None = None,
    start: str | Path | None = None,
    roles: RoleOptions | None = None,
    train_options: TrainOptions | None = None,
    text: TextOptions | None = None,
    sizes: Sequence[str] = (),
    held_out: Sequence[str] | str | Path | None = None,
    hooks: Hooks | None = None,
    resume: bool = False,
) -> Student:
    """Distil `teacher` into a few-step student, saved as a diffusers pipeline in `out`/student; returns it loaded.

    Args:
        teacher: a loaded teacher, or what `load_teacher` takes.
        method: a name of `fewstep methods`, then with the recipe of the teacher's family (`defaults`), or its options
            with some replaced (`dataclasses.replace(preset("tdm"), steps=2)`).
        out: run folder: log, checkpoints, student. Refused if it holds another run.
        prompts: texts to train on, or what `fewstep.data.sources.read_prompts` reads; for the embedded teachers their
            own captions unless told.
        real: clean data for methods with a discriminator, such as `fewstep.data.real.RealImages`; for the embedded
            teachers their own scenes or films unless told.
        pairs: noise with the teacher's samples, for methods that regress to them; 1024 of
            `fewstep.data.pairs.TeacherPairs` (causal-init: `TeacherTrajectories`) unless told.
        reward: of the student's samples, for methods that weigh by one; the method's own unless told.
        start: folder of a student, a whole pipeline, whose weights this one begins with; the teacher's unless told.
            Not for roles of adapters.
        roles: how networks share weights; as the family's recipe unless told.
        train_options: iterations, rates, batch and the like; as the family's recipe unless told.
        text: how prompts are encoded: unless told, once, to a cache beside `out`, and the text encoders are out of
            memory during training (for the embedded teachers they stay; see `TextOptions`). They are loaded again
            afterwards, and then wait on the CPU while they are not used.
        sizes: several sizes to train on, such as ["1024x1024", "832x1216"] (width x height, of videos x frames); each
            iteration has one of them, and the student is saved at the first (docs/prompts.md). Not for methods with
            real data or pairs. The teacher's size unless told.
        held_out: prompts as `prompts`, for evaluations, of which 16 are used; unless told, the first ones of `prompts`,
            and for the embedded teacher captions that it was not trained on.
        hooks: what to call during the run; unless told, sample grids in `out`/samples, and comparisons with the
            teacher's samples of held-out prompts (for the embedded teacher with the judge's scores as well), as often
            as `train_options` says. By these the best student is kept in `out`/best (docs/monitors.md).
        resume: continue the run in `out`.

    Raises:
        FewstepError: bad options or input, before any work.
    """
    options = preset(method) if isinstance(method, str) else method
    name = method if isinstance(method, str) else options.build().name
    settings = _recipe(teacher, name, None if roles is None else roles.roles)
    options = applied(options, settings) if isinstance(method, str) else options
    roles = roles or applied(RoleOptions(), settings)
    train_options = train_options or applied(TrainOptions(), settings)
    recipe = _built(options, reward)
    needs = recipe.needs
    train_options.validate()
    roles.validate(needs, applied(RoleOptions(), settings))
    if not recipe.critic_updates:
        usual_training = applied(TrainOptions(), settings)
        refuse_unread(train_options, ["critic_rate", "critic_clip"], "a critic or discriminator", usual_training)
    _refuse_unread_data(recipe.name, needs, real, pairs)
    teacher = teacher if isinstance(teacher, Teacher) else load_teacher(teacher, defer=roles.shard)
    backbone = teacher.backbone
    check_sharding(backbone, roles, train_options, needs.pairs and pairs is None)
    real = encoded_by_run(real, backbone)
    texts = training_prompts(backbone, prompts)
    require_clips(options, texts)
    own = {"real": real, "pairs": pairs, "hooks": hooks, "reward": reward}
    given = [name for name, value in own.items() if value is not None]
    unseen = None if held_out is None else list(training_prompts(backbone, held_out)[:PROMPTS])
    read_from = OWN if prompts is None else texts.source if isinstance(texts, Prompts) else None
    told = {"roles": roles, "train": train_options, "text": text or TextOptions()}
    origin = recorded(teacher, options, read_from, sizes, given, start=start, held_out=unseen, real=real, **told)
    if isinstance(options, PhasedOptions):
        from fewstep.several import distill_phases

        not_for_chains = {"start": start, "reward": reward, "held_out": held_out}
        if refused := [name for name, value in not_for_chains.items() if value is not None]:
            raise FewstepError(
                f"found {', '.join(refused)} for {recipe.name}, a chain of runs whose experts begin as the teacher, "
                "expected neither of these, fix: leave them out"
            )
        refuse_unread(options, ["phase"], "`fewstep.training.train` of one phase (a distillation trains all of them)")
        with origin:
            return distill_phases(
                teacher, options, out=out, prompts=texts, real=real, roles=roles, train_options=train_options,
                text=text, sizes=sizes, hooks=hooks, resume=resume,
            )  # fmt: skip
    listed = size_list(backbone, sizes, needs, train_options.seed)
    if needs.real_data and real is None:
        real = own_data(backbone, texts, recipe.name, train_options.seed)
    if held_out is not None and (hooks is not None or not train_options.evaluate_every):
        raise FewstepError(
            "found held_out, which nothing reads here, expected evaluations that are ours (evaluate_every above 0, and "
            "no hooks of your own), fix: ask for them, or leave it out"
        )
    encoding = Encoding.of(backbone, text, Path(out), texts, real, own=bool(hooks or pairs))
    if unseen is not None:
        encoding = replace(encoding, texts=[*encoding.texts, unseen])
    if isinstance(options, CausalInitOptions) and needs.trajectories and pairs is None:
        pairs = trajectories(teacher, options, texts, train_options.seed)
    if needs.pairs and pairs is None:
        motion = getattr(options, "motion_guidance", 0.0)
        pairs = TeacherPairs(
            teacher, texts, guidance_scale=_guidance_scale(options), motion_guidance=motion, seed=train_options.seed
        )
    features = roles.features(needs)
    grids = [options.time_grid(count) for count in options.counts]
    choose_scheduler(backbone, grids, options.eta, options.chain_noise)  # refuses what no pipeline could sample
    options = with_moments(options, teacher, texts)
    recipe = _built(options, reward)
    seats = build_roles(
        backbone,
        roles.roles,
        rank=roles.rank,
        critic_rank=roles.critic_rank,
        alpha=roles.alpha,
        layers=roles.layers,
        checkpointing=roles.checkpointing,
        critic=needs.critic or (needs.discriminator and features == "critic"),
        discriminator=features if needs.discriminator else "none",
        compile_backend="inductor" if roles.compile else None,
        steps_aware=needs.steps_condition or needs.landing_condition,
        causal=needs.causal,
        sparse=roles.sparse,
        seed=train_options.seed,
    )
    if start is not None and not roles.shard:
        begin_with(seats, start)
    if hooks is None:
        hooks = usual_hooks(seats, options, texts, Path(out), train_options.evaluate_every > 0, unseen)
    kept = {name: value for name, value in asdict(roles).items() if name not in (*MEMORY_ONLY, "discriminator")}
    if roles.alpha is None:
        del kept["alpha"]  # runs that began before there was one go on
    if not roles.sparse.on:
        del kept["sparse"]
    if needs.discriminator:
        kept["discriminator"] = features
    configuration = {"teacher": backbone.source, "roles": kept, "prompts": fingerprint(texts), **encoding.lossy}
    if backbone.told_size:
        configuration["size"] = backbone.told_size
    if backbone.quantised:
        configuration["quantised"] = backbone.quantised
    if start is not None:
        configuration["start"] = str(start)
    if unseen is not None:
        configuration["held_out"] = fingerprint(unseen)
    if reward is not None:
        configuration["reward"] = getattr(reward, "__qualname__", type(reward).__qualname__)
    if listed is not None:
        configuration["sizes"] = list(sizes)
        hooks = at_first_size(listed, hooks)
    folder = Path(out) / STUDENT_FOLDER
    with process_group(backbone.device) as group:
        if group.leads and not resume:
            refuse_run(Path(out))  # rather than after all prompts are encoded
        if roles.shard:
            shard(seats, train_options.precision)
            if start is not None:
                begin_with(seats, start)  # now, as the weights that are left on disk until then are the teacher's
        told = {"train": asdict(train_options), **configuration}
        try:
            with encoding.ready(group), origin:
                result = train(
                    recipe,
                    seats,
                    prompt_data(backbone, texts, train_options.seed),
                    train_options,
                    out,
                    hooks,
                    noise_shape=listed or backbone.latent_shape,
                    real=real,
                    pairs=pairs,
                    configuration=configuration,
                    resume=resume,
                )
        except Alarmed:
            _export_best(seats, options, Path(out), told, group)
            raise
        if listed is not None:
            listed.first()
        with result.ema.applied(), room(Path(out)):
            student = collected(seats)
            if group.leads and student is not None:
                export(student, options, folder, {"iterations": result.iteration, **told})
        _export_best(seats, options, Path(out), told, group)
        group.wait()  # the others load what the first has written
    return load_student(folder)


def begin_with(seats: Roles, folder: str | Path) -> None:
    """Give the student of `seats`, a full network, the weights of the student in `folder`.

    Raises:
        FewstepError: the student is an adapter, or `folder` holds no student of the same shape.
    """
    if seats.student_seat.adapter is not None:
        raise FewstepError(
            "found a student that is an adapter to begin with the weights of another, expected a full network, "
            "fix: --roles mixed or --roles copies"
        )
    network = load_student(folder).network
    seats.load_student_state({name: value.detach() for name, value in network.named_parameters()})


def _built(options: Options, reward: Reward | None) -> Method:
    """The method, with the reward where one is told.

    Raises:
        FewstepError: a reward for a method that has none.
    """
    if reward is None:
        return options.build()
    if not isinstance(options, RewardForcingOptions):
        raise FewstepError(
            f"found a reward for {options.build().name}, expected one for reward-forcing alone, fix: leave it out"
        )
    return RewardForcing(options, reward)


def _refuse_unread_data(method: str, needs: Needs, real: RealData | None, pairs: PairData | None) -> None:
    """Refuses data that the method does not look at."""
    for what, data, needed, beside in (
        ("real data", real, needs.real_data, "a discriminator (gan_weight above 0), which looks at them"),
        ("pairs", pairs, needs.pairs, "a regression (regression_weight above 0), which looks at them"),
    ):
        if data is not None and not needed:
            raise FewstepError(
                f"found {what} for {method} with these options, expected {beside}, fix: leave them out, or set the "
                "option that asks for them"
            )


def cache_prompts(
    teacher: Teacher | str | Path,
    prompts: Sequence[str] | str | Path | None = None,
    cache: str | Path = CACHE_FOLDER,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
) -> Path:
    """Encode prompts to the cache that `distill` of this teacher and these prompts then finds; returns its folder.

    Arguments are those of `distill` and of `TextOptions`; under torchrun the processes share the work.
    """
    teacher = teacher if isinstance(teacher, Teacher) else load_teacher(teacher, defer=True)
    backbone = teacher.backbone
    texts = training_prompts(backbone, prompts)
    told = TextOptions(text_encoder="cache", cache=Path(cache), cache_dtype=dtype)
    encoding = Encoding.of(backbone, told, Path(cache), texts, None, own=False)
    with process_group(backbone.device) as group:
        return make_cache(backbone, encoding.texts, encoding.folder, encoding.dtype, group).folder


def check_sharding(backbone: Backbone, roles: RoleOptions, train_options: TrainOptions, makes_pairs: bool) -> None:
    """Refuses what a teacher that is spread over processes, or still on disk, cannot do."""
    if backbone.deferred is not None and not roles.shard:
        raise FewstepError(
            "found a teacher whose weights were left on disk, expected a sharded distillation to read them, "
            "fix: RoleOptions(shard=True) (--shard), or load_teacher without defer"
        )
    if roles.shard:
        refuse_sharded(train_options, processes(), backbone.quantised)
    if roles.shard and makes_pairs:
        raise FewstepError(
            "found a method that regresses to samples of the teacher, expected them made before a sharded run, "
            "fix: pass pairs=... made with another teacher object, or leave --shard off"
        )


def export(seats: Roles, options: Options, folder: Path, details: dict[str, Any]) -> Path:
    """Save the student that `seats` hold now as a pipeline folder, and as a LoRA beside it where it is one adapter."""
    grids = [options.time_grid(count) for count in options.counts]
    name = next((name for name, make in METHODS.items() if make() == options), options.build().name)
    more = {"paper": options.build().paper, **details, "method": asdict(options)}
    layout = layout_of(options)
    forms: dict[Form, Path] = {"pipeline": folder}
    if seats.one_adapter:
        forms["lora"] = folder.with_name(LORA_FOLDER)
    for form, place in forms.items():
        save_student(
            place,
            seats,
            grids,
            method=name,
            eta=options.eta,
            chain_noise=options.chain_noise,
            form=form,
            causal=None if layout is None else asdict(layout),
            details=more,
        )
    return folder


def sample(
    model: Teacher | Student | str | Path,
    prompts: Sequence[str] | str,
    seeds: Sequence[int] | int = 0,
    steps: int | None = None,
    **more: Any,
) -> Tensor:
    """Images (B, 3, H, W), or videos (B, F, 3, H, W), uint8, of a teacher or student.

    Args:
        model: loaded, or a student's folder.
        prompts: one or several.
        seeds: one per prompt, or the first of consecutive ones.
        steps: solver steps; the model's own unless told.
        more: `solver`, `batch`, and for teachers `guidance_scale`.
    """
    loaded = load_student(model) if isinstance(model, str | Path) else model
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = range(seeds, seeds + len(texts)) if isinstance(seeds, int) else seeds
    return loaded.sample(texts, list(numbers), steps, **more)


def evaluate(
    model: Teacher | Student | str | Path, *, steps: int | None = None, count: int = 256, seed: int = 0, **more: Any
) -> dict[str, float]:
    """Quality, prompt-following and variety on held-out captions of the embedded data set (see `evaluation.scenes`).

    Args:
        model: the embedded teacher or a student of it, loaded or its folder.
        steps: solver steps.
        count: images, 16 to the size of the shipped reference set; compare only figures of equal count.
        seed: of the captions' noise; the reference set's own is another.
        more: for `sample`, such as `guidance_scale`.
    """
    from fewstep.evaluation.run import evaluate_scenes

    return evaluate_scenes(model, steps=steps, count=count, seed=seed, **more).scores.row()


def _export_best(seats: Roles, options: Options, out: Path, told: dict[str, Any], group: Group) -> None:
    """The best student of the run, if scores were taken, in `out`/best/student; the roles hold it afterwards."""
    best = read_best(out)
    if best is None:
        return
    there = dict(zip(seats.student_state(), seats.student_parameters(), strict=True))
    copy_tensors(there, best.tensors(GROUP), "student")
    with room(out):
        student = collected(seats)
        if group.leads and student is not None:
            export(student, options, out / BEST_FOLDER / STUDENT_FOLDER, {"iterations": best.iteration, **told})


def _guidance_scale(options: Options) -> float | None:
    """The guidance that the method distils, which pairs have to have as well."""
    return getattr(options, "guidance_scale", None)
