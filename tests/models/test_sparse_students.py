"""Sparse students of stock networks: whose attention is sparse when, training, files, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_families
import tiny_flows
import torch
from tiny_pixart import assert_latents_close, build_pipeline, perturb

from fewstep.api import RoleOptions, distill, load_teacher
from fewstep.attention.sparse import SparseOptions, network
from fewstep.attention.sparse.adaptive import Sequence
from fewstep.checkpoints import load_checkpoint
from fewstep.commands.distill import main as distill_command
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import Backbone, build_roles, load_student, save_student, seeded_noise
from fewstep.models.pipelines import STATES
from fewstep.models.smaller import build_smaller_roles, smaller_network
from fewstep.training.options import TrainOptions

SPARSE = SparseOptions(kind="asa-gt", block=4, samples=2, mass=0.5, least=0.0, most=0.5, window=4)
WHOLE = SparseOptions(kind="asa", block=4, samples=2, mass=1.0, least=0.0, most=1.0)
PROMPTS = ["a frog", "a frog"]
VIDEO = {"height": 16, "width": 32, "num_frames": 5}
TEACHERS: dict[str, tuple[Callable[[], Any], dict[str, int], int]] = {
    "pixart": (build_pipeline, {}, 0),
    "sd35": (lambda: "sd35", {}, 0),
    "flux": (lambda: "flux-dev", {}, 0),
    "cogvideox-5b": (lambda: tiny_flows.cogvideox("5b"), {"height": 24, "width": 16, "num_frames": 5}, 12),
    "cogvideox-1.5": (lambda: tiny_flows.cogvideox("1.5"), {}, 12),
    "wan2.1": (tiny_flows.wan, VIDEO, 0),
    "wan2.2-a14b": (lambda: tiny_flows.wan("a14b"), VIDEO, 0),
    "film": (tiny_flows.film, {"num_frames": 6}, 0),
}
every_teacher = pytest.mark.parametrize("name", TEACHERS)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Backbones by name, loaded when first asked for; read-only."""
    root = tmp_path_factory.mktemp("sparse-teachers")

    class Loaded(dict):
        def __missing__(self, name: str) -> Backbone:
            build, size, _ = TEACHERS[name]
            pipeline = build()
            if isinstance(pipeline, str):
                folder = tiny_families.save(pipeline, root)
            else:
                folder = root / name
                pipeline.save_pretrained(folder)
            self[name] = load_teacher(folder, **size).backbone
            return self[name]

    return Loaded()


