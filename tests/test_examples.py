"""The launch files parse, and all of them run one command that torchrun and fewstep accept."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from fewstep import api, cli
from fewstep.commands import distill

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
