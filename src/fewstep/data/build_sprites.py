"""Rebuild the sprite sheet that scenes are rendered from, out of the npm packages that draw the emoji.

The packages are fetched by name with npm (`npm pack`), so this needs npm, a registry and `resvg-py` (extra `sprites`).
The result, `assets/sprites.webp`, is committed; users never need this module.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.data.things import STYLES, THINGS
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from PIL import Image

SPRITE = 64
"""Side of a sprite in pixels; things are cropped to what is drawn and fill it."""
COLUMNS = 16
PACKAGES = {
    "flat": ("@discordapp/twemoji@16.0.1", "package/dist/svg/{code}.svg"),
    "3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{code}.webp"),
}
"""Style -> (npm package, member of its archive for a code point)."""


def build_sprites(out: Path, archives: dict[str, Path] | None = None) -> Path:
    """Write the sprite sheet (lossless WebP, RGBA, row-major over things, then styles) to `out`.

    `archives` gives the packages' .tgz files by style if they are at hand; otherwise `npm pack` fetches them.
    """
    from PIL import Image

    cells: dict[tuple[str, str], Image.Image] = {}
    with tempfile.TemporaryDirectory() as folder:
        for style in STYLES:
            archive = archives[style] if archives else _npm_pack(PACKAGES[style][0], Path(folder))
            for thing, sprite in _sprites(archive, style):
                cells[thing, style] = sprite
    order = [(thing, style) for thing in THINGS for style in STYLES]
    rows = -(-len(order) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SPRITE, rows * SPRITE))
    for i, key in enumerate(order):
        sheet.paste(cells[key], (i % COLUMNS * SPRITE, i // COLUMNS * SPRITE))
    sheet.save(out, lossless=True, quality=100, method=6)
    return out


def _npm_pack(package: str, folder: Path) -> Path:
    try:
        done = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise FewstepError(f"npm could not fetch {package}: {error}. Install npm, or pass the archives.") from error
    return folder / done.stdout.strip().splitlines()[-1]


def _sprites(archive: Path, style: str) -> Iterator[tuple[str, Image.Image]]:
    from PIL import Image

    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        for thing, code in THINGS.items():
            candidates = [PACKAGES[style][1].format(code=c) for c in (code, f"{code}-fe0f")]
            member = next((name for name in candidates if name in names), None)
            if member is None:
                raise FewstepError(f"{archive.name} has no drawing of {thing!r}; looked for {candidates}.")
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            if member.endswith(".svg"):
                data = _render_svg(data.decode())
            yield thing, _fill(Image.open(io.BytesIO(data)).convert("RGBA"))


def _render_svg(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError as error:
        raise FewstepError("Drawing SVG needs the extra: pip install 'fewstep[sprites]'.") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))


def _fill(image: Image.Image) -> Image.Image:
    """Crop to what is drawn, centre on a square, scale to SPRITE."""
    from PIL import Image

    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
