"""Files that are not taken at their word: checksums of what we write, a look at weights before they are read.

Weights are safetensors: a JSON header of names, shapes and places, then numbers, so that reading runs no code. The
package `safetensors` refuses headers whose sizes do not fit the file or one another; what it refuses is said here in
one sentence, and pickles under a false name are called what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import FewstepError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that torch.save and its likes have pickled."""
_ZIP = b"PK\x03\x04"
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


def fingerprint(data: bytes = b"") -> Any:
    """A hash object, to be fed. It finds damage, not forgery: whoever can change a file can change its manifest.

    BLAKE2b of 64 bits: in the standard library, and fast without help from the processor (docs/resume.md).
    """
    return blake2b(data, digest_size=8)


def checksum(path: Path) -> str:
    """Of a file's bytes, which are read once."""
    hashed = fingerprint()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            hashed.update(piece)
    return str(hashed.hexdigest())


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError, ValueError: it cannot be read, is not JSON, or is nested deeper than anything we write.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def check_weights(path: Path) -> None:
    """Looks at the header of a safetensors file, not at its numbers.

    Raises:
        FewstepError: a pickle, a file that is cut off, a header of impossible sizes, or names with `..`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise FewstepError(
            f"found {_nature(path)} at {path} ({error}), expected whole weights as safetensors, "
            "fix: fetch or save the file again"
        ) from error
    if odd := [name for name in names if ".." in name or not name.isprintable()]:
        raise FewstepError(
            f"found a tensor named {odd[0]!r} in {path}, expected names of layers (no program writes these), "
            "fix: do not use this file"
        )


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU mapped from it.

    Raises:
        FewstepError: as `check_weights`.
    """
    from safetensors.torch import load_file

    check_weights(path)
    return load_file(path, device=str(device))


def save_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with metadata, of the same bytes for the same contents.

    safetensors writes metadata in an order that changes with every call; here they are put in order by their names.
    """
    from safetensors.torch import save_file

    save_file(dict(tensors), path, dict(metadata))
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "safetensors spaced its header"
        file.seek(8)
        file.write(text.ljust(length))


def check_index(path: Path) -> dict[str, str]:
    """File name by tensor name of a `*.safetensors.index.json`.

    Raises:
        FewstepError: it is not one, or names files that are not safetensors beside it.
    """
    try:
        named = load_json(path)["weight_map"]
        odd = [file for file in named.values() if Path(file).name != file or Path(file).suffix != ".safetensors"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FewstepError(
            f"found an index of weights at {path} that cannot be read ({type(error).__name__}: {error}), expected "
            "names of tensors and their files, fix: fetch or save it again"
        ) from error
    if odd:
        raise FewstepError(
            f"found the file {odd[0]!r} in {path}, expected safetensors files beside it (a pickle can run any code "
            "when it is read), fix: do not use this folder, or save the pipeline again with save_pretrained"
        )
    return dict(named)


def _nature(path: Path) -> str:
    """What a file that is not safetensors is."""
    if not path.is_file():
        return "nothing"
    with path.open("rb") as file:
        start = file.read(4)
    if start == _ZIP or start[:2] in _PICKLE:
        return "a pickle (which can run any code when it is read)"
    return "a damaged file"
