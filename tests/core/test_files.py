"""Weights are looked at before they are read."""

from __future__ import annotations

import json
import pickle
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.core.files import check_index, checksum, read_weights, save_weights
from fewstep.errors import FewstepError


def _raw(path: Path, header: Any, numbers: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + numbers)
    return path


def _entry(shape: list[int], end: int, begin: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    save_file({"a.weight": torch.arange(640.0)}, tmp_path / "w.safetensors")
    torch.testing.assert_close(read_weights(tmp_path / "w.safetensors"), {"a.weight": torch.arange(640.0)})


def test_the_same_contents_are_the_same_bytes(tmp_path: Path) -> None:
    metadata = {name: f'{name} é "\n\t\x01\x7f/' for name in "qwertyuiop"}  # safetensors alone: 10! orders
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int64)}
    save_weights(tmp_path / "w.safetensors", tensors, metadata)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == metadata
    torch.testing.assert_close(read_weights(tmp_path / "w.safetensors"), tensors)
    data = (tmp_path / "w.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)


class _Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


@pytest.mark.parametrize("kind", ["torch", "torch, old", "pickle"])
def test_a_pickle_under_a_false_name_is_called_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(_Evil()))
    else:
        torch.save({"w": _Evil()}, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(FewstepError, match=r"found a pickle \(which can run any code .* fix: "):
        read_weights(path)


ABSURD = {
    "a header longer than the file": lambda p: _raw(p, {}, length=1 << 62),
    "a header of gigabytes": lambda p: _raw(p, {}, length=1 << 31),
    "nothing at all": lambda p: p.write_bytes(b""),
    "half a length": lambda p: p.write_bytes(b"\x10\0\0"),
    "not JSON": lambda p: _raw(p, b"{" * 64),
    "a list": lambda p: _raw(p, []),
    "lists without end": lambda p: _raw(p, b"[" * 200_000),
    "more numbers than there are": lambda p: _raw(p, {"w": _entry([4], 16)}, b"\0" * 12),
    "fewer numbers than there are": lambda p: _raw(p, {"w": _entry([1], 4)}, b"\0" * 12),
    "a shape that overflows": lambda p: _raw(p, {"w": _entry([1 << 62, 1 << 62], 4)}, b"\0" * 4),
    "a negative shape": lambda p: _raw(p, {"w": _entry([-1], 4)}, b"\0" * 4),
    "a shape of other size": lambda p: _raw(p, {"w": _entry([3], 4)}, b"\0" * 4),
    "places backwards": lambda p: _raw(p, {"w": _entry([1], 0, begin=4)}, b"\0" * 4),
    "tensors over one another": lambda p: _raw(p, {"v": _entry([1], 4), "w": _entry([1], 4)}, b"\0" * 4),
    "an unknown kind of number": lambda p: _raw(p, {"w": _entry([1], 4, dtype="PICKLE")}, b"\0" * 4),
    "a name that climbs": lambda p: _raw(p, {"../../etc/w": _entry([1], 4)}, b"\0" * 4),
    "a name with a zero in it": lambda p: _raw(p, {"w\0": _entry([1], 4)}, b"\0" * 4),
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_headers_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "w.safetensors"
    ABSURD[what](path)
    with pytest.raises(FewstepError, match=r"found (a damaged file|a tensor named) .*w\.safetensors.* fix: "):
        read_weights(path)


@pytest.mark.parametrize("file", ["../w.safetensors", "/w.safetensors", "w.bin", "sub/w.safetensors", 3])
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, file: Any) -> None:
    path = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors"}}))
    assert check_index(path) == {"a": "part-1.safetensors"}
    path.write_text(json.dumps({"weight_map": {"a": "part-1.safetensors", "b": file}}))
    with pytest.raises(FewstepError, match="index of weights|beside it"):
        check_index(path)


def test_checksums_are_of_every_byte(tmp_path: Path) -> None:
    data = bytes(range(256)) * (3 << 14)  # more than is read at a time
    (tmp_path / "f").write_bytes(data)
    assert checksum(tmp_path / "f") == blake2b(data, digest_size=8).hexdigest()
