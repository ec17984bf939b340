"""What a family is distilled with when the user says nothing, and how adapters of other packages are found."""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_families import build_sd3, build_sd15, build_sdxl

import fewstep
from fewstep.api import RoleOptions, defaults
from fewstep.cli import main
from fewstep.commands.backbones import markdown, rows
from fewstep.errors import FewstepError
from fewstep.methods import preset
from fewstep.models import Recipe, Setting
from fewstep.models.backbone import BACKBONES
from fewstep.models.loading import adapter_of, built_in
from fewstep.models.recipes import applied
from fewstep.training.options import TrainOptions

DOCS = Path(__file__).parents[2] / "docs" / "backbones.md"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    build_sd15(folder / "files").save_pretrained(folder / "teacher")
    return folder / "teacher"


@pytest.mark.parametrize("kind", built_in(), ids=lambda kind: kind.__name__)
def test_recipes_name_options_that_exist_and_are_valid(kind) -> None:
    known = {name for part in (RoleOptions, TrainOptions) for name in (entry.name for entry in fields(part))}
    for method in ("tdm", "tdm-unify", "dmd2", "sid", *kind.recipe.by_method):
        settings = kind.recipe.settings(method)
        assert set(settings) <= known | {entry.name for entry in fields(preset(method))}
        applied(preset(method), settings).validate()
        applied(TrainOptions(), settings).validate()
        assert all(setting.source for setting in settings.values())


def test_the_documented_table_is_the_codes() -> None:
    """Run `python -m fewstep.commands.backbones` and put its output between the two marks."""
    table = re.search(r"<!-- recipes:.*?-->\n(.*?)\n<!-- end", DOCS.read_text(), re.S)
    assert table is not None
    assert table.group(1) == markdown()


def test_the_papers_numbers_are_taken(sd15: Path) -> None:
    method, roles, train = defaults(sd15)
    assert (method.guidance_scale, method.critic_updates, method.shift) == (3.5, 1, 1.0)
    assert (roles.roles, train.student_rate, train.critic_rate) == ("copies", 2e-6, 2e-5)
    method, roles, train = defaults(sd15, "dmd2")
    assert (method.guidance_scale, method.critic_updates, method.gan_weight) == (1.75, 10, 1e-3)
    assert (roles.roles, train.student_rate) == ("copies", 1e-5)


def test_rates_are_for_the_recipes_roles(sd15: Path) -> None:
    _, roles, train = defaults(sd15, roles="adapters")
    assert (roles, train) == (RoleOptions(), TrainOptions())


def test_adapters_have_the_scale_that_they_were_measured_with() -> None:
    kinds = {kind.__name__: kind.recipe.settings("tdm") for kind in built_in()}
    found = {name: applied(RoleOptions(), kinds[name]) for name in ("StableDiffusion3", "QwenImage", "ZImage", "Wan")}
    assert {name: (roles.rank, roles.alpha) for name, roles in found.items()} == {
        "StableDiffusion3": (32, 64), "QwenImage": (64, 8), "ZImage": (32, 64), "Wan": (64, None),
    }  # fmt: skip


def test_other_methods_have_the_path_alone(sd15: Path) -> None:
    method, roles, train = defaults(sd15, "sid")
    assert (method, roles, train) == (preset("sid"), RoleOptions(), TrainOptions())
    flux = built_in()[[kind.__name__ for kind in built_in()].index("Flux")].recipe
    assert applied(preset("f-distill"), flux.settings("f-distill")).guidance_scale == 1  # distilled into the teacher
    assert applied(preset("f-distill"), flux.settings("f-distill")).shift == 3


def test_what_a_preset_sets_on_purpose_stays() -> None:
    recipe = Recipe(by_method={"dmd": {"critic_updates": Setting(7), "gan_weight": Setting(1.0)}}, shift=Setting(2.0))
    made = applied(preset("dmd"), recipe.settings("dmd"))
    assert (made.critic_updates, made.gan_weight, made.shift) == (1, 0.0, 2.0)
    phased = applied(preset("phased-paper"), Recipe(shift=Setting(3.0)).settings("phased-paper"))
    assert phased.shift == 5


def test_a_grid_written_out_is_for_its_step_count_alone() -> None:
    recipe = Recipe(grid=Setting((1.0, 0.857, 0.666, 0.4)))
    assert applied(preset("tdm"), recipe.settings("tdm")).grid == (1.0, 0.857, 0.666, 0.4)
    assert applied(preset("tdm-unify"), recipe.settings("tdm-unify")).grid == ()


def test_the_embedded_teacher_has_the_general_defaults(tiny_teacher: Path) -> None:
    assert defaults() == (preset("tdm"), RoleOptions(), TrainOptions())
    assert defaults(tiny_teacher)[1].roles == "copies"  # PixArt's own recipe


