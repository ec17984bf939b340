"""Memory by part, forwards, time and cost of a run, from a teacher without weights and the options of `distill`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.api import RoleOptions
from fewstep.attention.layout import FRAMES
from fewstep.errors import FewstepError
from fewstep.methods.base import Options
from fewstep.methods.self_forcing import layout_of
from fewstep.models.blocks import outermost_blocks, repeated_blocks
from fewstep.models.pipelines import STATES
from fewstep.models.quantised import PACKAGES, rounded_bytes
from fewstep.models.roles import Roles, build_roles
from fewstep.planning.build import Blueprint
from fewstep.planning.calls import Call, calls_of
from fewstep.planning.conditions import shapes
from fewstep.planning.trace import Cost, trace
from fewstep.training.optimisers import state_bytes
from fewstep.training.options import TrainOptions, refuse_sharded

_AHEAD = 2
"""Blocks that are whole at a time where weights are sharded: the one that computes and the next, being gathered."""


@dataclass(frozen=True)
class Run:
    """All that memory and time depend on."""

    options: Options
    roles: RoleOptions
    train: TrainOptions
    base_dtype: str = "float32"
    gpus: int = 1
    shard: bool = False
    text_encoder: str = "keep"
    """"keep", "offload" or "cache", as `TextOptions` has them."""
    words: int | None = None

    @property
    def share(self) -> int:
        """Samples of one process in an iteration."""
        return -(-self.train.batch // self.gpus)

    @property
    def rows(self) -> int:
        """Samples of one process in one forward."""
        return min(self.train.microbatch or self.share, self.share)


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are those of one GPU."""

    parameters: Mapping[str, int]
    """Numbers: of the frozen network, and trained of student and critic (with a discriminator)."""
    parts: Mapping[str, int]
    """Bytes by part while it trains; those of weights, gradients, optimiser and average are exact."""
    encoding: int
    """Bytes held while prompts are encoded by text encoders that are not there while it trains; 0 if they are."""
    saving: int
    """Bytes held while the student is written at the end, without activations."""
    cache_per_prompt: int
    """Bytes on disk of an encoded prompt in bfloat16."""
    forwards: float
    """Network forwards per sample and iteration, as the method counts them; a guided call counts 2."""
    passes: float
    """The same with backward passes: one counts two forwards, and three where it computes blocks again."""
    operations: float
    """Floating-point operations of one forward of the student for one sample."""

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(sum(self.parts.values()), self.encoding, self.saving)

    def seconds(self, run: Run, per_forward: float) -> float:
        """Of an iteration, where a forward of one sample takes `per_forward` seconds on one of the GPUs."""
        return self.passes * run.share * per_forward


