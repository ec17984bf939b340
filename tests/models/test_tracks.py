"""Tracks and drives as channels. M numbers are those of the card motionstream.md, section 8."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_flows
import torch

import fewstep
from fewstep.core.guidance import joint_weights
from fewstep.core.tensors import CONTROLS
from fewstep.errors import FewstepError
from fewstep.models.film import FilmPipeline
from fewstep.models.teacher import Teacher
from fewstep.models.tracks import TRACK_WIDTH, TrackHead, drive_maps, packed, track_maps, track_vectors

NAN = math.nan
GRID: dict[str, int] = {"height": 3, "width": 4, "scale": 4}


def paths(*points: tuple[float, float]) -> torch.Tensor:
    """One film of one frame with tracks at these points, (1, N, 1, 2)."""
    return torch.tensor(points).view(1, len(points), 1, 2)


def test_a_seen_track_is_its_vector_in_one_cell() -> None:
    """M7."""
    maps = track_maps(paths((9.0, 4.0), (NAN, 4.0), (16.0, 1.0), (-0.1, 1.0)), torch.tensor([[7, 8, 9, 10]]), **GRID)
    assert maps.shape == (1, TRACK_WIDTH, 1, 3, 4)
    filled = maps[0, :, 0].norm(dim=0)
    assert (filled > 0).nonzero().tolist() == [[1, 2]]  # row 4 / 4, column 9 / 4; the others are not seen
    torch.testing.assert_close(maps[0, :, 0, 1, 2], track_vectors(torch.tensor(7)))
    torch.testing.assert_close(filled[1, 2], torch.tensor(math.sqrt(TRACK_WIDTH / 2)))


def test_the_order_of_tracks_does_not_matter_unless_they_meet() -> None:
    """M7."""
    tracks = torch.rand(2, 3, 5, 2, generator=torch.Generator().manual_seed(0)) * 3.9
    tracks[:, :, :, 0] += 4 * torch.tensor([0, 1, 2])[None, :, None]  # each in a column of its own
    ids = torch.tensor([[3, 5, 200], [0, 1, 2]])
    maps, order = track_maps(tracks, ids, **GRID), [2, 0, 1]
    assert torch.equal(track_maps(tracks[:, order], ids[:, order], **GRID), maps)
    assert ((maps != 0).any(1).sum((2, 3)) == 3).all()
    meeting = track_maps(paths((1.0, 1.0), (2.0, 2.0)), torch.tensor([[4, 6]]), **GRID)
    torch.testing.assert_close(meeting[0, :, 0, 0, 0], track_vectors(torch.tensor(6)))


def test_the_head_is_local_in_time_and_leaves_nothing_as_nothing() -> None:
    """M8: told chunk by chunk is told all at once, to the bit; so streams need no look-ahead."""
    torch.manual_seed(0)
    head, tracks, drives = TrackHead(5), torch.rand(2, 6, 2) * 12, torch.rand(2, 6)
    tracks[0, 2:4], drives[1, :3] = NAN, NAN
    whole = head.controls(tracks, drives, **GRID)
    assert whole.shape == (2, head.width, 6, 3, 4)
    parts = [head.controls(tracks[:, i : i + 2], drives[:, i : i + 2], **GRID) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts, 2), whole)
    assert (whole[0, :5, 2:4] == 0).all()
    assert (whole[1, 5:, :3] == 0).all()
    torch.testing.assert_close(whole[1, 5:, 3, 0, 0], torch.tensor([float(drives[1, 3]), 1.0]))
    assert (head.controls(None, torch.full((1, 2), NAN), **GRID) == 0).all()
    silent = drive_maps(torch.zeros(1, 1), 1, 1).flatten()
    assert silent.tolist() == [0, 1]  # silence is something said


def test_frames_are_packed_as_autoencoders_of_videos_do() -> None:
    maps = torch.arange(9.0).view(1, 1, 9, 1, 1)
    assert packed(maps, 4)[0, :, :, 0, 0].T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert packed(maps, 1) is maps
    head = TrackHead(5, packing=4)
    assert head.controls(torch.ones(1, 9, 2), None, **GRID).shape == (1, head.width, 3, 3, 4)
    with pytest.raises(FewstepError, match="found 8 frames of controls"):
        packed(maps[:, :, :8], 4)


@pytest.mark.parametrize(
    ("tracks", "drives"),
    [((2, 3, 3), None), ((2, 3, 2), (2, 4)), (None, (2, 3, 1)), ((1, 3, 2), (2, 3)), (None, None)],
)
def test_shapes_that_do_not_fit_are_told(tracks: Any, drives: Any) -> None:
    given = [None if shape is None else torch.zeros(shape) for shape in (tracks, drives)]
    with pytest.raises(FewstepError, match=r"expected tracks \(films, frames, 2\)"):
        TrackHead(2).controls(*given, **GRID)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    tiny_flows.film().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return fewstep.load_teacher(folder, num_frames=3)


def test_the_head_lies_in_the_folder(folder: Path) -> None:
    assert (folder / "track_head" / "diffusion_pytorch_model.safetensors").is_file()
    first, again = tiny_flows.film().track_head, FilmPipeline.from_pretrained(folder).track_head
    assert isinstance(again, TrackHead)
    assert torch.equal(first.project.weight, again.project.weight)


def test_nothing_said_is_plain_text_to_video(teacher: Teacher) -> None:
    plain = teacher.latents(["a frog"], [0], 2)
    untold = teacher.latents(["a frog"], [0], 2, tracks=torch.full((1, 3, 2), NAN))
    assert torch.equal(plain, untold)
    told = teacher.latents(["a frog"], [0], 2, tracks=torch.full((1, 3, 2), 9.0))
    loud = teacher.latents(["a frog"], [0], 2, drives=torch.ones(1, 3))
    assert (told - plain).abs().max() > 1e-3
    assert (loud - plain).abs().max() > 1e-3


def test_adapter_and_pipeline_agree_about_joint_guidance(teacher: Teacher, folder: Path) -> None:
    tracks, drives = torch.rand(2, 3, 2) * 16, torch.rand(2, 3)
    told = {"guidance_scale": 3.0, "motion_guidance": 1.5}
    films = teacher.sample(["a frog", "a pig"], [0, 1], 2, tracks=tracks, drives=drives, batch=1, **told)  # type: ignore[arg-type]
    pipeline = FilmPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    size = teacher.backbone.size
    noise = torch.cat([teacher.noise([seed]) for seed in (0, 1)])
    theirs = pipeline(
        ["a frog", "a pig"], latents=noise, tracks=tracks, drive=drives, num_inference_steps=2, output_type="pt",
        **size, **told,
    ).frames  # fmt: skip
    torch.testing.assert_close(theirs, films.float() / 255, rtol=0, atol=0.02)
    plain = teacher.sample(["a frog", "a pig"], [0, 1], 2, tracks=tracks, drives=drives)
    assert (plain.float() - films.float()).abs().max() > 2
    assert teacher.calls(2, 3.0, 1.5) == 6
    assert sum(joint_weights(3.0, 1.5)) == pytest.approx(1)


def test_what_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="motion guidance with conditions of"):
        teacher.latents(["a frog"], [0], 1, motion_guidance=1.0)
    with pytest.raises(FewstepError, match="4 frames for 3 frames"):
        teacher.latents(["a frog"], [0], 1, tracks=torch.ones(1, 4, 2))
    tiny_flows.wan().save_pretrained(tmp_path)
    plain = fewstep.load_teacher(tmp_path, num_frames=5)
    with pytest.raises(FewstepError, match="found tracks or drives for Wan"):
        plain.sample(["a frog"], [0], 1, tracks=torch.ones(1, 5, 2))
    with pytest.raises(FewstepError, match="found tracks or drives for Wan"):
        fewstep.distill(plain, "tdm", out=tmp_path / "run", prompts=fewstep.data.film_clips.FilmClips(4))
    with pytest.raises(FewstepError, match="prompts that say nothing of motion"):
        fewstep.distill(teacher, "motionstream", out=tmp_path / "run", prompts=["a frog"])
    assert not (tmp_path / "run").exists()


def test_conditions_have_controls(teacher: Teacher) -> None:
    told = teacher.encode(["a frog"], tracks=torch.ones(1, 3, 2))
    assert told[CONTROLS].shape == (1, 5, 3, *teacher.backbone.latent_shape[2:])
    assert CONTROLS not in teacher.encode(["a frog"])
