"""Routing: parts are disjoint, equal and the same everywhere; each picture is made by one student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pixart import PROMPTS, assert_latents_close, perturb
from torch import Tensor

from fewstep.commands.common import load
from fewstep.core import grids
from fewstep.errors import FewstepError
from fewstep.models import Backbone, build_roles, load_student, save_student
from fewstep.models.router import RoutedStudent, Router, Split, contiguous_split, given_split, part_folder, pooled
from fewstep.models.smaller import build_smaller_roles, smaller_network

SEEDS = [3, 4, 5]
PARTS = [["a frog", "a 3d pizza"], ["a red apple on a blue background"]]


def cloud(count: int, dimensions: int = 5, seed: int = 0) -> Tensor:
    """Points that spread most along one direction."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator) * torch.tensor([1.0, 5.0, 0.5, 1.0, 2.0])[:dimensions]


@pytest.mark.parametrize(("count", "parts"), [(100, 1), (100, 4), (103, 4), (7, 7), (1000, 8)])
def test_parts_are_disjoint_cover_all_and_differ_by_one_at_most(count: int, parts: int) -> None:
    points = cloud(count)
    split = contiguous_split(points, parts)
    part = split.part(points)
    sizes = torch.bincount(part, minlength=parts)
    assert split.parts == parts
    assert sizes.sum() == count
    assert sizes.max() - sizes.min() <= 1
    order = split.place(points).argsort()
    assert (part[order].diff() >= 0).all()  # contiguous along the direction
    assert split.direction.abs().argmax() == 1  # the widest one
    assert split.direction[1] > 0


