"""The command and a real student: the same picture in any batch, and an end that loses nothing."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live_server import ask, metric, opened, wait_for  # type: ignore[import-not-found]

import fewstep
from fewstep.cli import main
from fewstep.errors import FewstepError
from fewstep.evaluation.pictures import to_pil
from fewstep.methods import TDMOptions, preset
from fewstep.serving.limits import Limits
from fewstep.serving.served import served
from fewstep.serving.server import KEY_VARIABLE, bind, is_loopback, read_key
from fewstep.training.options import TrainOptions

PROMPTS = ["a frog", "a red apple on a blue background", "a 3d pizza"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Path:
    out = tmp_path_factory.mktemp("served")
    options, told = preset("tdm"), TrainOptions(iterations=1, batch=2, warmup=0, sample_every=0, tensorboard=False)
    assert isinstance(options, TDMOptions)
    fewstep.distill(tiny_teacher, replace(options, steps=2), out=out, prompts=PROMPTS, train_options=told)
    return out / "student"


def test_a_sample_does_not_depend_on_its_batch(folder: Path) -> None:
    model = served(fewstep.load_student(folder), "tiny")
    assert (model.width, model.height, model.steps) == (32, 32, (2,))
    alone = [model.draw([prompt], [seed], 2)[0] for seed, prompt in enumerate(PROMPTS * 3)]
    together = model.draw(PROMPTS * 3, range(9), 2)
    backwards = model.draw(PROMPTS[::-1] * 3, range(8, -1, -1), 2)
    for one, other, third in zip(alone, together, reversed(backwards), strict=True):
        torch.testing.assert_close(one.int(), other.int(), rtol=0, atol=1)  # rounding may differ by one level of 255
        torch.testing.assert_close(one.int(), third.int(), rtol=0, atol=1)
    assert not torch.equal(alone[0], alone[3])  # the same prompt of another seed


def test_the_command_serves_and_ends_when_all_is_answered(folder: Path) -> None:
    words = ["--student", str(folder), "--port", "0", "--queue", "100", "--batch", "1", "--device", "cpu"]
    child = subprocess.Popen(
        [sys.executable, "-m", "fewstep", "serve", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    try:
        line = child.stdout.readline()
        found = re.fullmatch(r"serving fewstep \(32x32, steps 2\) at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + str(child.stderr and child.stderr.read())
        url = found[1]
        body = {"prompt": "a frog", "seed": 5, "response_format": "b64_json"}
        picture = ask(url, body)[1]["data"][0]["b64_json"]  # at once: connections can be made
        expected = to_pil(fewstep.sample(folder, "a frog", seeds=5)[0])
        assert opened(base64.b64decode(picture), expected.size).tobytes() == expected.tobytes()
        with ThreadPoolExecutor(6) as clients:
            answers = [clients.submit(ask, url, {**body, "n": 10}) for _ in range(6)]
            counted = ("fewstep_waiting_pictures", "fewstep_batch_size_sum")
            wait_for(lambda: metric(url, *counted) >= 60)  # of 61 with the first, and one being drawn: all have arrived
            child.send_signal(signal.SIGTERM)
            assert [len(answer.result(60)[1]["data"]) for answer in answers] == [10] * 6
        out, errors = child.communicate(timeout=60)
        assert child.returncode == 0
        assert "stopped" in out
        assert not re.search("Traceback|ERROR|Cancel", errors), errors  # nothing was dropped
    finally:
        child.kill()
        child.communicate()


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_bad_options_are_refused_before_the_student_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = ["--student", str(tmp_path / "nothing")]
    assert "no student" in fails(capsys, *student, "--port", "0")
    assert "queue = 3" in fails(capsys, *student, "--queue", "3")
    assert "timeout = 0" in fails(capsys, *student, "--timeout", "0")
    assert "linger" in fails(capsys, *student, "--linger", "nan")
    assert "cannot be listened to" in fails(capsys, *student, "--host", "no.such.host.invalid")
    assert "cannot be listened to" in fails(capsys, *student, "--port", "99999999")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be listened to" in fails(capsys, *student, "--port", str(taken.getsockname()[1]))
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    for name in [name for name in sys.modules if name.startswith("fewstep.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'fewstep[serve]'" in fails(capsys, *student)


def test_keys_come_from_a_file_or_the_environment_and_are_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from-the-environment")
    assert read_key(None) == "from-the-environment"
    file = tmp_path / "key"
    file.write_text("from-the-key-file\n")
    assert read_key(file) == "from-the-key-file"
    for bad in ("", "short-secret", "a secret with spaces in it", "secret-of-\u00fcmlauts-here"):
        file.write_text(bad, encoding="utf-8")
        with pytest.raises(FewstepError) as refused:
            read_key(file)
        assert "secret" not in str(refused.value)
    with pytest.raises(FewstepError, match="no readable key file"):
        read_key(tmp_path / "missing")


def test_only_loopback_needs_no_warning() -> None:
    hosts = ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "example.org")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
    bind("127.0.0.1", 0).close()


def test_room_for_pictures_is_checked() -> None:
    with pytest.raises(FewstepError, match="keep_megabytes = 1"):
        Limits(keep_megabytes=1).check_room(1024, 1024)
    with pytest.raises(FewstepError, match="81 frames"):
        Limits().check_room(832, 480, 81)
    Limits().check_room(1024, 1024)
