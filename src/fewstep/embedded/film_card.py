"""The model card of the embedded video teacher, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.data.film_paths import MOTIONS
from fewstep.data.films import FILM_BACKGROUNDS, FILM_THINGS, FRAMES

_HEAD = """# The embedded video teacher

A text-to-video diffusion model in miniature: Wan2.1's parts and conventions (`WanTransformer3DModel`, rotary positions,
cross-attention to UMT5 states, flow prediction, classifier-free guidance) at 4 M parameters, for films of {frames}
frames of 32x32 pixels, each frame an 8x8x8 latent of its own. It exists so that few-step and streaming video can be
distilled and tested on a laptop; it knows {things} things, {motions} motions and {backgrounds} backgrounds, and the
words for them, no others.

```python
from fewstep.models.film import FilmPipeline

film = FilmPipeline.from_pretrained("film-teacher")("a frog hops to the right on a green background").frames[0]
```

Frames can be told more than the caption says: `tracks=` where the thing is to be, `drive=` how loud it is; nan, or
neither, leaves it to the model. `motion_guidance=` strengthens that (three network calls a step).

**Data.** Films rendered on the fly (`fewstep.data.films`): one thing in flat style moves over a background that stays,
and its size follows a sound-like signal while it sings. A caption names the thing and, each by chance, motion, voice
and background; what it leaves open is uniform. One caption in eight is held out from all training. The drawings are
Twemoji (CC-BY 4.0, Twitter, Inc. and other contributors). No people.

**Licence.** Apache-2.0; the drawings keep their own.

**Training.** `fewstep teacher train-video`: {training}

**Measures.** `fewstep.evaluation.films`: things are found by matching their drawings, no network judges.

**Limits.** A closed vocabulary; 32 pixels. Not a model of the world.
"""


def write_film_card(folder: Path, table: dict[str, Any]) -> Path:
    """Write README.md into the teacher's folder, which holds `training.json`, with what `table-video --out` wrote."""
    notes = json.loads((folder / "training.json").read_text())
    text = _HEAD.format(
        frames=FRAMES,
        things=len(FILM_THINGS),
        motions=len(MOTIONS),
        backgrounds=len(FILM_BACKGROUNDS),
        training=", ".join(f"{name} {value}" for name, value in notes.items()) + ".",
    )
    path = folder / "README.md"
    path.write_text(f"{text}\n## Scores\n\n{film_table(table)}")
    return path


def film_table(table: dict[str, Any]) -> str:
    """The rows of `fewstep teacher table-video` as Markdown."""
    films = next(iter(table.values()))["films"]
    lines = [
        f"Held-out captions, {films} films a row (`fewstep teacher table-video`). Shares of frames with the right "
        "thing, and of films with the right motion, voice and background where the caption says it; fit is the share "
        "of what is not background that the thing's drawing explains; same thing: as in the first chunk; track: mean "
        "distance in pixels where it was told; drive: correlation of the size with it, likewise; the rest in pixels a "
        "frame, and in levels of 255.\n",
        "| films | network calls | thing | motion | voice | background | fit | same thing | speed | flicker "
        "| colour drift | background drift | track | drive |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        shares = [f"{100 * row[key]:.1f} %" for key in ("thing", "motion", "voice", "background")]
        numbers = [f"{row[key]:.2f}" for key in ("amplitude", "flicker", "colour_drift", "background_drift")]
        numbers += ["" if row[key] is None else f"{row[key]:.2f}" for key in ("error", "correlation")]
        cells = [name, str(row["calls"]), *shares, f"{row['fit']:.3f}", f"{100 * row['same_thing']:.1f} %", *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
