"""A flow-matching scheduler that pipelines written for DDIM can drive, at exactly the student's own times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

__all__ = [
    "FlowMatchStepsScheduler",
    "SchedulerMixin",  # diffusers looks in the module of a class of ours for the base class that says how to load it
]


class FlowMatchStepsScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method on a flow process, at times written down for each step count.

    diffusers' FlowMatchEuler spaces K calls from 1 to near 0 (1, .67, .33, .001 for 4: the last call is wasted on a
    few-step student), lacks what older pipelines ask of a scheduler (`init_noise_sigma`, `scale_model_input`), and
    returns one value where PixArt's pipeline reads the second for one step. Loading a folder that names this class
    needs `import fewstep.models.flow_scheduler` first.

    Args:
        num_train_timesteps: what the network is fed at time 1.
        step_sigmas: for each K, as a string, the K times of its calls, falling from 1. Others are spaced evenly.
        stochastic_sampling: land with fresh noise, from torch's global generator, as FlowMatchEuler's of this name.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        step_sigmas: dict[str, list[float]] | None = None,
        stochastic_sampling: bool = False,
    ) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, stochastic_sampling=stochastic_sampling)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the times for K calls."""
        evenly = np.linspace(1, 0, num_inference_steps + 1)[:-1].tolist()
        sigmas = (self.config.step_sigmas or {}).get(str(num_inference_steps), evenly)
        super().set_timesteps(sigmas=sigmas, device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """`sample` itself."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """As FlowMatchEuler; as a tuple it is (next sample, denoised sample)."""
        if return_dict:
            return super().step(model_output, timestep, sample, **kwargs)
        (landed,) = super().step(model_output, timestep, sample, return_dict=False, **kwargs)
        sigma = self.sigmas[self.step_index - 1].to(sample)
        return landed, sample - sigma * model_output
