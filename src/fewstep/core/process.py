"""Noising processes x_t = alpha(t) x_0 + sigma(t) eps on one time axis: t in [0, 1], data at 0, noise at 1.

A process is a pair of functions and knows nothing of networks except `network_time`, the number that networks of its
family are fed for t. Shifts are properties of time grids (`core.grids`), not of processes.

All functions take times of any shape and return that shape, computed in float64, in the dtype of the times but at least
float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.core.schedules import betas_from_schedule, zero_terminal_snr
from fewstep.core.tensors import at_least_float32
from fewstep.errors import FewstepError

_SLACK = 1e-6  # float32 times that should be equal may differ by this much
_GRID_SLACK = 1e-3  # a float32 time within this share of an index spacing is meant to lie on the index


class Process(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps with a signal-to-noise ratio that falls in t."""

    name: ClassVar[str]
    noise_scale: float = 1.0
    """Standard deviation of the pure noise that stands for x at t = 1."""

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor:
        """alpha at float64 times."""

    @abstractmethod
    def _sigma(self, t: Tensor) -> Tensor:
        """sigma at float64 times."""

    @abstractmethod
    def _network_time(self, t: Tensor) -> Tensor:
        """Network time at float64 times."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """A JSON-able description, from which `Process.from_config` builds an equal process."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Process:
        """The process that `to_config` described; `config["process"]` holds its name."""
        kind = _PROCESSES.get(config.get("process", ""))
        if kind is None:
            raise FewstepError(
                f"found process {config.get('process')!r}, expected one of {sorted(_PROCESSES)}, "
                "fix: pass a description made by to_config()"
            )
        return kind._from_config({key: value for key, value in config.items() if key != "process"})

    @classmethod
    def _from_config(cls, values: dict[str, Any]) -> Process:
        return cls(**values)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level: 1 at t = 0."""
        return self._alpha(t.double()).to(at_least_float32(t.dtype))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level: exactly 0 at t = 0."""
        return self._sigma(t.double()).to(at_least_float32(t.dtype))

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio (alpha/sigma)^2: infinite at t = 0."""
        exact = t.double()
        return (self._alpha(exact) / self._sigma(exact)).square().to(at_least_float32(t.dtype))

    def network_time(self, t: Tensor) -> Tensor:
        """What networks of this family are fed for time t."""
        return self._network_time(t.double()).to(at_least_float32(t.dtype))

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(r, beta) of the forward kernel x_t = r x_s + beta n for t >= s (card tdm.md, eq. 3).

        r = alpha_t / alpha_s and beta^2 = sigma_t^2 - r^2 sigma_s^2, at least 0. Where alpha_s is 0, s is pure noise
        and so is t: r = 1, beta = 0.

        Raises:
            FewstepError: some t lies before its s by more than 1e-6 (noise cannot be taken away).
        """
        s, t = torch.broadcast_tensors(s, t)
        if bool((t < s - _SLACK).any()):
            worst = int((s - t).flatten().argmax())
            raise FewstepError(
                f"found a transition from time {s.flatten()[worst]:.6f} back to {t.flatten()[worst]:.6f}, expected the "
                "target time at or after the source, fix: draw tau from the landing time upwards"
            )
        dtype = at_least_float32(torch.promote_types(s.dtype, t.dtype))
        s, t = s.double(), t.double()
        alpha_s = self._alpha(s)
        r = torch.where(alpha_s > 0, self._alpha(t) / alpha_s, torch.ones_like(alpha_s))
        variance = self._sigma(t).square() - (r * self._sigma(s)).square()
        return r.to(dtype), variance.clamp(min=0).sqrt().to(dtype)


