"""What a call of a network holds in memory and computes, found by running it on tensors that are only shapes.

Every tensor that torch allocates in forward and backward is counted while it lives, on the kernels that the CPU would
use. Scratch memory inside kernels is not seen. Deep networks are run with two and three of each repeated block, which
determines all: bytes and operations are linear in the number of blocks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

from fewstep.attention.layout import FRAMES
from fewstep.core.tensors import Condition
from fewstep.models.wan_experts import WanExperts
from fewstep.planning.build import Blueprint
from fewstep.planning.calls import Call
from fewstep.planning.conditions import condition_like
from fewstep.training.networks import Networks

_FEW = 2
"""Blocks of a kind that are run at least; runs of up to twice as many are run whole."""


@dataclass(frozen=True)
class Cost:
    """Of one call: bytes beyond weights, gradients and inputs, and floating-point operations of the forward."""

    saved: float
    """Held from the forward for the backward."""
    forward: float
    """Most that is held during the forward."""
    backward: float
    """Most that is held at any time, the backward with all that it computes again included; 0 without one."""
    operations: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(factor * getattr(self, f.name) for f in fields(Cost)))


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that are alive and were made while it is on, and the operations done."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.operations = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self.operations += _operations(function, args, kwargs or {}, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, gone)
        self.alive += size
        self.most = max(self.most, self.alive)


def _operations(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = function._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    if "flash_attention_for_cpu" in str(packet) and "backward" not in str(packet):
        query, key = args[0].shape, args[1].shape  # (B, heads, tokens, width)
        return 4 * query.numel() * key[-2]
    return 0


def trace(
    print_: Blueprint,
    roles: Any,
    call: Call,
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    words: int | None = None,
    whole: bool = False,
) -> Cost:
    """The cost of `call` by `roles`, which were built of fake tensors in `print_`'s mode.

    Args:
        print_: the teacher.
        roles: of `build_roles`.
        call: whose role, how many rows, with or without a backward.
        precision: of the arithmetic, as `TrainOptions.precision`.
        words: `conditions.shapes`.
        whole: run all blocks instead of two and three of each kind.
    """
    network = _network(roles, call.role)
    stacks = [] if whole else _stacks(network)
    counts = [len(blocks) for _, blocks in stacks]

    def run(kept: list[int]) -> Cost:
        with ExitStack() as stack:
            for (home, blocks), count in zip(stacks, kept, strict=True):
                stack.enter_context(_shortened(home, blocks, count))
            return _run(print_, roles, network, call, precision, words)

    fewest = [_FEW] * len(stacks)
    base = run(fewest)
    total = base
    for place, count in enumerate(counts):
        more = run([_FEW + (index == place) for index in range(len(stacks))])
        total = total + (more + base * -1) * (count - _FEW)
    return total


def _run(print_: Blueprint, roles: Any, network: nn.Module, call: Call, precision: Any, words: int | None) -> Cost:
    """One forward, and a backward if the call has one, of the network as it is now."""
    backbone = roles.backbone
    networks: Any = Networks(roles, precision, torch.device("cpu"))
    with print_.mode, torch.set_grad_enabled(call.graph):
        shape = list(backbone.latent_shape)
        if call.seen is not None:
            shape[FRAMES - 1] = call.frames
        x = torch.empty(call.rows, *shape, requires_grad=call.through)
        of_frames = call.layout is not None and call.seen is None  # all chunks at once, each frame at a time of its own
        t = torch.empty(call.rows, shape[FRAMES - 1]) if of_frames else torch.empty(call.rows)
        condition = condition_like(backbone, call.rows, words)
        if roles.steps_aware:
            condition |= {"steps": torch.empty(call.rows), "landing": torch.empty(call.rows)}
        present = {id(parameter) for parameter in network.parameters()}
        trained = [p for p in _trained(roles, call.role) if id(p) in present] if call.graph else []
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        answer_to, remembered = _asked(networks, call, x, t, condition)
        known = [x, t, *condition.values(), *remembered, *network.parameters(), *network.buffers()]
        known += [p.grad for p in trained if p.grad is not None]
        with Ledger(known) as ledger:
            answer = _computed_again(answer_to) if call.again else answer_to()
            saved, forward, operations = ledger.alive, ledger.most, ledger.operations
            if call.graph:
                answer.sum().backward(inputs=[*trained, *([x] if call.through else [])])
            most = ledger.most if call.graph else 0
        del answer
        for parameter in trained:
            parameter.grad = None
    return Cost(saved if call.graph else 0, forward, most, operations)


def _asked(
    networks: Any, call: Call, x: Tensor, t: Tensor, condition: Condition
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The call, still to be made, and what a causal student remembers at that time."""
    layout = call.layout
    if layout is None:
        return lambda: getattr(networks, call.role)(x, t, condition), []
    if call.seen is None:
        clean = x.detach() if call.frames > x.shape[FRAMES] else None
        return lambda: networks.causal.parallel(networks.student, layout, x, t, condition, clean), []
    if layout.kept == "noisy":  # a call sees as much with `last`, and asks for no time, which here is only a shape
        layout = replace(layout, kept="last")
    memory = networks.causal.memory(networks.student, layout, condition)
    while memory.seen_frames < (call.seen + 1) * layout.chunk:
        if layout.kept != "clean":
            memory.denoise(x.detach(), t)
        memory.remember(x.detach())
    kept = [part for chunk in memory.remembered for layer in chunk.layers for part in layer]
    return lambda: memory.denoise(x, t), kept


def _computed_again(answer_to: Callable[[], Tensor]) -> Tensor:
    """As `fewstep.streaming.rollout.CausalPath` does it."""
    answer: Tensor = checkpoint(answer_to, use_reentrant=False, preserve_rng_state=False)
    return answer


def _network(roles: Any, role: str) -> nn.Module:
    seat = {"teacher": roles._teacher, "student": roles._student, "critic": roles._critic}.get(role)
    network = roles._discriminator.seat.network if seat is None else seat.network
    return network.high if isinstance(network, WanExperts) else network


def _trained(roles: Any, role: str) -> list[nn.Parameter]:
    if role == "teacher":
        return []
    return roles.student_parameters() if role == "student" else roles.critic_parameters()


def _stacks(network: nn.Module) -> list[tuple[nn.ModuleList, list[nn.Module]]]:
    """Lists of modules with their longest run of like modules, where it is long enough to be shortened."""
    found = []
    for module in network.modules():
        if isinstance(module, nn.ModuleList):
            run: list[nn.Module] = []
            longest: list[nn.Module] = []
            for block in module:
                run = [*run, block] if run and _shape(run[-1]) == _shape(block) else [block]
                longest = max(longest, run, key=len)
            if len(longest) > 2 * _FEW:
                found.append((module, longest))
    return found


def _shape(module: nn.Module) -> Any:
    return type(module), [(name, p.shape, p.dtype) for name, p in module.named_parameters()]


@contextmanager
def _shortened(home: nn.ModuleList, blocks: list[nn.Module], count: int) -> Iterator[None]:
    """`home` with only the first `count` of `blocks`."""
    before = home._modules
    dropped = {id(block) for block in blocks[count:]}
    kept = [block for block in before.values() if id(block) not in dropped]
    home._modules = {str(index): block for index, block in enumerate(kept)}
    try:
        yield
    finally:
        home._modules = before
