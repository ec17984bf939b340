"""Stable Diffusion 1.x and 2.x: UNets that predict eps or v, over CLIP states.

UNets that have the guidance scale embedded (latent consistency models) are told `embedded_guidance` in every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewstep.core import grids
from fewstep.core.prediction import to_denoised
from fewstep.core.tensors import Condition
from fewstep.models.backbone import Backbone, Predict, register_backbone
from fewstep.models.comfyui import unet_key
from fewstep.models.pipelines import STATES, decoded, encoded_images, in_batches, pixels
from fewstep.models.recipes import Recipe, Setting
from fewstep.models.sizes import Side

_TDM = "TDM paper, app. D"
_DMD2 = "DMD2 paper, app. F"


@register_backbone("StableDiffusionPipeline")
class StableDiffusion(Backbone):
    """Adapter of `StableDiffusionPipeline`; the base of SDXL's (`stable_diffusion_xl.py`)."""

    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    network_name = "unet"
    comfyui_key = staticmethod(unet_key)
    adapter_layers = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    teacher_guidance = 7.5
    recipe: ClassVar[Recipe] = Recipe(
        guidance_scale=Setting(3.5, _TDM),
        shift=Setting(1.0, _TDM),
        start_time=Setting(1.0, _TDM),
        critic_updates=Setting(1, _TDM),
        student_rate=Setting(2e-6, _TDM),
        critic_rate=Setting(2e-5, _TDM),
        roles=Setting("copies", _TDM),
        by_method={
            "dmd2": {
                "guidance_scale": Setting(1.75, f"{_DMD2} (one step)"),
                "critic_updates": Setting(10, f"{_DMD2} (one step)"),
                "student_rate": Setting(1e-5, f"{_DMD2} (one step)"),
                "critic_rate": Setting(1e-5, f"{_DMD2} (one step)"),
                "gan_weight": Setting(1e-3, f"{_DMD2} (one step)"),
                "roles": Setting("copies", f"{_DMD2} (one step)"),
            }
        },
    )

    def __init__(self, pipeline: Any, source: str) -> None:
        super().__init__(pipeline, source)
        if self._embeds_guidance:
            self.embedded_guidance, self.teacher_guidance = 7.5, 1.0

    @property
    def _embeds_guidance(self) -> bool:
        return self.pipeline.unet.config.time_cond_proj_dim is not None

    @property
    def sides(self) -> dict[str, Side]:
        config = self.pipeline.unet.config
        return self._square(config.sample_size, 2 ** (len(config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.pipeline.unet.config.in_channels, *self.latent_sides)

    def call(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(network.parameters()).dtype
        output = network(
            x.to(dtype),
            self.process.network_time(t),
            encoder_hidden_states=condition[STATES].to(dtype),
            timestep_cond=self._guidance_embedding(x, dtype),
            added_cond_kwargs=self._added_conditions(condition, dtype),
            return_dict=False,
        )[0]
        return to_denoised(self.prediction, output.to(x.dtype), x, self.process.alpha(t), self.process.sigma(t))

    def _guidance_embedding(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        if not self._embeds_guidance:
            return None
        assert self.embedded_guidance is not None
        scales = torch.full((len(x),), self.embedded_guidance - 1.0)
        width = self.pipeline.unet.config.time_cond_proj_dim
        return self.pipeline.get_guidance_scale_embedding(scales, embedding_dim=width).to(x.device, dtype)

    def _added_conditions(self, condition: Condition, dtype: torch.dtype) -> dict[str, Tensor] | None:
        """What the network is told besides text and time; nothing here."""
        return None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        return in_batches(lambda batch: {STATES: self.pipeline.encode_prompt(batch, self.device, 1, False)[0]}, prompts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """As the pipeline: where it has a safety checker, the images that this one refuses are black."""
        images = decoded(self.pipeline.vae, latents)
        checked, refused = self.pipeline.run_safety_checker(images, self.device, images.dtype)
        made = pixels(checked)
        if refused is not None:
            made[torch.tensor(refused, dtype=torch.bool)] = 0
        return made

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        return encoded_images(self.pipeline.vae, images)

    def teacher_grid(self, steps: int) -> Tensor:
        """The scheduler's own; for PNDM (SD 1.5's), which calls twice at one time, DDIM's with its spacing."""
        from diffusers import DDIMScheduler

        scheduler = self.pipeline.scheduler
        if type(scheduler).__name__ == "PNDMScheduler":
            scheduler = DDIMScheduler.from_config(scheduler.config)
        return grids.from_scheduler(scheduler, steps, self.process)

    def tapped_blocks(self, network: nn.Module) -> list[nn.Module]:
        """The bottleneck, where DMD2's discriminator stands."""
        return [network.get_submodule("mid_block")]

    def block_tokens(self, output: Tensor) -> Tensor:
        return output.flatten(2).transpose(1, 2)

    @property
    def feature_width(self) -> int:
        return self.pipeline.unet.config.block_out_channels[-1]

    def run_pipeline(self, predict: Predict, scheduler: Any, noise: Tensor, **call: Any) -> Tensor:
        def forward(x: Tensor, timestep: Tensor, **others: Any) -> tuple[Tensor]:
            return (predict(x, timestep.expand(len(x))),)

        return self.stock_pipeline(forward, scheduler)(
            **self._prompt_arguments(len(noise)), **self.size, latents=noise, guidance_scale=1.0,
            output_type="latent", **call,
        ).images  # fmt: skip

    def _prompt_arguments(self, count: int) -> dict[str, Tensor]:
        """The empty prompt `count` times, as arguments of the pipeline's call."""
        return {"prompt_embeds": self.null_condition()[STATES].expand(count, -1, -1)}
