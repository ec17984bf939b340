"""Prompts of every kind of file: read in order, left on disk where they can be, refused with the place."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fewstep.data.sources import Spans, read_prompts
from fewstep.errors import FewstepError

TEXTS = ["a frog", "ein Apfel, grün", 'a "3d"\npizza']
PLAIN = ["a frog", "ein Apfel, grün"]


def jsonl(folder: Path) -> str:
    records = [{"n": 1, "caption": f" {text} "} for text in TEXTS] + [{"caption": ""}, {"caption": None}]
    (folder / "p.jsonl").write_text("\n\n".join(json.dumps(record) for record in records))
    return f"{folder / 'p.jsonl'}:caption"


def table(folder: Path) -> pyarrow.Table:
    return pyarrow.table({"text": [TEXTS[0], None, " ", TEXTS[1] + " ", TEXTS[2]], "n": [1, 2, 3, 4, 5]})


def csv_file(folder: Path) -> str:
    (folder / "p.csv").write_text('\ufeffn,text\n1,a frog\n2,"ein Apfel, grün"\n3,\n4,"a ""3d""\npizza"\n')
    return str(folder / "p.csv")


def parquet_file(folder: Path) -> str:
    parquet.write_table(table(folder), folder / "p.parquet", row_group_size=2)
    return str(folder / "p.parquet")


def parquet_folder(folder: Path) -> str:
    (folder / "data").mkdir()
    for part, rows in enumerate((slice(0, 2), slice(2, 5))):
        piece = table(folder).slice(rows.start, rows.stop - rows.start)
        parquet.write_table(piece, folder / "data" / f"train-{part}.parquet")
    return f"{folder}:text"


def saved_dataset(folder: Path) -> str:
    """The files that `datasets.Dataset.save_to_disk` writes, as far as they are read."""
    rows = table(folder)
    for part, piece in enumerate((rows.slice(0, 3), rows.slice(3))):
        with pyarrow.ipc.new_stream(folder / f"data-{part}.arrow", rows.schema) as stream:
            stream.write_table(piece, max_chunksize=2)
    state = {"_data_files": [{"filename": f"data-{part}.arrow"} for part in range(2)], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return str(folder)


def shard(path: Path, members: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def shards(folder: Path) -> str:
    shard(folder / "0.tar", {"a.jpg": b"\xff\x00", "a.txt": TEXTS[0], "b.txt": "", "b.json": "{}"})
    shard(folder / "1.tar", {"c.txt": TEXTS[1], "d.txt": TEXTS[2]})
    return str(folder)


def json_shard(folder: Path) -> str:
    members = {f"{n}.json": json.dumps({"caption": text}) for n, text in enumerate(TEXTS)}
    return f"{shard(folder / 's.tar', members | {'0.txt': 'not this'})}:caption"


SOURCES = [jsonl, csv_file, parquet_file, parquet_folder, saved_dataset, shards, json_shard]


@pytest.mark.parametrize("write", SOURCES)
def test_every_kind_of_file_gives_its_prompts_in_order(write: Callable[[Path], str], tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path))
    assert list(prompts) == TEXTS
    assert len(prompts) == 3
    assert (prompts[-1], prompts[1:]) == (TEXTS[2], TEXTS[1:])
    with pytest.raises(IndexError):
        prompts[3]


def test_reads_one_prompt_a_line_and_skips_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa frog\r\n\n  ein Apfel, grün \n".encode())
    assert list(read_prompts(file)) == PLAIN
    odd = file.rename(tmp_path / "with:colon")
    assert list(read_prompts(odd)) == PLAIN


def test_a_text_file_stays_on_disk(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"prompt number {n} of many, with more words" for n in range(10_000)))
    prompts = read_prompts(tmp_path / "p.txt")
    assert isinstance(prompts, Spans)
    own = [value for name, value in vars(prompts).items() if name != "source"]
    held = [value for value in own if isinstance(value, (list, str, bytes, bytearray))]
    assert not held
    assert prompts[9_999].startswith("prompt number 9999 ")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", b"", "no prompt"),
        ("p.txt", b"\n \n", "no prompt"),
        ("p.txt", b"fine\n\xff\xfe\x00", "not UTF-8 in line 2"),
        ("p.txt", b"fine\rfine\na\x00b", "control characters .* line 3"),
        ("p.txt", b"x" * 5000, "5000 characters.* line 1"),
        ("p.txt:text", b"fine", "column 'text' asked of .*plain text"),
        ("p.jsonl", b'{"text": "fine"}\n\n{"text": }', "no JSON .*line 3"),
        ("p.jsonl", b'{"text": "fine"}\n{"n": 1}', r"no column 'text' among \['n'\] in line 2.*PATH:COLUMN"),
        ("p.jsonl", b'{"words": "fine"}', r"none of .* among \['words'\] in line 1"),
        ("p.jsonl", b'{"text": 3}', "int instead of text in line 1"),
        ("p.jsonl", b"[1]", "list instead of an object in line 1"),
        ("p.jsonl", b'{"text": "\\ud800"}', "not UTF-8 in line 1"),
        ("p.csv", b"n,m\n1,2\n", r"none of .* among \['n', 'm'\]"),
        ("p.csv:words", b"n,text\n1,fine\n", r"no column 'words' among \['n', 'text'\]"),
        ("p.csv", b"n,text\n1,fine\n2\n", "ends before its column 'text' in line 3"),
        ("p.csv", b'n,text\n1,"fine\n', "line"),
        ("p.parquet", b"PAR1 not really", "cannot be read"),
        ("p.tar", b"not really", "cannot be read to its end"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name.split(":")[0]).write_bytes(content)
    with pytest.raises(FewstepError, match=f"(?s)found .*{expected}"):
        read_prompts(tmp_path / name)


def test_bad_rows_members_and_folders_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["fine", "a\x00b"], "n": [1, 2]}), tmp_path / "p.parquet")
    for where, expected in (
        (tmp_path / "p.parquet", "control characters .* row 2 of"),
        (f"{tmp_path / 'p.parquet'}:n", "int instead of text in row 1 of"),
        (f"{tmp_path / 'p.parquet'}:words", r"no column 'words' among \['text', 'n'\]"),
        (shard(tmp_path / "a.tar", {"x.txt": b"\xff"}), "not UTF-8 in x.txt of"),
        (shard(tmp_path / "b.tar", {"x.json": '{"n": 1}'}), "no .txt member in .*SHARDS:caption"),
        (f"{tmp_path / 'b.tar'}:caption", "no column 'caption' among .* in x.json of"),
        (tmp_path / "none.txt", "no readable prompts file"),
        (f"{tmp_path / 'none.jsonl'}:text", "no readable prompts file"),
    ):
        with pytest.raises(FewstepError, match=expected):
            read_prompts(where)
    half = shard(tmp_path / "c.tar", {"x.txt": "word " * 500}).read_bytes()[:1500]
    (tmp_path / "half.tar").write_bytes(half)
    with pytest.raises(FewstepError, match="half.tar that cannot be read to its end"):
        read_prompts(tmp_path / "half.tar")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FewstepError, match="no readable prompts file"):
        read_prompts(empty)
    (empty / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(FewstepError, match=r"splits \['train', 'test'\].*fix: pass .*train"):
        read_prompts(empty)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = parquet_file(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(FewstepError, match=r"pip install 'fewstep\[data\]'"):
        read_prompts(where)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=300), kind=st.sampled_from(["txt", "jsonl", "csv"]))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    file = tmp_path / f"prompts.{kind}"
    file.write_bytes(content)
    try:
        prompts = read_prompts(file)
    except FewstepError:
        return
    assert len(prompts)
    assert all(prompt.strip() for prompt in prompts)
