"""A saved student, ready to sample."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.attention.sparse import SparseOptions
from fewstep.core import grids as time_grids
from fewstep.core.files import load_json
from fewstep.core.solvers import SOLVERS
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.adapters import shared_copy
from fewstep.models.backbone import Backbone, SeededNoise
from fewstep.models.export import CARD, CARD_FORMAT
from fewstep.models.loading import load_backbone
from fewstep.models.lora import attach_loras, read_loras
from fewstep.models.teacher import Teacher

ROUTER = "router.json"
"""Lies in a folder of several students (`fewstep.models.router`)."""


class Student:
    """A few-step network with the grids it was trained on.

    Args:
        backbone: the pipeline around it.
        network: the student's network.
        grids: time grid (K+1,) for each step count K it is for.
        steps_aware: whether it is told K.
        card: what `fewstep.json` says.
        eta: share of its own noise that a step keeps: 1, or 0 for fresh noise at every step.
    """

    def __init__(
        self,
        backbone: Backbone,
        network: nn.Module,
        grids: dict[int, Tensor],
        steps_aware: bool,
        card: dict[str, Any],
        eta: float = 1.0,
    ) -> None:
        self.backbone, self.network, self.grids, self.card = backbone, network, grids, card
        self.steps_aware, self.eta = steps_aware, eta

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """x (B, ...) at t (B,) -> denoised; one network call."""
        return self.backbone.call(self.network, x, t, condition)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        tracks: Tensor | None = None,
        drives: Tensor | None = None,
        solver: str = "trained",
    ) -> Tensor:
        """Latents (B, ...) float32 for prompts and seeds of equal number, in `steps` network calls; see `sample`."""
        grid = self._grid(steps)
        if len(prompts) != len(seeds):
            raise FewstepError(
                f"found {len(prompts)} prompts and {len(seeds)} seeds, expected one seed per prompt, "
                "fix: repeat the shorter"
            )
        if solver == "trained":
            solver = "ddim" if self.eta == 1 else "lcm"
        if solver not in SOLVERS:
            raise FewstepError(
                f"found solver {solver!r}, expected 'trained' or one of {sorted(SOLVERS)}, fix: leave it out"
            )
        condition = self.backbone.told(prompts, tracks, drives)
        if self.steps_aware:
            condition["steps"] = torch.full((len(prompts),), float(len(grid) - 1), device=self.backbone.device)
        numbers, process = SeededNoise(seeds), self.backbone.process
        noise = numbers(self.backbone.latent_shape).to(self.backbone.device)
        more = {"noise": lambda _, shape: numbers(shape)} if solver == "lcm" else {}
        return SOLVERS[solver](self.denoise, noise * process.noise_scale, grid, process, condition, **more)

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        *,
        tracks: Tensor | None = None,
        drives: Tensor | None = None,
        solver: str = "trained",
        batch: int | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W), or videos (B, F, 3, H, W), uint8 on the CPU.

        Args:
            prompts: B prompts.
            seeds: B seeds; a seed gives the noise that the diffusers pipeline draws with a generator of that seed.
            steps: network calls, one of `self.grids`; the largest unless told.
            tracks: where the teacher reads them (`Backbone.controls`), (B, F, 2) as x, y in pixels, nan where open.
            drives: likewise, (B, F) in [0, 1].
            solver: as `trained`, or "ddim", "lcm" (fresh noise at every step), "dpmpp_2m", "heun" (2K - 1 calls).
            batch: how many at a time, 1 or more; fewer for larger latents unless told (`Backbone.sample_batch`).
        """
        parts = []
        batch = self.backbone.rows_at_a_time(batch)
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            latents = self.latents(
                prompts[part], seeds[part], steps, solver=solver,
                tracks=None if tracks is None else tracks[part], drives=None if drives is None else drives[part],
            )  # fmt: skip
            parts.append(self.backbone.decode(latents))
        if not parts:
            raise FewstepError("found no prompt, expected at least one, fix: pass a prompt")
        return torch.cat(parts)

    def _grid(self, steps: int | None) -> Tensor:
        steps = max(self.grids) if steps is None else steps
        if steps not in self.grids:
            raise FewstepError(
                f"found steps = {steps}, expected one of {sorted(self.grids)} (what this student was trained for), "
                "fix: ask for one of these"
            )
        return self.grids[steps]


