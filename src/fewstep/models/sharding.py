"""Weights spread over processes with FSDP2, and read from disk only then.

`shard` comes last in the building of roles: network on the meta device -> adapters -> checkpointing -> compile -> shard
-> load. Every block of a network, and what lies outside its blocks, is gathered while it computes and freed again. What
is gathered is a block's base, in its own dtype, together with its adapters: one collective for both, and gradients for
the adapters alone. docs/scaling.md says why, and what it costs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from fewstep.core.shards import whole
from fewstep.errors import FewstepError
from fewstep.models.adapters import Switch, shared_copy
from fewstep.models.backbone import Backbone
from fewstep.models.blocks import outermost_blocks
from fewstep.models.deferred import plain_name
from fewstep.models.discriminator import Heads
from fewstep.models.experts import ExpertRoles
from fewstep.models.roles import Caller, Roles, Seat
from fewstep.models.wan_experts import WanExperts


def shard(roles: Roles, precision: Literal["fp32", "bf16", "fp16"] = "fp32") -> None:
    """Leave each process only its part of every network of `roles`, in place; every process calls this.

    Roles are then called by all processes at once, and trained by `fewstep.training.train` as before. The backbone's
    own network holds the same parts, and is no longer called: a teacher that is to sample has to be loaded again. In a
    single process nothing is spread; weights left on disk (`load_backbone(..., defer=True)`) are loaded all the same.

    Args:
        roles: as `build_roles` makes them, the same in every process; nobody keeps their parameters yet.
        precision: of the arithmetic. With bf16, weights are gathered as bfloat16 and gradients summed in float32.

    Raises:
        FewstepError: roles whose student is not of the teacher's shape.
    """
    if type(roles) not in (Roles, ExpertRoles):
        raise FewstepError(
            f"found {type(roles).__name__} to be spread over processes, expected roles whose student has the teacher's "
            "shape, fix: leave --shard off"
        )
    spread = dist.is_initialized() and dist.get_world_size() > 1
    backbone = roles.backbone if isinstance(roles.backbone, Backbone) else None
    if spread:
        device = roles.student_parameters()[0].device if backbone is None else backbone.device
        if backbone is not None:
            _seat_apart(roles, backbone)
        roles.skeletons = _skeletons(roles)
        roles.sharded = _networks(roles)
        roles.gathered_as = torch.bfloat16 if precision == "bf16" else None
    moved: dict[int, nn.Parameter] = {}
    theirs = set() if backbone is None else {id(parameter) for parameter in backbone.network.parameters()}
    for network in _networks(roles):
        before = {name: id(value) for name, value in network.named_parameters() if id(value) in theirs}
        if spread:
            blocks = [] if isinstance(network, Heads) else outermost_blocks(network)
            _shard_network(network, blocks, device, precision)
        if backbone is not None and backbone.deferred is not None:
            backbone.deferred.load(network)
            if not spread:
                network.to(backbone.deferred.device)
        after = dict(network.named_parameters())
        moved |= {before[name]: after[name] for name in before}
    if backbone is not None:
        for module in backbone.network.modules():
            module._parameters.update({name: moved.get(id(p), p) for name, p in module._parameters.items()})  # type: ignore[arg-type]
        backbone.deferred = None


def collected(roles: Roles) -> Roles | None:
    """The student of sharded roles, whole, on the CPU of the first process: for saving; None in the other processes.

    All processes call this; they gather one tensor at a time. Roles that are not sharded are returned as they are.

    Raises:
        FewstepError: experts of which some are still to be trained.
    """
    if not roles.sharded:
        return roles
    experts = roles.experts if isinstance(roles, ExpertRoles) else [roles.student_seat]
    if any(seat is roles._teacher for seat in experts):
        raise FewstepError(
            "found experts that are still to be trained, expected all of them to collect a student that is spread over "
            "processes, fix: save it after the last phase"
        )
    others = {id(parameter) for parameter in roles.critic_parameters()}
    twins = {network: _gathered(network, roles, others) for network in dict.fromkeys(seat.network for seat in experts)}
    if dist.get_rank() != 0:
        return None
    plain, switch = copy.deepcopy(roles.skeletons[1]), None
    if experts[0].adapter is not None:  # all are on one network
        (twin,) = twins.values()
        switch = Switch(twin)
        of_base = {plain_name(name): value for name, value in twin.named_parameters() if not value.is_meta}
        for name, parameter in list(plain.named_parameters()):
            _put(plain, name, of_base.get(name, torch.empty_like(parameter, device="cpu")))
    seats = [Seat(twins[s.network] if switch else twins[s.network].to("cpu"), switch, s.adapter) for s in experts]
    parts = [_Collected(roles.backbone, seat, plain.to("cpu")) for seat in seats]
    return _CollectedExperts(parts, roles.switches) if isinstance(roles, ExpertRoles) else parts[0]


def _gathered(network: nn.Module, roles: Roles, others: set[int]) -> nn.Module:
    """A network like the student's; in the first process with all weights but the `others`, on the CPU."""
    twin = copy.deepcopy(roles.skeletons[0])
    for name, parameter in network.named_parameters():
        if id(parameter) not in others:
            value = whole(parameter)
            if dist.get_rank() == 0:
                _put(twin, name, value.cpu())
    return twin


