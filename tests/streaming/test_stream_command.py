"""`fewstep stream` with a tiny Wan, from training over noisy histories to a film on disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny_flows
import torch

import fewstep
from fewstep.api import RoleOptions
from fewstep.commands.stream import main
from fewstep.errors import FewstepError
from fewstep.methods import LiveAvatarOptions
from fewstep.streaming.film import FilmFile
from fewstep.streaming.student import CausalStudent
from fewstep.training.options import TrainOptions

imageio = pytest.importorskip("imageio.v3")
pytest.importorskip("imageio_ffmpeg")
PROMPTS = tiny_flows.PROMPTS[:2]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a student of two calls, chunks of one latent frame of 2x4; read-only."""
    folder = tmp_path_factory.mktemp("live")
    tiny_flows.wan().save_pretrained(folder / "wan")
    teacher = fewstep.load_teacher(folder / "wan", height=16, width=32, num_frames=9)
    made = fewstep.distill(
        teacher, LiveAvatarOptions(chunk=1, window=1, steps=2, critic_updates=1), out=folder / "run", prompts=PROMPTS,
        roles=RoleOptions(roles="copies"),
        train_options=TrainOptions(iterations=1, batch=2, warmup=0, tensorboard=False, sample_every=0),
    )  # fmt: skip
    assert isinstance(made, CausalStudent)
    assert made.layout.kept == "noisy"
    assert made.layout.positions == "rolling"
    return folder / "run" / "student"


def told(student: Path, out: Path, *more: str) -> list[str]:
    return ["--student", str(student), "--out", str(out), "--device", "cpu", *more]


def test_two_processes_write_the_file_of_one(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit, with a prompt that changes; the frames are those of the stream, decoded at once."""
    more = ["--prompt", *PROMPTS, "--every", "2", "--chunks", "4", "--fps", "8"]
    main(told(student, tmp_path / "one.mp4", *more))
    assert "13 frames in 4 chunks" in capsys.readouterr().out
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fewstep"]
    command = [*torchrun, "stream", *told(student, tmp_path / "two.mp4", *more)]
    subprocess.run(command, check=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "two.mp4"]
    assert imageio.imread(tmp_path / "one.mp4", plugin="FFMPEG").shape == (13, 16, 32, 3)


def test_interrupted_it_leaves_a_film_that_plays(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an end; Ctrl-C while the third chunk is written. What is there by then is the beginning."""
    write, growing = FilmFile.write, []

    def interrupted(film: FilmFile, frames: torch.Tensor) -> None:
        write(film, frames)
        growing.append(film.frames)
        if len(growing) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(FilmFile, "write", interrupted)
    before = signal.getsignal(signal.SIGINT)
    main(told(student, tmp_path / "film.mp4", "--prompt", PROMPTS[0]))
    assert signal.getsignal(signal.SIGINT) is before
    assert len(imageio.imread(tmp_path / "film.mp4", plugin="FFMPEG")) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_what_fails_leaves_nothing(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(film: FilmFile, frames: torch.Tensor) -> None:
        raise RuntimeError("no disk")

    monkeypatch.setattr(FilmFile, "write", failing)
    with pytest.raises(RuntimeError, match="no disk"):
        main(told(student, tmp_path / "film.mp4", "--prompt", PROMPTS[0]))
    assert list(tmp_path.iterdir()) == []


def test_chunks_decoded_one_by_one_are_the_film_decoded_at_once(student: Path) -> None:
    """For Wan's autoencoder, whose decoder remembers; a length in seconds is rounded up to chunks."""
    loaded: Any = fewstep.load_student(student)
    latents = torch.cat(list(islice(loaded.stream(PROMPTS, [0, 1]), 4)), 2)
    films = []
    for sizes in ([1, 1, 1, 1], [2, 1, 1], [4]):
        decode = loaded.backbone.stream_decoder()
        films.append(torch.cat([decode(part) for part in latents.split(sizes, 2)], 1))
    assert torch.equal(films[0], films[1])
    assert torch.equal(films[0], films[2])
    off = (films[0].int() - loaded.backbone.decode(latents).int()).abs()
    assert off.max() <= 1  # rounding
    assert off.float().mean() < 0.01
    from fewstep.commands.stream import Stream, _length

    args = [Stream(student="", prompt=("a",), seconds=seconds) for seconds in (0.1, 1.2, 1.3)]
    assert [_length(one, 8, 1, 4) for one in args] == [1, 4, 4]
    assert [_length(one, 8, 3, 4) for one in args] == [1, 2, 2]
    assert [_length(one, 8, 3, 1) for one in args] == [1, 4, 4]


def test_what_is_refused(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "film.mp4"
    prompt = ["--prompt", PROMPTS[0]]
    for more, message in (
        ([*prompt, "--chunks", "2", "--seconds", "1"], "found chunks 2 and seconds 1.0"),
        ([*prompt, "--seconds", "inf"], "found chunks 0 and seconds inf"),
        ([*prompt, "--seconds", "nan"], "found chunks 0 and seconds nan"),
        ([*prompt, "--every", "2"], "found 1 prompts and every = 2"),
        (["--prompt", " "], "found no prompt or an empty one"),
        ([*prompt, "--steps", "3"], "found steps = 3"),
        ([*prompt, "--out", "film.gif"], "found film.gif at 16 frames a second"),
        ([*prompt, "--fps", "0"], "found film.mp4 at 0 frames"),
    ):
        with pytest.raises(FewstepError, match=message):
            main(told(student, out, *more))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(FewstepError, match="found 4 processes for a student of 2 calls"):
        main(told(student, out, *prompt))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FewstepError, match="found 2 processes for a student that reads every finished chunk"):
        main(told(student, out, *prompt, "--kept", "clean"))
    with pytest.raises(FewstepError, match="that makes whole samples, expected a causal student"):
        main(told(student.parents[1] / "wan", out, *prompt))
    assert list(tmp_path.iterdir()) == []