def load_student(
    folder: str | Path,
    *,
    teacher: Teacher | str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Student:
    """Load what `save_student` wrote: a pipeline folder, or a LoRA with the teacher that it names; or several of them.

    Several lie in one folder with their router, and are sampled as one (`fewstep.models.router`). One that makes videos
    chunk by chunk is a `fewstep.streaming.student.CausalStudent`.

    Args:
        folder: what to load.
        teacher: for a LoRA, the teacher it was trained on, where that is not at the place the LoRA names: a folder, a
            Hub id, or one that is loaded, whose weights are then shared and whose size, dtype and device hold.
        dtype: of the weights.
        device: where to put them.

    Raises:
        FewstepError: no student there, weights that are pickles, parts that would need code from the folder, a LoRA
            that does not fit the teacher, or a teacher for a student that has all its weights.
    """
    folder = Path(folder)
    if (folder / ROUTER).is_file():
        from fewstep.models.router import load_routed

        return load_routed(folder, dtype=dtype, device=device)
    card, grids = read_card(folder)
    if card["form"] not in ("pipeline", "lora"):
        raise FewstepError(
            f"found a student exported to {card['form']} at {folder}, expected a pipeline or a LoRA folder, fix: load "
            "the folder that it was exported from"
        )
    if teacher is not None and card["form"] == "pipeline":
        raise FewstepError(
            f"found a teacher for {folder}, which is a whole pipeline, expected one for a LoRA only, fix: leave it out"
        )
    if isinstance(teacher, Teacher):
        backbone, network = copy.copy(teacher.backbone), shared_copy(teacher.backbone.network)
    else:
        source = folder if card["form"] == "pipeline" else teacher or card["teacher"]
        backbone = load_backbone(source, dtype=dtype, device=device, size=card.get("size"))
        network = backbone.network
    if card["form"] == "lora":
        network = attach_loras(backbone, network, read_loras(folder, backbone.network_parts)).to(backbone.device)
    backbone.embedded_guidance = card.get("embedded_guidance", backbone.embedded_guidance)
    if "causal" in card:
        from fewstep.attention import Layout
        from fewstep.streaming.student import CausalStudent

        network = shared_copy(network) if network is backbone.network else network
        layout = Layout(**card["causal"])
        return CausalStudent(backbone, network, grids, card, card["eta"], layout, backbone.causal(network))
    if "sparse" in card:
        network = shared_copy(network) if network is backbone.network else network
        backbone.sparse(network, SparseOptions(**card["sparse"]))
    return Student(backbone, network, grids, card["steps_aware"], card, card["eta"])


def read_card(folder: Path) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """`fewstep.json` of a student's folder, and its time grids by step count.

    Raises:
        FewstepError: no student there, or one that this version does not read.
    """
    path = folder / CARD
    if not path.is_file():
        found = "a pipeline without a student's card" if (folder / "model_index.json").is_file() else "no student"
        raise FewstepError(
            f"found {found} at {folder}, expected a folder with {CARD} that save_student wrote, fix: pass the "
            "student's folder (a teacher is loaded with load_teacher)"
        )
    try:
        card = load_json(path)
        if card["format"] != CARD_FORMAT or card["form"] not in ("pipeline", "lora", "comfyui", "merged"):
            raise ValueError(f"format {card['format']}, form {card['form']}")
        grids = {int(count): torch.tensor(grid, dtype=torch.float64) for count, grid in card["grids"].items()}
        if not grids or any(len(time_grids.validated(grid)) != count + 1 for count, grid in grids.items()):
            raise ValueError("grids that do not have one time more than steps")
        card["steps_aware"], card["teacher"] = bool(card["steps_aware"]), str(card["teacher"])
        card["eta"], card["size"] = float(card.get("eta", 1)), card.get("size") or {}
        SparseOptions(**card.get("sparse", {})).validate()
        told = card.get("embedded_guidance")
        if not all(isinstance(side, int) for side in card["size"].values()) or not isinstance(told, float | int | None):
            raise ValueError("a size or guidance that are no numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise FewstepError(
            f"found an unreadable {path} ({type(error).__name__}: {error}), expected what save_student of this version "
            f"writes (format {CARD_FORMAT}), fix: export the student again"
        ) from error
    return card, grids