class DiscreteVP(Process):
    """Variance-preserving process of DDPM, Stable Diffusion, PixArt: N noise levels given as a table.

    Index i of the table is time (i + 1) / N, and t = 0 is clean data (alpha 1, sigma 0), a level that is not
    in the table. Between the levels alpha is interpolated linearly: the one rule that also serves tables that end at
    alpha = 0. A float32 time next to a level is taken to be that level, so that network times are whole numbers there.

    Args:
        alphas_cumprod: (N,) falling, alpha^2 per index, each in [0, 1).
        recipe: arguments of `from_schedule` that give this table, for a short `to_config`.
    """

    name = "discrete_vp"

    def __init__(self, alphas_cumprod: Tensor, recipe: Mapping[str, Any] | None = None) -> None:
        table = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        if table.ndim != 1 or not bool((table.diff() < 0).all()) or not 0 <= table[-1] <= table[0] < 1:
            raise FewstepError(
                f"found alphas_cumprod of shape {tuple(table.shape)} that does not fall strictly within [0, 1), "
                "expected (N,) strictly falling values, fix: pass the products of 1 - beta, least noise first"
            )
        self.alphas_cumprod = table
        self._recipe = dict(recipe) if recipe else None
        self._levels = {torch.device("cpu"): torch.cat([table.new_ones(1), table.sqrt()])}

    @classmethod
    def from_schedule(
        cls,
        schedule: str = "linear",
        num_steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal: bool = False,
        snr_shift: float = 1.0,
    ) -> DiscreteVP:
        """The table diffusers builds, bit for bit except after a zero-terminal rescaling.

        Args:
            schedule: "linear", "scaled_linear" (linear in sqrt(beta)) or "squaredcos_cap_v2" (takes no betas).
            num_steps: N, number of noise levels.
            beta_start: beta of the first index, in (0, 1).
            beta_end: beta of the last index.
            zero_terminal: rescale alpha so that it is exactly 0 at t = 1 (arXiv 2305.08891, algorithm 1).
            snr_shift: divide the SNR of every level by this (CogVideoX: 3 or 1).
        """
        recipe = {
            "schedule": schedule,
            "num_steps": num_steps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "zero_terminal": zero_terminal,
            "snr_shift": snr_shift,
        }
        betas = betas_from_schedule(schedule, num_steps, beta_start, beta_end)
        return cls(_alphas_cumprod(betas, zero_terminal, snr_shift), recipe)

    @classmethod
    def from_betas(cls, betas: Tensor, zero_terminal: bool = False, snr_shift: float = 1.0) -> DiscreteVP:
        """From the N betas themselves (diffusers' `trained_betas`)."""
        return cls(_alphas_cumprod(torch.as_tensor(betas, dtype=torch.float32), zero_terminal, snr_shift))

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal: bool = False
    ) -> DiscreteVP:
        """DDPM, PixArt, DiT."""
        return cls.from_schedule("linear", num_steps, beta_start, beta_end, zero_terminal)

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, zero_terminal: bool = False
    ) -> DiscreteVP:
        """Stable Diffusion 1.x, 2.x, XL."""
        return cls.from_schedule("scaled_linear", num_steps, beta_start, beta_end, zero_terminal)

    @classmethod
    def cosine(cls, num_steps: int = 1000, zero_terminal: bool = False) -> DiscreteVP:
        """Improved DDPM; diffusers' "squaredcos_cap_v2"."""
        return cls.from_schedule("squaredcos_cap_v2", num_steps, zero_terminal=zero_terminal)

    @property
    def num_steps(self) -> int:
        """N, the number of noise levels."""
        return len(self.alphas_cumprod)

    def to_config(self) -> dict[str, Any]:
        return {"process": self.name, **(self._recipe or {"alphas_cumprod": self.alphas_cumprod.tolist()})}

    @classmethod
    def _from_config(cls, values: dict[str, Any]) -> Process:
        if "alphas_cumprod" in values:
            return cls(torch.tensor(values["alphas_cumprod"], dtype=torch.float64))
        return cls.from_schedule(**values)

    def _position(self, t: Tensor) -> Tensor:
        """t N, moved onto a whole number if float32 rounding alone keeps it away."""
        position = t.clamp(0, 1) * self.num_steps
        nearest = position.round()
        return torch.where((position - nearest).abs() < _GRID_SLACK, nearest, position)

    def _alpha(self, t: Tensor) -> Tensor:
        levels = self._levels.get(t.device)
        if levels is None:
            levels = self._levels[t.device] = self._levels[torch.device("cpu")].to(t.device)
        position = self._position(t)
        below = position.floor().long().clamp(max=self.num_steps - 1)
        return torch.lerp(levels[below], levels[below + 1], position - below)

    def _sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha(t).square()).clamp(min=0).sqrt()

    def _network_time(self, t: Tensor) -> Tensor:
        return (self._position(t) - 1).clamp(min=0)


class Flow(Process):
    """Rectified flow (SD3, FLUX, Wan): alpha = 1 - t, sigma = t. Networks are fed `time_scale` * t."""

    name = "flow"

    def __init__(self, time_scale: float = 1000.0) -> None:
        self.time_scale = float(time_scale)

    def to_config(self) -> dict[str, Any]:
        return {"process": self.name, "time_scale": self.time_scale}

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _network_time(self, t: Tensor) -> Tensor:
        return self.time_scale * t


