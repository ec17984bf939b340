"""Several roles on one frozen network: LoRA adapters that are switched without side effects.

PEFT injects and computes the adapters; switching is done here, because PEFT's own way has two silent traps:

1. `set_adapter("critic")` clears `requires_grad` of every other adapter: a student backward after it yields no
   gradient, and no error. Here `requires_grad` is set once and switching never touches it.
2. With activation checkpointing the recompute in `backward` uses whatever adapter is active *then*: a wrong gradient,
   without an error. Here every checkpoint remembers the adapter of its own forward (`checkpoint_function`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def shared_copy(network: nn.Module) -> nn.Module:
    """A second module tree over the very same parameters and buffers: layers can be replaced, memory is not doubled."""
    tensors: Iterable[Tensor] = chain(network.parameters(), network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})


def cpu_copy(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy on the CPU, floats in `dtype`; tensor by tensor, so that no device holds a second one of `network`."""
    tensors: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        value = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        trained = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if trained else value
    return copy.deepcopy(network, tensors)


class PerAdapter(nn.Module):
    """One copy of a small submodule for each adapter, all trained in full; calls go to the active one."""

    def __init__(self, module: nn.Module, adapters: Iterable[str]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({adapter: copy.deepcopy(module).float() for adapter in adapters})
        self._active_adapter: list[str] = []  # the name under which PEFT's layers keep theirs

    def forward(self, *args: Any) -> Tensor:
        (adapter,) = self._active_adapter
        return self.copies[adapter](*args)


class Switch:
    """Which adapter of a network computes: a name, or None for the bare base."""

    def __init__(self, network: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [layer for layer in network.modules() if isinstance(layer, (BaseTunerLayer, PerAdapter))]
        self.active: str | None = None
        self._apply()

    def select(self, adapter: str | None) -> None:
        """Let `adapter` compute from now on; gradients and `requires_grad` of all adapters stay as they are."""
        if adapter != self.active:
            self.active = adapter
            self._apply()

    def _apply(self) -> None:
        for layer in self._layers:
            layer._active_adapter = [] if self.active is None else [self.active]


class _Selected:
    """Context in which one adapter computes; can be entered again, as a second backward does."""

    def __init__(self, switch: Switch, adapter: str | None) -> None:
        self.switch, self.adapter = switch, adapter
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before.append(self.switch.active)
        self.switch.select(self.adapter)

    def __exit__(self, *error: object) -> None:
        self.switch.select(self._before.pop())


def checkpoint_function(switch: Switch) -> Callable[..., Any]:
    """For diffusers' `enable_gradient_checkpointing`: recomputes with the adapter that was active in the forward."""

    def run(module: nn.Module, *args: Any) -> Any:
        adapter = switch.active
        return checkpoint(
            module.__call__,
            *args,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _Selected(switch, adapter)),
        )

    return run


def add_adapter(network: nn.Module, adapter: str, *, rank: int, alpha: float, targets: list[str] | str) -> None:
    """Inject a LoRA adapter that changes nothing yet; its weights are float32 whatever the base is.

    `targets` are ends of layers' names, or an expression that matches them in full.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    with warnings.catch_warnings(), _standing_in(network):
        warnings.filterwarnings("ignore", message=".*peft_config.*")  # a second adapter is what we want
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")  # PEFT merges nothing here
        inject_adapter_in_model(config, network, adapter)
    for parameter in adapter_parameters(network, adapter).values():
        parameter.data = parameter.data.float()


@contextmanager
def _standing_in(network: nn.Module) -> Iterator[None]:
    """One number on the CPU stands for each weight on the meta device: PEFT makes adapters where the base is."""
    kept = []
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                kept.append((module, name, parameter))
                number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(number, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def adapter_parameters(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Everything that belongs to one adapter, by its name in the network."""
    return {name: value for name, value in network.named_parameters() if f".{adapter}." in name}


@torch.no_grad()
def merge_adapter(network: nn.Module, adapter: str, into: nn.Module) -> None:
    """Add the LoRA updates of `network` to `into`, a plain network with the base's weights; computed in float32."""
    from peft.tuners.lora import LoraLayer

    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            target = into.get_submodule(name).weight
            target.copy_(target.float() + layer.get_delta_weight(adapter).float().to(target.device))
        elif isinstance(layer, PerAdapter):
            into.get_submodule(name).load_state_dict(layer.copies[adapter].state_dict())
