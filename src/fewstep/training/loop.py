"""The training loop, from top to bottom.

One iteration: conditions -> the student's trajectory -> the critic's updates on it -> the student's update ->
average, log, hooks, checkpoint. Everything random in it is a function of (seed, iteration, global sample index), so
neither the number of processes, nor micro-batches, nor an interruption changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.core.shards import is_sharded
from fewstep.core.streams import Streams
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Method, Roles
from fewstep.training import checkpoint, folder
from fewstep.training.ema import Ema
from fewstep.training.log import Log
from fewstep.training.monitors.guard import Guard
from fewstep.training.monitors.null import null_numbers
from fewstep.training.networks import Meter, Networks
from fewstep.training.options import TrainOptions, refuse_sharded
from fewstep.training.parallel import Group, process_group
from fewstep.training.progress import Progress
from fewstep.training.signals import Stopped, StopRequest
from fewstep.training.state import State
from fewstep.training.trackers import make_tracker
from fewstep.training.trainee import Trainee, Update

Data = Callable[[int, Tensor], Condition]
"""data(iteration, samples (b,) long) -> condition with b rows, on the networks' device.

It depends on its arguments only. `samples` are global: the n-th sample of iteration i (1, 2, ...) is (i - 1) x batch +
n, whatever process asks for it.
"""

RealData = Callable[[int, Tensor], tuple[Tensor, Condition]]
"""real(iteration, samples (b,) long) -> clean samples of the data (b, ...) with their conditions; as `Data`."""

NoiseShape = tuple[int, ...] | Callable[[int], tuple[int, ...]]
"""Shape of one sample without the batch axis, or shape(iteration), a function of the iteration alone.

The function is called at the beginning of the iteration and may set networks up for samples of that shape.
"""

PairData = Callable[[int, Tensor], tuple[Tensor, Tensor, Condition]]
"""pairs(iteration, samples) -> standard normal noise (b, ...), the teacher's samples from it, conditions; as `Data`."""


