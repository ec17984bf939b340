"""What frames of a video are told of motion and sound: tracks as maps of sinusoidal vectors, and a drive signal.

MotionStream (arXiv 2511.01266, eq. 1): where a track is, the cell of the latent grid holds the track's vector, and
zeros elsewhere; a small head of 1x1x1 makes channels of it, which the network is fed beside the noisy latents. Only the
width of what it is fed changes. All of it is local in time, so a stream is told chunk by chunk what is asked of it.

Legend: B films, N tracks, F frames, d = `TRACK_WIDTH`, h x w cells of a frame's latent.
"""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fewstep.errors import FewstepError

__all__ = [
    "DRIVE_CHANNELS",
    "TRACK_IDS",
    "TRACK_WIDTH",
    "ModelMixin",  # diffusers looks in the module of a class of ours for the base class that says how to load it
    "TrackHead",
    "drive_maps",
    "packed",
    "track_maps",
    "track_vectors",
]

TRACK_WIDTH = 64
"""d, width of a track's vector (published)."""
TRACK_IDS = 256
"""Numbers that tracks are told apart by; drawn at random in training, from 0 on when sampling. The range is ours."""
DRIVE_CHANNELS = 2
"""Channels of a drive: its value, and whether there is one; so that silence is not the same as nothing said."""