class _Collected(Roles):
    """A student and a plain network of the teacher's weights, neither of them for calling."""

    def __init__(self, backbone: Caller, student: Seat, plain: nn.Module) -> None:
        super().__init__(backbone, student, student, None)
        self._plain = plain

    def teacher_copy(self) -> nn.Module:
        return copy.deepcopy(self._plain).float()


class _CollectedExperts(ExpertRoles):
    """Such students as one."""

    def __init__(self, parts: Sequence[_Collected], switches: Sequence[float]) -> None:
        super().__init__(parts[-1], [part.student_seat for part in parts[:-1]], switches)
        self._parts = parts

    def _networks(self) -> list[nn.Module]:
        return [part.student_network() for part in self._parts]


def _shard_network(network: nn.Module, blocks: list[nn.Module], device: torch.device, precision: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":  # inputs are left to autocast: some, such as angles of positions, have to stay float32
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in (*blocks, network):
        # Always freed after a call, also the root: kept weights would be those from before the next optimiser step.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, WanExperts):
            module.together = True


def _seat_apart(roles: Roles, backbone: Backbone) -> None:
    """Where the backbone's network itself has a seat, another tree over its weights takes it.

    FSDP's hooks are on that one then, and the backbone's stays a plain network for what only looks at it.
    """
    if roles._teacher.network is not backbone.network:
        return
    roles._teacher = Seat(shared_copy(backbone.network))
    judge = roles._discriminator
    if judge is not None and judge.seat is not None and judge.seat.network is backbone.network:
        roles._discriminator = replace(judge, seat=roles._teacher)


def _networks(roles: Roles) -> list[nn.Module]:
    """Every network of the roles that has parameters, once."""
    networks = [seat.network for seat in roles.seats]
    if roles._discriminator is not None:
        networks.append(roles._discriminator.network)
    return [network for network in dict.fromkeys(networks) if any(True for _ in network.parameters())]


def _skeletons(roles: Roles) -> tuple[nn.Module, nn.Module]:
    """The student's network and the teacher's, of its kind, as they are before sharding, without weights."""
    seat, backbone = roles.student_seat, roles.backbone
    if seat.adapter is None or not isinstance(backbone, Backbone):
        return _skeleton(seat.network), nn.Module()
    told = hasattr(seat.network, "call_embedder")  # as Roles.steps_aware; experts are, and are not told
    return _skeleton(seat.network), _skeleton(backbone.steps_aware() if told else backbone.network)


def _skeleton(network: nn.Module) -> nn.Module:
    """A deep copy whose parameters are on the meta device."""
    nothing = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, nothing)  # type: ignore[arg-type]


def _put(network: nn.Module, name: str, value: torch.Tensor) -> None:
    """Let `value` be the parameter `name`, frozen."""
    owner, _, own_name = name.rpartition(".")
    setattr(network.get_submodule(owner), own_name, nn.Parameter(value.detach(), requires_grad=False))
