"""Scripts and notebook run; launch files parse, and all of them run one command that torchrun and fewstep accept."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.run import get_args_parser

from fewstep import api, cli
from fewstep.commands import distill
from fewstep.core.process import Flow
from fewstep.core.streams import Streams
from fewstep.errors import FewstepError
from fewstep.evaluation.exact import LABEL, ring
from fewstep.evaluation.toy import ToyRoles
from fewstep.methods import METHODS, available, preset
from fewstep.methods.base import Batch

FOLDER = Path(__file__).parents[1] / "examples"


def texts() -> dict[str, str]:
    """The shell script within each file."""
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    return {
        "slurm": (FOLDER / "slurm.sbatch").read_text(),
        "kubernetes": pod["containers"][0]["args"][0],
        "skypilot": yaml.safe_load((FOLDER / "skypilot.yaml").read_text())["run"],
    }


def command(text: str) -> list[str]:
    """The words of the command after `torchrun`, with 2 in the place of every variable."""
    (line,) = re.findall(r"torchrun (--nnodes.*)", text.replace("\\\n", " "))
    return shlex.split(re.sub(r"\$\([^)]*\)|\$\w+", "2", line))


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "skypilot"])
def test_the_command_is_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = command(texts()[name])
    launched = get_args_parser().parse_args(words)
    assert (launched.module, launched.training_script) == (True, "fewstep")
    assert launched.nnodes == "2"
    told: dict[str, Any] = {}
    monkeypatch.setattr(distill, "defaults", lambda teacher, method, roles: api.defaults("emoji", method, roles))
    monkeypatch.setattr(distill, "read_prompts", lambda path: [str(path)])
    monkeypatch.setattr(distill, "load_teacher", lambda source, **more: told.update(more, teacher=source))
    monkeypatch.setattr(distill, "distill", lambda teacher, options, **more: told.update(more))
    cli.main(launched.training_script_args)
    assert told["teacher"] == "black-forest-labs/FLUX.1-dev"
    assert told["defer"]
    assert told["roles"].shard
    assert told["resume"]
    assert told["train_options"].batch % 16 == 0  # as many processes as the files start


def test_all_run_the_same() -> None:
    shells = [words[words.index("-m") :] for words in map(command, texts().values())]
    assert shells[0] == shells[1] == shells[2]


def run_script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example as `python examples/NAME 2` in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [name, "2"])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("distil_in_ten_lines.py", "runs/ten-lines/pictures.png"),
        ("own_teacher.py", "runs/own-teacher/tdm/log.jsonl"),
        ("own_method.py", "runs/own-method/student/fewstep.json"),
    ],
)
def test_the_script_runs(name: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(name, tmp_path, monkeypatch)
    assert (tmp_path / made).is_file()


def test_ten_lines_are_ten() -> None:
    lines = (FOLDER / "distil_in_ten_lines.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(('"""', "import", "from"))]
    assert len(code) <= 10


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((FOLDER / "first_student.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)  # as it is before anybody runs it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_ITERATIONS", "1")
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert (tmp_path / "runs/notebook/pictures.png").is_file()
    assert names["student"].grids.keys() == {4}


def test_the_own_teacher_is_the_exact_denoiser() -> None:
    """By Tweedie's formula, from the logarithm of the density: alpha E[x0 | x] = x + sigma^2 d log p / dx."""
    example = runpy.run_path(str(FOLDER / "own_teacher.py"))
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.linspace(0.05, 0.95, 50)
    alpha, sigma = (1 - t)[:, None], t[:, None]
    variance = (alpha * example["WIDTH"]) ** 2 + sigma**2
    distance = (x[:, None] - alpha[:, None] * example["BLOBS"]).square().sum(2)
    torch.logsumexp(-distance / (2 * variance), 1).sum().backward()
    expected = (x.detach() + sigma**2 * x.grad) / alpha
    torch.testing.assert_close(example["my_posterior_mean"](x.detach(), t), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """install(value): a package whose entry point `imitation` is `value`; the method of the example is in it."""
    home = tmp_path / "site"
    (home / "my_package").mkdir(parents=True)
    (home / "my_package" / "own_method.py").write_text((FOLDER / "own_method.py").read_text())
    about = home / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(home)

    def install(value: str) -> None:
        (about / "entry_points.txt").write_text(f"[fewstep.methods]\nimitation = {value}\n")

    yield install
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def test_a_package_brings_its_own_method(
    installed: Any, tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the example says: named by an entry point, its options on the command line, listed, in the student's card."""
    installed("my_package.own_method:imitation")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a frog\n")
    where = ["--teacher", str(tiny_teacher), "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    quick = ["--iterations", "1", "--batch", "2", "--warmup", "0", "--no-tensorboard"]
    cli.main(["distill", "imitation", *where, *quick, "--substeps", "2", "--steps", "2"])
    card = json.loads((tmp_path / "run" / "student" / "fewstep.json").read_text())
    assert card["method"] == "imitation"
    assert card["details"]["method"] == {"steps": 2, "substeps": 2, "guidance_scale": 3.5}
    capsys.readouterr()
    cli.main(["methods"])
    assert "imitation" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["my_package.nowhere:imitation", "my_package.own_method:Imitation", "json:dumps"])
def test_an_entry_point_that_is_no_preset_is_refused(installed: Any, value: str) -> None:
    installed(value)
    with pytest.raises(FewstepError, match=f"{value}.*no preset"):
        preset("imitation")
    with pytest.raises(FewstepError, match="no preset"):
        available()
    assert preset("tdm").counts == (4,)


def test_a_package_does_not_replace_our_methods(installed: Any) -> None:
    installed("my_package.own_method:imitation")
    assert {name: available()[name] for name in METHODS} == METHODS


def test_the_own_method_lands_where_the_teacher_does() -> None:
    """A student that is the teacher has no loss with one substep and no guidance; every other student has some."""
    example = runpy.run_path(str(FOLDER / "own_method.py"))
    options = example["ImitationOptions"](steps=3, substeps=1, guidance_scale=1.0)
    method, draw = options.build(), Streams(0).at(1, range(64))
    exact = ring(Flow(), [1, 2, 3, 4], 1.5, 0.3, torch.float64)
    batch = Batch({LABEL: torch.zeros(64, dtype=torch.long)}, torch.arange(64), (2,), torch.float64)
    for gain, expected in ((1.0, 0.0), (0.9, None)):
        roles = ToyRoles(exact, lambda x, t, condition, gain=gain: gain * exact(x, t, condition), exact)
        values = method.student_loss(method.rollout(batch, roles, draw), roles, draw).values
        if expected is None:
            assert bool((values > 0).all())
        else:
            torch.testing.assert_close(values, torch.zeros_like(values))
