"""Which of several students makes a prompt's picture, and a folder of students that is sampled like one.

`router.json` lies beside the folders part-1, part-2, ..., each the run of one student (`fewstep.several`); nothing else
has to be there to sample than `part-<k>/student`. The folders may come from different machines that were given the same
router.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.files import load_json
from fewstep.core.tensors import Condition
from fewstep.errors import FewstepError
from fewstep.models.student import ROUTER, Student, load_student

ROUTER_FORMAT = 1
Embed = Callable[[Sequence[str]], Tensor]
"""embed(prompts) -> (N, d)."""


@dataclass(frozen=True)
class Split:
    """A partition of embeddings (N, d) by their place along one direction."""

    mean: Tensor
    """(d,) float64."""
    direction: Tensor
    """(d,) float64, of length 1: the first principal component of the embeddings it was made from."""
    edges: Tensor
    """(K-1,) float64, rising: the places between the parts."""

    @property
    def parts(self) -> int:
        return len(self.edges) + 1

    def part(self, embeddings: Tensor) -> Tensor:
        """The part, 0 to K-1, of each of (N, d) embeddings: (N,) long."""
        return torch.bucketize(self.place(embeddings), self.edges)

    def place(self, embeddings: Tensor) -> Tensor:
        """(N,) float64: where embeddings lie along the direction."""
        return (embeddings.detach().cpu().double() - self.mean) @ self.direction

    def to_config(self) -> dict[str, list[float]]:
        """JSON-able, to the bit."""
        return {"mean": self.mean.tolist(), "direction": self.direction.tolist(), "edges": self.edges.tolist()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Split:
        """What `to_config` described."""
        parts = [torch.tensor(config[name], dtype=torch.float64) for name in ("mean", "direction", "edges")]
        if any(part.ndim != 1 for part in parts) or len(parts[0]) != len(parts[1]):
            raise ValueError("numbers of another shape than a direction's")
        return cls(*parts)


def contiguous_split(embeddings: Tensor, parts: int) -> Split:
    """Cuts (N, d) embeddings along their first principal component into parts whose sizes differ by at most 1.

    Rows that lie at the same place cannot be told apart and stay together, whatever that does to the sizes: pass every
    prompt once. The sign of the direction is fixed (its largest entry is positive), so equal embeddings give equal
    parts on every machine.

    Raises:
        FewstepError: fewer than one part, or fewer different places than parts.
    """
    points = embeddings.detach().cpu().double()
    if not 1 <= parts <= len(points):
        raise FewstepError(
            f"found {parts} parts for {len(points)} prompts, expected 1 or more and no more than prompts"
        )
    mean = points.mean(0)
    _, _, axes = torch.linalg.svd(points - mean, full_matrices=False)
    direction = axes[0] * axes[0, axes[0].abs().argmax()].sign()
    place = ((points - mean) @ direction).sort().values
    cuts = [round(len(points) * part / parts) for part in range(1, parts)]
    edges = torch.stack([(place[cut - 1] + place[cut]) / 2 for cut in cuts]) if cuts else place.new_zeros(0)
    split = Split(mean, direction, edges)
    found = len(split.part(points).unique())
    if found < parts:
        raise FewstepError(
            f"found prompts that fall into {found} parts instead of {parts}, since many of them embed alike, expected "
            "enough different prompts, fix: pass each prompt once, use fewer parts or give the partition yourself"
        )
    return split


def given_split(parts: Sequence[Sequence[str]]) -> dict[str, int]:
    """The part, from 0, of every prompt of a partition written out.

    Raises:
        FewstepError: an empty part, or a prompt in two.
    """
    table: dict[str, int] = {}
    for number, prompts in enumerate(parts):
        shared = table.keys() & set(prompts)
        if not prompts or shared:
            what = f"the prompt {min(shared)!r} in two parts" if shared else f"part {number + 1} empty"
            raise FewstepError(f"found {what}, expected parts that share nothing and have prompts, fix: mend the parts")
        table |= dict.fromkeys(prompts, number)
    return table


class Router:
    """Sends prompts to parts, numbered from 0.

    A contiguous partition is a place along one direction (`Split`). In a given one the prompts that were
    given keep their part, and others go to the part whose mean embedding is nearest.

    Args:
        split: the contiguous partition, or None for a given one.
        table: the part of every given prompt.
        centres: (K, d) mean embeddings of the given parts.
    """

    def __init__(
        self, split: Split | None, table: Mapping[str, int] | None = None, centres: Tensor | None = None
    ) -> None:
        self._split, self._table, self._centres = split, dict(table or {}), centres

    @classmethod
    def contiguous(cls, prompts: Sequence[str], embed: Embed, parts: int) -> Router:
        """Parts of equal size (to 1) of the different `prompts`, in the order of their embeddings."""
        return cls(contiguous_split(embed(sorted(set(prompts))), parts))

    @classmethod
    def given(cls, parts: Sequence[Sequence[str]], embed: Embed) -> Router:
        """The partition `parts`, each a list of prompts."""
        table = given_split(parts)
        centres = torch.stack([embed(list(prompts)).cpu().double().mean(0) for prompts in parts])
        return cls(None, table, centres)

    @property
    def parts(self) -> int:
        if self._split is not None:
            return self._split.parts
        assert self._centres is not None
        return len(self._centres)

    @property
    def _width(self) -> int:
        """Numbers in an embedding."""
        if self._split is not None:
            return len(self._split.mean)
        assert self._centres is not None
        return self._centres.shape[1]

    def route(self, prompts: Sequence[str], embed: Embed) -> Tensor:
        """(N,) long: the part of each prompt."""
        embeddings = embed(prompts)
        width = self._width
        if embeddings.shape[1] != width:
            raise FewstepError(
                f"found text embeddings of {embeddings.shape[1]} numbers for a router of {width}, expected those of "
                "the teacher it was made with, fix: copy the router from where the parts were made"
            )
        if self._split is not None:
            return self._split.part(embeddings)
        assert self._centres is not None
        nearest = torch.cdist(embeddings.cpu().double(), self._centres).argmin(1).tolist()
        return torch.tensor([self._table.get(prompt, near) for prompt, near in zip(prompts, nearest, strict=True)])

    def save(self, folder: Path) -> Path:
        """Write `router.json` into `folder`, whole or not at all."""
        if self._split is not None:
            card: dict[str, Any] = {"kind": "contiguous", **self._split.to_config()}
        else:
            assert self._centres is not None
            card = {"kind": "given", "table": self._table, "centres": self._centres.tolist()}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ROUTER
        unfinished = folder / f".{ROUTER}.{os.getpid()}"
        try:
            text = json.dumps({"format": ROUTER_FORMAT, "parts": self.parts, **card})
            unfinished.write_text(text + "\n", encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, folder: Path) -> Router:
        """Read what `save` wrote.

        Raises:
            FewstepError: no router there, or not one of this version.
        """
        path = folder / ROUTER
        try:
            card = load_json(path)
            if card["format"] != ROUTER_FORMAT or card["kind"] not in ("contiguous", "given"):
                raise ValueError(f"format {card['format']}, kind {card['kind']}")
            if card["kind"] == "contiguous":
                return cls(Split.from_config(card))
            table, centres = dict(card["table"]), torch.tensor(card["centres"], dtype=torch.float64)
            if centres.ndim != 2 or not all(part in range(len(centres)) for part in table.values()):
                raise ValueError("a table of other parts than there are")
            return cls(None, table, centres)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise FewstepError(
                f"found no readable {path} ({type(error).__name__}: {error}), expected the router of a partition of "
                f"format {ROUTER_FORMAT}, fix: copy it from where the parts were made"
            ) from error


class RoutedStudent(Student):
    """Students of one partition, sampled as one: each prompt by the student of its part and by no other.

    Args:
        router: of the partition.
        students: one for each part.
    """

    def __init__(self, router: Router, students: Sequence[Student]) -> None:
        first = students[0]
        super().__init__(first.backbone, first.network, first.grids, first.steps_aware, first.card)
        self.router, self.students = router, list(students)
        for number, student in enumerate(students, start=1):
            if _listed(student.grids) != _listed(first.grids):
                raise FewstepError(
                    f"found other time grids in part {number} than in part 1, expected the same, fix: train all parts "
                    "with the same steps"
                )

    def denoise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        raise FewstepError("found a call of several students at once, expected prompts to route, fix: use `latents`")

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
        """Latents (B, ...) float32, each of the student of its prompt's part; as `Student.latents`."""
        if len(prompts) != len(seeds) or not prompts:
            # which says what is wrong
            return self.students[0].latents(prompts, seeds, steps, tracks=tracks, drives=drives, solver=solver)
        part = self.router.route(prompts, self._embed)
        rows = [(part == number).nonzero().flatten() for number in range(len(self.students))]
        made = [
            student.latents(
                [prompts[row] for row in own],
                [seeds[row] for row in own],
                steps,
                solver=solver,
                tracks=None if tracks is None else tracks[own],
                drives=None if drives is None else drives[own],
            )
            for student, own in zip(self.students, rows, strict=True)
            if len(own)
        ]
        return torch.cat(made)[torch.cat(rows).argsort()]

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        return pooled(self.backbone.encode(prompts))


