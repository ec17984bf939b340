"""Prompts from files: text, JSONL, CSV, Parquet, folders of Hugging Face datasets, WebDataset shards.

    read_prompts("prompts.txt")                 # one a line
    read_prompts("captions.jsonl:caption")      # a field; so for .csv, .tsv, .parquet and dataset folders
    read_prompts("shards")                      # a folder of .tar shards: their .txt members, or :FIELD of their .json

A file is checked once from beginning to end, and then read where it lies: text and JSONL stay on disk (16 bytes of
memory a prompt), as do the Arrow files of a dataset folder; of CSV and shards the column's text is held, of Parquet its
decoded column. No Python string lives longer than it is looked at. Nothing is unpickled.
"""

from __future__ import annotations

import csv
import json
import lzma
import mmap
import tarfile
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError

LONGEST = 4_000
"""Characters of a prompt above which it is taken for a mistake."""
_MOST_FILES = 100_000
"""In a folder of prompts; with more it is taken for a mistake."""
_LARGEST_MEMBER = 1 << 24
"""Bytes of a shard's member above which it is not read."""

FILMS = "films"
"""In the place of a path: the captions of the embedded films, with tracks and drives (`fewstep.data.film_clips`)."""
USUAL_COLUMNS = ("prompt", "text", "caption")
"""Columns that are looked for, in this order, where none is named."""


class Prompts(Sequence[str]):
    """Prompts that have been checked: texts without blanks around them, none of them empty."""

    source: str | None = None
    """PATH or PATH:COLUMN that they were read from, the path in full."""

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._text(at) for at in range(*place.indices(len(self)))]
        at = place + len(self) if place < 0 else place
        if not 0 <= at < len(self):
            raise IndexError(f"prompt {place} of {len(self)}")
        return self._text(at)

    def _text(self, at: int) -> str:
        raise NotImplementedError


class Spans(Prompts):
    """Prompts that are pieces of one buffer."""

    def __init__(self, buffer: Any, starts: array[int], ends: array[int], parse: Callable[[bytes], str]) -> None:
        self._buffer, self._starts, self._ends, self._parse = buffer, starts, ends, parse

    def __len__(self) -> int:
        return len(self._starts)

    def _text(self, at: int) -> str:
        return self._parse(self._buffer[self._starts[at] : self._ends[at]])


class Columns(Prompts):
    """Prompts that are the rows of Arrow arrays, one after the other."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks, self._starts = [chunk for chunk in chunks if len(chunk)], array("q", [0])
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))

    def __len__(self) -> int:
        return self._starts[-1]

    def _text(self, at: int) -> str:
        chunk = bisect_right(self._starts, at) - 1
        return self._chunks[chunk][at - self._starts[chunk]].as_py().strip()


def read_prompts(where: str | Path) -> Prompts:
    """The prompts of PATH or PATH:COLUMN, by the path's suffix; lines and cells without text are skipped.

    Args:
        where: a `.jsonl`, `.csv`, `.tsv`, `.parquet` or `.tar` file, a folder that `datasets` saved or that holds
            Parquet files or shards, or else a text file with one prompt a line. COLUMN is the field of a record or of a
            shard's `.json` members; unless told "prompt", "text" or "caption", and of shards the `.txt` members.

    In the place of a path the word `FILMS` names the embedded films.

    Raises:
        FewstepError: no such file, not UTF-8 text, no such column, control characters, an absurdly long prompt (each
            with its place), nothing in it, or a package missing that reading it takes.
    """
    if str(where) == FILMS:
        from fewstep.data.film_clips import FilmClips

        clips = FilmClips()
        clips.source = FILMS
        return clips
    try:
        path, column = _split(where)
        prompts = _folder(path, column) if path.is_dir() else _file(path, column)
    except OSError as error:  # such as a prompt in the place of a path, too long for a name
        raise FewstepError(
            f"found {str(where)[:100]!r}, which cannot be read ({error.strerror}), expected the path of a prompts file "
            "or a folder of them, fix: check the path"
        ) from error
    if not len(prompts):
        raise FewstepError(f"found no prompt in {where}, expected at least one text, fix: write one on a line")
    prompts.source = str(path.absolute()) + (f":{column}" if column else "")
    return prompts


def _file(path: Path, column: str | None) -> Prompts:
    kind = path.suffix.lower()
    readers = {".parquet": _parquet, ".tar": _shards}
    if kind in readers:
        return readers[kind]([_readable(path)], column)
    if kind in (".jsonl", ".ndjson"):
        return _jsonl(path, column)
    return _csv(path, column) if kind in (".csv", ".tsv") else _lines(path, column)


def _split(where: str | Path) -> tuple[Path, str | None]:
    """Path and column; a path that is there may have a colon in its name."""
    head, colon, tail = str(where).rpartition(":")
    return (Path(head), tail) if colon and head and tail and not Path(where).exists() else (Path(where), None)


def _readable(path: Path) -> Path:
    """`path`, which can be opened.

    Raises:
        FewstepError: it cannot.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe may take for ever
            raise OSError("a device or a pipe")
        with path.open("rb"):
            return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FewstepError(
            f"found no readable prompts file at {path} ({reason}), expected a text, .jsonl, .csv, .parquet or "
            ".tar file, or a folder of them, fix: check the path"
        ) from error


