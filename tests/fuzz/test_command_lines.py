"""Any command line, and any request for pictures: done, or refused in a paragraph with nothing left half-written."""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.fuzzing import CASES, cases, command, left_behind, outcome
from tests.fuzz.test_options import values

import fewstep
from fewstep import api
from fewstep.api import RoleOptions
from fewstep.attention.sparse import SparseOptions
from fewstep.cli import COMMANDS
from fewstep.commands import (
    cache,
    check,
    demo,
    distill,
    evaluate,
    export,
    film_teacher,
    msd,
    plan,
    reproduce,
    sample,
    serve,
    stream,
    studio,
    teacher,
)  # fmt: skip
from fewstep.conditions import Encoding, TextOptions
from fewstep.embedded.build import TEACHER_FOLDER, BuildOptions, shipped
from fewstep.embedded.film_build import FilmBuildOptions
from fewstep.embedded.film_teacher import FilmOptions
from fewstep.embedded.teacher import TeacherOptions
from fewstep.methods import METHODS, preset
from fewstep.models.loading import load_backbone
from fewstep.serving.limits import Limits
from fewstep.training.options import TrainOptions

TRAINING = (
    distill.RunOptions, distill.SingleOptions, distill.SizeOptions, TextOptions, RoleOptions, SparseOptions,
    TrainOptions,
)  # fmt: skip
OPTIONS: dict[str, tuple[type, ...]] = {
    "distill": TRAINING,
    "msd": (distill.RunOptions, TextOptions, RoleOptions, SparseOptions, TrainOptions, msd.PartOptions),
    "plan": (plan.PlanOptions, distill.SizeOptions, RoleOptions, SparseOptions, TrainOptions),
    "cache": (cache.Cache,),
    "sample": (sample.Sample,),
    "stream": (stream.Stream,),
    "evaluate": (evaluate.Evaluate,),
    "export": (export.Export,),
    "reproduce": (reproduce.Reproduce,),
    "serve": (serve.Serve, Limits),
    "studio": (studio.Studio,),
    "check": (check.Check,),
    "demo": (demo.Demo,),
    "compare": (),
    "methods": (),
    "backbones": (),
    "teacher": (),
    "league": (),
}
ACTIONS: dict[str, tuple[type, ...]] = {
    "train": (teacher.Train, TeacherOptions, BuildOptions),
    "reference": (teacher.Reference,),
    "table": (teacher.Table,),
    "card": (teacher.Card,),
    "train-video": (film_teacher.TrainVideo, FilmOptions, FilmBuildOptions),
    "table-video": (film_teacher.TableVideo,),
    "card-video": (film_teacher.CardVideo,),
}
"""Of `fewstep teacher`, but for the one that asks npm."""
ASKS_THE_NETWORK = {"host", "public_url"}
"""Options whose values are looked up by name."""
PATHS = ["teacher", "run", "run/student", "run/lora", "prompts.txt", "prompts.txt:text", "out", "prompts.txt/out"]
JUNK = [
    *PATHS, *PATHS, "", "0", "-1", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e309", "9" * 30, "-" + "9" * 30,
    "None", "True", "emoji", "auto", "cpu", "cuda:99", "adapters", "copies", "mixed", "none", "/", "/nowhere", "..",
    "-", "--", "~", "a" * 5000, "\udcff", "é", "[1, 2]", "{}", "%s", "8x8", "32x32", "10GB", "a frog", "int8",
]  # fmt: skip
STOPPED = (
    "fewstep.api.train", "fewstep.several.train_in_turn", "fewstep.reproducing.distill",
    "fewstep.commands.evaluate.study", "fewstep.commands.compare.compare", "fewstep.commands.plan.plan",
    "fewstep.commands.cache.cache_prompts", "fewstep.commands.plan.blueprint", "fewstep.league.cells.play",
    "fewstep.serving.server.run", "fewstep.studio.app.build_app", "fewstep.evaluation.known_answers.run_known_answers",
    "fewstep.commands.demo._distill", "fewstep.commands.teacher.build_teacher",
    "fewstep.commands.teacher.sample_reference", "fewstep.commands.teacher.evaluate_scenes",
    "fewstep.commands.film_teacher.build_film_teacher", "fewstep.commands.film_teacher.rendered_scores",
)  # fmt: skip
"""Work that sound command lines would do."""