class TrackHead(ModelMixin, ConfigMixin):
    """Track maps (B, d * packing, f, h, w) to channels (B, channels, f, h, w): a convolution of 1x1x1 without a bias.

    Without one, what is not said stays zero. A part of the pipeline, saved with it.

    Args:
        channels: what comes out.
        packing: frames that are one latent frame (see `packed`).
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, channels: int = 8, packing: int = 1) -> None:
        super().__init__()
        self.project = nn.Conv3d(TRACK_WIDTH * packing, channels, 1, bias=False)
        nn.init.normal_(self.project.weight, std=1 / math.sqrt(TRACK_WIDTH / 2))  # of vectors of norm sqrt(d / 2)

    def forward(self, maps: Tensor) -> Tensor:
        made: Tensor = self.project(maps.to(self.project.weight.dtype))
        return made

    @property
    def width(self) -> int:
        """Channels of `controls`."""
        return int(self.config.channels + DRIVE_CHANNELS * self.config.packing)

    def controls(
        self,
        tracks: Tensor | None,
        drives: Tensor | None,
        *,
        height: int,
        width: int,
        scale: int,
        ids: Tensor | None = None,
    ) -> Tensor:
        """What the frames of B films are told, (B, self.width, f, height, width); one of the two may be left out.

        Args:
            tracks: (B, F, 2), or (B, N, F, 2) of several, as x, y in pixels; not finite where nothing is said.
            drives: (B, F) in [0, 1], not finite where nothing is said.
            height: of the latent grid in cells; likewise `width`.
            scale: pixels of a cell's side.
            ids: (B, N) numbers of the tracks; 0, 1, ... unless told.

        Raises:
            FewstepError: other shapes, or films or frames of different number.
        """
        tracks = tracks[:, None] if tracks is not None and tracks.ndim == 3 else tracks
        _check(tracks, drives)
        if tracks is None:
            assert drives is not None
            tracks = drives.new_full((len(drives), 1, drives.shape[1], 2), math.nan)
        if drives is None:
            drives = tracks.new_full((len(tracks), tracks.shape[2]), math.nan)
        if ids is None:
            ids = torch.arange(tracks.shape[1], device=tracks.device).expand(len(tracks), -1)
        weight, packing = self.project.weight, self.config.packing
        maps = track_maps(tracks.to(weight.device, torch.float32), ids.to(weight.device), height, width, scale)
        told = drive_maps(drives.to(weight.device, torch.float32), height, width)
        return torch.cat([self(packed(maps, packing)), packed(told, packing).to(weight.dtype)], 1)


def track_vectors(ids: Tensor) -> Tensor:
    """Numbers of tracks (...) as vectors (..., d), sines then cosines, of norm sqrt(d / 2)."""
    half = TRACK_WIDTH // 2
    turns = ids[..., None] * 10000.0 ** -(torch.arange(half, device=ids.device) / half)
    return torch.cat([turns.sin(), turns.cos()], -1)


def track_maps(tracks: Tensor, ids: Tensor, height: int, width: int, scale: int) -> Tensor:
    """Eq. 1: each track's vector in the cell where it is, zeros elsewhere: (B, d, F, height, width) float32.

    Of two tracks in one cell the later one is shown.

    Args:
        tracks: (B, N, F, 2) as x, y in pixels; not shown where not finite, or outside of the frame.
        ids: (B, N) numbers of the tracks.
        height: of the grid in cells; likewise `width`.
        scale: pixels of a cell's side.
    """
    batch, count, frames, _ = tracks.shape
    cells = (tracks / scale).floor()
    cells = torch.where(cells.isfinite(), cells, -1.0)
    across, down = cells.unbind(-1)  # (B, N, F)
    shown = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    place = torch.where(shown, down * width + across, 0.0).long()
    order = torch.arange(1, count + 1, device=tracks.device)[:, None] * shown
    last = torch.zeros(batch, height * width, frames, dtype=torch.long, device=tracks.device)
    last.scatter_reduce_(1, place, order, "amax")
    vectors = track_vectors(ids)
    known = torch.cat([vectors.new_zeros(batch, 1, TRACK_WIDTH), vectors], 1)
    maps = known[torch.arange(batch, device=tracks.device)[:, None, None], last]  # (B, h w, F, d)
    return maps.permute(0, 3, 2, 1).unflatten(3, (height, width))


def drive_maps(drives: Tensor, height: int, width: int) -> Tensor:
    """Drives (B, F), not finite where nothing is said, as (B, 2, F, height, width): value and 1, or zeros."""
    said = drives.isfinite()
    told = torch.stack([torch.where(said, drives, 0.0), said.to(drives.dtype)], 1)
    return told[..., None, None].expand(-1, -1, -1, height, width)


def packed(maps: Tensor, factor: int) -> Tensor:
    """(B, C, F, h, w) at F frames as (B, C * factor, f, h, w) at f latent frames, each of `factor` frames.

    The first frame is a latent frame of its own, as autoencoders of videos have it, and fills its channels repeatedly.

    Raises:
        FewstepError: F is not 1 more than a multiple of a factor above 1.
    """
    if factor == 1:
        return maps
    if maps.shape[2] % factor != 1:
        raise FewstepError(
            f"found {maps.shape[2]} frames of controls, expected 1 more than a multiple of {factor}, the frames of a "
            "latent frame, fix: one value for each frame of the video"
        )
    whole = torch.cat([maps[:, :, :1].expand(-1, -1, factor - 1, -1, -1), maps], 2)
    return whole.unflatten(2, (-1, factor)).transpose(2, 3).flatten(1, 2)


def _check(tracks: Tensor | None, drives: Tensor | None) -> None:
    """FewstepError unless tracks (B, N, F, 2) and drives (B, F), one of which may be None, fit."""
    good = tracks is not None or drives is not None
    good &= tracks is None or (tracks.ndim == 4 and tracks.shape[3] == 2)
    good &= drives is None or drives.ndim == 2
    if good and tracks is not None and drives is not None:
        good = tracks.shape[::2] == drives.shape
    if not good:
        found = " and ".join(
            f"{name} {'missing' if value is None else tuple(value.shape)}"
            for name, value in (("tracks", tracks), ("drives", drives))
        )
        raise FewstepError(
            f"found {found}, expected tracks (films, frames, 2) or (films, tracks, frames, 2) as x, y in pixels, and "
            "drives (films, frames) in [0, 1], of the same films and frames, fix: nan where nothing is said"
        )