def test_parts_do_not_depend_on_the_order_of_the_prompts_or_on_rounding() -> None:
    points = cloud(101)
    part = contiguous_split(points, 4).part(points)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    assert torch.equal(contiguous_split(points[order], 4).part(points), part)
    noisy = points + 1e-6 * torch.randn(points.shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(contiguous_split(noisy, 4).part(noisy), part)


def test_prompts_that_embed_alike_stay_together_or_are_refused() -> None:
    points = torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    part = contiguous_split(points, 2).part(points)
    assert part[:3].unique().numel() == 1
    assert part[3] != part[0]
    with pytest.raises(FewstepError, match="embed alike"):
        contiguous_split(points, 3)
    with pytest.raises(FewstepError, match="5 parts for 4 prompts"):
        contiguous_split(points, 5)


def test_a_given_partition_is_checked() -> None:
    assert given_split([["a"], ["b", "c"]]) == {"a": 0, "b": 1, "c": 1}
    with pytest.raises(FewstepError, match="'a' in two parts"):
        given_split([["a", "b"], ["a"]])
    with pytest.raises(FewstepError, match="part 2 empty"):
        given_split([["a"], []])


def embed(backbone: Backbone):
    return lambda prompts: pooled(backbone.encode(prompts))


def test_embeddings_are_means_over_words_and_not_over_padding(backbone: Backbone) -> None:
    alone = torch.cat([pooled(backbone.encode([prompt])) for prompt in PROMPTS])
    assert_latents_close(pooled(backbone.encode(PROMPTS)), alone, 1e-6)
    condition = backbone.encode(["a frog"])
    used = condition["text_states"][0][condition["text_mask"][0].bool()]
    torch.testing.assert_close(pooled(condition)[0], used.float().mean(0))


@pytest.mark.parametrize("kind", ["contiguous", "given"])
def test_a_router_is_the_same_after_a_trip_to_disk(backbone: Backbone, tmp_path: Path, kind: str) -> None:
    router = Router.contiguous(PROMPTS * 3, embed(backbone), 3)
    if kind == "given":
        router = Router.given(PARTS, embed(backbone))
    router.save(tmp_path)
    again = Router.load(tmp_path)
    words = [*PROMPTS, "a blue frog", "an apple"]
    assert again.parts == router.parts == (2 if kind == "given" else 3)
    assert torch.equal(again.route(words, embed(backbone)), router.route(words, embed(backbone)))
    if kind == "given":
        assert router.route([*PARTS[0], *PARTS[1]], embed(backbone)).tolist() == [0, 0, 1]
    else:
        assert sorted(router.route(PROMPTS, embed(backbone)).tolist()) == [0, 1, 2]
    for text in ("{", json.dumps({"format": 9, "kind": "given"}), json.dumps({"format": 1, "kind": "contiguous"})):
        (tmp_path / "router.json").write_text(text)
        with pytest.raises(FewstepError, match="no readable"):
            Router.load(tmp_path)


def test_unknown_prompts_go_to_the_nearest_given_part() -> None:
    places = {"a": 0.0, "b": 1.0, "c": 10.0, "near a": 0.4, "near c": 8.0}
    router = Router.given([["a", "b"], ["c"]], lambda some: torch.tensor([[places[word]] for word in some]))
    assert router.route(["near a", "near c", "b"], lambda some: torch.tensor([[places[w]] for w in some])).tolist() == [
        0,
        1,
        0,
    ]


def folder_of_parts(backbone: Backbone, home: Path, steps: tuple[int, ...] = (2, 2, 2)) -> Path:
    """Three students, different ones, and a router."""
    Router.contiguous(PROMPTS, embed(backbone), 3).save(home)
    for part, count in enumerate(steps):
        roles = build_roles(backbone, "adapters", rank=4)
        perturb(roles.student_parameters(), part)
        save_student(part_folder(home, part) / "student", roles, [grids.uniform(count)], method="tdm")
    return home


def test_each_sample_is_made_by_the_student_of_its_part_and_by_no_other(backbone: Backbone, tmp_path: Path) -> None:
    student = load_student(folder_of_parts(backbone, tmp_path))
    assert isinstance(student, RoutedStudent)
    assert isinstance(load(str(tmp_path), torch.device("cpu")), RoutedStudent)  # as evaluate and compare take it
    rows: list[int] = []
    for own in student.students:
        own.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    words, seeds = [*PROMPTS, PROMPTS[0]], [*SEEDS, 6]
    part = student.router.route(words, embed(backbone)).tolist()
    latents = student.latents(words, seeds)
    assert sum(rows) == 2 * len(words)  # two steps, one student each
    for row, number in enumerate(part):
        alone = load_student(part_folder(tmp_path, number) / "student").latents([words[row]], [seeds[row]])
        assert_latents_close(latents[row], alone[0], 1e-5)
    assert student.sample(words, seeds, batch=3).shape == (4, 3, 32, 32)
    assert student.latents(PROMPTS[:1], [3]).shape == (1, 4, 8, 8)


def test_text_encoder_and_autoencoder_are_kept_once(backbone: Backbone, tmp_path: Path) -> None:
    student = load_student(folder_of_parts(backbone, tmp_path))
    first, second, _ = (own.backbone.pipeline for own in student.students)
    assert first.text_encoder is second.text_encoder
    assert first.vae is second.vae
    assert first.transformer is not second.transformer


def test_routed_students_refuse_what_does_not_go_together(backbone: Backbone, tmp_path: Path) -> None:
    student = load_student(folder_of_parts(backbone, tmp_path / "good"))
    with pytest.raises(FewstepError, match="2 seeds"):
        student.latents(PROMPTS, SEEDS[:2])
    with pytest.raises(FewstepError, match="steps = 3"):
        student.latents(PROMPTS, SEEDS, 3)
    with pytest.raises(FewstepError, match="prompts to route"):
        student.denoise(torch.zeros(1, 4, 8, 8), torch.ones(1), {})
    with pytest.raises(FewstepError, match="time grids in part 3"):
        load_student(folder_of_parts(backbone, tmp_path / "bad", (2, 2, 4)))


@pytest.mark.parametrize(("depth", "width"), [(0.5, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_a_smaller_student_trains_saves_and_samples(
    backbone: Backbone, batch, tmp_path: Path, depth: float, width: float
) -> None:
    x, t, condition = batch
    network = smaller_network(backbone.network, depth=depth, width=width)
    config = network.config
    assert (config.num_layers, config.num_attention_heads) == (2 * depth, 2 * width)
    roles = build_smaller_roles(backbone, network, rank=4, checkpointing=True)
    roles.student(x, t, condition).square().mean().backward()
    assert all(p.grad is not None for p in roles.student_parameters())
    assert all(p.grad is None for p in roles.critic_parameters())
    with torch.no_grad():
        assert torch.equal(roles.critic(x, t, condition), roles.teacher(x, t, condition))
        folder = save_student(tmp_path / "student", roles, [grids.uniform(2)], method="tdm")
        student = load_student(folder)
        assert_latents_close(student.denoise(x, t, condition), roles.student(x, t, condition), 1e-6)
    pipeline = DiffusionPipeline.from_pretrained(folder)  # plain diffusers knows nothing of the teacher's size
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    theirs = pipeline(
        PROMPTS, num_inference_steps=2, guidance_scale=1, generator=generators, output_type="latent",
        use_resolution_binning=False,
    ).images  # fmt: skip
    assert_latents_close(student.latents(PROMPTS, SEEDS), theirs)
    assert sum(p.numel() for p in student.network.parameters()) < sum(p.numel() for p in backbone.network.parameters())


def test_a_shallower_student_begins_with_the_teachers_own_layers(backbone: Backbone, batch) -> None:
    x, t, condition = batch
    whole = smaller_network(backbone.network, depth=1.0)
    with torch.no_grad():
        assert torch.equal(backbone.call(whole, x, t, condition), backbone.call(backbone.network, x, t, condition))
    half = smaller_network(backbone.network, depth=0.5)
    ours, theirs = half.state_dict(), backbone.network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(FewstepError, match="shares"):
        smaller_network(backbone.network, depth=0.0)
    with pytest.raises(FewstepError, match="Linear"):
        smaller_network(torch.nn.Linear(1, 1))


def test_a_split_survives_json() -> None:
    split = contiguous_split(cloud(50), 3)
    again = Split.from_config(json.loads(json.dumps(split.to_config())))
    for name in ("mean", "direction", "edges"):
        assert torch.equal(getattr(again, name), getattr(split, name))
