"""Networks that hold several experts and pick one by the timestep they are given, so that any pipeline can drive them.

Wan2.2 is released so: two transformers and a boundary. Here the pipeline stays the stock one and its transformer is a
subclass of the family's own: the first expert is the network itself, the others lie in it.

    import fewstep.models.expert_networks
    from diffusers import DiffusionPipeline
    images = DiffusionPipeline.from_pretrained(folder)("a frog", num_inference_steps=4, guidance_scale=1).images
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin, PixArtTransformer2DModel
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from fewstep.errors import FewstepError
from fewstep.models.experts import expert_of
from fewstep.models.steps_aware import StepsAwarePixArtTransformer2DModel

__all__ = [
    "ExpertsPixArtTransformer2DModel",
    "ModelMixin",  # diffusers looks in the module of a class of ours for the base class that says how to load it
    "switching_network",
]

_PLAIN = inspect.signature(PixArtTransformer2DModel.__init__)
_SWITCHES = inspect.Parameter("switches", inspect.Parameter.KEYWORD_ONLY, default=())


class ExpertsPixArtTransformer2DModel(PixArtTransformer2DModel):
    """`PixArtTransformer2DModel` whose weights depend on the timestep.

    Args:
        switches: falling timesteps; the n-th of `later_experts` computes below the n-th of them.
    """

    @functools.wraps(PixArtTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, switches: Sequence[float] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        alike = {name: value for name, value in self.config.items() if name in _PLAIN.parameters}
        self.later_experts = nn.ModuleList(PixArtTransformer2DModel(**alike) for _ in switches)
        self.register_to_config(switches=list(switches))

    __init__.__signature__ = _PLAIN.replace(  # type: ignore[attr-defined]
        parameters=[*_PLAIN.parameters.values(), _SWITCHES]  # what diffusers reads of a config
    )

    def forward(self, hidden_states: Tensor, *args: Any, timestep: Tensor, **kwargs: Any) -> Any:
        """As PixArt's; a batch of different times is split by expert."""
        timestep = timestep.reshape(-1).expand(len(hidden_states))
        expert = expert_of(timestep.float(), self.config.switches)
        present = expert.unique().tolist()
        if len(present) == 1:
            return self._ask(present[0], hidden_states, *args, timestep=timestep, **kwargs)
        wants_object = kwargs.pop("return_dict", True)
        rows = [(expert == index).nonzero().flatten() for index in present]
        parts = []
        for index, own in zip(present, rows, strict=True):
            told = _rows({"timestep": timestep, **kwargs}, own)
            parts += self._ask(index, *_rows([hidden_states, *args], own), **told, return_dict=False)
        sample = torch.cat(parts)[torch.cat(rows).argsort()]
        return Transformer2DModelOutput(sample=sample) if wants_object else (sample,)

    def _ask(self, expert: int, *args: Any, **kwargs: Any) -> Any:
        return self.later_experts[expert - 1](*args, **kwargs) if expert else super().forward(*args, **kwargs)


def switching_network(networks: Sequence[nn.Module], switches: Sequence[float]) -> nn.Module:
    """The first of the experts `networks`, noise first, made to hold the others; `switches` are network times.

    Raises:
        FewstepError: there is no such network for the family.
    """
    first, *later = (_untold(network) for network in networks)
    refuse_others(first)
    first.__class__ = ExpertsPixArtTransformer2DModel
    first.later_experts = nn.ModuleList(later)
    first.register_to_config(switches=list(switches))  # type: ignore[operator]
    return first


def _untold(network: nn.Module) -> nn.Module:
    """A steps-aware network that is told nothing, as the plain one that it is."""
    if isinstance(network, StepsAwarePixArtTransformer2DModel):
        embedding = network.adaln_single.emb
        del embedding.call_embedder
        embedding.__class__ = PixArtAlphaCombinedTimestepSizeEmbeddings
        network.__class__ = PixArtTransformer2DModel
    return network


def refuse_others(network: nn.Module) -> None:
    """Raises a FewstepError for families whose experts could not be saved as one network."""
    if type(network) is not PixArtTransformer2DModel:
        raise FewstepError(
            f"found experts that are {type(network).__name__}, expected PixArtTransformer2DModel, fix: add a subclass "
            "of theirs to fewstep.models.expert_networks"
        )


def _rows(parts: Any, own: Tensor) -> Any:
    """The rows `own` of every tensor in a nest of lists and dicts."""
    if isinstance(parts, Tensor):
        return parts[own]
    if isinstance(parts, dict):
        return {name: _rows(part, own) for name, part in parts.items()}
    return [_rows(part, own) for part in parts] if isinstance(parts, list) else parts
