"""Videos laid out as VBench (Huang et al. 2024) expects them, so that its own program can score them.

`FOLDER/videos/PROMPT-I.mp4` is the I-th video of a prompt, VBench's own naming, and `FOLDER/prompts.json` says the
prompt of each file, for its mode `custom_input`:

    vbench evaluate --videos_path FOLDER/videos --dimension human_action                      # prompts of VBench
    vbench evaluate --videos_path FOLDER/videos --dimension motion_smoothness --mode=custom_input   # yours
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.evaluation.clips import save_samples
from fewstep.evaluation.pictures import replace_file

LONGEST = 180
"""Characters of a prompt in a file's name; VBench's own are shorter."""


def write_vbench(folder: Path, videos: Iterable[tuple[str, Tensor]], fps: int = 16) -> Path:
    """Write prompts with their videos, uint8 (F, 3, H, W) each; returns the folder. Needs the extra `video`.

    The I of a name counts the videos of one prompt from 0, in the order they come.

    Raises:
        FewstepError: a picture where a video is expected.
    """
    seen: Counter[str] = Counter()
    told = {}
    for prompt, video in videos:
        if video.ndim != 4:
            raise FewstepError(
                f"found a sample of shape {tuple(video.shape)} for VBench, expected a video (F, 3, H, W), fix: leave "
                "--vbench out for models that make pictures"
            )
        name = re.sub(r"[/\\\0]", " ", prompt)[:LONGEST]
        path = folder / "videos" / f"{name}-{seen[name]}.mp4"
        seen[name] += 1
        save_samples(path, video[None], columns=1, fps=fps)
        told[str(path)] = prompt
    replace_file(folder / "prompts.json", (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    return folder
