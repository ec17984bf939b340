"""Options of sparse attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, get_args

import tyro

from fewstep.errors import FewstepError
from fewstep.unread import refuse_unread

Kind = Literal["dense", "asa", "asa-gt"]
Order = Literal["gilbert", "raster"]
Engine = Literal["auto", "flex", "gathered", "masked"]
_LARGEST = 2**13
_OF_A_RUN = ("engine", "critic")  # say how it is computed and trained, not what a student is


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """What the student's self-attention sees; the teacher's is dense. Numbers are Video-BLADE's for Wan2.1-1.3B."""

    kind: Annotated[Kind, tyro.conf.arg(name="sparse")] = "dense"
    """`asa`: blocks chosen anew from the queries and keys of every call; `asa-gt`: and global tokens, means of
    neighbours, seen by all. `asa` needs no training, `asa-gt` does."""
    block: Annotated[int, tyro.conf.arg(name="sparse-block")] = 128
    """Tokens of a block, 2 or more; smaller ones are nearer to dense attention and slower on a GPU."""
    samples: Annotated[int, tyro.conf.arg(name="sparse-samples")] = 32
    """Tokens of each block by which its importance is judged, 1 to `block` (published: 16 and 32)."""
    mass: Annotated[float, tyro.conf.arg(name="sparse-mass")] = 0.95
    """Share of the importance that the seen blocks hold together, in (0, 1]; 1 sees all."""
    least: Annotated[float, tyro.conf.arg(name="sparse-least")] = 0.05
    """Share of the blocks that is seen at least, in [0, 1], whatever `mass` says."""
    most: Annotated[float, tyro.conf.arg(name="sparse-most")] = 0.17
    """Share that is seen at most, in (0, 1], not below `least` (CogVideoX-5B: 0.10)."""
    window: Annotated[int, tyro.conf.arg(name="sparse-window")] = 30
    """Tokens that one global token of `asa-gt` stands for, 2 or more (CogVideoX-5B: 15)."""
    order: Annotated[Order, tyro.conf.arg(name="sparse-order")] = "gilbert"
    """How tokens come to blocks: along a space-filling curve, so that a block is a compact piece, or row by row."""
    engine: Annotated[Engine, tyro.conf.arg(name="sparse-engine")] = "auto"
    """What computes it: FlexAttention (a GPU), gathered blocks, or dense attention under a mask; equal to rounding."""
    critic: Annotated[bool, tyro.conf.arg(name="sparse-critic")] = False
    """The critic is sparse as well, as in Video-BLADE's release."""

    @property
    def on(self) -> bool:
        """Whether anything is sparse."""
        return self.kind != "dense"

    @property
    def of_student(self) -> dict[str, Any]:
        """What a student has to be called with wherever it is: the fields, less those of a run."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_A_RUN}

    def validate(self, critic: bool = True) -> None:
        """Refuses values out of range, and what nothing reads.

        Args:
            critic: whether there is one.

        Raises:
            FewstepError: with what was found, what was expected and the likely fix.
        """
        chosen = (("kind", self.kind, Kind), ("order", self.order, Order), ("engine", self.engine, Engine))
        for name, value, choices in chosen:
            if value not in get_args(choices):
                raise FewstepError(
                    f"found {name} = {value!r}, expected one of {get_args(choices)}, fix: choose one of them"
                )
        if not self.on:
            names = [entry.name for entry in fields(self) if entry.name != "kind"]
            refuse_unread(self, names, "sparse attention (--sparse asa or asa-gt)")
        if self.kind != "asa-gt":
            refuse_unread(self, ["window"], "global tokens (--sparse asa-gt)")
        if self.least == self.most:
            refuse_unread(self, ["mass"], "a least share below the most, so that there is something to choose,")
        if not critic:
            refuse_unread(self, ["critic"], "a method that has one")
        for name, number, low in (("block", self.block, 2), ("samples", self.samples, 1), ("window", self.window, 2)):
            if not low <= number <= _LARGEST:
                raise FewstepError(
                    f"found sparse {name} = {number}, expected {low} to {_LARGEST} tokens, fix: block 128, samples 32, "
                    "window 30"
                )
        if self.samples > self.block:
            raise FewstepError(
                f"found {self.samples} samples of blocks of {self.block} tokens, expected no more than there are, "
                "fix: lower --sparse-samples"
            )
        if not (0 < self.mass <= 1 and 0 <= self.least <= self.most <= 1 and self.most > 0):
            raise FewstepError(
                f"found sparse mass {self.mass}, least {self.least} and most {self.most}, expected shares: mass and "
                "most in (0, 1], least in [0, most], fix: mass 0.95, least 0.05, most 0.17"
            )