def _lines(path: Path, column: str | None) -> Spans:
    if column is not None:
        raise FewstepError(
            f"found the column {column!r} asked of {path}, expected none, as it is read as plain text with one prompt "
            f"a line, fix: pass {path}, or a file that ends in .jsonl, .csv or .parquet"
        )
    return _spans(path, lambda line: line.decode("utf-8-sig").strip())


def _jsonl(path: Path, column: str | None) -> Spans:
    name = column

    def parse(line: bytes) -> str:
        nonlocal name
        text = line.decode("utf-8-sig").strip()
        if not text:
            return ""
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError(f"{type(record).__name__} instead of an object")
        name = name or _column(record, None)
        return _cell(record, name)

    return _spans(path, parse)


def _spans(path: Path, parse: Callable[[bytes], str]) -> Spans:
    """The lines of a file that are prompts, left on disk."""
    starts, ends = array("q"), array("q")
    with _readable(path).open("rb") as file:
        if path.stat().st_size == 0:
            return Spans(b"", starts, ends, parse)
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    at = number = 0
    for whole in iter(buffer.readline, b""):
        for line in whole.splitlines(keepends=True):
            number += 1
            if _checked(parse, line, f"line {number} of {path}"):
                starts.append(at)
                ends.append(at + len(line))
            at += len(line)
    return Spans(buffer, starts, ends, parse)


def _csv(path: Path, column: str | None) -> Spans:
    """A cell may span lines; the number in an error is that of the cell's last one."""
    _readable(path)

    def cells() -> Iterator[tuple[str, str]]:
        number = 1
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
                name = None if reader.fieldnames is None else _column(reader.fieldnames, column)
                for row in reader:
                    number = reader.line_num
                    if name is not None and row[name] is None:
                        raise ValueError(f"a row that ends before its column {name!r}")
                    yield f"line {number} of {path}", row[name] if name else ""
        except _NoColumn as error:
            raise _bad(str(path), str(error), "name the column, as in PATH:COLUMN") from error
        except (ValueError, csv.Error) as error:
            raise _bad(f"line {number} of {path}", _reason(error)) from error

    return _packed(cells())


def _shards(paths: Sequence[Path], column: str | None) -> Spans:
    """The `.txt` members of tar files, or the field `column` of their `.json` members."""
    suffix = ".txt" if column is None else ".json"

    def members() -> Iterator[tuple[str, str]]:
        for path in paths:
            found = 0
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        if not (member.isfile() and member.name.lower().endswith(suffix)):
                            continue
                        found += 1
                        where = f"{member.name} of {path}"
                        if member.size > _LARGEST_MEMBER:
                            raise _bad(where, f"{member.size} bytes")
                        data = tar.extractfile(member).read()  # type: ignore[union-attr]
                        yield where, _checked(lambda data: _member(data, column), data, where)
            except FewstepError:
                raise
            except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise FewstepError(
                    f"found {path} that cannot be read to its end ({error}), expected an uncompressed or gzipped tar "
                    "file, fix: fetch or write this shard again"
                ) from error
            if not found:
                raise FewstepError(
                    f"found no {suffix} member in {path}, expected one per sample, fix: "
                    + (
                        "name the field of .json members, as in SHARDS:caption"
                        if column is None
                        else "leave :COLUMN out"
                    )
                )

    return _packed(members())


def _member(data: bytes, column: str | None) -> str:
    text = data.decode("utf-8-sig")
    if column is None:
        return text.strip()
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"{type(record).__name__} instead of an object")
    return _cell(record, column)


def _packed(texts: Iterable[tuple[str, str]]) -> Spans:
    """Checked texts, each with its place, as one buffer."""
    buffer, starts, ends = bytearray(), array("q"), array("q")
    for where, text in texts:
        data = _checked(str.strip, text, where).encode()
        if data:
            starts.append(len(buffer))
            buffer += data
            ends.append(len(buffer))
    return Spans(buffer, starts, ends, lambda data: bytes(data).decode())


def _folder(path: Path, column: str | None) -> Prompts:
    if (path / "dataset_dict.json").is_file():
        splits = _listed(path / "dataset_dict.json", "splits")
        raise FewstepError(
            f"found a dataset of the splits {splits} in {path}, expected one of them, fix: pass {path / splits[0]}"
        )
    if (path / "state.json").is_file():
        return _arrow([path / name for name in _listed(path / "state.json", "_data_files", "filename")], column)
    there = list(islice(path.rglob("*"), _MOST_FILES))
    if len(there) == _MOST_FILES:
        raise FewstepError(
            f"found {_MOST_FILES} files and more in {path}, expected the folder of a dataset, fix: pass a folder in it"
        )
    for suffix, reader in ((".parquet", _parquet), (".tar", _shards)):
        files = sorted(file for file in there if file.name.endswith(suffix))
        if files:
            return reader(files, column)
    raise FewstepError(
        f"found no readable prompts file at {path} (a folder without a dataset, Parquet files or .tar shards), "
        "expected one of these or a file, fix: check the path"
    )


