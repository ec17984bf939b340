"""No option is passed over: changed, each one changes a loss, a schedule, the memory or a file, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.option_tables import EQUAL, NEVER, QUICK, QUICK_CAUSAL, beside, others
from tests.streaming.frames import FRAMES, SIZE, FrameByFrame, TinyCausal, TinySeat
from tests.training import training_toy as toy
from torch import Tensor, nn

from fewstep import api, live
from fewstep.api import RoleOptions
from fewstep.attention.sparse import SparseOptions, sparse_attention
from fewstep.attention.sparse.adaptive import Sequence as Tokens
from fewstep.conditions import Encoding, TextOptions
from fewstep.core.files import checksum
from fewstep.core.process import Flow
from fewstep.core.streams import Streams
from fewstep.core.tensors import CONTROLS, Condition
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, ring
from fewstep.evaluation.toy import LogisticDiscriminator, ToyRoles
from fewstep.methods import METHODS, TDMOptions, preset
from fewstep.methods.base import Batch
from fewstep.methods.self_forcing import layout_of
from fewstep.training import trackers
from fewstep.training.log import read_alarms, read_log
from fewstep.training.loop import Hooks
from fewstep.training.monitors.guard import Alarmed
from fewstep.training.options import TrainOptions

SAMPLES = 6
LATE_EXIT = 2
"""An iteration in which causal students make all of their calls."""


class Scaled(nn.Module):
    """Another network than the teacher."""

    def __init__(self, teacher: nn.Module, gain: float) -> None:
        super().__init__()
        self.teacher = [teacher]
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.teacher[0](x, t, condition) * self.gain + 0.1


class Heard(ToyRoles):
    """Roles that hash everything they are asked and told: what a method does, to the bit."""

    def __init__(self, causal: bool) -> None:
        exact = ring(Flow(), [1, 2, 3, 4], 1.5, 0.3, torch.float64)
        judge = LogisticDiscriminator(Flow(), 2).double()
        nn.init.normal_(judge.weight, std=0.4, generator=torch.Generator().manual_seed(0))
        self.hashed = blake2b(digest_size=16)
        self.student_net = Scaled(exact, 0.9)
        networks = {"student": self.student_net, "critic": Scaled(exact, 1.1), "judge": judge, "teacher": exact}
        if causal:
            attending = TinyCausal(networks.pop("student"))
            self.causal = TinySeat(attending)
            networks = {"student": attending, **{name: FrameByFrame(each) for name, each in networks.items()}}
        heard = {name: self._heard(name, network) for name, network in networks.items()}
        super().__init__(exact, heard["student"], heard["critic"], heard["judge"])
        self.exact, self.teacher = exact, heard["teacher"]

    def null(self, condition: Condition) -> Condition:
        return self.exact.null(condition)

    def hear(self, *values: Any) -> None:
        for value in values:
            self.hashed.update(value.detach().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())

    def _heard(self, name: str, network: nn.Module) -> Any:
        def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.hear(name, x, t, *(part for item in sorted(condition.items()) for part in item))
            return network(x, t, condition)

        return call


class Sampler:
    """A teacher that is asked for its path."""

    def __init__(self, roles: Heard) -> None:
        self._roles = roles

    def states(
        self, prompts: list[str], seeds: Sequence[int], grid: Tensor, keep: Tensor, guidance_scale: float
    ) -> tuple[Tensor, Tensor]:
        self._roles.hear("states", grid, keep, guidance_scale)
        draw, shape = Streams(1).at(0, seeds), (SIZE, FRAMES)
        return draw.normal("states", (len(keep), *shape), torch.float64), draw.normal("clean", shape, torch.float64)

    def encode(self, prompts: list[str]) -> Condition:
        return {LABEL: torch.arange(len(prompts)) % 2}


@lru_cache(maxsize=256)
def done(options: Any) -> str | None:
    """A hash of all that a method does with these options and says of itself; None where they are refused."""
    try:
        method = options.build()
        causal = method.needs.causal
        roles, samples = Heard(causal), torch.arange(SAMPLES)
        shape = (SIZE, FRAMES) if causal else (SIZE,)
        roles.hear(method.needs, method.critic_updates, options.counts, options.eta, options.chain_noise)
        roles.hear(*(options.time_grid(count) for count in options.counts))
        for iteration in (LATE_EXIT,) if causal else (1, 2):
            draw = Streams(0).at(iteration, samples)
            controls = draw.normal("controls", (1, FRAMES, 1, 1), torch.float64)
            told = {LABEL: samples % 2, CONTROLS: controls}
            clean = roles.exact.sample(SAMPLES * FRAMES, torch.Generator().manual_seed(1))
            real = (clean.view(SAMPLES, FRAMES, SIZE).transpose(1, 2) if causal else clean[:SAMPLES], told)
            pairs = (draw.normal("pair", shape, torch.float64), *real)
            if method.needs.trajectories:
                pairs = api.trajectories(Sampler(roles), options, ["a frog"], 0)(iteration, samples)
            path = method.rollout(Batch(told, samples, shape, torch.float64, real, pairs), roles, draw)
            for update in range(method.critic_updates):
                roles.hear(method.critic_loss(path, roles, draw.sub("critic").sub(update)).values)
            loss = method.student_loss(path, roles, draw.sub("student")).values
            roles.hear(loss, torch.autograd.grad(loss.mean(), roles.student_net.gain)[0])
    except FewstepError:
        return None
    return roles.hashed.hexdigest()


def quickened(options: Any, but: str = "") -> Any:
    """`options` with few and small calls; their number of critic updates stays if it is `but`."""
    quick = QUICK if layout_of(options) is None else QUICK | QUICK_CAUSAL
    there = {entry.name for entry in fields(options)} - ({"critic_updates"} & {but})
    return replace(options, **{key: value for key, value in quick.items() if key in there})


def passed_over(options: Any, name: str) -> str:
    """Why the option `name` of `options` does nothing; empty if it does something or is refused where it would not."""
    options = quickened(options, but=name)
    plain = done(options)
    assert plain is not None
    if name not in EQUAL:
        for other in others(options, name):
            if done(replace(options, **other)) == plain:
                return f"{other} is accepted and changes nothing"
    if name in NEVER.get(type(options).__name__, ()):
        return ""
    base = replace(options, **beside(options, name))
    found = [done(replace(base, **other)) for other in others(base, name)]
    if not any(found):
        return f"no other value is accepted beside {beside(options, name)}"
    if any(one == done(base) for one in found):
        return f"a value is accepted beside {beside(options, name)} and changes nothing"
    return ""


@pytest.mark.parametrize(
    ("method", "name"), [(method, entry.name) for method in METHODS for entry in fields(METHODS[method]())]
)
def test_an_option_of_a_method_does_something_or_is_refused(method: str, name: str) -> None:
    assert passed_over(preset(method), name) == ""


@dataclass(frozen=True)
class WithNewOption(TDMOptions):
    colour: int = 3


def test_a_new_option_that_nothing_reads_is_found() -> None:
    assert passed_over(WithNewOption(), "colour") == "{'colour': 4} is accepted and changes nothing"


# The trainer's options


class Listed:
    """A tracker that leaves a file."""

    def start(self, folder: Path, configuration: Any, iteration: int) -> None:
        (folder / "listed.txt").write_text("")

    def log(self, iteration: int, numbers: Any) -> None: ...

    def finish(self) -> None: ...


def trained(out: Path, options: TrainOptions) -> dict[str, Any]:
    """All that a short run leaves: log, files and what is in them, and the rows of its largest call."""
    roles, asked = toy.ToyRoles(hidden=600), []
    student = roles.student
    rows: list[int] = []

    def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        rows.append(len(x))
        return student(x, t, condition)

    roles.student = call
    hooks = Hooks(sample=lambda i: asked.append(i), evaluate=lambda i: {"score": 1.0})
    told = {entry.name: getattr(options, entry.name) for entry in fields(options)}
    with suppress(Alarmed):
        toy.run(out, roles=roles, hooks=hooks, **told)
    moment = ("time/", "memory/")
    log = [{k: v for k, v in one.items() if not k.startswith(moment)} for one in read_log(out / "log.jsonl")]
    weights = {str(path.relative_to(out)): checksum(path) for path in out.rglob("*.safetensors")}
    top = sorted(path.name for path in out.iterdir())
    alarms = [(one["name"], one["done"]) for one in read_alarms(out / "log.jsonl")]
    return {"log": log, "alarms": alarms, "weights": weights, "top": top, "rows": max(rows), "sampled": asked}


SHORT = TrainOptions(
    iterations=4, batch=6, warmup=1, schedule="cosine", log_every=2, checkpoint_every=2, keep=2, tensorboard=False
)
TRAIN: dict[str, Any] = {
    "iterations": 5, "batch": 4, "microbatch": 3, "seed": 1, "student_rate": 1e-3, "critic_rate": 1e-3,
    "optimiser": "adamw8bit", "beta1": 0.5, "beta2": 0.9, "weight_decay": 5.0, "schedule": "constant", "warmup": 3,
    "final_rate": 0.5, "student_clip": 1e-3, "critic_clip": 1e-3, "ema_decay": 0.1, "precision": "bf16",
    "log_every": 1, "sample_every": 2, "evaluate_every": 2, "checkpoint_every": 3, "keep": 1, "tensorboard": True,
    "tracker": "listed", "on_alarm": "off", "patience": 2, "log_most": 1, "sample_most": 1,
}  # fmt: skip
FROZEN: dict[str, Any] = {"student_rate": 0.0}  # which is an alarm after three iterations
BESIDE_TRAIN: dict[str, dict[str, Any]] = {
    "on_alarm": FROZEN, "patience": {"evaluate_every": 1},
    "log_most": {"log_every": 1}, "sample_most": {"sample_every": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return trained(tmp_path_factory.mktemp("plain") / "run", SHORT)


@pytest.mark.parametrize("name", [entry.name for entry in fields(TrainOptions)])
def test_an_option_of_the_trainer_does_something(
    name: str, tmp_path: Path, plain_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "listed", Listed)
    base = replace(SHORT, **BESIDE_TRAIN.get(name, {}))
    plain = trained(tmp_path / "base", base) if name in BESIDE_TRAIN else plain_run
    assert trained(tmp_path / "run", replace(base, **{name: TRAIN[name]})) != plain


def test_what_alarms_do_is_chosen(tmp_path: Path) -> None:
    found = {
        choice: trained(tmp_path / choice, replace(SHORT, **FROZEN, on_alarm=choice))
        for choice in ("warn", "act", "off")
    }
    assert {choice: run["alarms"] for choice, run in found.items()} == {
        "warn": [("frozen", "told")], "act": [("frozen", "stop")], "off": []
    }  # fmt: skip
    assert {choice: run["log"][-1]["iteration"] for choice, run in found.items()} == {"warn": 4, "act": 2, "off": 4}


def test_options_of_the_trainer_are_refused_where_nothing_reads_them(tiny_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="found final_rate = 0.5, which nothing reads here"):
        replace(SHORT, schedule="constant", final_rate=0.5).validate()
    for name, every in (("log_most", "log_every"), ("sample_most", "sample_every")):
        with pytest.raises(FewstepError, match=f"found {name} = 7, which nothing reads here, expected {every} above 0"):
            replace(SHORT, **{every: 0, name: 7}).validate()
    with pytest.raises(FewstepError, match="found patience = 2, expected 0 where evaluate_every is 0"):
        replace(SHORT, patience=2).validate()
    with pytest.raises(FewstepError, match="found patience = 2 and an evaluation without a score"):
        toy.run(tmp_path / "other", hooks=Hooks(evaluate=lambda i: {"other": 1.0}), evaluate_every=1, patience=2)
    for name, value in (("critic_rate", 0.5), ("critic_clip", 0.5)):
        with pytest.raises(FewstepError, match=f"found {name} = 0.5, which nothing reads here"):
            begun(tiny_teacher, tmp_path, "tsm", train_options=replace(SHORT, **{name: value}))


# The options of roles and of texts


class Begun(Exception):
    """A run was about to begin."""


def begun(teacher: Any, out: Path, method: Any = "tdm", **more: Any) -> dict[str, Any]:
    """What `distill` hands the trainer: the trained tensors by name, how they are computed, how prompts are encoded."""
    seen: dict[str, Any] = {"sharded": False}

    @contextmanager
    def ready(self: Encoding, group: object) -> Iterator[None]:
        seen["encoding"] = (self.mode, self.dtype, self.folder)
        yield

    def train(recipe: Any, seats: Any, *rest: Any, **told: Any) -> None:
        judge = seats._discriminator
        modules = [module for seat in {seats.student_seat, seats._teacher, seats._critic or seats._teacher}
                   for module in seat.network.modules()]  # fmt: skip
        seen["tensors"] = [
            [(name, tuple(value.shape)) for name, value in state.items()]
            for state in (seats.student_state(), seats.critic_state())
        ]
        seen["scales"] = sorted(str(module.scaling) for module in modules if hasattr(module, "scaling"))
        seen["kept"] = any(getattr(module, "gradient_checkpointing", False) for module in modules)
        seen["compiled"] = any(module._compiled_call_impl is not None for module in modules)
        seen["sparse"] = seats.sparse
        seen["judge"] = None if judge is None else judge.seat.adapter
        raise Begun

    def shard(seats: Any, precision: str) -> None:
        seen["sharded"] = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoding, "ready", ready)
        patch.setattr(api, "train", train)
        patch.setattr(api, "shard", shard)
        told = {"prompts": ["a frog"], "roles": RoleOptions(rank=4), "train_options": SHORT, "hooks": None, **more}
        with pytest.raises(Begun):
            api.distill(teacher, method, out=out / "run", **told)
    return seen


GAN = {"method": replace(preset("tdm"), gan_weight=0.1), "real": lambda iteration, samples: None}  # type: ignore[type-var]
ROLES: dict[str, tuple[dict[str, Any], Any]] = {
    "roles": ({"rank": 32}, "mixed"), "rank": ({}, 2), "critic_rank": ({}, 8), "alpha": ({}, 8.0),
    "layers": ({}, "all-linear"), "checkpointing": ({}, True), "shard": ({}, True), "compile": ({}, True),
    "discriminator": ({}, "teacher"), "sparse": ({}, SparseOptions(kind="asa")),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tiny_teacher: Path) -> Any:
    return api.load_teacher(tiny_teacher)


@pytest.mark.parametrize("name", [entry.name for entry in fields(RoleOptions)])
def test_an_option_of_roles_does_something(name: str, loaded: Any, tiny_teacher: Path, tmp_path: Path) -> None:
    teacher = api.load_teacher(tiny_teacher) if name == "compile" else loaded  # which changes the network in place
    base, value = ROLES[name]
    roles, more = replace(RoleOptions(rank=4), **base), GAN if name == "discriminator" else {}
    before = begun(loaded, tmp_path, roles=roles, **more)
    assert begun(teacher, tmp_path, roles=replace(roles, **{name: value}), **more) != before


SPARSE: dict[str, tuple[dict[str, Any], Any]] = {
    "kind": ({"window": 30}, "asa"), "block": ({}, 8), "samples": ({}, 1), "mass": ({}, 0.3),
    "least": ({"mass": 0.1}, 0.5), "most": ({}, 0.4), "window": ({}, 8), "order": ({}, "raster"),
    "engine": ({}, "flex"), "critic": ({}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", [entry.name for entry in fields(SparseOptions)])
def test_an_option_of_sparse_attention_does_something(name: str) -> None:
    """By what a call returns, or, of the critic and of engines, by who is sparse and what is refused."""
    base, value = SPARSE[name]
    options = replace(SparseOptions(kind="asa-gt", block=4, samples=2, mass=0.6, least=0.0, most=1.0, window=4), **base)
    changed = replace(options, **{name: value})
    changed.validate()
    if name == "critic":
        assert changed.critic  # see tests/models/test_sparse_students.py
        return
    numbers = torch.Generator().manual_seed(0)
    parts = torch.randn(3, 1, 2, 60, 8, generator=numbers).unbind()
    if name == "engine":
        with pytest.raises(FewstepError, match="found FlexAttention"):
            sparse_attention(*parts, Tokens((3, 4, 5), False), changed)
        return
    plain, other = (sparse_attention(*parts, Tokens((3, 4, 5), False), each) for each in (options, changed))
    assert not torch.equal(plain, other)


@pytest.mark.parametrize(
    ("method", "roles", "named"),
    [
        ("tdm", RoleOptions(roles="copies", rank=4), "rank = 4"),
        ("tdm", RoleOptions(roles="copies", critic_rank=4), "critic_rank = 4"),
        ("tdm", RoleOptions(roles="copies", alpha=4.0), "alpha = 4.0"),
        ("tdm", RoleOptions(roles="copies", layers="all-linear"), "layers = 'all-linear'"),
        ("tdm", RoleOptions(roles="mixed", rank=4, critic_rank=8), "rank = 4"),
        ("tsm", RoleOptions(critic_rank=4), "critic_rank = 4"),
        ("tsm", RoleOptions(roles="mixed", alpha=4.0), "alpha = 4.0"),
        ("tdm", RoleOptions(discriminator="teacher"), "discriminator = 'teacher'"),
    ],
)
def test_options_of_roles_are_refused_where_nothing_reads_them(
    method: str, roles: RoleOptions, named: str, loaded: Any, tmp_path: Path
) -> None:
    with pytest.raises(FewstepError, match=f"found {named}, which nothing reads here"):
        begun(loaded, tmp_path, method, roles=roles)


@pytest.mark.parametrize(
    ("name", "base", "value"),
    [
        ("text_encoder", {}, "keep"),
        ("cache", {"text_encoder": "cache"}, Path("elsewhere")),
        ("cache_dtype", {"text_encoder": "cache"}, "float32"),
    ],
)
def test_an_option_of_texts_does_something_or_is_refused(
    name: str, base: dict[str, Any], value: Any, loaded: Any, tmp_path: Path
) -> None:
    assert {entry.name for entry in fields(TextOptions)} == {"text_encoder", "cache", "cache_dtype"}
    plain = TextOptions(**base)
    assert begun(loaded, tmp_path, text=plain) != begun(loaded, tmp_path, text=replace(plain, **{name: value}))
    if base:
        with pytest.raises(FewstepError, match=f"found {name} = .*, which nothing reads here"):
            begun(loaded, tmp_path, text=TextOptions(text_encoder="keep", **{name: value}))


def test_data_that_a_method_does_not_look_at_are_refused(loaded: Any, tmp_path: Path) -> None:
    for name, what in (("real", "real data"), ("pairs", "pairs")):
        with pytest.raises(FewstepError, match=f"found {what} for tdm with these options"):
            begun(loaded, tmp_path, **{name: lambda iteration, samples: None})
    with pytest.raises(FewstepError, match="found phase = 2, which nothing reads here"):
        begun(loaded, tmp_path, replace(preset("phased"), phase=2))  # type: ignore[type-var]


def test_arguments_of_distill_are_refused_where_nothing_reads_them(loaded: Any, tmp_path: Path) -> None:
    evaluated = replace(SHORT, evaluate_every=2)
    for more in ({}, {"train_options": evaluated, "hooks": Hooks(evaluate=lambda iteration: {})}):
        with pytest.raises(FewstepError, match="found held_out, which nothing reads here"):
            begun(loaded, tmp_path, held_out=["a frog"], **more)
    with pytest.raises(FewstepError, match="found a reward for tdm, expected one for reward-forcing alone"):
        begun(loaded, tmp_path, reward=lambda video, condition: video)
    with pytest.raises(FewstepError, match="found a student that is an adapter to begin with the weights of another"):
        begun(loaded, tmp_path, start=tmp_path)


def test_held_out_prompts_are_those_of_evaluations(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(live, "HeldOut", lambda sample, prompts: asked.append(prompts))
    for held_out in (None, ["a dog"]):
        begun(loaded, tmp_path, held_out=held_out, train_options=replace(SHORT, evaluate_every=2))
    assert asked == [["a frog"], ["a dog"]]
