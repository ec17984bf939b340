"""Which diffusers scheduler makes a pipeline sample exactly as the student was trained to.

Nothing is believed: a candidate is accepted when the teacher's own pipeline, driven by it with a stand-in for the
network, lands where `core.solvers.ddim` lands on the student's grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.guidance import Denoiser
from fewstep.core.prediction import to_denoised
from fewstep.core.process import DiscreteVP, Flow, Process
from fewstep.core.solvers import ddim, noise_at
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.backbone import Backbone, SeededNoise, seeded_noise

_NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr",
)  # fmt: skip
_TRAILING = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0}
_RENOISING = {"clip_sample": False, "set_alpha_to_one": True}
_TOLERANCE = 1e-4  # of the largest latent
_SLACK_OF_LAW = 0.3  # of means over a latent's numbers, of which the smallest latents have few


@dataclass(frozen=True)
class Sampling:
    """How a pipeline samples a student."""

    scheduler: Any
    calls: dict[int, dict[str, Any]]
    """For each step count K the arguments of the pipeline's call: num_inference_steps, or all timesteps or sigmas."""
    start: float = 1.0
    """Time of the scheduler's last noise level: below 1 its process is the beginning of the teacher's."""


def choose_scheduler(
    backbone: Backbone, grids: Sequence[Tensor], eta: float = 1.0, chain_noise: str = "fresh"
) -> Sampling:
    """A stock scheduler (flow students of PixArt: one of ours) with which the pipeline reproduces every grid.

    Schedulers that need no more than the step count come first, then those that must be handed the times in each call.
    No network call; cheap enough to ask before training.

    Args:
        backbone: the teacher.
        grids: one time grid (K+1,) per step count K (`core.grids`).
        eta: share of its own noise that a step keeps: 1, or 0, fresh noise at every step. On a discrete process that is
            LCMScheduler, with the noise that the pipeline draws from its generator. On a flow it is FlowMatchEuler's
            stochastic sampling: most pipelines draw that noise from torch's global generator, in their own layout, so
            that theirs and our samples are of one law, but not equal number by number.
        chain_noise: whether that noise is "fresh", or "fixed", that of the start; not looked at for an eta of 1 or for
            single calls.

    Raises:
        FewstepError: none does; with the reason for each candidate.
    """
    stochastic = eta != 1 and any(len(grid) > 2 for grid in grids)  # one call has nothing to renoise
    if stochastic and chain_noise != "fresh":
        raise FewstepError(
            f"found chain_noise {chain_noise!r} for students of {max(map(len, grids)) - 1} steps, expected 'fresh' "
            "(diffusers has no scheduler that renoises with the noise of the start), fix: set chain_noise to 'fresh', "
            "or eta to 1"
        )
    if stochastic and (eta != 0 or not isinstance(backbone.process, DiscreteVP | Flow)):
        raise FewstepError(
            f"found eta = {eta} on the process {backbone.process.name}, expected 1, or 0 on a discrete or flow process "
            "(diffusers has no scheduler for others), fix: set eta to 1"
        )
    reasons = []
    for sampling in _candidates(backbone, grids, stochastic):
        problems = (_problem(backbone, sampling, grid, eta) for grid in grids)
        problem = next((problem for problem in problems if problem), None)
        if problem is None:
            fresh = type(sampling.scheduler).from_config(sampling.scheduler.config)
            return Sampling(fresh, sampling.calls, sampling.start)
        reasons.append(f"{type(sampling.scheduler).__name__}: {problem}")
    shown = [[round(time, 4) for time in grid.tolist()] for grid in grids]
    raise FewstepError(
        f"found the time grids {shown}, expected ones that a diffusers scheduler can follow ({'; '.join(reasons)}), "
        "fix: use step counts that divide the number of training steps, or a grid of whole training indices "
        "(core.grids.explicit)"
    )


