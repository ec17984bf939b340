"""A network whose weights are still on disk: built on the meta device, read once it is known who needs which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fewstep.core.files import check_index
from fewstep.core.shards import fill_, is_sharded
from fewstep.errors import FewstepError


@dataclass(frozen=True)
class Deferred:
    """Where the weights of a backbone's network lie, and where they are to go."""

    device: torch.device
    files: Mapping[str, tuple[Path, str, torch.dtype]]
    """By the tensor's name in the network: a safetensors file, the name in it, and the dtype it has in the base."""

    @torch.no_grad()
    def load(self, network: nn.Module) -> None:
        """Read what of `network`, the backbone's or one built of it, is still on the meta device, in place.

        Each process reads only its own rows of sharded parameters. Weights come in the dtype that they have on the meta
        device, rounded to the base's first: copies begin as the teacher. Parameters become new objects, so this has to
        come before anyone keeps them.
        """
        from safetensors import safe_open

        opened: dict[Path, Any] = {}
        for prefix, module in network.named_modules():
            own = {**module._parameters, **module._buffers}
            for name, tensor in own.items():
                place = self.files.get(plain_name(f"{prefix}.{name}" if prefix else name))
                if tensor is None or place is None or (isinstance(tensor, nn.Parameter) and not _on_meta(tensor)):
                    continue
                path, key, dtype = place
                if path not in opened:
                    opened[path] = safe_open(path, framework="pt")
                if isinstance(tensor, nn.Parameter):
                    tensor = nn.Parameter(_empty(tensor, self.device), requires_grad=tensor.requires_grad)
                    setattr(module, name, tensor)
                fill_(tensor, opened[path].get_slice(key), dtype)


def plain_name(name: str) -> str:
    """The name in the plain network of a tensor in one with adapters."""
    return name.replace(".base_layer.", ".")


@contextmanager
def left_on_disk(classes: Iterable[type[nn.Module]], dtype: torch.dtype) -> Iterator[None]:
    """Within, `from_pretrained` of these network classes leaves parameters on the meta device, in their final dtypes.

    Buffers are real. Costs drawing the initial weights, one tensor at a time. (Pipelines do not all take a network that
    is handed to them.)
    """
    from accelerate import init_empty_weights

    def of(network_class: Any) -> Callable[..., nn.Module]:
        def from_pretrained(folder: str, **options: Any) -> nn.Module:
            with init_empty_weights(include_buffers=False):
                network: nn.Module = network_class.from_config(network_class.load_config(folder))
            kept = network_class._keep_in_fp32_modules or []
            for name, parameter in network.named_parameters():
                if not any(part in kept for part in name.split(".")):
                    parameter.data = parameter.data.to(dtype)
            return network.eval()

        return from_pretrained

    with ExitStack() as stack:
        for network_class in set(classes):
            stack.enter_context(patch.object(network_class, "from_pretrained", of(network_class)))
        yield


def weight_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """File and name of every tensor of a network's folder, by its name.

    Raises:
        FewstepError: there is no safetensors file under the usual name.
    """
    from safetensors import safe_open

    single = folder / "diffusion_pytorch_model.safetensors"
    index = folder / f"{single.name}.index.json"
    if index.is_file():
        return {name: (folder / file, name) for name, file in check_index(index).items()}
    if not single.is_file():
        raise FewstepError(
            f"found no {single.name} in {folder}, expected the network's weights, fix: save the pipeline with "
            "save_pretrained, or load it without defer"
        )
    with safe_open(single, framework="pt") as file:
        return {name: (single, name) for name in file.keys()}  # noqa: SIM118  not a dictionary


def _on_meta(tensor: Tensor) -> bool:
    return tensor.device.type == "meta"


def _empty(parameter: Tensor, device: torch.device) -> Tensor:
    """Room on `device` for what this process holds of a parameter that is on the meta device."""
    if not is_sharded(parameter):
        return torch.empty_like(parameter, device=device)
    from torch.distributed.tensor import DTensor

    part = torch.empty_like(parameter.to_local(), device=device)  # type: ignore[operator]
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