class Stop(SystemExit):
    """In the place of training: a sound command line ends here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Iterator[Path]:
    """A folder with a teacher, prompts and a run, in which commands are run; no training, no network, one teacher."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_teacher, place / "teacher")
    (place / "prompts.txt").write_text("a frog\na 3d pizza\n")
    short = TrainOptions(iterations=1, batch=2, warmup=0, tensorboard=False)
    more = {"prompts": place / "prompts.txt", "roles": RoleOptions(rank=2), "train_options": short}
    fewstep.distill(place / "teacher", out=place / "run", **more)
    loaded: dict[str, Any] = {}

    def load(source: Any, **told: Any) -> Any:
        """Loads for sure what cannot be loaded; what can, once; in the place of the embedded teacher, ours."""
        path = place / "teacher" if Path(source) == shipped(TEACHER_FOLDER) else source
        key = repr((str(path), sorted((name, str(value)) for name, value in told.items())))
        if key not in loaded:
            loaded[key] = load_backbone(path, **told)
        return loaded[key]

    @contextlib.contextmanager
    def ready(self: Encoding, group: object) -> Iterator[None]:
        yield

    def stop(*more: Any, **told: Any) -> None:
        raise Stop(0)

    own_config = DiffusionPipeline.load_config

    def offline(source: Any, *more: Any, **told: Any) -> Any:
        if Path(source).is_dir():
            return own_config(source, *more, **told)
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setattr(DiffusionPipeline, "load_config", offline)
        patch.setattr("huggingface_hub.hf_hub_download", offline)
        patch.setattr(api, "load_backbone", load)
        patch.setattr("fewstep.models.student.load_backbone", load)
        patch.setattr(Encoding, "ready", ready)
        for name in STOPPED:
            patch.setattr(name, stop)
        yield place


def flag_of(kind: type, name: str) -> str:
    """What the command line calls a field; those of sparse attention have names of their own there."""
    if kind is SparseOptions:
        return "sparse" if name == "kind" else f"sparse-{name}"
    return name.replace("_", "-")