def _candidates(backbone: Backbone, grids: Sequence[Tensor], stochastic: bool) -> Iterator[Sampling]:
    import diffusers

    counts = [len(grid) - 1 for grid in grids]
    by_count = {count: {"num_inference_steps": count} for count in counts}
    teachers = backbone.pipeline.scheduler.config
    config = {key: value for key, value in teachers.items() if key in _NOISE_SCHEDULE}
    snr_shift = teachers.get("snr_shift_scale")
    if snr_shift is not None and not stochastic:  # CogVideoX
        yield Sampling(diffusers.CogVideoXDDIMScheduler(**config, **_TRAILING, snr_shift_scale=snr_shift), by_count)
    if snr_shift not in (None, 1) and isinstance(backbone.process, DiscreteVP):
        config |= _written_out(backbone.process)
    if isinstance(backbone.process, DiscreteVP) and stochastic:
        levels = backbone.process.num_steps
        yield Sampling(diffusers.LCMScheduler(**config, **_RENOISING, original_inference_steps=levels), by_count)
        start = float(grids[0][0])
        first = _first_levels(config, round(start * levels))
        count = first["num_train_timesteps"]
        yield Sampling(diffusers.LCMScheduler(**first, **_RENOISING, original_inference_steps=count), by_count, start)
        times = {len(grid) - 1: backbone.process.network_time(grid[:-1]).round().long().tolist() for grid in grids}
        in_full = {count: {"timesteps": times[count]} for count in counts}
        yield Sampling(diffusers.LCMScheduler(**config, **_RENOISING, original_inference_steps=levels), in_full)
    elif isinstance(backbone.process, DiscreteVP):
        yield Sampling(diffusers.DDIMScheduler(**config, **_TRAILING), by_count)
        first_order = {"solver_order": 1, "timestep_spacing": "trailing", "final_sigmas_type": "zero"}
        yield Sampling(diffusers.DPMSolverMultistepScheduler(**config, **first_order), by_count)
        start = float(grids[0][0])
        first = _first_levels(config, round(start * backbone.process.num_steps))
        yield Sampling(diffusers.DDIMScheduler(**first, **_TRAILING), by_count, start)
        times = {len(grid) - 1: backbone.process.network_time(grid[:-1]).round().long().tolist() for grid in grids}
        in_full = {count: {"timesteps": times[count]} for count in counts}
        if config.get("rescale_betas_zero_snr"):
            config |= _written_out(backbone.process)
        yield Sampling(diffusers.DPMSolverMultistepScheduler(**config, **first_order), in_full)
    elif isinstance(backbone.process, Flow):
        from fewstep.models.flow_scheduler import FlowMatchStepsScheduler

        scale = int(backbone.process.time_scale)
        config = {"num_train_timesteps": scale, "stochastic_sampling": stochastic}
        sigmas = {len(grid) - 1: grid[:-1].tolist() for grid in grids}
        in_full = {count: {"sigmas": sigmas[count]} for count in counts}
        shift = shift_of(grids)
        yield Sampling(diffusers.FlowMatchEulerDiscreteScheduler(**config, shift=shift), by_count)
        even = getattr(diffusers, "FlowMapEulerDiscreteScheduler", None)  # for pipelines that leave the spacing to it
        if even is not None and not stochastic:  # older versions of diffusers have none
            yield Sampling(even(num_train_timesteps=scale, shift=shift), by_count)
        yield Sampling(diffusers.FlowMatchEulerDiscreteScheduler(**config), in_full)
        named = {str(count): times for count, times in sigmas.items()}
        yield Sampling(FlowMatchStepsScheduler(**config, step_sigmas=named), by_count)


def shift_of(grids: Sequence[Tensor]) -> float:
    """The shift of the longest of `grids`, if it is a shifted one."""
    grid = max(grids, key=len)
    if len(grid) < 3:
        return 1.0
    even, t = 1 - 1 / (len(grid) - 1), float(grid[1])
    return round(t * (1 - even) / (even * (1 - t)), 6)