def inputs(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return seeded_noise([1, 2], backbone.latent_shape), torch.tensor([0.9, 0.3]), backbone.encode(PROMPTS)


@every_teacher
def test_the_student_alone_is_sparse_and_the_teacher_is_the_stock_network_to_the_bit(name: str, teachers: Any) -> None:
    backbone = teachers[name]
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        stock = backbone.call(backbone.network, x, t, condition)
        roles = build_roles(backbone, "adapters", rank=2, sparse=SPARSE)
        student = roles.student(x, t, condition)  # its adapter changes nothing yet
        for role in (roles.teacher, roles.critic, roles.teacher):
            assert torch.equal(role(x, t, condition), stock)
        whole = build_roles(backbone, "adapters", rank=2, sparse=WHOLE)
        assert_latents_close(whole.student(x, t, condition), stock, 1e-5)
        assert torch.equal(roles.student(x, t, condition), student)
        assert torch.equal(backbone.call(backbone.network, x, t, condition), stock)
    assert (student - stock).abs().max() > 1e-3 * stock.abs().max()


@every_teacher
def test_tokens_of_the_text_are_told_from_those_of_the_sample(
    name: str, teachers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first layer, another text has other keys, and the sample does not."""
    backbone = teachers[name]
    x, t, condition = inputs(backbone)
    found: list[tuple[torch.Tensor, Sequence]] = []

    def spy(query: Any, key: Any, value: Any, sequence: Sequence, *more: Any) -> torch.Tensor:
        found.append((key, sequence))
        return value

    monkeypatch.setattr(network, "sparse_attention", spy)
    roles = build_roles(backbone, "adapters", rank=2, sparse=SPARSE)
    with torch.no_grad():
        for told in (condition, {**condition, STATES: condition[STATES] + torch.randn_like(condition[STATES])}):
            roles.student(x[:1], t[:1], {key: value[:1] for key, value in told.items()})
    (before, sequence), (after, _) = found[0], found[len(found) // 2]
    frames, rows, columns = sequence.grid
    changed = (before != after).any(3)[0, 0]
    text = changed.nonzero().flatten().tolist()
    assert len(changed) - len(text) == frames * rows * columns
    assert text == list(range(len(text)) if sequence.text_first else range(frames * rows * columns, len(changed)))
    assert not TEACHERS[name][2] or len(text) == TEACHERS[name][2]


@pytest.mark.parametrize("kind", ["copies", "mixed"])
@pytest.mark.parametrize("critic", [False, True])
def test_the_critic_is_sparse_if_asked(kind: Any, critic: bool, teachers: Any) -> None:
    backbone = teachers["pixart"]
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        stock = backbone.call(backbone.network, x, t, condition)
        roles = build_roles(
            backbone, kind, sparse=replace(SPARSE, critic=critic), **({} if kind == "copies" else {"rank": 2})
        )
        assert torch.equal(roles.teacher(x, t, condition), stock)
        assert torch.equal(roles.critic(x, t, condition), stock) != critic
        assert not torch.equal(roles.student(x, t, condition), stock)


def test_a_smaller_student_is_sparse(teachers: Any) -> None:
    backbone = teachers["pixart"]
    small = smaller_network(backbone.network, depth=0.5)
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        dense = backbone.call(small, x, t, condition)
        roles = build_smaller_roles(backbone, small, rank=2, sparse=SPARSE)
        assert not torch.equal(roles.student(x, t, condition), dense)
    assert roles.sparse == SPARSE


@pytest.mark.parametrize("name", ["pixart", "cogvideox-5b", "wan2.1"])
def test_gradients_are_those_without_checkpointing(name: str, teachers: Any) -> None:
    """Other roles are called on the same network, densely, before the backward that computes the student again."""
    backbone = teachers[name]
    x, t, condition = inputs(backbone)
    gradients = []
    for checkpointing in (False, True):
        roles = build_roles(backbone, "adapters", rank=2, sparse=SPARSE, checkpointing=checkpointing)
        perturb(roles.student_parameters())
        denoised = roles.student(x, t, condition)
        with torch.no_grad():
            roles.teacher(x, t, condition)
        roles.critic(x, t, condition)
        denoised.square().mean().backward()
        gradients.append([parameter.grad for parameter in roles.student_parameters()])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["pipeline", "lora"])
def test_a_saved_student_is_sparse_where_fewstep_loads_it(form: Any, teachers: Any, tmp_path: Path) -> None:
    backbone = teachers["wan2.1"]
    roles = build_roles(backbone, "adapters", rank=2, sparse=replace(SPARSE, critic=True, engine="gathered"))
    perturb(roles.student_parameters())
    x, t, condition = inputs(backbone)
    save_student(tmp_path / "student", roles, [grids.shifted(2, 5.0)], method="tdm", form=form)
    student = load_student(tmp_path / "student")
    assert SparseOptions(**student.card["sparse"]) == SPARSE
    assert (
        "a plain diffusers pipeline of this folder would compute dense" in (tmp_path / "student/README.md").read_text()
    )
    with torch.no_grad():
        expected = roles.student(x, t, condition)
        assert_latents_close(student.denoise(x, t, condition), expected, 1e-5)
        dense = student.backbone.call(student.backbone.network, x, t, condition)
    assert (dense - expected).abs().max() > 1e-3 * expected.abs().max()  # as a plain pipeline would compute


def test_the_gathered_engine_serves_a_student_as_the_mask_does(teachers: Any) -> None:
    backbone = teachers["cogvideox-5b"]
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        outputs = [
            build_roles(backbone, "adapters", rank=2, sparse=replace(SPARSE, engine=engine)).student(x, t, condition)  # type: ignore[arg-type]
            for engine in ("masked", "gathered")
        ]
    assert_latents_close(outputs[0], outputs[1], 1e-5)


RUN = TrainOptions(iterations=2, batch=2, warmup=0, student_rate=0.01, checkpoint_every=1, tensorboard=False)


@pytest.mark.parametrize("method", ["tdm", "phased", "dmd2"])
def test_a_run_trains_and_saves_a_sparse_student(method: str, tiny_teacher: Path, tmp_path: Path) -> None:
    roles = RoleOptions(rank=2, sparse=SPARSE)
    options: Any = replace(preset(method), steps=2, **({"phase_calls": (1, 1)} if method == "phased" else {}))  # type: ignore[type-var]
    more: dict[str, Any] = {"prompts": PROMPTS, "train_options": RUN}
    if method == "dmd2":
        options = replace(options, gan_weight=0.0)
    student = distill(tiny_teacher, options, out=tmp_path / "run", roles=roles, **more)
    assert SparseOptions(**student.card["sparse"]) == SPARSE
    if method == "tdm":
        newest = load_checkpoint(tmp_path / "run/checkpoints/000002")
        seen = [model.latents(PROMPTS, [3, 4]) for model in (newest, student)]
        assert_latents_close(seen[0], seen[1], 1e-5)
        student.backbone.sparse(student.network, WHOLE)
        assert (student.latents(PROMPTS, [3, 4]) - seen[1]).abs().max() > 1e-3 * seen[1].abs().max()


def test_the_command_line_has_the_options(tiny_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a frog\n")
    words = "--sparse asa --sparse-block 4 --sparse-samples 2 --sparse-mass 0.5 --sparse-least 0 --sparse-most 0.5"
    run = "--roles adapters --rank 2 --iterations 1 --batch 1 --warmup 0 --no-tensorboard --device cpu --steps 2"
    told = ["--teacher", str(tiny_teacher), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "run")]
    distill_command(["tdm", *told, *run.split(), *words.split(), "--sparse-order", "raster", "--sparse-critic"])
    card = load_student(tmp_path / "run/student").card
    assert SparseOptions(**card["sparse"]) == replace(SPARSE, kind="asa", window=30, order="raster")
    assert card["details"]["roles"]["sparse"]["critic"]


# What is refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"causal": True}, "found a sparse student that is causal, or compiled"),
        ({"compile_backend": "eager"}, "found a sparse student that is causal, or compiled"),
        ({"sparse": replace(SPARSE, engine="flex", block=128)}, "found FlexAttention for blocks of 128 tokens on cpu"),
    ],
)
def test_what_a_sparse_student_cannot_be_is_refused(more: dict[str, Any], said: str, teachers: Any) -> None:
    with pytest.raises(FewstepError, match=said):
        build_roles(teachers["wan2.1"], "adapters", rank=2, **{"sparse": SPARSE, **more})


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sana"])
def test_families_that_do_not_say_where_tokens_lie_are_refused(family: str, tmp_path: Path) -> None:
    backbone = load_teacher(tiny_families.save(family, tmp_path), **tiny_families.FAMILIES[family].size).backbone
    with pytest.raises(FewstepError, match="to be made sparse, expected a family that says where its tokens lie"):
        build_roles(backbone, "adapters", rank=2, sparse=SPARSE)


@pytest.mark.parametrize(
    ("method", "roles", "said"),
    [
        ("self-forcing", RoleOptions(roles="copies", sparse=SPARSE), "causal, sharded or compiled"),
        ("tdm", RoleOptions(shard=True, sparse=SPARSE), "causal, sharded or compiled"),
        ("tdm", RoleOptions(compile=True, sparse=SPARSE), "causal, sharded or compiled"),
        ("tsm", RoleOptions(sparse=replace(SPARSE, critic=True)), "found critic = True, which nothing reads"),
        ("tdm", RoleOptions(sparse=SparseOptions(block=64)), "found block = 64, which nothing reads"),
        ("tdm", RoleOptions(sparse=SparseOptions(kind="asa", window=8)), "found window = 8, which nothing reads"),
        ("tdm", RoleOptions(sparse=SparseOptions(kind="asa", least=0.2, most=0.2, mass=0.5)), "found mass = 0.5"),
        ("tdm", RoleOptions(sparse=SparseOptions(kind="asa", samples=129)), "found 129 samples of blocks of 128"),
        (
            "tdm",
            RoleOptions(sparse=SparseOptions(kind="asa", most=0.01)),
            "found sparse mass 0.95, least 0.05",
        ),
        ("tdm", RoleOptions(sparse=SparseOptions(kind="asa", block=1)), "found sparse block = 1"),
        ("tdm", RoleOptions(sparse=SparseOptions(kind="asa", order="hilbert")), "found order = 'hilbert'"),  # type: ignore[arg-type]
    ],
)
def test_options_that_do_not_fit_are_refused(method: str, roles: RoleOptions, said: str, tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match=said):
        distill("emoji", method, out=tmp_path / "run", roles=roles)
    assert not (tmp_path / "run").exists()


def test_attention_that_is_not_plain_is_refused(teachers: Any) -> None:
    """Qwen-Image's padded text comes with a mask; and a backend of diffusers' own is not torch's."""
    roles = build_roles(teachers["wan2.1"], "adapters", rank=2, sparse=SPARSE)
    x, t, condition = inputs(teachers["wan2.1"])
    layer = roles.student_seat.network.get_submodule("blocks.0.attn1").processor
    stock = layer._stock
    for answer, said in (
        (lambda attn, states, *more, **told: states, "called torch's attention 0 times"),
        (_under_a_mask, "found attention under a mask"),
    ):
        layer._stock = answer
        with pytest.raises(FewstepError, match=said):
            roles.student(x, t, condition)
    layer._stock = stock
    roles.student(x, t, condition)


def _under_a_mask(attn: Any, states: torch.Tensor, *more: Any, **told: Any) -> torch.Tensor:
    parts = states[:, None]
    return torch.nn.functional.scaled_dot_product_attention(parts, parts, parts, torch.zeros(()))
