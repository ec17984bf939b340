"""Damaged folders of every kind that fewstep reads: read as they were, mended, or refused in a paragraph."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.fuzzing import cases, damage, damaged, edited, left_behind, outcome
from tests.training import training_toy as toy

import fewstep
from fewstep.api import RoleOptions
from fewstep.caching import make_cache
from fewstep.core.files import checksum
from fewstep.models import load_backbone
from fewstep.models.lora import read_loras
from fewstep.models.router import Router, contiguous_split
from fewstep.models.student import read_card
from fewstep.reproducing import reproduce
from fewstep.training import checkpoint
from fewstep.training.folder import read_record
from fewstep.training.options import TrainOptions
from fewstep.training.parallel import Group

PROMPTS = ["a frog", "a red apple", "a 3d pizza", "a blue frog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    """A teacher, a run of it with student and LoRA, a run of the toy, a router and a cache."""
    place = tmp_path_factory.mktemp("sound")
    shutil.copytree(tiny_teacher, place / "teacher")
    short = TrainOptions(iterations=1, batch=2, warmup=0, tensorboard=False)
    more = {"prompts": PROMPTS, "roles": RoleOptions(rank=2), "train_options": short}
    fewstep.distill(place / "teacher", out=place / "run", **more)
    toy.run(place / "toy", iterations=4, checkpoint_every=2)
    (place / "routed").mkdir()
    Router(contiguous_split(torch.randn(4, 3), 2)).save(place / "routed")
    return place


def with_damage(source: Path, check: Callable[[Path], Any], pattern: str = "*") -> Callable[[Any, int], None]:
    """A function that damages one file of a copy of `source` and calls `check` with the copy."""
    names = sorted(path.relative_to(source) for path in source.rglob(pattern) if path.is_file())
    assert names

    def fuzz(what: Any, which: int) -> None:
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = Path(name) / source.name
            shutil.copytree(source, copy)
            damaged(copy / names[which % len(names)], what)
            check(copy)

    return fuzz


WHICH = st.integers(0, 10**6)


def test_cards_of_students(folders: Path) -> None:
    fuzz = with_damage(folders / "run" / "student", lambda copy: outcome(lambda: read_card(copy)), "fewstep.json")
    cases("cards")(given(what=damage(), which=WHICH)(fuzz))()


def test_routers(folders: Path) -> None:
    def check(copy: Path) -> None:
        outcome(lambda: Router.load(copy).route(PROMPTS, lambda prompts: torch.zeros(len(prompts), 3)))

    cases("routers")(given(what=damage(), which=WHICH)(with_damage(folders / "routed", check)))()


def test_lora_files(folders: Path) -> None:
    def check(copy: Path) -> None:
        outcome(lambda: read_loras(copy, ["transformer"]))

    fuzz = with_damage(folders / "run" / "lora", check, "*.safetensors")
    cases("LoRA files")(given(what=damage(), which=WHICH)(fuzz))()


def test_pipeline_folders(folders: Path) -> None:
    """Numbers in configs stay small: a network of 10^30 layers is built as it is told to be."""

    def check(copy: Path) -> None:
        outcome(lambda: load_backbone(copy).encode(PROMPTS[:1]))
        assert not left_behind(copy)

    fuzz = with_damage(folders / "teacher", check, "*.json")
    whole = with_damage(folders / "teacher", check, "*.safetensors")

    @cases("pipeline folders")
    @given(what=damage(), which=WHICH, weights=st.booleans())
    def run(what: Any, which: int, weights: bool) -> None:
        how, (place, junk, value) = what
        (whole if weights else fuzz)((how, (place, junk, small(value))), which)

    run()


def small(value: Any) -> Any:
    """JSON without large numbers."""
    if isinstance(value, dict):
        return {key: small(each) for key, each in value.items()}
    if isinstance(value, list):
        return [small(each) for each in value]
    return value if not isinstance(value, int | float) or -99 < value < 99 else 7


def test_checkpoints(folders: Path) -> None:
    """The other one is used, or, where the damage keeps to its manifest, what is read is refused."""

    def check(copy: Path) -> None:
        outcome(lambda: checkpoint.newest(copy / "checkpoints"))

    fuzz = with_damage(folders / "toy", check, "checkpoints/*/*")
    cases("checkpoints")(given(what=damage(), which=WHICH)(fuzz))()


def test_runs_that_are_resumed(folders: Path) -> None:
    """Also with a state.json that was edited together with its manifest."""
    whole = [weight.clone() for weight in weights_of(folders / "toy")]

    def resumed(copy: Path) -> None:
        if outcome(lambda: toy.run(copy, iterations=4, checkpoint_every=2, resume=True)) is None:
            assert all(torch.equal(a, b) for a, b in zip(whole, weights_of(copy), strict=True))
        assert not left_behind(copy)

    fuzz = with_damage(folders / "toy", resumed)

    @cases("runs")
    @given(what=damage(), which=WHICH, forged=st.booleans())
    def run(what: Any, which: int, forged: bool) -> None:
        if not forged:
            return fuzz(what, which)
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = Path(name) / "toy"
            shutil.copytree(folders / "toy", copy)
            forge(copy / "checkpoints" / "000004", what)
            outcome(lambda: toy.run(copy, iterations=4, checkpoint_every=2, resume=True))
            return None

    run()


def forge(folder: Path, what: tuple[str, Any]) -> None:
    """Edits state.json and makes the manifest fit."""
    place, _, value = what[1]
    state = folder / "state.json"
    state.write_text(json.dumps(edited(json.loads(state.read_text()), place, value)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": state.stat().st_size, "blake2b": checksum(state)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def weights_of(run: Path) -> Iterator[torch.Tensor]:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return iter(found.tensors("student").values())


def test_records_of_runs(folders: Path) -> None:
    def check(copy: Path) -> None:
        outcome(lambda: read_record(copy))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fewstep.reproducing.distill", _not_begun)
            patch.setattr("fewstep.reproducing.load_teacher", lambda *more, **told: teacher)
            with contextlib.suppress(_NotBegun):
                outcome(lambda: reproduce(copy, copy.parent / "again", prompts=PROMPTS))
        assert not (copy.parent / "again").exists()

    teacher = fewstep.load_teacher(folders / "teacher")
    cases("records")(given(what=damage(), which=WHICH)(with_damage(folders / "run", check, "run.json")))()


class _NotBegun(Exception):
    pass


def _not_begun(*more: Any, **told: Any) -> None:
    raise _NotBegun


def test_embedding_caches(folders: Path) -> None:
    """Made again where it is damaged: what it answers is right, or refused."""
    backbone, parent = load_backbone(folders / "teacher"), folders / "caches"

    def made(place: Path) -> Any:
        return make_cache(backbone, [PROMPTS], place, torch.float32, Group(0, 1))

    right = made(parent).encode(PROMPTS)

    def check(copy: Path) -> None:
        def use() -> None:
            found = made(copy).encode(PROMPTS)
            assert all(torch.equal(found[name], right[name]) for name in right)

        outcome(use)
        assert not left_behind(copy)

    cases("caches")(given(what=damage(), which=WHICH)(with_damage(parent, check)))()
