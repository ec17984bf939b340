"""Prompt files of any contents: read, or refused in a paragraph."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.fuzzing import DEEP, JSON, cases, damage, damaged, outcome

from fewstep.data.sources import Prompts, read_prompts

COLUMNS = st.sampled_from([None, "prompt", "text", "caption", "x", "", ":", "a:b"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def read(path: Path, column: str | None) -> None:
    """Reads a file, and every prompt of it."""
    prompts = read_prompts(path if column is None else f"{path}:{column}")
    assert isinstance(prompts, Prompts)
    assert all(text and text == text.strip() for text in prompts)
    assert len(list(prompts)) == len(prompts) > 0


@st.composite
def contents(draw: Any) -> bytes:
    """Bytes, text, or lines that are nearly what is wanted."""
    line = st.one_of(
        TEXTS.map(str.encode),
        st.binary(max_size=30),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({"text": TEXTS}).map(lambda record: json.dumps(record).encode()),
        st.sampled_from([b'"a,b', b"text", b"prompt,text", b"\xef\xbb\xbftext", b"\x00", b'{"text": ', DEEP.encode()]),
        st.just(b"a" * 5000),
    )
    return draw(st.sampled_from([b"\n", b"\r\n", b"\r", b","])).join(draw(st.lists(line, max_size=5)))


def test_text_jsonl_and_csv() -> None:
    @cases("text files")
    @given(data=contents(), suffix=st.sampled_from([".txt", ".jsonl", ".csv", ".tsv", "", ".TXT"]), column=COLUMNS)
    def fuzz(data: bytes, suffix: str, column: str | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"prompts{suffix}"
            path.write_bytes(data)
            outcome(lambda: read(path, column))

    fuzz()


def test_parquet_tables() -> None:
    columns = st.one_of(
        st.lists(st.one_of(st.none(), TEXTS), max_size=3),
        st.lists(st.integers(0, 9), max_size=3),
        st.lists(st.binary(max_size=5), max_size=3),
        st.lists(st.dictionaries(st.sampled_from(["a", "b"]), TEXTS, min_size=1), max_size=3),
        st.lists(st.lists(TEXTS, max_size=2), max_size=3),
        st.lists(st.datetimes(), max_size=3),
    )
    tables = st.dictionaries(st.sampled_from(["text", "prompt", "x", ""]), columns, max_size=3)

    @cases("tables")
    @given(table=tables, what=st.none() | damage(), column=COLUMNS)
    def fuzz(table: dict[str, list[Any]], what: Any, column: str | None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.parquet"
            rows = min((len(values) for values in table.values()), default=0)
            pq.write_table(pa.table({name: values[:rows] for name, values in table.items()}), path)
            if what is not None:
                damaged(path, what)
            outcome(lambda: read(path, column))

    fuzz()


def shard(members: list[tuple[str, bytes]], mode: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def test_shards_and_folders() -> None:
    members = st.lists(
        st.tuples(st.sampled_from(["a.txt", "b.json", "../c.txt", "d.png", "é.TXT"]), contents()), max_size=3
    )

    @cases("shards and folders")
    @given(
        members=members,
        mode=st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]),
        what=st.none() | damage(),
        more=st.none() | st.tuples(st.sampled_from(["dataset_dict.json", "state.json"]), JSON),
        column=COLUMNS,
    )
    def fuzz(members: list[tuple[str, bytes]], mode: str, what: Any, more: Any, column: str | None) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "shards"
            folder.mkdir()
            (folder / "a.tar").write_bytes(shard(members, mode))
            if what is not None:
                damaged(folder / "a.tar", what)
            if more is not None:
                told = {"splits": more[1], "_data_files": more[1]} if isinstance(more[1], list) else more[1]
                (folder / more[0]).write_text(json.dumps(told))
            outcome(lambda: read(folder, column))

    fuzz()


@pytest.mark.parametrize("where", ["a" * 5000, "a\0b", "", "/dev/null", "x" * 300 + ":text"])
def test_what_is_no_path_is_refused(where: str) -> None:
    assert outcome(lambda: read_prompts(where))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "prompts.txt")
    assert "a device or a pipe" in str(outcome(lambda: read_prompts(tmp_path / "prompts.txt")))


def test_a_member_of_absurd_size_is_refused_and_not_read(tmp_path: Path) -> None:
    entry = tarfile.TarInfo("a.txt")
    entry.size = 2**40
    (tmp_path / "a.tar").write_bytes(entry.tobuf() + b"\0" * 1024)
    assert "1099511627776 bytes" in str(outcome(lambda: read_prompts(tmp_path / "a.tar")))
