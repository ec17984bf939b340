"""MotionStream: joint guidance inside the real score, and from a film teacher to a stream that is steered.

M numbers are those of the card motionstream.md, section 8. M11: tests/embedded/test_film_teacher.py, frames are decoded
one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import tiny_flows
import torch
from tiny_causal import CHANNELS, ROWS, SIDE
from torch import Tensor
from toy_roles import FRAMES, WanRoles, draw, gradient

import fewstep
from fewstep.api import RoleOptions
from fewstep.core.guidance import guided
from fewstep.core.tensors import CONTROLS
from fewstep.data.film_clips import ClipData, FilmClips
from fewstep.data.films import draw_films
from fewstep.data.real import RealFilms
from fewstep.errors import FewstepError
from fewstep.methods import CausalInitOptions, preset
from fewstep.methods.base import Batch
from fewstep.models.teacher import Teacher
from fewstep.streaming.film import FilmFile
from fewstep.streaming.pipeline import Order, run_chain
from fewstep.streaming.student import CausalStudent
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group

OPTIONS = replace(preset("motionstream"), chunk=1, steps=2, critic_updates=1)  # type: ignore[type-var]
TRAIN = TrainOptions(iterations=2, batch=2, warmup=0, tensorboard=False)


class ToldRoles(WanRoles):
    """Networks that are fed controls; the empty prompt leaves these as they are."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("student", "teacher", "critic"):
            setattr(self, name, _fed(getattr(self, name)))

    def null(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return condition | {"text": torch.zeros_like(condition["text"])}

    def batch(self) -> Batch:
        batch = super().batch()
        controls = draw().normal("controls", (CHANNELS, FRAMES, SIDE, SIDE))
        return replace(batch, condition=batch.condition | {CONTROLS: controls})


def _fed(network: object) -> object:
    return lambda x, t, told: network(x + told[CONTROLS], t, told)  # type: ignore[operator]


def student_loss(roles: ToldRoles) -> Tensor:
    method = OPTIONS.build()
    path = method.rollout(roles.batch(), roles, draw())
    return method.student_loss(path, roles, draw().sub("student")).values


def test_a_critic_that_is_the_guided_teacher_gives_no_gradient() -> None:
    """M6: what is distilled is the joint guidance of teacher.sample; with less motion guidance there is a gradient."""
    roles, rows = ToldRoles(), []
    for motion in (1.5, 0.5):
        teacher = roles.teacher
        roles.critic = lambda x, t, told, motion=motion: guided(
            roles.teacher, x, t, told, roles.null(told), 3.0, motion
        )
        values = student_loss(roles)
        size = float(gradient(values, roles.own.network).abs().max())
        rows.append(size)
        roles.teacher = teacher
    assert rows[0] < 1e-6 < 1e-4 < rows[1]


def test_the_real_score_is_one_call_of_three_branches() -> None:
    roles, method = ToldRoles(), OPTIONS.build()
    asked, teacher = [], roles.teacher
    roles.teacher = lambda x, t, told: (asked.append(len(x)), teacher(x, t, told))[1]
    path = method.rollout(roles.batch(), roles, draw())
    loss = method.student_loss(path, roles, draw().sub("student"))
    assert asked == [3 * ROWS]
    assert loss.metrics["motion_gap"] > 0
    assert method.forwards() - replace(OPTIONS, motion_guidance=0.0).build().forwards() == 1
    assert preset("motionstream").build().forwards() > 0


def test_without_controls_it_is_refused() -> None:
    roles = ToldRoles()
    method, batch = OPTIONS.build(), roles.batch()
    roles.networks[0].condition = {}
    told = {name: value for name, value in batch.condition.items() if name != CONTROLS}
    roles.student = roles.own.student
    roles.critic = roles.teacher = roles.real.student
    path = method.rollout(replace(batch, condition=told), roles, draw())
    with pytest.raises(FewstepError, match="expected controls among them"):
        method.student_loss(path, roles, draw())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    folder = tmp_path_factory.mktemp("films")
    tiny_flows.film().save_pretrained(folder)
    return fewstep.load_teacher(folder, num_frames=4)


def test_clips_are_the_films_of_their_numbers(teacher: Teacher) -> None:
    clips, films = FilmClips(20), draw_films(range(20), frames=6)
    assert list(clips) == [str(caption) for caption in films.captions]
    told = clips.told(range(20), 6)
    for name, given in (("tracks", films.tracks), ("drives", films.drives)):
        said = told[name].flatten(1).isfinite()
        assert (said.all(1) | ~said.any(1)).all()
        assert 0 < said.all(1).sum() < 20
        torch.testing.assert_close(told[name][said.all(1)], given[said.all(1)])
    data, samples = ClipData(teacher.backbone, FilmClips(5)), torch.tensor([3, 8])
    condition = data(1, samples)
    again = data(7, samples.flip(0))
    assert condition[CONTROLS].shape == (2, 5, *teacher.backbone.latent_shape[1:])
    assert all(torch.equal(again[name].flip(0), value) for name, value in condition.items())
    places = [FilmClips(5)[:].index(data.prompt(n)) for n in (3, 8)]
    parts = FilmClips(5).told(places, 4)
    expected = teacher.encode([data.prompt(3), data.prompt(8)], **parts)
    assert all(torch.equal(expected[name], value) for name, value in condition.items())


def test_real_films_tell_their_own_tracks(teacher: Teacher) -> None:
    source = RealFilms(teacher.backbone, frames=4, controls=True)
    _, condition = source(1, torch.tensor([5]))
    films = draw_films([5], frames=4)
    told = teacher.encode([str(films.captions[0])], tracks=films.tracks, drives=films.drives)
    assert torch.equal(condition[CONTROLS], told[CONTROLS])
    assert CONTROLS not in RealFilms(teacher.backbone, frames=4)(1, torch.tensor([5]))[1]


def test_from_a_film_teacher_to_a_steered_stream(teacher: Teacher, tmp_path: Path) -> None:
    """Two stages on clips; then a stream is told where to go while it is made, without look-ahead."""
    clips, roles = FilmClips(4), RoleOptions(roles="copies")
    begin = CausalInitOptions(chunk=1, window=1, sink=1, steps=2, path_steps=2, guidance_scale=3.0, motion_guidance=1.5)
    told = {"prompts": clips, "roles": roles, "train_options": TRAIN}
    fewstep.distill(teacher, begin, out=tmp_path / "init", **told)  # type: ignore[arg-type]
    student = fewstep.distill(teacher, OPTIONS, out=tmp_path / "run", start=tmp_path / "init" / "student", **told)  # type: ignore[arg-type]
    assert isinstance(student, CausalStudent)
    tracks, drives = torch.rand(1, 6, 2) * 16, torch.rand(1, 6)
    asked: list[int] = []

    def pointer() -> Iterator[Tensor]:
        for frame in range(6):
            asked.append(frame)
            yield tracks[:, frame : frame + 1]

    chunks = []
    for chunk in islice(student.stream("a frog", 3, tracks=pointer(), drives=drives), 8):  # two with nothing said
        chunks.append(chunk)
        assert len(asked) == min(len(chunks), 6)
    streamed = torch.cat(chunks, 2)
    whole = torch.cat(list(islice(student.stream("a frog", 3, tracks=tracks, drives=drives), 8)), 2)
    assert torch.equal(streamed, whole)
    latents = student.latents(["a frog"], [3], tracks=tracks[:, :4], drives=drives[:, :4])
    assert torch.equal(latents, whole[:, :, :4])
    turned = tracks.clone()
    turned[:, 3:] = 16 - turned[:, 3:]
    other = torch.cat(list(islice(student.stream("a frog", 3, tracks=turned, drives=drives), 8)), 2)
    assert torch.equal(other[:, :, :3], whole[:, :, :3])
    assert (other - whole)[:, :, 3:].abs().max() > 1e-4
    decoded = torch.cat([student.backbone.decode(chunk) for chunk in chunks[:4]], 1)
    assert torch.equal(decoded, student.sample(["a frog"], [3], tracks=tracks[:, :4], drives=drives[:, :4]))
    _to_a_file(student, tracks, drives, tmp_path / "film.mp4")
    with pytest.raises(FewstepError, match=r"found tracks of shape \(1, 2, 2\) for a chunk"):
        next(student.stream("a frog", tracks=[torch.ones(1, 2, 2)]))


def _to_a_file(student: CausalStudent, tracks: Tensor, drives: Tensor, path: Path) -> None:
    """As a chain of Live Avatar writes it, over a noisy history: the frames are those of the stream."""
    imageio = pytest.importorskip("imageio.v3")
    told = {"tracks": tracks, "drives": drives}
    wanted = list(islice(student.stream("a frog", 3, kept="noisy", **told), 6))
    memory, noise, grid = student.begin(["a frog"], [3], None, student.endless(kept="noisy"))
    decode, made = student.backbone.stream_decoder(), []

    def deliver(latents: Tensor) -> None:
        made.append(latents)
        film.write(decode(latents)[0])

    with FilmFile(path, student.backbone.frame_rate) as film:
        run_chain(
            memory, noise, grid, student.backbone.process, Group(0, 1), orders=lambda chunk: Order(chunk < 6),
            tell=lambda prompt: None, deliver=deliver, begun=student.steering(memory, 1, **told), eta=student.eta,
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert len(imageio.imread(path, plugin="FFMPEG")) == 6
    plain = list(islice(student.stream("a frog", 3, kept="noisy"), 6))
    assert (made[5] - plain[5]).abs().max() > 1e-4
