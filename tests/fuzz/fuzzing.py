"""What the fuzzers share: how many cases each tries, junk, damage to files, and what an error has to look like."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fewstep.cli import main
from fewstep.errors import FewstepError

CASES = {
    "command lines": 400,
    "requests": 150,
    "video requests": 120,
    "streams": 60,
    "options of methods": 450,
    "options of trainer and roles": 150,
    "text files": 300,
    "tables": 150,
    "shards and folders": 100,
    "caches": 50,
    "cards": 150,
    "routers": 60,
    "LoRA files": 60,
    "pipeline folders": 60,
    "checkpoints": 100,
    "runs": 60,
    "records": 60,
}
"""In all 2,000 and more; each fuzzer's are the same in every run."""
PICKLE = b"\x80\x04\x95\x10\x00"
ZIP = b"PK\x03\x04"


def cases(name: str) -> Any:
    """A hypothesis profile of so many cases."""
    return settings(
        max_examples=CASES[name],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # no shrinking: it would cost more than the rest
        suppress_health_check=list(HealthCheck),
    )


def outcome(call: Callable[[], Any]) -> str | None:
    """None, or what a FewstepError says, which is one paragraph; any other error is a bug and passes.

    But for those of the operating system about a path, which the command line says in a paragraph.
    """
    try:
        call()
    except OSError as error:
        if error.filename is None:
            raise
        return str(error)
    except FewstepError as error:
        said = str(error)
        assert said.startswith("found ")
        assert "expected" in said or "fix" in said
        assert "Traceback" not in said
        return said
    return None


def command(words: list[str]) -> int:
    """Exit code of `fewstep WORDS`; a failure says why in one paragraph, on either stream, without a traceback."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as stopped:
            code = stopped.code or 0
    said = err.getvalue() + out.getvalue()
    assert isinstance(code, int), f"{words}: {code}"
    assert "Traceback" not in said
    if code:
        assert said.strip(), f"{words} said nothing"
    return code


NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(10**30)]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]),
    st.floats(-10, 10),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON, nan and infinity as Python writes them among it."""
DEEP = "[" * 100_000
"""More than any parser's stack."""


@st.composite
def damage(draw: Any) -> tuple[str, Any]:
    """Something that happens to a file: see `damaged`."""
    ways = ["gone", "empty", "cut", "flip", "junk", "pickle", "zip", "folder", "json", "deep", "edit", "edit", "edit"]
    how = draw(st.sampled_from(ways))
    return how, (draw(st.integers(0, 2**16)), draw(st.binary(min_size=1, max_size=64)), draw(JSON))


def damaged(path: Path, what: tuple[str, Any]) -> None:
    """Damages the file `path`."""
    how, (place, junk, value) = what
    data = path.read_bytes()
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    elif how == "edit" and path.suffix == ".json":
        path.write_text(json.dumps(edited(json.loads(data), place, value)))
    else:
        at = place % max(len(data), 1)
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[:at],
                "flip": data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :] if data else b"",
                "junk": junk,
                "edit": junk,
                "pickle": PICKLE + data,
                "zip": ZIP + data,
                "json": json.dumps(value).encode(),
                "deep": DEEP.encode(),
            }[how]
        )


def edited(tree: Any, place: int, value: Any) -> Any:
    """JSON with another value at one of its places, or, every third time, without it."""
    if isinstance(tree, dict) and tree:
        name = sorted(tree)[place % len(tree)]
        rest = {key: tree[key] for key in tree if key != name}
        inner = tree[name]
        if isinstance(inner, dict | list) and inner and place % 2:
            return rest | {name: edited(inner, place // len(tree), value)}
        return rest if place % 3 == 0 else rest | {name: value}
    if isinstance(tree, list) and tree:
        at = place % len(tree)
        return [*tree[:at], edited(tree[at], place // len(tree), value), *tree[at + 1 :]]
    return value


def left_behind(folder: Path) -> list[str]:
    """Names in a folder, at any depth, that only unfinished work has."""
    ends = (".new", ".old")
    return [str(path) for path in folder.rglob("*") if "unfinished" in path.name or path.name.endswith(ends)]
