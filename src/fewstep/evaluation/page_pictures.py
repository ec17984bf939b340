"""The pictures inside a report: how they are encoded, and the blocks of text that carry them.

Every sample is one line of base64 in a block that the browser does not run, `ROWS` prompts a block, candidate by
candidate. The page's script takes a line when it shows the picture, so that thousands cost nothing until then.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from PIL import Image
from torch import Tensor

from fewstep.evaluation.clips import EXACT, QUALITY, webp_bytes
from fewstep.evaluation.pictures import Candidate, to_pil

ROWS = 24
"""Prompts in a block, and on a leaf of the page's grid."""
_SIDES = (1024, 768, 512, 384, 256, 192, 128, 96, 64)
_PROBES = 6


@dataclass(frozen=True)
class Form:
    """How pictures are embedded."""

    side: int
    """Longest side in pixels; larger ones are scaled down to it."""
    exact: bool
    """WebP without loss; else of quality 90."""

    def told(self, candidates: Sequence[Candidate]) -> str:
        """A sentence on what was lost."""
        if self.exact:
            return "Pictures are embedded without loss."
        largest = _largest(candidates)
        scaled = f", at {self.side} of {largest} pixels" if self.side < largest else ""
        return f"Pictures are embedded as WebP of quality {QUALITY}{scaled}: judge fine detail by the samples on disk."


def choose_form(candidates: Sequence[Candidate], megabytes: float) -> Form:
    """The best form with which all pictures take at most about so many megabytes, judged by a few of them.

    Small pictures without loss, others at full size, scaled down as far as is needed; 64 pixels whatever they take.
    """
    largest, count = _largest(candidates), len(candidates[0].images)
    probes = sorted({i * (count - 1) // (_PROBES - 1) for i in range(_PROBES)})
    forms = [Form(largest, True)] if largest <= EXACT else []
    forms += [Form(largest, False), *(Form(side, False) for side in _SIDES if side < largest)]
    for form in forms:
        sizes = [len(webp(c.images[i], form, c.fps)) for c in candidates for i in probes]
        if sum(sizes) / len(sizes) * count * len(candidates) * 4 / 3 <= megabytes * 1e6:
            break
    return form


def webp(sample: Tensor, form: Form, fps: int = 16) -> bytes:
    """(3, H, W) uint8 as a WebP file; (F, 3, H, W) as an animated one."""
    frames = [_fitted(to_pil(frame), form.side) for frame in (sample if sample.ndim == 4 else sample[None])]
    return webp_bytes(frames, fps, form.exact)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    longest = max(picture.size)
    if longest <= side:
        return picture
    width, height = (max(1, round(length * side / longest)) for length in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def picture_blocks(candidates: Sequence[Candidate], form: Form) -> Iterator[str]:
    """The blocks, one after the other; each picture is read and encoded as its block is asked for."""
    count = len(candidates[0].images)
    for block, start in enumerate(range(0, count, ROWS)):
        rows = range(start, min(start + ROWS, count))
        lines = (base64.b64encode(webp(c.images[i], form, c.fps)).decode() for i in rows for c in candidates)
        yield f'<script type="text/plain" id="block-{block}">{chr(10).join(lines)}</script>\n'


def data_block(candidates: Sequence[Candidate], prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """What the script has to know besides the pictures, as JSON that no markup can end."""
    told = {
        "page": page_id(candidates),
        "rows": ROWS,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "candidates": [
            {
                "name": c.name,
                "calls": c.calls,
                "height": c.images[0].shape[-2],
                "width": c.images[0].shape[-1],
                "moves": c.images[0].ndim == 4,
            }
            for c in candidates
        ],
    }
    return f'<script type="application/json" id="data">{json.dumps(told).replace("<", chr(92) + "u003c")}</script>\n'


def page_id(candidates: Sequence[Candidate]) -> str:
    """A hash of the candidates' names and settings: votes with the same hash may be counted together."""
    text = json.dumps([[c.name, dict(c.settings)] for c in candidates], sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _largest(candidates: Sequence[Candidate]) -> int:
    """Longest side of a picture, in pixels."""
    return max(max(c.images[0].shape[-2:]) for c in candidates)