def _listed(path: Path, name: str, within: str | None = None) -> list[str]:
    """The list of texts called `name` in a JSON file of a dataset, or those called `within` in its entries.

    Raises:
        FewstepError: there is none.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[name]
        texts = entries if within is None else [entry[within] for entry in entries]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no names in {name!r}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FewstepError(
            f"found {path} that cannot be read ({type(error).__name__}: {error}), expected what `datasets` writes, "
            "fix: save the dataset again"
        ) from error
    return texts


def _parquet(paths: Sequence[Path], column: str | None) -> Columns:
    parquet = _pyarrow("parquet")

    def chunks(path: Path) -> Iterator[Any]:
        file = parquet.ParquetFile(path)
        name = _column_of(file.schema_arrow.names, column, path)
        for batch in file.iter_batches(columns=[name]):
            yield batch.column(0)

    return _columns(paths, chunks)


def _arrow(paths: Sequence[Path], column: str | None) -> Columns:
    """What `Dataset.save_to_disk` writes; stays on disk."""
    arrow, ipc = _pyarrow("lib"), _pyarrow("ipc")

    def chunks(path: Path) -> Iterator[Any]:
        table = ipc.open_stream(arrow.memory_map(str(path))).read_all()
        yield from table.column(_column_of(table.column_names, column, path)).chunks

    return _columns(paths, chunks)


def _columns(paths: Sequence[Path], chunks: Callable[[Path], Iterator[Any]]) -> Columns:
    kept: list[Any] = []
    for path in paths:
        row = 0
        try:
            for chunk in chunks(path):
                full = []
                for at, text in enumerate(chunk.to_pylist()):
                    row += 1
                    if _checked(_text_or_none, text, f"row {row} of {path}"):
                        full.append(at)
                kept.append(chunk if len(full) == len(chunk) else chunk.take(_pyarrow("lib").array(full, "int64")))
        except FewstepError:
            raise
        except (OSError, ValueError, LookupError, OverflowError, _pyarrow("lib").ArrowException) as error:
            raise FewstepError(
                f"found {path} that cannot be read ({error}), expected a whole Parquet or Arrow file, fix: fetch or "
                "write it again"
            ) from error
    return Columns(kept)


def _pyarrow(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise FewstepError(
            "found no pyarrow, expected it for Parquet files and datasets' folders, fix: pip install 'fewstep[data]'"
        ) from error


def _column_of(names: Sequence[str], column: str | None, path: Path) -> str:
    try:
        return _column(names, column)
    except _NoColumn as error:
        raise FewstepError(
            f"found {error} in {path}, expected a column of texts, fix: name one, as in {path.name}:caption"
        ) from error


def _column(names: Iterable[str], column: str | None) -> str:
    """The column to read.

    Raises:
        _NoColumn: there is none of that name, or of the usual ones; says what there is.
    """
    names = list(names)
    found = next((name for name in ((column,) if column else USUAL_COLUMNS) if name in names), None)
    if found is None:
        raise _NoColumn(f"no column {column!r} among {names}" if column else f"none of {USUAL_COLUMNS} among {names}")
    return found


class _NoColumn(ValueError):
    """What `_column` raises."""


def _cell(record: dict[str, Any], name: str) -> str:
    return _text_or_none(record[_column(record, name)])


def _text_or_none(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{type(value).__name__} instead of text")
    return (value or "").strip()


def _checked(parse: Callable[[Any], str], data: Any, where: str) -> str:
    """`parse(data)`, a prompt or nothing.

    Raises:
        FewstepError: it cannot be parsed, or is no prompt, with `where` it stands.
    """
    try:
        text = parse(data)
        text.encode()  # JSON may hold halves of characters
    except _NoColumn as error:
        raise _bad(where, str(error), "name the column, as in PATH:COLUMN") from error
    except (ValueError, RecursionError) as error:
        raise _bad(where, _reason(error)) from error
    if any(ord(character) < 32 and character not in "\t\n\r" for character in text):
        raise _bad(where, "control characters (a binary file?)")
    if len(text) > LONGEST:
        raise _bad(where, f"{len(text)} characters, more than {LONGEST}")
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "bytes that are not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg} at character {error.pos + 1})"
    return str(error)


def _bad(where: str, found: str, fix: str = "correct or remove it") -> FewstepError:
    return FewstepError(f"found {found} in {where}, expected one prompt of plain text, fix: {fix}")