def test_the_command_line_starts_from_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_sdxl(tmp_path / "files").save_pretrained(tmp_path / "sdxl")
    shown = {}
    for roles in ("", "--roles=adapters"):
        with pytest.raises(SystemExit):
            main(["distill", "tdm", f"--teacher={tmp_path / 'sdxl'}", *roles.split(), "--help"])
        shown[roles] = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    assert "default: 1e-06" in shown[""]
    assert "default: 8.0" in shown[""]
    assert "default: 1e-06" not in shown["--roles=adapters"]
    assert "default: 8.0" in shown["--roles=adapters"]


def test_the_command_line_picks_the_adapter(sd15: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a frog\na red apple\n")
    words = ["--teacher", sd15, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run", "--height", "24"]
    quick = ["--iterations", "1", "--batch", "2", "--warmup", "0", "--no-tensorboard", "--device", "cpu"]
    main(["distill", "tdm", *map(str, words), *quick])
    student = fewstep.load_student(tmp_path / "run" / "student")
    assert student.card["details"]["roles"]["roles"] == "copies"
    assert student.sample(["a frog"], [0]).shape == (1, 3, 24, 16)


def test_the_recipes_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["backbones"])
    printed = capsys.readouterr().out
    assert "StableDiffusionXL (StableDiffusionXLPipeline), dmd2\n  guidance 8; shift 1;" in printed
    assert "rates of student, critic 0.0001*, 0.0004*" in printed
    assert printed.count("from: ") == len(rows())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The package of docs/backbones.md, installed."""
    home = tmp_path / "site"
    (home / "my_package").mkdir(parents=True)
    for name, code in re.findall(r"```python\n# my_package/(\w+\.py)\n(.*?)```", DOCS.read_text(), re.S):
        (home / "my_package" / name).write_text(code)
    (home / "my_package-1.0.dist-info").mkdir()
    (home / "my_package-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n"
    )
    entries = DOCS.read_text().split("```toml\n")[1].split("```")[0]
    entries = entries.replace('[project.entry-points."fewstep.backbones"]', "[fewstep.backbones]").replace('"', "")
    listing = home / "my_package-1.0.dist-info" / "entry_points.txt"
    listing.write_text(entries)
    monkeypatch.syspath_prepend(home)
    yield listing
    BACKBONES.pop("MyTransformer2DModel", None)
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def saved_with_my_network(folder: Path) -> Path:
    from my_package.network import MyTransformer2DModel  # type: ignore[import-not-found]

    pipeline = build_sd3(folder / "files")
    pipeline.register_modules(transformer=MyTransformer2DModel.from_config(pipeline.transformer.config))
    pipeline.save_pretrained(folder / "teacher")
    return folder / "teacher"


def test_a_package_brings_its_own_family(package: Path, tmp_path: Path) -> None:
    """As documented: named by an entry point, network class and all; its student is sampled by the stock pipeline."""
    from diffusers import DiffusionPipeline
    from tiny_pixart import assert_latents_close

    folder = saved_with_my_network(tmp_path)
    teacher = fewstep.load_teacher(folder)
    assert type(teacher.backbone).__name__ == "Mine"
    assert teacher.guidance_scale == 5.0
    train = TrainOptions(iterations=1, batch=2, warmup=0, tensorboard=False)
    student = fewstep.distill(teacher, "tdm", out=tmp_path / "run", prompts=["a frog"], train_options=train)
    assert student.card["details"]["method"]["shift"] == 3.0
    told = {**student.card["call"]["4"], **student.backbone.student_call, "output_type": "latent"}
    import torch

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    theirs = pipeline(["a frog"], generator=[torch.Generator().manual_seed(0)], **told).images
    assert_latents_close(student.latents(["a frog"], [0]), theirs)


def test_an_entry_point_that_is_no_adapter_is_refused(package: Path, tmp_path: Path) -> None:
    package.write_text("[fewstep.backbones]\nMyTransformer2DModel = my_package.network:MyTransformer2DModel\n")
    folder = saved_with_my_network(tmp_path)
    with pytest.raises(FewstepError, match="my_package.network:MyTransformer2DModel.*no adapter"):
        adapter_of(folder)


def test_a_class_that_nobody_knows_is_refused_with_a_way_out(package: Path, tmp_path: Path) -> None:
    package.write_text("")
    folder = saved_with_my_network(tmp_path)
    with pytest.raises(FewstepError, match=r"MyTransformer2DModel.*docs/backbones.md.*register_backbone.*entry point"):
        fewstep.load_teacher(folder)