def sound(kind: type, name: str) -> st.SearchStrategy[list[str]]:
    """An option with a value of its type, of any size."""
    flag = flag_of(kind, name)
    if get_type_hints(kind)[name] is bool:
        return st.sampled_from([[f"--{flag}"], [f"--no-{flag}"]])
    if "str" in str(get_type_hints(kind)[name]) or "Path" in str(get_type_hints(kind)[name]):
        return st.sampled_from(PATHS).map(lambda path: [f"--{flag}", path])
    return values(kind, name).map(
        lambda value: [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    )


@st.composite
def lines(draw: Any) -> list[str]:
    """A command, perhaps of a method, with options of its own or of nobody's, and values sound and not."""
    name = draw(st.sampled_from([*OPTIONS, "distill", "distill", "sample", "msd", "teacher", "nonsense"]))
    words = [name]
    kinds: tuple[type, ...] = OPTIONS.get(name, ())
    if name == "teacher":
        words.append(draw(st.sampled_from([*ACTIONS, "nonsense"])))
        kinds = ACTIONS.get(words[-1], ())
    if name == "serve" or (name == "teacher" and "card" in words[-1]):
        path = draw(st.sampled_from(PATHS))
        words += ["--student", path] if name == "serve" else ["--folder", "teacher", "--table", path]
    if name in ("distill", "msd", "plan") and draw(st.booleans()):
        method = draw(st.sampled_from([*METHODS, "nonsense"]))
        words.append(method)
        if method in METHODS:
            kinds = (*kinds, type(preset(method)))
    if name in ("distill", "msd", "sample", "stream", "evaluate", "cache") and draw(st.booleans()):
        whose = "--student" if name in ("sample", "stream", "evaluate") else "--teacher"
        words += [whose, draw(st.sampled_from(PATHS))]
        words += [] if name in ("sample", "stream") else ["--prompts", "prompts.txt"]
    named = [(kind, entry) for kind in kinds for entry in fields(kind) if entry.name not in ASKS_THE_NETWORK]
    known = [
        (kind, entry.name)
        for kind, entry in named
        if not any(map(is_dataclass, (entry.default, entry.default_factory)))
    ]
    for _ in range(draw(st.integers(0, 3))):
        if known and draw(st.integers(0, 9)) < 7:
            words += draw(st.sampled_from(known).flatmap(lambda option: sound(*option)))
        else:
            flags = [f"--{flag_of(kind, name)}" for kind, name in known]
            words.append(draw(st.sampled_from([*flags, "--nonsense", "--no-resume", "-x"])))
            words += draw(st.lists(st.sampled_from(JUNK), max_size=2))
    if name in ("export", "reproduce", "compare", "teacher", "league"):
        words += draw(st.lists(st.sampled_from([*JUNK, "run:2", "card", "emoji:0"]), max_size=2))
    return words


def test_command_lines(place: Path) -> None:
    sound = {str(path) for path in place.rglob("*")}

    @cases("command lines")
    @given(words=lines())
    def fuzz(words: list[str]) -> None:
        code = command(words)
        assert code in (0, 2), words
        assert not left_behind(place)
        new = {str(path) for path in place.rglob("*")} - sound
        assert not new or code == 0, (words, new)
        for path in sorted(new, reverse=True):
            Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()

    fuzz()


def test_requests_for_pictures(place: Path) -> None:
    models = [fewstep.load_teacher(place / "teacher"), fewstep.load_student(place / "run" / "student")]
    models[0].steps = 2  # type: ignore[union-attr]
    numbers = st.integers(-2, 4) | st.sampled_from([1001, 2**63, 2**64, -(2**63) - 1, 10**30])

    @cases("requests")
    @given(
        which=st.integers(0, 1),
        prompts=st.lists(st.text(max_size=20), max_size=3) | st.text(max_size=20),
        seeds=numbers | st.lists(numbers, max_size=3),
        more=st.fixed_dictionaries(
            {},
            optional={
                "steps": numbers.filter(lambda steps: not 4 < steps <= 1000),
                "solver": st.sampled_from(["trained", "ddim", "lcm", "heun", "dpmpp_2m", "nonsense", ""]),
                "batch": numbers,
                "guidance_scale": st.floats(),
            },
        ),
    )
    def fuzz(which: int, prompts: Any, seeds: Any, more: dict[str, Any]) -> None:
        if which == 1:
            more.pop("guidance_scale", None)  # students have no such argument

        def use() -> None:
            images = fewstep.sample(models[which], prompts, seeds, **more)
            assert images.shape == (1 if isinstance(prompts, str) else len(prompts), 3, 32, 32)

        outcome(use)

    fuzz()


def test_the_fuzzer_knows_every_command() -> None:
    assert OPTIONS.keys() == COMMANDS.keys()


def test_every_option_of_a_command_is_read_by_it() -> None:
    """By its module, those of its own; what is handed on as a whole has tests in `tests/test_every_option.py`."""
    whole = {distill.SizeOptions: "asdict(args.size)"}
    unread = []
    for name, kinds in [*OPTIONS.items(), *[("teacher", kinds) for kinds in ACTIONS.values()]]:
        for kind in (kind for kind in kinds if kind.__module__.startswith("fewstep.commands.")):
            modules = {f"fewstep.commands.{name}", kind.__module__ if name != "msd" else "fewstep.commands.msd"}
            source = inspect.getsource(kind) + "".join(inspect.getsource(sys.modules[one]) for one in modules)
            if kind not in whole or whole[kind] not in source:
                unread += [
                    (name, option)
                    for option in kind.__annotations__
                    if not re.search(rf"\w\.{option}\b|\"{option}\"", source)
                ]
    assert unread == []


def test_an_address_that_is_no_name_is_refused(place: Path) -> None:
    for host in ("a" * 300, "\udcff", "a..b"):
        assert command(["serve", "--student", "run/student", "--host", host]) == 2


def test_a_card_of_what_is_no_table_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    for content in ("", "{}", "[1, 2]", '{"a": 3}', "[" * 100_000):
        (tmp_path / "table.json").write_text(content)
        for action in ("card", "card-video"):
            words = ["teacher", action, "--folder", str(tmp_path), "--table", str(tmp_path / "table.json")]
            assert command(words) == 2, (action, content[:9])
    assert not (tmp_path / "README.md").exists()


def test_a_demo_refuses_what_it_could_not_score_before_it_trains() -> None:
    assert command(["demo", "--scores", "3"]) == command(["demo", "--processes", "-1"]) == 2


def test_there_are_two_thousand_cases() -> None:
    assert sum(CASES.values()) >= 2000
