"""Causal students from a stock Wan pipeline: roles, a run of two stages, and what is saved."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import tiny_flows
import torch
from tiny_pixart import perturb
from torch import Tensor

import fewstep
from fewstep.api import RoleOptions
from fewstep.attention import Layout
from fewstep.errors import FewstepError
from fewstep.methods import CausalInitOptions, RewardForcingOptions, SelfForcingOptions
from fewstep.models import build_roles, seeded_noise
from fewstep.models.teacher import Teacher
from fewstep.streaming.student import CausalStudent
from fewstep.training.options import TrainOptions

PROMPTS = tiny_flows.PROMPTS[:2]
TRAIN = TrainOptions(iterations=2, batch=2, warmup=0, tensorboard=False, sample_every=2)
LAYOUT = Layout(1, sink=1, window=1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """Three latent frames of 2x4; read-only."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_flows.wan().save_pretrained(folder)
    return fewstep.load_teacher(folder, height=16, width=32, num_frames=9)


@pytest.mark.parametrize("kind", ["adapters", "copies"])
def test_student_is_causal_and_teacher_and_critic_are_as_they_were(teacher: Teacher, kind: str) -> None:
    """One network may be all three; gradients are exact with checkpointing, after others were called."""
    backbone = teacher.backbone
    x, t, condition = seeded_noise([1, 2], backbone.latent_shape), torch.tensor([0.9, 0.4]), backbone.encode(PROMPTS)
    plain = backbone.call(backbone.network, x, t, condition)
    found = []
    for checkpointing in (False, True):
        roles = build_roles(backbone, kind, rank=2, checkpointing=checkpointing, causal=True)  # type: ignore[arg-type]
        perturb(roles.student_parameters())
        assert roles.causal is not None
        memory = roles.causal.memory(roles.student, LAYOUT, condition)
        memory.remember(x[:, :, :1])
        assert torch.equal(roles.teacher(x, t, condition), plain)
        denoised = memory.denoise(x[:, :, 1:2], t)
        with torch.no_grad():
            assert torch.equal(roles.teacher(x, t, condition), plain)
            roles.critic(x, t, condition)
        gradients = torch.autograd.grad(denoised.square().sum(), roles.student_parameters(), allow_unused=True)
        found.append([gradient for gradient in gradients if gradient is not None])
    torch.testing.assert_close(*found)
    assert max(float(gradient.abs().max()) for gradient in found[0]) > 1e-4
    assert torch.equal(backbone.call(backbone.network, x, t, condition), plain)


def apart(student: CausalStudent, network: torch.nn.Module) -> float:
    """The largest difference of any weight."""
    pairs = zip(student.network.parameters(), network.parameters(), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def test_two_stages_and_a_student_that_streams(teacher: Teacher, tmp_path: Path) -> None:
    """causal-init, then Reward Forcing from its weights; loaded again, the student makes the same without end."""
    init = CausalInitOptions(chunk=1, window=1, steps=2, path_steps=2, guidance_scale=1.0)
    copies = RoleOptions(roles="copies")
    told = {"prompts": PROMPTS, "roles": copies, "train_options": TRAIN}
    first = fewstep.distill(teacher, init, out=tmp_path / "init", **told)
    options = RewardForcingOptions(chunk=1, steps=2, critic_updates=1, sink_decay=0.9)
    seen = []

    def reward(video: Tensor, condition: dict[str, Tensor]) -> Tensor:
        seen.append(video.shape)
        return video.mean((1, 2, 3, 4))

    start = tmp_path / "init" / "student"
    second = fewstep.distill(teacher, options, out=tmp_path / "run", start=start, reward=reward, **told)
    assert seen == [(2, *teacher.backbone.latent_shape)] * 2
    assert isinstance(first, CausalStudent)
    assert isinstance(second, CausalStudent)
    assert second.layout == Layout(1, 1, 1, "slot", 0.9)
    assert (tmp_path / "run" / "samples" / "000002-2-steps.png").is_file()
    readme = (tmp_path / "run" / "student" / "README.md").read_text()
    assert 'student.stream("a prompt"' in readme

    moved, away = apart(first, second.network), apart(first, teacher.backbone.network)
    assert 0 < moved < 5e-3
    assert away > 0

    latents = second.latents(PROMPTS, [3, 4])
    chunks = list(islice(second.stream(PROMPTS, [3, 4]), 12))
    assert torch.equal(torch.cat(chunks[:3], 2), latents)
    alone = torch.cat(list(islice(second.stream(PROMPTS[1], 4), 12)), 2)
    torch.testing.assert_close(alone, torch.cat(chunks, 2)[1:], rtol=1e-4, atol=1e-4)
    assert second.sample(PROMPTS, [3, 4]).shape == (2, 9, 3, 16, 32)
    assert first.latents(PROMPTS, [3, 4]).isfinite().all()


def test_teacher_and_critic_are_compiled_beside_a_causal_student(teacher: Teacher) -> None:
    """Theirs are the numbers of plain networks, and the student's blocks stay as they are."""
    backbone = teacher.backbone
    x, t, condition = seeded_noise([1, 2], backbone.latent_shape), torch.tensor([0.9, 0.4]), backbone.encode(PROMPTS)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    roles = build_roles(backbone, "copies", causal=True, compile_backend="eager")
    answers = [role(x, t, condition) for role in (roles.teacher, roles.critic, roles.student)]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch.testing.assert_close(answers[0], answers[2])
    torch.testing.assert_close(answers[1], answers[2])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert roles.causal is not None
    memory = roles.causal.memory(roles.student, LAYOUT, condition)
    memory.remember(x[:, :, :1])
    memory.denoise(x[:, :, 1:2], t).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_what_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    backbone, options = teacher.backbone, SelfForcingOptions(chunk=1, steps=2)
    with pytest.raises(FewstepError, match="a causal student to be compiled"):
        build_roles(backbone, causal=True, compile_backend="eager")
    with pytest.raises(FewstepError, match="expected one for reward-forcing alone"):
        fewstep.distill(teacher, options, out=tmp_path, prompts=PROMPTS, reward=lambda video, condition: video)
    roles = build_roles(backbone, rank=2, causal=True)
    with pytest.raises(FewstepError, match="an adapter to begin with the weights of another"):
        fewstep.api.begin_with(roles, tmp_path)
    assert roles.causal is not None
    network = roles.student_seat.network
    student = CausalStudent(backbone, network, {2: options.time_grid(2)}, {}, 0.0, Layout(1), roles.causal)
    with pytest.raises(FewstepError, match="remembers every chunk"):
        student.stream("a frog")


def test_a_family_without_causal_students_says_so(tiny_teacher: Path) -> None:
    with pytest.raises(FewstepError, match="PixArtTransformer2DModel for a causal student"):
        build_roles(fewstep.load_teacher(tiny_teacher).backbone, rank=2, causal=True)
