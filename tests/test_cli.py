"""The command line: a whole small run through its commands, and bad input refused before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fewstep.cli import COMMANDS, main
from fewstep.methods import METHODS

QUICK = ["--iterations", "2", "--batch", "4", "--warmup", "1", "--log-every", "1", "--no-tensorboard"]


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a command that exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err + captured.out


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a frog\na red apple on a blue background\n\na 3d pizza\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, prompts: Path) -> Path:
    """A finished run of two iterations."""
    out = tmp_path_factory.mktemp("run") / "out"
    main(["distill", "tdm", "--teacher", str(tiny_teacher), "--prompts", str(prompts), "--out", str(out), *QUICK])
    return out


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = "import sys; from fewstep.cli import main; main(['--help']); assert not {'torch', 'tyro'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("teacher", "league")])
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fewstep {command}" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_command_line(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its options are beside those of roles and of the trainer: no two may have one name."""
    with pytest.raises(SystemExit) as stopped:
        main(["distill", method, "--help"])
    assert stopped.value.code == 0
    assert "--lora-alpha" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["train", "reference", "table", "card", "sprites"])
def test_every_teacher_action_explains_its_options(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["teacher", action, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fewstep teacher {action}" in capsys.readouterr().out


def test_a_run_leaves_log_sample_grid_checkpoint_and_student(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert {"loss/student", "loss/critic"} <= lines[0].keys()
    assert (run / "checkpoints" / "000002" / "state.json").is_file()
    assert (run / "samples" / "000002-4-steps.png").is_file()
    card = json.loads((run / "student" / "fewstep.json").read_text())
    assert card["method"] == "tdm"
    assert card["grids"] == {"4": [1.0, 0.75, 0.5, 0.25, 0.0]}


def test_two_processes_end_with_one_student(tmp_path: Path, tiny_teacher: Path, prompts: Path) -> None:
    """The second process must not look for the student before the first has written it; torchrun keeps our options."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "fewstep"]
    words = [
        "distill",
        "tdm",
        "--teacher",
        str(tiny_teacher),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*launcher, *words, *QUICK, "--start-time", "0.8"],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "student" / "fewstep.json").is_file()
    assert done.stderr.count("student: ") == 1


def test_sample_and_compare_use_the_student(run: Path, prompts: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    from PIL import Image

    picture = tmp_path / "sample.png"
    words = ["--prompt", "a frog", "a 3d pizza", "--count", "2", "--columns", "2", "--out", str(picture)]
    main(["sample", "--student", str(run / "student"), *words])
    assert Image.open(picture).size == (64, 64)  # two by two pictures of 32
    main(
        [
            "compare",
            f"{tiny_teacher}:3",
            f"{run / 'student'}:4",
            "--prompts",
            str(prompts),
            "--out",
            str(tmp_path / "c"),
            "--samples",
            str(tmp_path / "samples"),
        ]
    )
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "teacher, 3 steps" in page
    assert "student, 4 steps" in page
    assert (tmp_path / "c" / "compare.png").is_file()


def test_the_same_seed_gives_the_same_picture(run: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = ["--prompt", "a frog", "--seed", str(seed), "--out", str(tmp_path / f"{name}.png")]
        main(["sample", "--student", str(run / "student"), *words])
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_an_output_folder_with_another_run_is_refused(
    run: Path, tiny_teacher: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--teacher", tiny_teacher, "--prompts", prompts, "--out", run]
    before = (run / "log.jsonl").read_bytes()
    assert "resume" in fails(capsys, "distill", "tdm", *words, *QUICK)
    changed = fails(capsys, "distill", "tdm", *words, *QUICK, "--resume", "--guidance-scale", "2")
    assert "guidance_scale" in changed
    assert (run / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dance"], "found command 'dance'"),
        (["distill", "tdmm"], "found method 'tdmm'"),
        (["distill", "tdm", "--stepz", "4"], "stepz"),
        (["distill", "tdm", "--steps", "0"], "1 or more"),
        (["distill", "tdm", "--steps", "four"], "steps"),
        (["distill", "tdm", "--iterations", "0"], "at least 1"),
        (["distill", "tdm", "--teacher", "/nowhere/at/all"], "found nothing at /nowhere/at/all"),
        (["distill", "tdm", "--prompts", "/nowhere.txt"], "no readable prompts file"),
        (["distill", "tdm", "--device", "moon"], "moon"),
        (["sample"], "no prompt"),
        (["sample", "--prompt", " "], "no prompt"),
        (["sample", "--student", "/nowhere", "--prompt", "a frog"], "/nowhere"),
        (["compare"], "no candidate"),
        (["teacher", "dance"], "found action 'dance'"),
    ],
)
def test_bad_input_is_one_paragraph(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, *words)


def test_a_folder_without_a_pipeline_and_missing_prompts_are_refused(
    tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert "model_index.json" in fails(capsys, "distill", "tdm", "--teacher", tmp_path, "--out", out)
    assert "--prompts" in fails(capsys, "distill", "tdm", "--teacher", tiny_teacher, "--out", out)
    assert not out.exists()


def test_students_take_no_guidance_and_only_their_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--student", run / "student", "--prompt", "a frog"]
    assert "guidance is trained into it" in fails(capsys, *words, "--guidance-scale", "3")
    assert "expected one of [4]" in fails(capsys, *words, "--steps", "3")


def test_no_memory_left_is_one_paragraph_and_other_errors_of_the_program_are_not_hidden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.commands.methods.main", lambda words: torch.empty(10**15))
    assert "found no memory left" in fails(capsys, "methods")
    monkeypatch.setattr("fewstep.commands.methods.main", lambda words: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError):
        main(["methods"])


def test_ctrl_c_and_sigterm_before_or_after_training_end_with_their_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt  # as SIGINT does, which a process started in the background may ignore

    def terminated(words: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    handler = signal.getsignal(signal.SIGTERM)
    for act, code in ((interrupted, 130), (terminated, 143)):
        monkeypatch.setattr("fewstep.commands.methods.main", act)
        with pytest.raises(SystemExit) as stopped:
            main(["methods"])
        assert stopped.value.code == code
        assert capsys.readouterr().err == "fewstep: stopped; the same command goes on (--resume for a run)\n"
        assert signal.getsignal(signal.SIGTERM) == handler


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("tdm-paper", "tdm-unify", "2503.06674", "fewstep msd METHOD"))