class VE(Process):
    """Variance-exploding process of EDM: alpha = 1, sigma from `sigma_min` to `sigma_max` by the rho rule.

    sigma(t)^(1/rho) is linear on [1/1000, 1], from sigma_min to sigma_max (EDM eq. 5); below that sigma itself falls
    linearly to exactly 0 at t = 0. Networks are fed log(sigma) / 4, with sigma at least sigma_min.
    """

    name = "ve"
    _FOOT = 1e-3

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise FewstepError(
                f"found sigma_min = {sigma_min}, sigma_max = {sigma_max}, rho = {rho}, expected 0 < sigma_min "
                "< sigma_max and rho > 0, fix: EDM's own values are 0.002, 80 and 7"
            )
        self.sigma_min, self.sigma_max, self.rho = float(sigma_min), float(sigma_max), float(rho)
        self.noise_scale = self.sigma_max

    def to_config(self) -> dict[str, Any]:
        return {"process": self.name, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}

    def time_of(self, sigma: Tensor) -> Tensor:
        """The time at which the noise level is `sigma` in [0, sigma_max]: inverse of `sigma(t)`, float64."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        sigma = sigma.double()
        share = ((sigma.clamp(min=self.sigma_min) ** (1 / self.rho) - low) / (high - low)).clamp(max=1)
        return torch.where(
            sigma < self.sigma_min,
            self._FOOT * sigma / self.sigma_min,
            torch.lerp(torch.full_like(share, self._FOOT), torch.ones_like(share), share),
        )

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        share = (t.clamp(self._FOOT, 1) - self._FOOT) / (1 - self._FOOT)
        return torch.where(
            t < self._FOOT, t.clamp(min=0) * (self.sigma_min / self._FOOT), (low + share * (high - low)) ** self.rho
        )

    def _network_time(self, t: Tensor) -> Tensor:
        return self._sigma(t).clamp(min=self.sigma_min).log() / 4


_PROCESSES: dict[str, type[Process]] = {kind.name: kind for kind in (DiscreteVP, Flow, VE)}


def _alphas_cumprod(betas: Tensor, zero_terminal: bool, snr_shift: float) -> Tensor:
    """Products of 1 - beta, then the SNR divided by `snr_shift`, then alpha rescaled to end at 0 if asked."""
    table = torch.cumprod(1 - betas, dim=0)
    if snr_shift != 1:
        table = table / (snr_shift + (1 - snr_shift) * table)
    return zero_terminal_snr(table) if zero_terminal else table


_PREDICTION_OF = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow", "sample": "x0"}


def process_from_scheduler(config: Mapping[str, Any]) -> tuple[Process, str]:
    """(process, prediction type) of the model that a diffusers scheduler config belongs to.

    The config is what `scheduler_config.json` holds or `scheduler.config` returns; the class name is used where it is
    there, else the family is told from the keys. How the scheduler spaces its steps does not matter here (see
    `core.grids.from_scheduler`). The prediction type is one of `core.prediction.PREDICTIONS`, or "edm" for EDM
    schedulers, whose networks are wrapped in c_skip, c_out, c_in: an adapter has to undo that itself.

    Raises:
        FewstepError: a beta schedule, prediction type or scheduler family that is not known.
    """
    family = str(config.get("_class_name", ""))
    prediction = config.get("prediction_type", "epsilon")
    flow_family = "FlowMatch" in family or "FlowMap" in family
    is_flow = flow_family or prediction == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    if is_flow or (not family and "shift" in config and "beta_schedule" not in config):
        return Flow(config.get("num_train_timesteps", 1000)), "flow"
    if "EDM" in family or "sigma_data" in config:
        return _edm_from_scheduler(config), "edm"
    if config.get("timestep_type") == "continuous" or "beta_schedule" not in config:
        raise FewstepError(
            f"found a {family or 'scheduler'} config without a discrete beta schedule, expected one of a DDIM, "
            "DPM-Solver, Euler, FlowMatch or EDM scheduler, fix: build the process by hand (DiscreteVP, Flow, VE)"
        )
    if prediction not in _PREDICTION_OF:
        raise FewstepError(
            f"found prediction_type {prediction!r}, expected one of {sorted(_PREDICTION_OF)}, fix: correct the config"
        )
    return _vp_from_scheduler(config, family), _PREDICTION_OF[prediction]


def _vp_from_scheduler(config: Mapping[str, Any], family: str) -> DiscreteVP:
    zero_terminal = bool(config.get("rescale_betas_zero_snr", False))
    snr_shift = float(config.get("snr_shift_scale", 3.0 if family.startswith("CogVideoX") else 1.0))
    if config.get("trained_betas") is not None:
        return DiscreteVP.from_betas(torch.as_tensor(config["trained_betas"]), zero_terminal, snr_shift)
    return DiscreteVP.from_schedule(
        config["beta_schedule"],
        config.get("num_train_timesteps", 1000),
        config.get("beta_start", 1e-4),
        config.get("beta_end", 0.02),
        zero_terminal,
        snr_shift,
    )


def _edm_from_scheduler(config: Mapping[str, Any]) -> VE:
    if config.get("sigma_schedule", "karras") != "karras":
        raise FewstepError(
            f"found sigma_schedule {config['sigma_schedule']!r}, expected 'karras', fix: set it in the scheduler config"
        )
    return VE(config.get("sigma_min", 0.002), config.get("sigma_max", 80.0), config.get("rho", 7.0))
