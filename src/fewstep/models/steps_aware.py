"""A PixArt network that is told its step count K, and the pipeline that tells it.

TDM-unify (card tdm.md, section 2.7) trains one student for several step counts: at pure noise the right answer for one
step is another one than for eight, so the student must know K. A small network of log2 K is added to the time
embedding; its last layer starts at zero, so that a fresh one is the teacher, to the bit, for any K. Critics may also be
told the time of the landing point they are asked about.

    from fewstep.models.steps_aware import StepsAwarePixArtPipeline
    images = StepsAwarePixArtPipeline.from_pretrained(folder)("a frog", num_inference_steps=4, guidance_scale=1).images
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin, PixArtAlphaPipeline, PixArtTransformer2DModel
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings, TimestepEmbedding, Timesteps
from torch import Tensor, nn

from fewstep.errors import FewstepError

__all__ = [
    "ModelMixin",  # diffusers looks in the module of a class of ours for the base class that says how to load it
    "StepsAwarePixArtPipeline",
    "StepsAwarePixArtTransformer2DModel",
    "made_steps_aware",
]

_BINNED_SIZES = (32, 64, 128)  # the latent sizes whose images PixArtAlphaPipeline can fit to its table of aspect ratios


class CallEmbedding(nn.Module):
    """(B, width) from the step count K (B,) and the landing time in [0, 1) (B,), either of which may be None; zero at
    first.

    Both become 128 sinusoids each, of 100 log2 K and 1000 t, zeros where None.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoids = Timesteps(num_channels=128, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(in_channels=256, time_embed_dim=width)
        nn.init.zeros_(self.mlp.linear_2.weight)
        nn.init.zeros_(self.mlp.linear_2.bias)

    def forward(self, steps: Tensor | None, landing: Tensor | None) -> Tensor:
        given = steps if steps is not None else landing
        assert given is not None
        nothing = given.new_zeros(len(given), 128, dtype=torch.float32)
        of_steps = nothing if steps is None else self.sinusoids(100 * steps.float().log2())
        of_landing = nothing if landing is None else self.sinusoids(1000 * landing.float())
        return self.mlp(torch.cat([of_steps, of_landing], 1).to(self.mlp.linear_1.weight.dtype))


class StepsAwareTimeEmbedding(PixArtAlphaCombinedTimestepSizeEmbeddings):
    """PixArt's time embedding plus a `CallEmbedding`; without "steps" and "landing" exactly PixArt's."""

    def __init__(self, embedding_dim: int, size_emb_dim: int, use_additional_conditions: bool = False) -> None:
        super().__init__(embedding_dim, size_emb_dim, use_additional_conditions)
        self.call_embedder = CallEmbedding(embedding_dim)

    def forward(self, *args: Any, steps: Tensor | None = None, landing: Tensor | None = None, **kwargs: Any) -> Tensor:
        embedding = super().forward(*args, **kwargs)
        if steps is None and landing is None:
            return embedding
        return embedding + self.call_embedder(steps, landing).to(embedding.dtype)


class StepsAwarePixArtTransformer2DModel(PixArtTransformer2DModel):
    """`PixArtTransformer2DModel` that also reads "steps" and "landing", each (B,), from `added_cond_kwargs`."""

    call_embedder: ClassVar[str] = "adaln_single.emb.call_embedder"
    """Name of the submodule that is not the teacher's."""

    steps: int | None = None
    """K for callers that cannot pass it, such as a pipeline; `added_cond_kwargs["steps"]` goes before it."""

    @functools.wraps(PixArtTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adaln_single.emb = StepsAwareTimeEmbedding(
            self.inner_dim, self.inner_dim // 3, self.use_additional_conditions
        )

    def forward(self, hidden_states: Tensor, *args: Any, added_cond_kwargs: dict | None = None, **kwargs: Any) -> Any:
        extra = {"resolution": None, "aspect_ratio": None, **(added_cond_kwargs or {})}
        if self.steps is not None and "steps" not in extra:
            extra["steps"] = torch.full((len(hidden_states),), float(self.steps), device=hidden_states.device)
        return super().forward(hidden_states, *args, added_cond_kwargs=extra, **kwargs)


def made_steps_aware(network: PixArtTransformer2DModel) -> StepsAwarePixArtTransformer2DModel:
    """`network` itself as the steps-aware class: its weights stay where they are, a fresh `CallEmbedding` is added.

    Raises:
        FewstepError: it is of a subclass that does more, such as switching between experts, which would be lost.
    """
    if not isinstance(network, StepsAwarePixArtTransformer2DModel):
        if type(network) is not PixArtTransformer2DModel:
            raise FewstepError(
                f"found a {type(network).__name__} that is to be told its step count, expected "
                "PixArtTransformer2DModel (what the subclass adds would be lost), fix: distil the plain teacher, or "
                "leave steps_condition and critic_call_condition off"
            )
        network.__class__ = StepsAwarePixArtTransformer2DModel
        embedding = network.adaln_single.emb
        embedding.__class__ = StepsAwareTimeEmbedding
        embedding.call_embedder = CallEmbedding(network.inner_dim)
        if network.device.type != "meta":
            embedding.call_embedder.to(network.device)
    return network


class StepsAwarePixArtPipeline(PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` that tells its network how many steps are being made.

    Images whose latents are not 32, 64 or 128 wide are not fitted to PixArt's table of aspect ratios, which has none
    for them, unless asked for.
    """

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | None = "",
        num_inference_steps: int = 4,
        timesteps: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        kwargs.setdefault("use_resolution_binning", self.transformer.config.sample_size in _BINNED_SIZES)
        self.transformer.steps = num_inference_steps if timesteps is None else len(timesteps)
        try:
            return super().__call__(prompt, negative_prompt, num_inference_steps, timesteps, *args, **kwargs)
        finally:
            self.transformer.steps = None
