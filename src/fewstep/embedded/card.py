"""The model card of the embedded teacher, written from what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fewstep.data.things import BACKGROUNDS, PLACEMENTS, STYLES, THINGS

_HEAD = """# The embedded teacher

A text-to-image diffusion model in miniature: PixArt-alpha's parts and conventions (`PixArtTransformer2DModel`,
cross-attention to T5 states, noise prediction with learned variance, linear betas 1e-4..0.02 over 1000 steps,
classifier-free guidance) at 4 M parameters, for pictures of 64x64 pixels as 4x16x16 latents. It exists so that few-
step distillation can be tried and tested on a laptop; it draws {things} things on plain backgrounds and knows the
words for them, no others.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("emoji-teacher")
pipeline("a 3d frog on a blue background", num_inference_steps=50, guidance_scale=3.5, use_resolution_binning=False)
```

**Data.** Scenes rendered on the fly from {sprites} drawings: one of {things} things, in one of {styles} styles
({style_names}), on one of {backgrounds} backgrounds, at one of {placements} placements. A caption names the thing
and, each by chance, the rest; what it leaves open is uniform. One caption in eight is held out from all training.
Style "flat" is Twemoji (CC-BY 4.0, Twitter, Inc. and other contributors), style "3d" is Fluent Emoji (MIT,
Microsoft Corporation). No people.

**Licence.** Apache-2.0; the drawings keep their own licences.

**Training.** `fewstep teacher train`: {training}

**Judge.** A small network trained on the same scenes names what is drawn; on held-out scenes it is right on
{judge}.

**Limits.** A closed vocabulary; 64 pixels; soft details. Not a model of the world.
"""


def write_card(folder: Path, table: dict[str, Any], judge: dict[str, float]) -> Path:
    """Write README.md into the teacher's folder.

    Args:
        folder: the pipeline folder, with `training.json`.
        table: what `fewstep teacher table --out` wrote.
        judge: the judge's accuracy per attribute.
    """
    notes = json.loads((folder / "training.json").read_text())
    text = _HEAD.format(
        things=len(THINGS),
        sprites=len(THINGS) * len(STYLES),
        styles=len(STYLES),
        style_names=", ".join(STYLES),
        backgrounds=len(BACKGROUNDS),
        placements=len(PLACEMENTS),
        training=", ".join(f"{name} {value}" for name, value in notes.items()) + ".",
        judge=", ".join(f"{name} {100 * value:.1f} %" for name, value in judge.items()),
    )
    path = folder / "README.md"
    path.write_text(f"{text}\n## Scores\n\n{table_markdown(table)}")
    return path


def table_markdown(table: dict[str, Any]) -> str:
    """The rows of `fewstep teacher table` as Markdown."""
    images = next(iter(table.values()))["images"]
    lines = [
        f"Held-out captions, {images} images a row, against the guided 50-step samples with other seeds "
        "(`fewstep teacher table`).\n",
        "| sampling | network calls | Fréchet | following | right thing | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in table.items():
        lines.append(
            f"| {name} | {row['calls']} | {row['frechet']:.2f} | {100 * row['following']:.1f} % | "
            f"{100 * row['thing']:.1f} % | {row['precision']:.3f} | {row['recall']:.3f} |"
        )
    return "\n".join(lines) + "\n"
