"""A student of several networks, its experts, each for a range of times: roles that train one, and a network of all.

| kind       | expert in training | earlier experts                | later experts          |
|------------|--------------------|--------------------------------|------------------------|
| "adapters" | LoRA on the base   | a frozen LoRA each on the base | the teacher, unguided  |
| "copies"   | full copy          | a frozen full copy each        | the teacher, unguided  |
| "mixed"    | full copy          | a frozen full copy each        | the teacher, unguided  |

Later experts are what they will begin as, so that a student can be looked at, and saved, at any time of its training.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.tensors import Condition, index_condition
from fewstep.errors import FewstepError
from fewstep.models.adapters import PerAdapter, adapter_parameters, add_adapter, cpu_copy
from fewstep.models.backbone import Backbone
from fewstep.models.loading import original
from fewstep.models.roles import Kind, Roles, Seat, build_roles


class ExpertRoles(Roles):
    """Roles whose student is, sample by sample, the expert of its time; only one expert is trained.

    Args:
        roles: student (the expert in training), critic and teacher.
        earlier: frozen seats of the experts before it, noise first.
        switches: times, falling, of which the n-th lies between the calls of expert n and of expert n + 1.
    """

    def __init__(self, roles: Roles, earlier: Sequence[Seat], switches: Sequence[float]) -> None:
        super().__init__(roles.backbone, roles._teacher, roles._student, roles._critic, roles._discriminator)
        self._earlier, self.switches, self.sparse = list(earlier), tuple(switches), roles.sparse

    @property
    def experts(self) -> list[Seat]:
        """All of them, noise first; later ones are the teacher."""
        later = len(self.switches) - len(self._earlier)
        return [*self._earlier, self._student, *[self._teacher] * later]

    @property
    def seats(self) -> list[Seat]:
        """The earlier experts' as well."""
        return [*super().seats, *self._earlier]

    def student(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """One call of one expert for every sample; a batch of different times is split by expert.

        Experts that are spread over processes are all called every time, for one row to no purpose where no sample is
        theirs, since other processes may have samples for them.
        """
        expert = expert_of(t, self.switches)
        present = list(range(len(self.experts))) if self.sharded else expert.unique().tolist()
        if len(present) == 1:
            return self._call(self.experts[present[0]], x, t, condition)
        rows = [(expert == index).nonzero().flatten() for index in present]
        parts = []
        for index, own in zip(present, rows, strict=True):
            called = own if len(own) else own.new_zeros(1)
            answer = self._call(self.experts[index], x[called], t[called], index_condition(condition, called))
            parts.append(answer[: len(own)])
        return torch.cat(parts)[torch.cat(rows).argsort()]

    @property
    def steps_aware(self) -> bool:
        """False: experts are for one step count, and if networks read "landing", only the critic is told it."""
        return False

    @property
    def one_adapter(self) -> bool:
        """False: there is one for each expert."""
        return False

    def student_network(self) -> nn.Module:
        """All experts as one network that switches by itself (`fewstep.models.expert_networks`). A copy, frozen."""
        from fewstep.models.expert_networks import switching_network

        assert isinstance(self.backbone, Backbone)
        self._refuse_sharded()
        switches = self.backbone.process.network_time(torch.tensor(self.switches, dtype=torch.float64))
        return switching_network(self._networks(), switches.tolist()).requires_grad_(False).eval()

    def _networks(self) -> list[nn.Module]:
        """A copy of each expert."""
        assert isinstance(self.backbone, Backbone)
        return [
            cpu_copy(original(self.backbone).network)
            if seat is self._teacher
            else Roles(self.backbone, self._teacher, seat, None).student_network()
            for seat in self.experts
        ]


def build_expert_roles(
    backbone: Backbone,
    kind: Kind,
    switches: Sequence[float],
    earlier: Sequence[Mapping[str, Tensor]],
    **options: Any,
) -> ExpertRoles:
    """Seat the expert that follows `earlier` ones as the student, starting as the teacher, with a fresh critic.

    Args:
        backbone: the teacher.
        kind: how roles share weights, as in `build_roles`.
        switches: times at which experts change (`switch_times`), one fewer than experts.
        earlier: `student_state()` of the experts before, noise first.
        options: more for `build_roles`; with `steps_aware` networks read "landing", which the student is not told.

    Raises:
        FewstepError: there are more earlier experts than switches, or states that do not fit.
    """
    if len(earlier) > len(switches):
        raise FewstepError(
            f"found {len(earlier)} experts before this one and {len(switches)} times at which experts change, expected "
            "no more experts than times, fix: name the time at which each expert ends"
        )
    roles = build_roles(backbone, kind, **options)
    frozen = [_frozen_seat(roles.student_seat, f"expert{n}", state) for n, state in enumerate(earlier, start=1)]
    return ExpertRoles(roles, frozen, switches)


def switch_times(grid: Tensor, ends: Sequence[int]) -> tuple[float, ...]:
    """Midway between the last call of an expert and the first of the next; `ends` are the calls made by then.

    At midpoints no rounding of times can change who is called.
    """
    return tuple(float(grid[end - 1] + grid[end]) / 2 for end in ends[:-1])


def expert_of(t: Tensor, switches: Sequence[float]) -> Tensor:
    """(B,) long: 0 above the first of the falling `switches`, 1 above the second, ...; also for network times."""
    return (t[:, None] < t.new_tensor(list(switches))).sum(1)


def _frozen_seat(student: Seat, name: str, state: Mapping[str, Tensor]) -> Seat:
    """A seat like the student's, with the weights of `state`; those of the student may still be on disk."""
    if student.adapter is None:
        own = dict(student.network.named_parameters())
        _refuse_others(own, state)
        weights = {
            id(parameter): nn.Parameter(_beside(parameter, state[name]), requires_grad=False)
            for name, parameter in own.items()
        }
        return Seat(copy.deepcopy(student.network, weights))  # type: ignore[arg-type]
    assert student.switch is not None
    network, config = student.network, student.network.peft_config[student.adapter]  # type: ignore[index]
    trained = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    add_adapter(network, name, rank=config.r, alpha=config.lora_alpha, targets=list(config.target_modules))
    for layer in network.modules():
        if isinstance(layer, PerAdapter):
            layer.copies[name] = copy.deepcopy(layer.copies[student.adapter])
    for key, parameter in network.named_parameters():  # PEFT has changed them, and which adapter computes
        parameter.requires_grad_(key in trained)
    student.switch.select(name)
    own, named = adapter_parameters(network, name), f".{student.adapter}."
    state = {key.replace(named, f".{name}."): value for key, value in state.items()}
    _refuse_others(own, state)
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    return Seat(network, student.switch, name)


def _refuse_others(parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    wrong = sorted(parameters.keys() ^ state.keys())
    if wrong:
        raise FewstepError(
            f"found an expert's state that differs in {len(wrong)} tensors (such as {wrong[0]!r}), expected that of "
            "equal roles, fix: build the roles with the kind, rank and layers that the expert was trained with"
        )


def _beside(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` where `parameter` is, on the CPU if that is nowhere yet."""
    return value.to("cpu" if parameter.is_meta else parameter.device, parameter.dtype, copy=True)
