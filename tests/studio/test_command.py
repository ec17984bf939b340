"""The command where the extra is not installed."""

from __future__ import annotations

import sys

import pytest

from fewstep import cli


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("fewstep.studio.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if there were none
    with pytest.raises(SystemExit) as stopped:
        cli.main(["studio", "--port", "0"])
    assert stopped.value.code == 2
    assert "found no gradio" in (told := capsys.readouterr().err)
    assert "pip install 'fewstep[studio]'" in told
