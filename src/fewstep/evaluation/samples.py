"""Samples on disk: drawn once, one file each, found again by what decides them.

A set lies in `FOLDER/<hash of the description>/` with `samples.json` (fingerprint of the model, steps, guidance, ...)
and has one PNG per sample, named by the hash of prompt and seed. So a run that was killed goes on where it was, more
prompts or seeds add files, several processes share the work, and a teacher is sampled once for all its students. A
video is one PNG as well, its frames on top of each other: nothing is lost, and any viewer shows it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.pictures import replace_file, to_pil
from fewstep.models.export import CARD
from fewstep.training.parallel import Group

Draw = Callable[[list[str], list[int]], Tensor]
"""prompts, seeds -> samples, uint8 (n, 3, H, W) or (n, F, 3, H, W)."""


PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class SampleSet:
    """The samples of one model with one setting, in `folder`.

    Args:
        folder: where sets lie side by side.
        description: everything that decides a sample but its prompt and seed, as JSON-able values.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        text = json.dumps(description, sort_keys=True, indent=1)
        self.folder = folder / _hash(text)
        self._text = text

    def path(self, prompt: str, seed: int) -> Path:
        """Where the sample of a prompt and seed lies, or will."""
        return self.folder / f"{_hash(json.dumps([prompt, seed]))}.png"

    def complete(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        draw: Draw,
        batch: int,
        group: Group,
        report: Callable[[str], None] = lambda text: None,
    ) -> int:
        """Draw what is not there yet, this process's share of it; returns how many this process drew.

        Sample n belongs to process n modulo their number. Returns when every process has come here.
        """
        wanted = list(zip(prompts, seeds, strict=True))[group.rank :: group.size]
        missing = [(prompt, seed) for prompt, seed in wanted if not self.path(prompt, seed).is_file()]
        if group.leads and not (self.folder / "samples.json").is_file():
            replace_file(self.folder / "samples.json", (self._text + "\n").encode())
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            samples = draw([prompt for prompt, _ in part], [seed for _, seed in part])
            for (prompt, seed), sample in zip(part, samples, strict=True):
                _write(self.path(prompt, seed), sample, prompt, seed)
            report(f"{start + len(part)}/{len(missing)} samples")
        group.wait()
        return len(missing)

    def read(self, prompts: Sequence[str], seeds: Sequence[int], batch: int = 32) -> Iterator[Tensor]:
        """The samples in order, `batch` at a time, uint8 (n, 3, H, W) or (n, F, 3, H, W)."""
        wanted = list(zip(prompts, seeds, strict=True))
        for start in range(0, len(wanted), batch):
            yield torch.stack([read_sample(self.path(*one)) for one in wanted[start : start + batch]])


def _write(path: Path, sample: Tensor, prompt: str, seed: int) -> None:
    """(3, H, W) or (F, 3, H, W) uint8 as one PNG that says what it is of."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt("prompt", prompt)
    notes.add_text("seed", str(seed))
    if sample.ndim == 4:
        notes.add_text("frames", str(len(sample)))
        sample = torch.cat(list(sample), 1)
    target = io.BytesIO()
    to_pil(sample).save(target, "PNG", pnginfo=notes)
    replace_file(path, target.getvalue())


def read_sample(path: Path) -> Tensor:
    """A sample of a set, or any picture: uint8 (3, H, W), or (F, 3, H, W).

    Raises:
        FewstepError: not a picture.
    """
    try:
        with Image.open(path) as image:
            frames = int(getattr(image, "text", {}).get("frames", 0))
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise FewstepError(
            f"found {path} that is no readable picture ({error}), expected one, fix: delete it and run again"
        ) from error
    return torch.stack(pixels.chunk(frames, 1)) if frames else pixels


def read_images(folder: Path) -> Iterator[Tensor]:
    """All pictures of a folder by their names, each (1, 3, H, W), of any size.

    Raises:
        FewstepError: none there.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise FewstepError(
            f"found no picture in {folder}, expected files that end in {', '.join(PICTURES)}, fix: check the path"
        )
    for path in paths:
        yield read_sample(path)[None]


def fingerprint(source: str | Path) -> str:
    """A hash of all files of a folder, names and bytes; of a LoRA's teacher too. A Hub id stands for itself.

    Reads every weight once: about a second a GB.
    """
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    found = blake2b(digest_size=12)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts):
        found.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                found.update(piece)
    card = folder / CARD
    if card.is_file():
        told = json.loads(card.read_text())
        if told.get("form") == "lora":
            found.update(fingerprint(told["teacher"]).encode())
    return found.hexdigest()


def _hash(text: str) -> str:
    return blake2b(text.encode(), digest_size=12).hexdigest()
