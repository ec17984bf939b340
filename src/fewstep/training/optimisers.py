"""AdamW, in full or with its two moments in 8 bits, and the way of its state to disk and back to the bit.

"adamw" is torch's, fused on every device: 8 bytes a trained parameter. "adamw8bit" is bitsandbytes' (Dettmers et al.,
arXiv 2110.02861): a byte for each moment and four for every 256 of them; tensors of fewer than 4096 numbers stay in
full.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.errors import FewstepError

Optimiser = Literal["adamw", "adamw8bit"]
_BLOCK, _SMALL = 256, 4096  # bitsandbytes' own
_COUNT = "step"
_TABLES = ("qmap1", "qmap2")
"""What the 256 codes of a moment stand for: one tensor of all parameters, which files take only one by one."""


def make_optimiser(
    kind: Optimiser, parameters: list[nn.Parameter], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An AdamW of `kind` on `parameters`; its learning rate is set before each step.

    Raises:
        FewstepError: 8 bits without bitsandbytes.
    """
    if kind == "adamw":
        return torch.optim.AdamW(parameters, betas=betas, weight_decay=weight_decay, fused=True)
    require(kind)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, betas=betas, weight_decay=weight_decay)


def require(kind: Optimiser) -> None:
    """Raises FewstepError if the package of `kind` is not installed."""
    if kind == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise FewstepError(
            "found no package bitsandbytes, expected it for optimiser = adamw8bit, "
            "fix: pip install 'fewstep[bitsandbytes]', or --optimiser adamw"
        )


def state_bytes(kind: Optimiser, numbers: int) -> int:
    """Bytes of the state of a parameter of so many float32 numbers; tables that all parameters share are left out."""
    if kind == "adamw":
        return 8 * numbers + 4  # the count of steps is a tensor
    if numbers < _SMALL:
        return 8 * numbers
    return 2 * (numbers + 4 * -(-numbers // _BLOCK))


def tensors(optimiser: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Its state as "parameter.entry" -> tensor; `names` are those of its parameters, in their order."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return {
        f"{name}.{key}": value.clone() if key in _TABLES else torch.as_tensor(value)
        for name, parameter in zip(names, parameters, strict=True)
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load(optimiser: torch.optim.Optimizer, saved: Mapping[str, Tensor], names: list[str]) -> None:
    """Takes over what `tensors` returned."""
    states: dict[int, dict[str, Any]] = {}
    indices = {name: index for index, name in enumerate(names)}
    for name, tensor in saved.items():
        parameter, key = name.rsplit(".", 1)
        states.setdefault(indices[parameter], {})[key] = tensor
    if isinstance(optimiser, torch.optim.AdamW):
        optimiser.load_state_dict({"state": states, "param_groups": optimiser.state_dict()["param_groups"]})
        return
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for index, state in states.items():  # as it is: codes are bytes, whatever the parameter is
        own = {key: value.to(parameters[index].device) for key, value in state.items()}
        optimiser.state[parameters[index]] = own | {_COUNT: int(state[_COUNT])}