def _written_out(process: DiscreteVP) -> dict[str, Any]:
    """The noise levels of `process` as betas, for schedulers that cannot make them from their own settings.

    The last beta stays below 1: schedulers that take logarithms of a level without signal put 2^-24 there, which moves
    the samples by 4e-4 of their range.
    """
    table = process.alphas_cumprod
    betas = 1 - table / torch.cat([table.new_ones(1), table[:-1]])
    return {"trained_betas": betas.clamp(max=1 - 2**-24).tolist(), "rescale_betas_zero_snr": False}


def _first_levels(config: dict[str, Any], levels: int) -> dict[str, Any]:
    """The noise schedule's first `levels` levels only, as if the process ended there: for grids that start below 1."""
    from diffusers import DDIMScheduler

    betas = DDIMScheduler(**config).betas[:levels].tolist()
    return config | {"num_train_timesteps": levels, "trained_betas": betas, "rescale_betas_zero_snr": False}


def _problem(backbone: Backbone, sampling: Sampling, grid: Tensor, eta: float) -> str | None:
    """What is wrong with a candidate on one grid; None if nothing is."""
    process, asked = backbone.process, []

    def predict(x: Tensor, network_time: Tensor) -> Tensor:
        """A stand-in network: bounded, not linear, different at every time."""
        return torch.sin(2 * x + network_time.to(x).view(-1, *[1] * (x.ndim - 1)) / 200)

    def recorded(x: Tensor, network_time: Tensor) -> Tensor:
        asked.append((x, float(network_time[0])))
        return predict(x, network_time)

    def denoise(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = predict(x, process.network_time(t))
        return to_denoised(backbone.prediction, output, x, process.alpha(t), process.sigma(t))

    noise = seeded_noise([0], backbone.latent_shape).to(backbone.device)
    call = sampling.calls[len(grid) - 1] | {"generator": torch.Generator().manual_seed(1)}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            theirs = backbone.run_pipeline(recorded, sampling.scheduler, noise, **call)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        return f"the pipeline cannot drive it for {len(grid) - 1} steps ({error})"
    times, wanted = [time for _, time in asked], process.network_time(grid[:-1]).tolist()
    if len(times) != len(wanted) or any(abs(a - b) > 1e-3 for a, b in zip(times, wanted, strict=True)):
        return f"calls the network at {times} and not at {[round(time, 3) for time in wanted]}"
    if eta == 0 and isinstance(process, Flow):
        return _problem_of_law(process, denoise, [x for x, _ in asked], theirs, grid)
    fresh = SeededNoise([1])
    ours = ddim(denoise, noise * process.noise_scale, grid, process, {}, eta=eta, noise=lambda _, shape: fresh(shape))
    distance = float((ours - theirs).abs().max() / ours.abs().max())
    return f"lands {distance:.1e} of the latents' range away" if distance > _TOLERANCE else None


def _problem_of_law(
    process: Process, denoise: Denoiser, states: list[Tensor], last: Tensor, grid: Tensor
) -> str | None:
    """What is wrong with a path whose fresh noise cannot be foretold: each call must meet noise of its own, of spread
    1, around what the call before denoised; None if nothing is."""
    before, path = states[0], zip(grid[:-1], [*states[1:], last], grid[1:], strict=True)
    noise = before
    for t, landed, t_next in path:
        denoised = denoise(before, t.to(before).expand(len(before)), {})
        if t_next == 0:
            distance = float((landed - denoised).abs().max() / denoised.abs().max())
            return f"ends {distance:.1e} of the latents' range away" if distance > _TOLERANCE else None
        fresh = noise_at(process, landed, denoised, t_next.to(before).expand(len(before)))
        kept = float((fresh * noise).mean() / (fresh.std() * noise.std()))
        if abs(float(fresh.std()) - 1) > _SLACK_OF_LAW or abs(kept) > _SLACK_OF_LAW:
            return f"renoises with a spread of {float(fresh.std()):.2f} and keeps {kept:.2f} of the noise before"
        before, noise = landed, fresh
    return None