def _listed(grids: Mapping[int, Tensor]) -> dict[int, list[float]]:
    return {count: grid.tolist() for count, grid in grids.items()}


def pooled(condition: Condition) -> Tensor:
    """(B, d) float32: the mean over the words of the text states (B, L, d) of a backbone's `encode`.

    Words are told from padding by the mask (B, L) among its tensors, if there is one.
    """
    states = max(condition.values(), key=lambda value: value.ndim).float()
    mask = next((value for value in condition.values() if value.shape == states.shape[:2]), None)
    weight = torch.ones(states.shape[:2]) if mask is None else mask.float()
    weight = weight.to(states.device)[..., None]
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


def part_folder(folder: Path, part: int) -> Path:
    """Where the run of a part, numbered from 0, lies."""
    return folder / f"part-{part + 1}"


def load_routed(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> RoutedStudent:
    """Load a folder with a router and its students; text encoder and autoencoder are kept once for all.

    Raises:
        FewstepError: the router or a part is missing, or parts do not go together.
    """
    router = Router.load(folder)
    homes = [part_folder(folder, part) / "student" for part in range(router.parts)]
    missing = [home.parent.name for home in homes if not home.is_dir()]
    if missing:
        raise FewstepError(
            f"found no student for {', '.join(missing)} of {router.parts} in {folder}, expected one for every part, "
            "fix: train the missing parts, or copy their folders here from where they were trained"
        )
    students: list[Student] = []
    for home in homes:
        student = load_student(home, dtype=dtype, device=device)
        if students:
            _share(students[0].backbone.pipeline, student.backbone.pipeline)
        students.append(student)
    return RoutedStudent(router, students)


def _share(first: Any, other: Any) -> None:
    """Let `other` use the parts of `first` that are not trained."""
    for name, part in first.components.items():
        if name not in ("transformer", "scheduler"):
            setattr(other, name, part)
