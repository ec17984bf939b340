"""The embedded video teacher: words, sizes, training, all stages of its build in miniature, table and card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

import fewstep
from fewstep.commands import teacher as command
from fewstep.data.films import draw_film_caption, draw_films, film_training_captions
from fewstep.data.real import RealFilms
from fewstep.data.scenes import held_out
from fewstep.embedded.autoencoder import build_autoencoder, train_autoencoder
from fewstep.embedded.film_build import FILM_FOLDER, FilmBuildOptions, build_film_teacher
from fewstep.embedded.film_teacher import (
    LATENT_CHANNELS,
    FilmModel,
    FilmOptions,
    FilmTraining,
    build_film_autoencoder,
    build_film_tokenizer,
    film_frames,
    told_controls,
)
from fewstep.embedded.training import TOKENS
from fewstep.evaluation.film_run import film_captions, rendered_scores
from fewstep.models import load_backbone
from fewstep.models.film import FilmPipeline, decode_frames, encode_frames


def test_every_caption_fits_the_vocabulary_and_the_length() -> None:
    tokenizer, rng = build_film_tokenizer(), np.random.default_rng(0)
    for _ in range(500):
        ids = tokenizer(str(draw_film_caption(rng))).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= TOKENS
        assert ids[-1] == tokenizer.eos_token_id


def test_size_and_shape() -> None:
    model = FilmModel()
    assert 2e6 < sum(p.numel() for p in model.transformer.parameters()) < 4.2e6
    with torch.no_grad():
        nothing = (torch.full((2, 4, 2), torch.nan), torch.full((2, 4), torch.nan), torch.zeros(2, 1))
        flow = model(torch.randn(2, LATENT_CHANNELS, 4, 8, 8), torch.tensor([0.3, 1.0]), ["a frog", ""], *nothing)
    assert flow.shape == (2, LATENT_CHANNELS, 4, 8, 8)


def test_frames_are_encoded_and_decoded_one_by_one() -> None:
    autoencoder, films = build_autoencoder(latent_channels=LATENT_CHANNELS).eval(), draw_films([1, 2], frames=4).pixels
    with torch.no_grad():
        latents = encode_frames(autoencoder, films)
        whole = decode_frames(autoencoder, latents)
        part = decode_frames(autoencoder, latents[:, :, 2:])  # as a stream does
    assert latents.shape == (2, LATENT_CHANNELS, 4, 8, 8)
    assert whole.shape == films.shape
    torch.testing.assert_close(part, whole[:, :, 2:])


def test_the_autoencoder_starts_from_the_images_and_sees_whole_frames() -> None:
    image = build_autoencoder()
    own, given = build_film_autoencoder(image).state_dict(), image.state_dict()
    new = {
        name for name, value in own.items() if not torch.equal(value, given[name]) or value.shape != given[name].shape
    }
    assert 2 <= len(new) <= 6
    assert all(LATENT_CHANNELS in own[name].shape for name in new)
    frames = film_frames(7, np.random.default_rng(0))
    assert frames.shape == (7, 3, 32, 32)
    assert frames.abs().max() <= 1 + 1e-5


def test_the_loss_is_zero_at_the_flow_from_data_to_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    training = FilmTraining(build_autoencoder(latent_channels=LATENT_CHANNELS), FilmOptions(batch=4, frames=3))
    films = draw_films(np.random.default_rng(5).integers(2**62, size=4), frames=3)
    with torch.no_grad():
        x0 = encode_frames(training.autoencoder, films.pixels)
    told: list[str] = []

    def forward(x: torch.Tensor, t: torch.Tensor, captions: list[str], *controls: torch.Tensor) -> torch.Tensor:
        told.extend(captions)
        assert ((t > 0) & (t < 1)).all()
        return (x - x0) / t.view(-1, 1, 1, 1, 1) + wrong  # noise - data, as x = data + t (noise - data)

    monkeypatch.setattr(training.model, "forward", forward)
    for wrong in (0.0, 0.5):
        loss = training.loss(np.random.default_rng(5))
        torch.testing.assert_close(loss, torch.tensor(wrong**2), rtol=1e-3, atol=1e-5)
    assert sum(text == str(c) for text, c in zip(told, films.captions, strict=False)) >= 2  # some are dropped


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("film-build")
    said: list[str] = []
    options = FilmOptions(iterations=2, batch=2, frames=3)
    build_film_teacher(out, options, FilmBuildOptions(autoencoder_iterations=1), report=said.append)
    assert any("teacher 2/2" in line for line in said)
    return out


def test_training_resumes_to_the_bit(built: Path) -> None:
    torch.set_num_threads(1)
    options, folder, said = FilmOptions(iterations=3, batch=2, frames=3), built / "autoencoder", []
    straight = FilmTraining(AutoencoderTiny.from_pretrained(folder), options)
    for _ in range(3):
        straight.step()
    build_film_teacher(built, options, FilmBuildOptions(), report=said.append)
    assert "continuing the teacher from iteration 2" in said
    assert not any(line.startswith("autoencoder") for line in said)
    state = load_file(built / "teacher.safetensors")
    for name, value in straight.model.state_dict().items():
        assert torch.equal(state[f"model.{name}"], value), name
        assert torch.equal(state[f"average.{name}"], straight.average[name]), name
    assert json.loads((built / FILM_FOLDER / "training.json").read_text())["iterations"] == 3


def test_the_result_is_a_teacher_of_films(built: Path) -> None:
    teacher = fewstep.load_teacher(built / FILM_FOLDER, num_frames=5)
    assert teacher.backbone.latent_shape == (LATENT_CHANNELS, 5, 8, 8)
    assert teacher.backbone.prediction == "flow"
    films = teacher.sample(["a frog", "a pig"], [0, 1], 2)
    assert films.shape == (2, 5, 3, 32, 32)
    assert films.dtype == torch.uint8
    pipeline = FilmPipeline.from_pretrained(built / FILM_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    frames = pipeline(["a frog", "a pig"], num_frames=5, num_inference_steps=2, generator=generators, output_type="pt")
    ours, theirs = films.float() / 255, frames.frames
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)


def test_real_films_are_functions_of_the_samples_number(built: Path) -> None:
    backbone = load_backbone(built / FILM_FOLDER, size={"num_frames": 3})
    source, samples = RealFilms(backbone, frames=3), torch.tensor([5, 100_003])
    latents, condition = source(1, samples)
    again, _ = source(9, samples.flip(0))
    assert latents.shape == (2, *backbone.latent_shape)
    torch.testing.assert_close(again.flip(0), latents)
    films = draw_films([5, 100_003], frames=3)
    torch.testing.assert_close(latents, encode_frames(backbone.pipeline.vae, films.pixels))
    for name, value in backbone.encode([str(c) for c in films.captions]).items():
        torch.testing.assert_close(condition[name], value)
    assert not any(held_out(text) for text in film_training_captions(200))


def test_encoded_captions_are_those_of_training(built: Path) -> None:
    backbone, model = load_backbone(built / FILM_FOLDER), FilmModel()
    model.text_encoder.load_state_dict(backbone.pipeline.text_encoder.state_dict())
    seen: list[torch.Tensor] = []
    model.transformer.forward = lambda x, t, states, return_dict: seen.append(states) or (x[:, :LATENT_CHANNELS],)  # type: ignore[method-assign]
    captions = ["a singing frog hops to the right on a green background", ""]
    nothing = (torch.full((2, 1, 2), torch.nan), torch.full((2, 1), torch.nan), torch.zeros(2, 1))
    model(torch.zeros(2, LATENT_CHANNELS, 1, 8, 8), torch.ones(2), captions, *nothing)
    (told,) = backbone.encode(captions).values()
    torch.testing.assert_close(told, seen[0], rtol=1e-3, atol=1e-3)
    assert (told[1, 1:] == 0).all()


def test_films_are_scored_and_the_card_says_so(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = built / FILM_FOLDER, built / "table.json"
    told = ["--teacher", folder, "--steps", 1, "--scales", 1, "--motion", 1.5, "--frames", 9, "--count", 2]
    command.main(["table-video", *map(str, told), "--out", str(table)])
    rows = json.loads(table.read_text())
    assert list(rows) == ["rendered", "1 steps, guidance 1", "1 steps, tracks and drives, motion 1.5"]
    assert (rows["1 steps, guidance 1"]["error"], rows["1 steps, guidance 1"]["correlation"]) == (None, None)
    controlled = rows["1 steps, tracks and drives, motion 1.5"]
    assert controlled["calls"] == 3
    assert controlled["error"] > 0
    assert -1 <= controlled["correlation"] <= 1
    assert rows["rendered"]["thing"] == 1
    assert rows["rendered"]["error"] < 0.05
    assert rows["1 steps, guidance 1"]["calls"] == 1
    command.main(["card-video", "--folder", str(folder), "--table", str(table)])
    card = (folder / "README.md").read_text()
    assert "| rendered | 0 | 100.0 % |" in card
    assert "iterations" in card
    assert "thing 100.0 %" in capsys.readouterr().out


def test_evaluation_uses_held_out_captions_and_its_ceiling_is_full_marks() -> None:
    assert film_captions(5) == film_captions(5)
    scores = rendered_scores(8).scores
    assert scores.thing == scores.voice == scores.background == scores.same_thing == 1


def test_what_is_told_is_told_for_some_films_and_chunks() -> None:
    options, rng = FilmOptions(), np.random.default_rng(0)
    tracks, drives = torch.rand(400, 24, 2), torch.rand(400, 24)
    told_tracks, told_drives, ids = told_controls(tracks, drives, options, rng)
    seen = told_tracks.isfinite()[..., 0]
    assert torch.equal(told_tracks[seen], tracks[seen])
    some = seen.any(1)
    assert abs(float(some.float().mean()) - 0.5) < 0.1
    chunks = seen[some].unflatten(1, (-1, 3))
    assert (chunks.all(2) == chunks.any(2)).all()
    assert chunks[:, 0].all()
    assert abs(float(chunks[:, 1:].float().mean()) - 0.8) < 0.05
    loud = told_drives.isfinite()
    assert (loud.all(1) == loud.any(1)).all()
    assert abs(float(loud.float().mean()) - 0.5) < 0.1
    assert abs(float((loud[:, 0] & some).float().mean()) - 0.25) < 0.1  # each by itself
    assert len(ids.unique()) > 150


def test_the_autoencoder_resumes_to_the_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)

    class Stopped(Exception):
        pass

    def draw(count: int, rng: np.random.Generator) -> torch.Tensor:
        drawn.append(1)
        if len(drawn) == stop:
            raise Stopped
        return torch.from_numpy(rng.uniform(-1, 1, (count, 3, 8, 8)).astype(np.float32))

    def train(**more: Path) -> dict[str, torch.Tensor]:
        told = {"draw": draw, "batch": 2, "save_seconds": -1.0, **more}
        torch.manual_seed(0)
        return train_autoencoder(5, lambda *_: None, start=build_autoencoder(8), **told).state_dict()  # type: ignore[arg-type]

    drawn: list[int] = []
    stop = 0
    torch.manual_seed(0)
    start = build_autoencoder(8).state_dict()
    straight = train()
    drawn, stop = [], 4
    with pytest.raises(Stopped):
        train(state=tmp_path / "state.safetensors")
    drawn, stop = [], 0
    resumed = train(state=tmp_path / "state.safetensors")
    assert len(drawn) == 2  # of 5, three had been made and saved
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())
    assert not all(torch.equal(start[name], value) for name, value in resumed.items())
