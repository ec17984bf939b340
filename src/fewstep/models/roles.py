"""Teacher, student and critic over one backbone, in three arrangements.

| kind       | teacher            | student          | critic           | weights in memory      |
|------------|--------------------|------------------|------------------|------------------------|
| "adapters" | base, adapters off | LoRA on the base | LoRA on the base | 1 network + 2 adapters |
| "copies"   | the network        | full copy        | full copy        | 3 networks             |
| "mixed"    | base, adapter off  | full copy        | LoRA on the base | 2 networks + 1 adapter |

A discriminator, for methods that have one, is heads on the features of the critic or of the teacher, or a network of
its own; what it has of its own is trained, saved and restored with the critic. Methods that ask no critic do without:
then neither its weights nor its optimiser are there.

All start as the teacher, exactly. The teacher's weights are the backbone's own, shared and never trained. What is
trained is float32; the frozen base is in whatever dtype the backbone was loaded. Text encoder and autoencoder have no
part in this.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from fewstep.attention import CausalSeat
from fewstep.attention.sparse import SparseOptions
from fewstep.core.process import Process
from fewstep.core.shards import fill_
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.adapters import (
    PerAdapter,
    Switch,
    adapter_parameters,
    add_adapter,
    checkpoint_function,
    cpu_copy,
    merge_adapter,
    shared_copy,
)
from fewstep.models.backbone import Backbone
from fewstep.models.blocks import compile_blocks
from fewstep.models.discriminator import Heads, tapped
from fewstep.models.loading import original

Kind = Literal["adapters", "copies", "mixed"]
Layers = Literal["attention+ff", "all-linear"]
Features = Literal["none", "critic", "teacher"]
STUDENT, CRITIC, DISCRIMINATOR = "student", "critic", "discriminator"
_TOLD = ("steps", "landing")  # what the teacher must not be told


class Caller(Protocol):
    """What roles need of a backbone or of a `FunctionTeacher`."""

    process: Process

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    def null_condition(self) -> Condition: ...


@dataclass(frozen=True)
class Seat:
    """Where a role sits: a network, and the switch position in which the network plays that role."""

    network: nn.Module
    switch: Switch | None = None
    adapter: str | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained in this seat, by name."""
        if self.adapter is None:
            return dict(self.network.named_parameters())
        return adapter_parameters(self.network, self.adapter)


@dataclass(frozen=True)
class Discriminator:
    """What tells data from the student's samples: heads on the features of a seat, or a module of its own."""

    network: nn.Module
    """Heads (features -> logits) on `seat`; without one, (x, t, condition) -> logits (B, heads)."""
    seat: Seat | None = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """What it has of its own, by names that no network uses."""
        return {f"{DISCRIMINATOR}.{name}": value for name, value in self.network.named_parameters()}