class TrainableRoles(Roles, Protocol):
    """Roles whose student and critic can be trained; a discriminator, if there is one, is part of the critic.

    A method without critic updates leaves the critic alone: no optimiser, nothing in checkpoints.
    """

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminator. May be missing where there is none."""
        ...

    def student_parameters(self) -> list[nn.Parameter]:
        """What is trained of the student; shares nothing with the critic's."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]: ...

    def student_state(self) -> Mapping[str, Tensor]:
        """The values of `student_parameters`, in their order, with their names."""
        ...

    def critic_state(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Hooks:
    """What a run calls besides the method, each in the first process and without gradient.

    While they run (`log` apart) the student's parameters hold the average. They may use torch's global random numbers:
    training does not depend on their state. In a parallel run the other processes wait, for as long as
    torch.distributed's time-out allows. Sharded roles are called by all processes or none, so in a sharded run every
    process calls the hooks (`log` apart), which then do the same everywhere, and write in the first process alone
    (`fewstep.training.parallel.leads`).
    """

    sample: Callable[[int], None] | None = None
    """sample(iteration), every `sample_every` iterations: draws pictures and puts them where it likes."""
    evaluate: Callable[[int], Mapping[str, float]] | None = None
    """evaluate(iteration) -> numbers by name, every `evaluate_every` iterations; logged as evaluate/name. By the one
    called "score", lower is better, the best student is kept (docs/monitors.md)."""
    save: Callable[[int, Path], None] | None = None
    """save(iteration, folder): adds files, such as an exported student, to a checkpoint before it becomes visible."""
    log: Callable[[int, Mapping[str, float]], None] | None = None
    """log(iteration, record) after each logged iteration."""


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run stands. The roles hold the last student; within `ema.applied()` they hold the average."""

    iteration: int
    """The last one: all that were asked for, unless patience or a drift ended the run before."""
    checkpoint: Path
    log: Path
    ema: Ema


def train(
    method: Method,
    roles: TrainableRoles,
    data: Data,
    options: TrainOptions,
    out: Path | str,
    hooks: Hooks | None = None,
    *,
    noise_shape: NoiseShape,
    real: RealData | None = None,
    pairs: PairData | None = None,
    configuration: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> TrainResult:
    """Trains the student (and critic) of `roles` by `method`, and leaves log and checkpoints in the folder `out`.

    Args:
        noise_shape: shape of one sample without the batch axis, such as (4, 16, 16); or of the iteration's samples
            (`NoiseShape`), then `configuration` has to tell what it follows from.
        real: where clean data come from; needed by methods with a discriminator, not looked at by others.
        pairs: where noise with the teacher's own samples comes from; likewise for methods that regress to them.
        configuration: all else that decides the result (teacher, kind of roles, prompts ...), as JSON-able
            values; kept with the checkpoints and compared on resume, as are the options of method and trainer.
        resume: continue the run in `out` from its newest complete checkpoint, on the CPU to the bit; if there is no
            run in `out`, begin one. Constant-rate runs may be resumed with more iterations.

    Under torchrun every process calls this with the same arguments; the folder must be on a disk they share. Torch's
    global random state is set anew in every iteration.

    Raises:
        FewstepError: options out of range, a folder in use or with another run, too little disk (all before any work);
            a loss or gradient that is not finite, or reaches no parameter; an alarm that stops the run
            (`TrainOptions.on_alarm`); a disk that is full after all.
        Stopped: SIGINT or SIGTERM came; the iteration was finished and a checkpoint saved. A SystemExit of code 130
            or 143.
    """
    hooks = hooks or Hooks()
    _validate(method, roles, options, hooks, real, pairs)
    out = Path(out)
    run = {
        **(configuration or {}),
        "method": {"name": method.name, **asdict(method.options)},
        "train": options.deciding(),
        "noise_shape": None if callable(noise_shape) else noise_shape,
    }
    first = roles.student_parameters()[0]
    device, dtype = first.device, torch.promote_types(first.dtype, torch.float32)
    networks = Networks(roles, options.precision, device)
    sharded = is_sharded(first)

    null: dict[str, float] = {}

    def batch(iteration: int, samples: Tensor) -> Batch:
        told: dict[str, Any] = {}
        shape = noise_shape(iteration) if callable(noise_shape) else noise_shape
        with networks.watch("data"):
            condition = data(iteration, samples)
            if method.needs.real_data and real is not None:
                clean, of_clean = real(iteration, samples)
                told["real"] = clean.to(device, dtype), of_clean
            if method.needs.pairs and pairs is not None:
                noise, made, of_made = pairs(iteration, samples)
                told["pairs"] = noise.to(device, dtype), made.to(device, dtype), of_made
        if iteration == 1 and not null:
            null.update(null_numbers(method, roles, condition))
        return Batch(condition, samples.to(device), shape, dtype, **told)

    with ExitStack() as stack:
        stack.enter_context(folder.room(out))
        group = stack.enter_context(process_group(device))
        if options.batch < group.size:
            raise FewstepError(
                f"found batch = {options.batch} for {group.size} processes, expected a sample for each of them, "
                "fix: raise --batch or start fewer processes"
            )
        if sharded:
            refuse_sharded(options, group.size)
            networks.in_step()
        stop = stack.enter_context(closing(StopRequest()))
        named = dict(zip(roles.student_state(), roles.student_parameters(), strict=True))
        student = Trainee("student", named, options, group, networks.timed)
        named = dict(zip(roles.critic_state(), roles.critic_parameters(), strict=True))
        critic = Trainee("critic", named, options, group, networks.timed) if method.critic_updates else None
        state = State(student, critic, Ema(student.parameters, options.ema_decay))
        newest = None
        if group.leads:
            folder.require_space(out, state.bytes(), options.keep)
            stack.enter_context(folder.locked(out))
            notes = {"options": asdict(options), "machine": folder.machine(device)}
            usual = {"method": folder.defaults(method.options), "train": folder.defaults(options)}
            newest = folder.begin(out, run, notes, resume=resume, usual=usual)
        start, told = state.restore(out / "checkpoints", newest, group, options.iterations)
        guard = Guard(options, state, group, out)
        unfinished = guard.begin(start, told.get("monitors", {}))
        kept: dict[str, Any] = {"tensorboard": options.tensorboard, "tracker": options.tracker, "configuration": run}
        kept["known"] = told.get("log_lines", 0)
        log = stack.enter_context(closing(Log(out, start, **kept))) if group.leads else None
        progress = stack.enter_context(closing(Progress(options.iterations, start, shown=group.leads)))
        meter = Meter(networks, options.batch, device)
        saved = out / "checkpoints" / f"{start:06d}"

        iteration = start
        while unfinished and iteration < options.iterations:
            iteration += 1
            with meter:
                updates = _iterate(method, networks, batch, state, options, group, iteration)
                state.ema.update()
                with networks.watch("monitors"):
                    numbers = _numbers(updates, state, options, group, iteration)
                    alarms = guard.look(iteration, updates, numbers | (null if iteration == 1 else {}))

            record: dict[str, float] = {}
            if options.due(options.log_every, iteration, options.log_most):
                record |= numbers | guard.shown(numbers) | meter.take()
            if log is not None or sharded:
                evaluated = _call_hooks(hooks, state, options, iteration)
                alarms += guard.judge(iteration, evaluated)
                record |= evaluated
            decision = guard.decide(alarms)
            if log is not None:
                if record:
                    log.write(iteration, record)
                    if hooks.log is not None:
                        hooks.log(iteration, record)
                for alarm in alarms:
                    done = guard.done(alarm, decision)
                    log.alarm(iteration, alarm.record() | done)
                    progress.say(f"{alarm.text()} ({done['done']})")
            progress.advance(iteration, record)

            guard.carry_out(decision, iteration, alarms, folder.describe(run))
            unfinished = decision.step != "finish"
            code = group.largest(stop.code, device)
            if code or not unfinished or options.due(options.checkpoint_every, iteration):
                if log is not None:
                    log.sync()
                    about = {**folder.describe(run), "monitors": guard.memory(), "log_lines": log.lines}
                    saved = _save(state, out, about, options, hooks, iteration)
                elif sharded:
                    saved = _help_save(state, out, hooks, iteration)
            if code:
                group.wait()
                progress.say(f"stopped after iteration {iteration}, saved {saved}; resume with --resume (resume=True)")
                raise Stopped(code)
        if iteration < options.iterations:
            progress.say(f"ended early, after iteration {iteration}; {guard.best}")
        group.wait()
        return TrainResult(iteration, saved, out / "log.jsonl", state.ema)


def _iterate(
    method: Method,
    networks: Networks,
    batch: Callable[[int, Tensor], Batch],
    state: State,
    options: TrainOptions,
    group: Group,
    iteration: int,
) -> dict[str, Update]:
    """One iteration of the method on this process's samples: trajectory, critic updates, student update."""
    first = (iteration - 1) * options.batch
    samples = group.share(torch.arange(first, first + options.batch))
    draws = [Streams(options.seed).at(iteration, part) for part in samples.split(options.microbatch or options.batch)]
    torch.manual_seed(int(draws[0].common("dropout") * 2**53))  # for layers that draw by themselves

    paths = [method.rollout(batch(iteration, draw.samples), networks, draw) for draw in draws]
    parts = list(zip(paths, draws, strict=True))
    updates = {}
    for update in range(method.critic_updates):
        critic_losses = (method.critic_loss(path, networks, draw.sub("critic").sub(update)) for path, draw in parts)
        assert state.critic is not None  # see `train`
        updates["critic"] = state.critic.update(critic_losses, iteration)
    student_losses = (method.student_loss(path, networks, draw.sub("student")) for path, draw in parts)
    updates["student"] = state.student.update(student_losses, iteration)
    return updates


def _numbers(
    updates: Mapping[str, Update], state: State, options: TrainOptions, group: Group, iteration: int
) -> dict[str, float]:
    """The numbers of this iteration that are the same in every repetition of the run."""
    record: dict[str, float] = {}
    for role, update in sorted(updates.items()):
        record |= {f"loss/{role}": update.loss, f"gradient_norm/{role}": update.gradient_norm}
        record[f"rate/{role}"] = options.rate(role, iteration) * getattr(state, role).slowed
        if options.precision == "fp16":
            record[f"loss_scale/{role}"] = getattr(state, role).scaler.get_scale()
        if update.metrics:
            means = torch.stack([value.float() for value in update.metrics.values()])
            group.sum_([means])
            names = (f"metric/{role}/{name}" for name in update.metrics)
            record |= dict(zip(names, means.tolist(), strict=True))
    return record


@torch.no_grad()
def _call_hooks(hooks: Hooks, state: State, options: TrainOptions, iteration: int) -> dict[str, float]:
    """Samples and evaluates where it is time to, by the averaged student; returns the evaluation's numbers."""
    sample = hooks.sample if options.due(options.sample_every, iteration, options.sample_most) else None
    evaluate = hooks.evaluate if options.due(options.evaluate_every, iteration) else None
    if sample is None and evaluate is None:
        return {}
    with state.ema.applied():
        if sample is not None:
            sample(iteration)
        numbers = {} if evaluate is None else evaluate(iteration)
    return {f"evaluate/{name}": float(value) for name, value in numbers.items()}


def _save(
    state: State, out: Path, about: Mapping[str, Any], options: TrainOptions, hooks: Hooks, iteration: int
) -> Path:
    """Writes the checkpoint of `iteration`, which `about` describes, with what the save hook adds to it."""

    @torch.no_grad()
    def extra(unfinished: Path) -> None:
        if hooks.save is not None:
            with state.ema.applied():
                hooks.save(iteration, unfinished)

    return state.save(out / "checkpoints", iteration, about, keep=options.keep, extra=extra)


@torch.no_grad()
def _help_save(state: State, out: Path, hooks: Hooks, iteration: int) -> Path:
    """What the other processes do of `_save` in a sharded run: they give their parts, and call the hook."""
    state.give()
    folder = checkpoint.place(out / "checkpoints", iteration)
    if hooks.save is not None:
        with state.ema.applied():
            hooks.save(iteration, checkpoint.unfinished(folder))
    return folder


def _validate(
    method: Method,
    roles: TrainableRoles,
    options: TrainOptions,
    hooks: Hooks,
    real: RealData | None,
    pairs: PairData | None,
) -> None:
    """Refuses what cannot work, before any work."""
    options.validate()
    if options.tracker != "none":
        make_tracker(options.tracker)  # refuses an unknown one, or one whose package is missing
    for name in ("sample", "evaluate"):
        if getattr(options, f"{name}_every") and getattr(hooks, name) is None:
            raise FewstepError(
                f"found {name}_every = {getattr(options, f'{name}_every')} without a way to do it, expected a hook, "
                f"fix: pass Hooks({name}=...) or set {name}_every to 0"
            )
    trained = {"student": roles.student_parameters()}
    if method.critic_updates:
        trained["critic"] = roles.critic_parameters()
    for name, parameters in trained.items():
        if not parameters:
            raise FewstepError(
                f"found no parameters to train in the {name}, expected some, "
                "fix: build the roles with an adapter or a copy"
            )
    needs = method.needs
    for wanted, there, what, fix in (
        (
            needs.discriminator,
            getattr(roles, "discriminates", False),
            "a discriminator",
            "build the roles with discriminator='critic' or 'teacher'",
        ),
        (needs.real_data, real is not None, "real data", "pass real=..., such as fewstep.data.real.RealImages"),
        (needs.pairs, pairs is not None, "pairs", "pass pairs=..., such as fewstep.data.pairs.TeacherPairs"),
    ):
        if wanted and not there:
            raise FewstepError(
                f"found the method {method.name} with these options without {what}, expected it to have {what}, "
                f"fix: {fix}, or set the options that ask for it (gan_weight, divergence, regression_weight) back"
            )
