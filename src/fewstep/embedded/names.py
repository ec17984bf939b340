"""The embedded teachers by name: `emoji` for pictures, `films` for videos."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from fewstep.embedded.build import TEACHER_FOLDER, shipped
from fewstep.errors import FewstepError

EMOJI = "emoji"
"""The name of the embedded teacher of pictures."""
FILMS = "films"
"""The name of the embedded teacher of videos."""
FILM_FOLDER = "film-teacher"


def named(source: str | Path) -> str | Path:
    """The folder of an embedded teacher that is meant by its name; anything else as it is.

    Raises:
        FewstepError: `films` where its weights are not shipped.
    """
    if str(source) == EMOJI:
        return shipped(TEACHER_FOLDER)
    if str(source) == FILMS:
        if not films_folder().is_dir():
            raise FewstepError(
                "found no weights of the video teacher in this version, expected a trained one, fix: fewstep teacher "
                "train-video --out runs/video-teacher (about 5 core-hours), then --teacher "
                f"runs/video-teacher/{FILM_FOLDER} (docs/video.md)"
            )
        return films_folder()
    return source


def name_of(source: str) -> str | None:
    """The name of the embedded teacher whose folder `source` is, if it is one's."""
    if Path(source) == shipped(TEACHER_FOLDER):
        return EMOJI
    return FILMS if Path(source) == films_folder() else None


def films_folder() -> Path:
    """Where the weights of `films` are, once they are shipped."""
    return Path(str(files("fewstep") / "assets" / FILM_FOLDER))
