"""Videos through every command: films without a prompt of the user's, and tiny Wan and CogVideoX pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_flows
import torch
from PIL import Image
from tiny_pixart import assert_latents_close

import fewstep
from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation.clips import has_films
from fewstep.evaluation.film_run import held_out_films
from fewstep.models import seeded_noise

QUICK = ["--iterations", "2", "--batch", "2", "--warmup", "0", "--no-tensorboard"]
FRAMES = 9
WAN = ["--height", "16", "--width", "32", "--num-frames", "5"]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of films and a student by DMD2 with its GAN; neither prompts nor real data are told."""
    folder = tmp_path_factory.mktemp("films")
    tiny_flows.film().save_pretrained(folder / "film-teacher")
    words = ["--teacher", str(folder / "film-teacher"), "--out", str(folder / "run"), "--num-frames", str(FRAMES)]
    main(["distill", "dmd2", *words, *QUICK, "--steps", "2", "--sample-every", "2"])
    return folder


def test_films_are_distilled_from_their_own_captions_and_data(films: Path) -> None:
    told = json.loads((films / "run" / "run.json").read_text())
    assert told["origin"]["prompts"] == "the embedded teacher's own captions"
    assert told["configuration"]["prompts"]["count"] == 8192
    assert (films / "run" / "samples" / "000002-2-steps.png").is_file()


def test_a_film_a_grid_or_a_folder_of_files(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = ["sample", "--student", str(films / "run" / "student"), "--prompt", "a frog", "a 3d pizza"]
    main([*student, "--out", str(tmp_path / "grid.gif"), "--fps", "10", "--columns", "1"])
    with Image.open(tmp_path / "grid.gif") as film:
        assert film.size == (32, 64)
        film.load()
        assert film.info["duration"] == 100
    main([*student, "--out", str(tmp_path / "each"), "--seed", "5", "--count", "2"])
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        "0000-a-frog-5.webp", "0001-a-frog-6.webp", "0002-a-3d-pizza-7.webp", "0003-a-3d-pizza-8.webp",
    ]  # fmt: skip
    main([*student, "--out", str(tmp_path / "again"), "--seed", "5", "--form", "webp"])
    first, again = (tmp_path / name / "0000-a-frog-5.webp" for name in ("each", "again"))
    assert first.read_bytes() == again.read_bytes()
    with Image.open(first) as film:
        assert (film.size, film.n_frames) == ((32, 32), FRAMES)
        film.load()
        assert film.info["duration"] == round(1000 / 16)
    capsys.readouterr()
    for more, expected in (
        (["--out", "clip.avi"], "found clip.avi for videos"),
        (["--out", "clip.gif", "--fps", "61"], "found fps = 61"),
        (["--out", "clip.gif", "--form", "mp4"], "found --form mp4 beside the file clip.gif"),
    ):
        with pytest.raises(SystemExit):
            main([*student, *more])
        assert expected in capsys.readouterr().err


@pytest.mark.skipif(not has_films(), reason="needs the extra video")
def test_a_seed_gives_the_same_mp4(films: Path, tmp_path: Path) -> None:
    words = ["sample", "--student", str(films / "run" / "student"), "--prompt", "a frog"]
    for name in ("one.mp4", "two.mp4"):
        main([*words, "--out", str(tmp_path / name)])
    main([*words, "--out", str(tmp_path / "other.mp4"), "--seed", "1"])
    one, two, other = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_films_are_scored_and_compared_exactly(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.models.wan.Wan.teacher_steps", 2)
    samples, student = ["--samples", str(tmp_path / "samples")], str(films / "run" / "student")
    main(["evaluate", "--student", student, "--count", "6", *samples, "--out", str(tmp_path / "numbers.json")])
    row = json.loads((tmp_path / "numbers.json").read_text())["rows"]["2 steps"]["metrics"]
    assert {"frechet/films", "following", "thing", "fit", "speed", "drift/colour", "flicker/background"} <= set(row)
    assert row["fit"]["low"] <= row["fit"]["value"] <= row["fit"]["high"] < 0.9  # an untrained one draws nothing
    out = tmp_path / "page"
    words = ["--count", "2", "--scores", "6", *samples, "--out", str(out), "--fps", "8"]
    main(["compare", f"{films / 'film-teacher'}:2", student, *words])
    page = (out / "compare.html").read_text()
    assert all(prompt in page for prompt in held_out_films(2, seed=1))
    assert "Fréchet distance" in page
    assert "drift" in page


def test_a_served_film_is_the_sampled_one(films: Path) -> None:
    pytest.importorskip("fastapi")
    from fewstep.serving.served import served

    student = fewstep.load_student(films / "run" / "student")
    model = served(student, "films")
    assert (model.size, model.frames, model.fps) == ("32x32", FRAMES, 16)
    assert torch.equal(model.draw(["a frog"], [3], 2)[0], student.sample(["a frog"], [3])[0])


def test_the_shipped_name_says_how_to_train_it() -> None:
    with pytest.raises(FewstepError, match="fewstep teacher train-video"):
        fewstep.load_teacher("films")


@pytest.mark.parametrize(
    ("family", "method", "more", "fps"),
    [
        ("cogvideox", "tdm", [], 8),
        ("wan", "dmd2", [*WAN, "--gan-weight", "0", "--eta", "1"], 16),
    ],
)
def test_from_the_command_to_plain_diffusers(
    family: str, method: str, more: list[str], fps: int, tmp_path: Path
) -> None:
    """Four calls, on CogVideoX at the published times; the stock pipeline makes of the folder what our sampler does."""
    from diffusers import DiffusionPipeline

    getattr(tiny_flows, family)().save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a frog\na 3d pizza\n")
    words = ["--teacher", str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.txt"), "--rank", "2"]
    run = tmp_path / "run"
    main(["distill", method, *words, *QUICK, *more, "--student-rate", "1e-2", "--out", str(run)])
    student = fewstep.load_student(run / "student")
    if family == "cogvideox":
        assert [round(1000 * float(t)) - 1 for t in student.grids[4]] == [999, 856, 665, 399, -1]

    pipeline = DiffusionPipeline.from_pretrained(run / "student")
    pipeline.set_progress_bar_config(disable=True)
    noise = seeded_noise([7], student.backbone.latent_shape)
    call = student.card["call"]["4"] | student.backbone.student_call
    theirs = pipeline("a frog", latents=noise, output_type="latent", **call).frames
    assert_latents_close(student.latents(["a frog"], [7], 4), theirs, 1e-4)

    main(["sample", "--student", str(run / "student"), "--prompt", "a frog", "--out", str(tmp_path / "f.gif")])
    with Image.open(tmp_path / "f.gif") as film:
        film.load()
        assert film.info["duration"] == round(100 / fps) * 10