def plan(print_: Blueprint, run: Run) -> Plan:
    """Count and trace. Takes seconds for small networks and up to minutes for deep ones.

    Raises:
        FewstepError: options out of range, as `distill` would.
    """
    _validate(run)
    roles = _roles(print_, run)
    frozen, trained, average = _weights(roles, run)
    numbers = {role: sum(p.numel() for p in parameters) for role, parameters in trained.items()}
    every = [parameter for parameters in trained.values() for parameter in parameters]
    gathered = _gathered(roles, run)
    unrounded = max((w.nbytes for w in _rounded(roles).values()), default=0) if run.base_dtype in PACKAGES else 0
    known: dict[int, tuple[Tensor, Tensor]] = {}
    frozen_numbers = sum(p.numel() for p in roles.backbone.network.parameters())  # type: ignore[attr-defined]
    for network in {id(n): n for n in _networks(roles)}.values():
        print_.made_callable(network, known)
    costs: dict[Call, Cost] = {}

    def cost(call: Call) -> Cost:
        if call not in costs:
            costs[call] = trace(print_, roles, call, precision=run.train.precision, words=run.words)
        return costs[call]

    method = run.options.build()
    frames = print_.backbone.latent_shape[FRAMES - 1] if method.needs.causal else 0
    phases = calls_of(run.options, roles.process, run.rows, frames)
    others = {name: numbers * _bytes(run) for name, numbers in print_.others.items()}
    encoders = {name: size for name, size in others.items() if "text_encoder" in name and run.text_encoder != "keep"}
    others = {name: size for name, size in others.items() if name not in encoders}
    parts = {
        "frozen weights": frozen,
        "trained weights": sum(p.nbytes for p in every),
        "optimiser": sum(state_bytes(run.train.optimiser, p.numel()) for p in every),
        "average": average,
    }
    divided = run.gpus if run.shard else 1
    parts = {name: -(-size // divided) for name, size in parts.items()}
    if run.shard:
        parts["gathered blocks"] = gathered
    at_rest = sum(parts.values())
    encoding = _encoding(parts, others, encoders, run)
    parts |= {name.replace("_", " "): size for name, size in others.items()}
    parts["prompts and paths"] = _prompts_and_paths(roles, run)
    if any(call.seen is not None for calls in phases.values() for call in calls):
        parts["remembered chunks"] = _remembered(roles, run)
    parts["gradients"], most = max(
        (
            (-(-_gradients(phase, calls, trained, run) // divided), int(_peak([cost(call) for call in calls], calls)))
            for phase, calls in phases.items()
        ),
        key=sum,
    )
    parts["activations"] = most + unrounded  # of a quantised base, the layer that computes
    student = Call("student", 1, False, False)
    graphs = sum(
        call.rows
        / run.rows
        * (call.frames / frames if call.layout is not None else 1)
        * (method.critic_updates if phase == "critic" else 1)
        for phase, calls in phases.items()
        for call in calls
        if call.graph
    )
    told = shapes(print_.backbone, run.words)
    return Plan(
        parameters={"frozen": frozen_numbers, **numbers},
        parts=parts,
        encoding=encoding,
        saving=at_rest + sum(others.values()) + average,  # the student itself, while the average stands in its place
        cache_per_prompt=sum(2 * math.prod(shape) for shape in told.values()),
        forwards=method.forwards(),
        passes=method.forwards() + (3 if run.roles.checkpointing else 2) * graphs,
        operations=cost(student).operations,
    )


def _validate(run: Run) -> None:
    run.options.validate()
    run.train.validate()
    if run.roles.sparse.on:
        raise FewstepError(
            "found a sparse student to be planned, expected a dense one, since the work of a sparse one follows from "
            "what it sees, fix: leave --sparse at dense; memory of weights and optimisers is the same"
        )
    if not 1 <= run.gpus <= run.train.batch:
        raise FewstepError(
            f"found {run.gpus} GPUs for batch = {run.train.batch}, expected 1 to as many as there are samples, "
            "fix: change --gpus or --batch"
        )
    if run.shard:
        refuse_sharded(run.train, run.gpus, run.base_dtype if run.base_dtype in PACKAGES else None)
    if run.base_dtype in PACKAGES and run.roles.roles != "adapters":
        raise FewstepError(
            f"found roles {run.roles.roles!r} on a base in {run.base_dtype}, expected adapters, since copies of "
            "rounded weights cannot be trained, fix: --roles adapters, or --base-dtype bfloat16"
        )


def _roles(print_: Blueprint, run: Run) -> Roles:
    """As `distill` builds them, on the meta device."""
    needs, told = run.options.build().needs, run.roles
    features = needs.features if told.discriminator == "method" else told.discriminator
    return build_roles(
        print_.in_dtype(torch.float32 if run.base_dtype == "float32" else torch.bfloat16),
        told.roles,
        rank=told.rank,
        critic_rank=told.critic_rank,
        layers=told.layers,
        checkpointing=told.checkpointing,
        critic=needs.critic or (needs.discriminator and features == "critic"),
        discriminator=features if needs.discriminator else "none",
        steps_aware=needs.steps_condition or needs.landing_condition,
        causal=needs.causal,
    )


def _networks(roles: Roles) -> list[nn.Module]:
    seats = [seat for seat in (roles._teacher, roles._student, roles._critic) if seat is not None]
    judge = roles._discriminator
    return [seat.network for seat in seats] + ([] if judge is None else [judge.network])


def _weights(roles: Roles, run: Run) -> tuple[int, dict[str, list[nn.Parameter]], int]:
    """Bytes that are frozen, trained parameters by role, bytes of the average."""
    trained = {"student": roles.student_parameters(), "critic": roles.critic_parameters()}
    counted = {id(parameter) for parameters in trained.values() for parameter in parameters}
    rounded = _rounded(roles) if run.base_dtype in PACKAGES else {}
    frozen = 0
    for network in _networks(roles):
        for tensor in [*network.parameters(), *network.buffers()]:
            if id(tensor) not in counted:
                counted.add(id(tensor))
                size = rounded_bytes(run.base_dtype) if id(tensor) in rounded else None
                frozen += tensor.nbytes if size is None else size(tensor.shape, tensor.element_size())
    return frozen, trained, sum(p.nbytes for p in trained["student"]) if run.train.ema_decay else 0


def _rounded(roles: Roles) -> dict[int, Tensor]:
    """The weights that a quantised base has in few bits."""
    network = roles.backbone.network  # type: ignore[attr-defined]
    layers = [layer for block in repeated_blocks(network).values() for layer in block.modules()]
    return {id(layer.weight): layer.weight for layer in layers if isinstance(layer, nn.Linear)}


def _gathered(roles: Roles, run: Run) -> int:
    """Most bytes of a network's weights that are whole while it computes: what is outside its blocks, and two of them.

    With precision bf16 they are gathered as that, whatever the parts are.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() * (2 if run.train.precision == "bf16" else p.element_size()) for p in module.parameters())

    def most(network: nn.Module) -> int:
        blocks = [size(block) for block in outermost_blocks(network)]
        return size(network) - sum(blocks) + _AHEAD * max(blocks, default=0)

    return max(most(network) for network in _networks(roles))


def _prompts_and_paths(roles: Roles, run: Run) -> int:
    """Of all samples of an iteration: encoded prompts, and the student's path, which is kept in float32."""
    backbone: Any = roles.backbone
    text = sum(_bytes(run) * math.prod(shape) for shape in shapes(backbone, run.words).values())
    path = (3 * max(run.options.counts) + 1) * 4 * math.prod(backbone.latent_shape)
    return run.share * (text + path)


def _remembered(roles: Roles, run: Run) -> int:
    """Keys and values that a causal student keeps through an iteration, of all samples.

    Of every finished chunk, since the student's update walks each chunk again within the memory that it had; in float32
    of each state of a blended sink; and of the prompt. A noisy cache keeps as many of each chunk as it makes calls, at
    most all, of the last chunk too, and its sink beside them.
    """
    backbone: Any = roles.backbone
    layout, config = layout_of(run.options), backbone.network.config
    assert layout is not None
    _, patch, _ = config.patch_size
    _, frames, height, width = backbone.latent_shape
    finished = layout.chunks(frames) - 1
    kept = finished
    if layout.kept != "clean":
        calls = max(run.options.counts) if layout.kept == "noisy" else 1
        kept = calls * (finished + 1) + min(layout.sink, finished)
    tokens = layout.chunk * (height // patch) * (width // patch)
    half = run.train.precision != "fp32" or (run.roles.roles == "adapters" and run.base_dtype != "float32")
    blended = 0
    if layout.sink_decay < 1 and layout.window is not None:
        blended = max(0, finished - layout.sink - layout.window)
    words = shapes(backbone, run.words)[STATES][0]
    numbers = (2 if half else 4) * (kept * tokens + words) + 4 * blended * tokens
    return run.share * 2 * config.num_layers * config.num_attention_heads * config.attention_head_dim * numbers


def _encoding(at_rest: Mapping[str, int], others: Mapping[str, int], encoders: Mapping[str, int], run: Run) -> int:
    """Most bytes while text encoders that are not there during training encode prompts; their activations come on top.

    A teacher is loaded whole, so that before training all encoders are beside the networks. Offloaded ones come back
    one at a time, when optimiser and average are there too.
    """
    if not encoders:
        return 0
    loaded = at_rest["frozen weights"] + at_rest["trained weights"] + sum(encoders.values())
    visited = sum(at_rest.values()) + max(encoders.values()) if run.text_encoder == "offload" else 0
    return max(loaded, visited) + sum(others.values())


def _gradients(phase: str, calls: list[Call], trained: Mapping[str, list[nn.Parameter]], run: Run) -> int:
    """Bytes of gradients in one role's update; a sharded backward leaves some with every role that it leads through."""
    reached = {"critic" if call.role == "discriminator" else call.role for call in calls if call.graph}
    roles = reached & trained.keys() if run.shard else {phase}
    return sum(parameter.nbytes for role in roles for parameter in trained[role])


def _peak(costs: list[Cost], calls: list[Call]) -> float:
    """Most bytes at any time of one loss: what calls before keep for their backward, and what the present one holds."""
    held = most = 0.0
    for cost, call in zip(costs, calls, strict=True):
        most = max(most, held + cost.forward)
        held += cost.saved if call.graph else 0
    again = [cost.backward - cost.saved for cost, call in zip(costs, calls, strict=True) if call.graph]
    return max(most, held + max(again, default=0))


def _bytes(run: Run) -> int:
    """Of a number in the parts of the pipeline that are not trained."""
    return 4 if run.base_dtype == "float32" else 2
