"""Tracks and drives by files: `fewstep sample` and `fewstep stream` make what Python makes of the same numbers."""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import tiny_flows
import torch
from PIL import Image, ImageSequence

import fewstep
from fewstep.attention import Layout
from fewstep.cli import main
from fewstep.commands import stream as stream_command
from fewstep.core import grids
from fewstep.data.told_files import read_told
from fewstep.errors import FewstepError
from fewstep.models.teacher import Teacher
from fewstep.streaming.film import FilmFile
from fewstep.streaming.student import CausalStudent

TRACK = [[4, 5], None, [9.5, 12], [12, 12]]
DRIVE = [0.25, 1, None]
TOLD = {
    "tracks": torch.tensor([[[4, 5], [math.nan] * 2, [9.5, 12], [12, 12], [math.nan] * 2, [math.nan] * 2]]),
    "drives": torch.tensor([[0.25, 1, *[math.nan] * 4]]),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("films")
    tiny_flows.film().save_pretrained(folder)
    return fewstep.load_teacher(folder, num_frames=6)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, told in (("track", TRACK), ("drive", DRIVE)):
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
    return ["--tracks", str(tmp_path / "track.json"), "--drives", str(tmp_path / "drive.json")]


def test_sampled_films_do_as_the_files_say(teacher: Teacher, files: list[str], tmp_path: Path) -> None:
    source, out = teacher.backbone.source, tmp_path / "films"
    words = ["sample", "--student", source, "--prompt", "a frog", "--count", "2", "--steps", "2", "--num-frames", "6"]
    main([*words, *files, "--motion-guidance", "1.5", "--out", str(out)])
    told = {name: value.expand(2, *value.shape[1:]) for name, value in TOLD.items()}
    wanted = teacher.sample(["a frog"] * 2, [0, 1], 2, motion_guidance=1.5, **told)
    for film, path in zip(wanted, sorted(out.iterdir()), strict=True):
        with Image.open(path) as shown:
            frames = [torch.tensor(list(each.convert("RGB").tobytes())) for each in ImageSequence.Iterator(shown)]
        assert torch.equal(torch.stack(frames), film.permute(0, 2, 3, 1).flatten(1).long())
    assert not torch.equal(wanted, teacher.sample(["a frog"] * 2, [0, 1], 2))


def test_a_stream_does_as_the_files_say(
    teacher: Teacher, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of two, the files' last frames and what comes after them left open."""
    pytest.importorskip("imageio_ffmpeg")
    backbone, grid = teacher.backbone, {2: grids.shifted(2, 5.0)}
    layout = Layout(2, sink=1, window=1)
    student = CausalStudent(backbone, backbone.network, grid, {}, 0.0, layout, backbone.causal(backbone.network))
    monkeypatch.setattr(stream_command, "load", lambda *told: student)
    written: list[torch.Tensor] = []
    monkeypatch.setattr(FilmFile, "write", lambda film, frames: written.append(frames))
    words = ["--student", "tiny", "--prompt", "a frog", "--chunks", "4", "--out", str(tmp_path / "film.mp4")]
    stream_command.main([*words, *files])
    wanted = [backbone.decode(chunk)[0] for chunk in islice(student.stream("a frog", 0, **TOLD), 4)]
    assert all(torch.equal(one, other) for one, other in zip(written, wanted, strict=True))
    plain = [backbone.decode(chunk)[0] for chunk in islice(student.stream("a frog", 0), 4)]
    assert not torch.equal(plain[0], wanted[0])


NO_TRACKS = [
    "",
    "{",
    "3",
    "[]",
    "{}",
    "[1]",
    "[[1]]",
    '[["a", 1]]',
    "[[NaN, 1]]",
    "[[1, true]]",
    f"[[1{'0' * 400}, 1]]",
]


@pytest.mark.parametrize("text", NO_TRACKS)
def test_what_is_no_track_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "track.json"
    path.write_text(text)
    with pytest.raises(FewstepError, match=r"expected a list of \[x, y\] in pixels"):
        read_told(path, None)
    path.write_text("[0.5, 1.5]")
    with pytest.raises(FewstepError, match=r"found 1.5 in .*expected a list of numbers in \[0, 1\]"):
        read_told(None, path)


def test_what_cannot_be_told_is_refused(
    tiny_teacher: Path, teacher: Teacher, files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film = [*files, "--num-frames", "3"]
    for source, more, said in (
        (teacher.backbone.source, film, "found tracks or drives of 4 frames for films of 3"),
        (str(tiny_teacher), files, "found tracks or drives for PixArt"),
        (teacher.backbone.source, ["--motion-guidance", "1"], "motion guidance with conditions of"),
        (str(tiny_teacher), ["--tracks", str(tmp_path / "none.json")], "found no JSON at"),
    ):
        with pytest.raises(SystemExit):
            main(["sample", "--student", source, "--prompt", "a frog", "--steps", "1", "--out", "x.png", *more])
        assert said in capsys.readouterr().err