class Roles:
    """The three denoisers of a distillation: `teacher`, `student` and `critic`, each `(x, t, condition) -> denoised`.

    x (B, ...), t (B,) in [0, 1], condition with B rows; one network forward each. Calls may come in any order, also
    between the forward of a role and its backward: gradients are exact, with and without checkpointing.
    """

    def __init__(
        self,
        backbone: Caller,
        teacher: Seat,
        student: Seat,
        critic: Seat | None,
        discriminator: Discriminator | None = None,
        causal: CausalSeat | None = None,
    ) -> None:
        self.backbone, self.process = backbone, backbone.process
        self.causal = causal
        """How the student is called chunk by chunk, where it is a causal one."""
        self._teacher, self._student, self._critic = teacher, student, critic
        self._discriminator = discriminator
        self.sparse: SparseOptions | None = None
        """What the student's attention sees, where it is sparse."""
        self.sharded: list[nn.Module] = []
        """Networks of which every process holds a part (`fewstep.models.sharding`)."""
        self.gathered_as: torch.dtype | None = None
        """Of sharded roles: the dtype in which whole weights are there, if not their own; all calls compute in it."""
        self.skeletons: tuple[nn.Module, nn.Module] = (nn.Module(), nn.Module())
        """Of sharded roles: the student's network and the teacher's as they were, without weights."""

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        told = {name: value for name, value in condition.items() if name not in _TOLD}
        return self._call(self._teacher, x, t, told)

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call(self._student, x, t, condition)

    def critic(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self._call(self._need_critic(), x, t, condition)

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminator."""
        return self._discriminator is not None

    def discriminator(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits (B, heads) that noised `x` is data and not the student's; it is not told about steps.

        Gradients go to the heads, to what is trained of the features' network, and to `x`: whoever calls it for the
        student's sake asks for the student's gradients alone (`training.trainee`).
        """
        found = self._discriminator
        if found is None:
            raise FewstepError(
                "found roles without a discriminator, expected one, fix: build_roles(..., discriminator='critic')"
            )
        told = {name: value for name, value in condition.items() if name not in _TOLD}
        if found.seat is None:
            return found.network(x, t, told)
        assert isinstance(self.backbone, Backbone)
        with tapped(self.backbone.tapped_blocks(found.seat.network)) as features:
            self._call(found.seat, x, t, told)
        tokens = [self.backbone.block_tokens(output) for output in features]
        return found.network(tokens).to(x.dtype)

    def log_ratio(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """log p/q (B,) of data and student at noised `x`: the mean logit, a geometric mean of the heads' ratios."""
        return self.discriminator(x, t, condition).flatten(1).mean(1)

    def null(self, condition: Condition) -> Condition:
        """`condition` with the prompt replaced by the empty one, row by row; "steps" and the like stay."""
        if not condition:
            return {}
        null = self.backbone.null_condition()
        return {
            name: null[name].expand(len(value), *null[name].shape[1:]).to(value) if name in null else value
            for name, value in condition.items()
        }

    def student_parameters(self) -> list[nn.Parameter]:
        return list(self._student.parameters().values())

    def critic_parameters(self) -> list[nn.Parameter]:
        """What is trained with the critic: its own parameters and those of the discriminator, as far as there are."""
        return list(self._critic_trained().values())

    def student_state(self) -> dict[str, Tensor]:
        """The trained tensors of the student by name, detached and not copied."""
        return {name: value.detach() for name, value in self._student.parameters().items()}

    def critic_state(self) -> dict[str, Tensor]:
        """The trained tensors of critic and discriminator by name, detached and not copied."""
        return {name: value.detach() for name, value in self._critic_trained().items()}

    def load_student_state(self, state: Mapping[str, Tensor]) -> None:
        """Write what `student_state` returned back into the student, in place."""
        _load(self._student.parameters(), state, STUDENT)

    def load_critic_state(self, state: Mapping[str, Tensor]) -> None:
        """Write what `critic_state` returned back into the critic, in place."""
        _load(self._critic_trained(), state, CRITIC)

    @property
    def student_seat(self) -> Seat:
        return self._student

    @property
    def seats(self) -> list[Seat]:
        """Where roles sit, some of them on one network."""
        return [seat for seat in (self._teacher, self._student, self._critic) if seat is not None]

    @property
    def steps_aware(self) -> bool:
        """Whether student and critic read the condition "steps"."""
        return hasattr(self._student.network, "call_embedder")

    @property
    def one_adapter(self) -> bool:
        """Whether the student is the teacher with one LoRA and nothing else, so that a LoRA file can hold it."""
        return self._student.adapter is not None and not self.steps_aware

    def student_network(self) -> nn.Module:
        """The student as a network of its own on the CPU, float32, adapters merged: what is exported. A copy, frozen.

        Raises:
            FewstepError: the roles are sharded.
        """
        seat = self._student
        self._refuse_sharded()
        if seat.adapter is None:
            network: Any = cpu_copy(seat.network)
            if getattr(network, "is_gradient_checkpointing", False):
                network.disable_gradient_checkpointing()
        else:
            network = self.teacher_copy()
            merge_adapter(seat.network, seat.adapter, into=network)
        return network.requires_grad_(False).eval()

    def teacher_copy(self) -> nn.Module:
        """The teacher's network on the CPU, steps-aware if the student is, float32, with weights of its own."""
        assert isinstance(self.backbone, Backbone)
        backbone = original(self.backbone)
        return cpu_copy(backbone.steps_aware() if self.steps_aware else backbone.network)

    def _refuse_sharded(self) -> None:
        if self.sharded:
            raise FewstepError(
                "found a student that is spread over processes, expected a whole one to copy, "
                "fix: fewstep.models.sharding.collected(roles), in every process"
            )

    def _critic_trained(self) -> dict[str, nn.Parameter]:
        own = {} if self._critic is None else self._critic.parameters()
        return own if self._discriminator is None else own | self._discriminator.parameters()

    def _need_critic(self) -> Seat:
        if self._critic is None:
            raise FewstepError("found roles without a critic, expected one, fix: leave critic at True in build_roles")
        return self._critic

    def _call(self, seat: Seat, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if seat.switch is not None:
            seat.switch.select(seat.adapter)
        with nullcontext() if self.gathered_as is None else torch.autocast(x.device.type, self.gathered_as):
            return self.backbone.call(seat.network, x, t, condition)


def build_roles(
    backbone: Backbone,
    kind: Kind = "adapters",
    *,
    rank: int = 32,
    critic_rank: int | None = None,
    alpha: float | None = None,
    layers: Layers = "attention+ff",
    steps_aware: bool = False,
    checkpointing: bool = False,
    critic: bool = True,
    discriminator: Features = "none",
    compile_backend: str | None = None,
    causal: bool = False,
    sparse: SparseOptions | None = None,
    seed: int = 0,
) -> Roles:
    """Seat the three roles, and a discriminator if it is asked for.

    Args:
        backbone: the teacher.
        kind: "adapters", "copies" or "mixed" (see the module's table).
        rank: of the student's adapter, at least 1.
        critic_rank: of the critic's; as the student's unless told. A smaller one is warned of: the critic has to follow
            the student wherever it goes.
        alpha: adapters are scaled by alpha / rank; the adapter's own rank unless told, which is scale 1.
        layers: which layers take adapters: attention and feed-forward, or every linear layer.
        steps_aware: student and critic read the conditions "steps" and "landing".
        checkpointing: keep only block inputs for the backward pass and compute the rest again.
        critic: whether there is one, for methods that ask it or a discriminator that reads its features.
        discriminator: whose features it reads: the critic's, which it then shapes too (DMD2), or those of the frozen
            teacher (f-distill).
        compile_backend: where given, blocks are compiled when first called, by this backend of torch.compile
            ("inductor" is the usual one); with a causal student those of teacher and critic.
        causal: the student can generate videos chunk by chunk (`fewstep.attention`); teacher and critic see whole ones,
            also where they share its network.
        sparse: what the student's self-attention sees, and the critic's if it says so; the teacher's is dense, also
            where they share its network. None, or "dense": all of it.
        seed: of the new weights (adapters, step embedding, heads).

    Raises:
        FewstepError: unknown kind, layers or discriminator, a rank below 1, an alpha not above 0, a discriminator
            without the critic it should read, or on a backbone that does not say where its features are; a full copy of
            a quantised base; a causal or sparse student of a family that has none, or both; a sparse one compiled, or
            a causal one on a network that is to be.
    """
    if kind not in get_args(Kind):
        raise FewstepError(f"found roles {kind!r}, expected one of {get_args(Kind)}, fix: name one of these")
    if discriminator not in get_args(Features):
        raise FewstepError(
            f"found discriminator {discriminator!r}, expected one of {get_args(Features)}, fix: name one of these"
        )
    if discriminator == "critic" and not critic:
        raise FewstepError(
            "found a discriminator on the features of a critic that is not there, expected one to read, fix: leave "
            "critic at True, or set discriminator to 'teacher'"
        )
    if backbone.quantised is not None and kind != "adapters":
        raise FewstepError(
            f"found roles {kind!r} on a base in {backbone.quantised}, expected adapters, since copies of rounded "
            "weights cannot be trained, fix: --roles adapters, or --base-dtype bfloat16"
        )
    sparse = sparse if sparse is not None and sparse.on else None
    if sparse is not None and (causal or compile_backend is not None):
        raise FewstepError(
            "found a sparse student that is causal, or compiled, expected neither (chunks choose what they see "
            "themselves, and the compiler knows no choice of blocks), fix: leave --sparse at dense, or --compile off"
        )
    if causal and compile_backend is not None and kind == "adapters":
        raise FewstepError(
            "found a causal student to be compiled together with teacher and critic, whose network it shares, expected "
            "networks apart: its blocks are handed a memory, which the compiler does not know, theirs are not, "
            "fix: --roles copies or mixed, or leave --compile off"
        )
    ranks = {STUDENT: rank, CRITIC: rank if critic_rank is None else critic_rank}
    if min(ranks.values()) < 1:
        raise FewstepError(f"found adapter ranks {ranks}, expected at least 1, fix: 16 to 64 are usual")
    if alpha is not None and not alpha > 0:
        raise FewstepError(f"found LoRA alpha {alpha}, expected a number above 0, fix: leave it out, or the rank")
    trained = (STUDENT, CRITIC) if critic else (STUDENT,)
    adapters = [role for role in trained if role in {"adapters": trained, "mixed": (CRITIC,), "copies": ()}[kind]]
    if kind == "adapters" and critic and ranks[CRITIC] < ranks[STUDENT]:
        warnings.warn(
            f"The critic's adapter has rank {ranks[CRITIC]}, less than the student's {ranks[STUDENT]}: a critic that "
            "cannot follow the student misleads it. Give it at least the same rank.",
            stacklevel=2,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base, switch = _adapted_base(backbone, adapters, ranks, alpha, layers, steps_aware)
        seats = {
            role: Seat(base, switch, role) if role in adapters else Seat(_trainable(_own_copy(backbone, steps_aware)))
            for role in trained
        }
        read = {"none": None, "critic": seats.get(CRITIC), "teacher": Seat(base, switch)}[discriminator]
        judge = None if read is None else Discriminator(_heads(backbone, read.network), read)
    if checkpointing:
        for network, its_switch in {(seat.network, seat.switch) for seat in seats.values()}:
            own_way = checkpoint_function(its_switch) if its_switch else None
            network.enable_gradient_checkpointing(own_way)
    if compile_backend is not None:
        own = {seats[STUDENT].network} if causal else set()
        for network in {base, *(seat.network for seat in seats.values())} - own:
            compile_blocks(network, compile_backend)
    seat = backbone.causal(seats[STUDENT].network) if causal else None
    roles = Roles(backbone, Seat(base, switch), seats[STUDENT], seats.get(CRITIC), judge, seat)
    if sparse is not None:
        _make_sparse(roles, backbone, sparse)
    return roles


def _make_sparse(roles: Roles, backbone: Backbone, options: SparseOptions) -> None:
    """Sparse attention for the student, and the critic if it is asked for, wherever they sit."""
    seats = [roles.student_seat] + ([roles._critic] if options.critic and roles._critic is not None else [])
    dense: set[str | None] = {None} if options.critic else {None, CRITIC}
    for network, switch in {(seat.network, seat.switch) for seat in seats}:
        if switch is None:
            backbone.sparse(network, options)
        else:
            backbone.sparse(network, options, partial(_is_sparse, switch, dense))
    roles.sparse = options


def _is_sparse(switch: Switch, dense: set[str | None]) -> bool:
    """Whether the adapter that computes is none of the `dense` ones."""
    return switch.active not in dense


def _heads(backbone: Backbone, network: nn.Module) -> Heads:
    """New heads, float32, on the device of the network."""
    return Heads(backbone.feature_width, len(backbone.tapped_blocks(network))).to(backbone.device)


def _adapted_base(
    backbone: Backbone,
    adapters: list[str],
    ranks: Mapping[str, int],
    alpha: float | None,
    layers: str,
    steps_aware: bool,
) -> tuple[nn.Module, Switch | None]:
    """The frozen base over the backbone's own weights with the adapters in it; the bare network if there are none."""
    if not adapters:
        return backbone.network, None
    base = backbone.steps_aware() if steps_aware else shared_copy(backbone.network)
    for adapter in adapters:
        scale = ranks[adapter] if alpha is None else alpha
        add_adapter(base, adapter, rank=ranks[adapter], alpha=scale, targets=backbone.adapter_targets(layers))
    if steps_aware:
        path = base.call_embedder
        base.set_submodule(path, PerAdapter(base.get_submodule(path), adapters))
    base.requires_grad_(False)
    for adapter in adapters:
        for parameter in adapter_parameters(base, adapter).values():
            parameter.requires_grad_(True)
    return base, Switch(base)


def _own_copy(backbone: Backbone, steps_aware: bool) -> nn.Module:
    """A float32 copy of the teacher's network with weights of its own."""
    return copy.deepcopy(backbone.steps_aware() if steps_aware else backbone.network).float()


def _trainable(network: nn.Module) -> nn.Module:
    return network.requires_grad_(True)


def _load(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], role: str) -> None:
    wrong = sorted(parameters.keys() ^ state.keys()) or sorted(
        name for name, value in parameters.items() if value.shape != state[name].shape
    )
    if wrong:
        raise FewstepError(
            f"found a {role} state that differs in {len(wrong)} of {len(parameters)} tensors (such as {wrong[0]!r}), "
            "expected the state of equal roles, fix: build the roles with the kind, rank, layers, step condition and "
            "discriminator of the checkpoint"
        )
    for name, value in parameters.items():
        fill_(value, state[name])
