"""What is measured of every single film of the embedded data set, and the features that films are compared in.

`film_numbers` is what `score_films` averages, one number a film, so that intervals can be had. `film_features` describe
a film by what an exact reader finds in it, so that a Fréchet distance says whether films go where, as fast, as large
and as colourful as others do, without any learnt network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.data.film_paths import SIDE
from fewstep.data.films import LOUD, QUIET, FilmCaption
from fewstep.evaluation.film_reading import Reading
from fewstep.evaluation.films import CHUNK, drift, flicker, motion_amplitude, name_attributes

SPACE = "films"
"""The name of the feature space."""
_MOMENTS = 4
_STATED = ("motion", "voice", "background")


def film_numbers(films: Tensor, captions: Sequence[FilmCaption], reading: Reading) -> dict[str, Tensor]:
    """Numbers (B,) by name of uint8 films (B, F, 3, 32, 32) of `captions` as `read_films` read them.

    following: 1 where all that the caption says is shown. thing: share of frames with the caption's thing. fit: share
    of what is not background that the drawing explains. identity: share of frames with the thing of the first chunk.
    speed: pixels a frame. drift, flicker: levels of 0 to 255, 0 at best.
    """
    named, away = torch.from_numpy(name_attributes(reading)), drift(films, reading)
    right = reading.things == torch.tensor([caption.thing for caption in captions])[:, None]
    following = named[:, 0] == torch.tensor([caption.thing for caption in captions])
    for column, name in enumerate(_STATED, 1):
        told = [getattr(caption, name) for caption in captions]
        open_ = torch.tensor([value is None for value in told])
        following = following & (open_ | (named[:, column] == torch.tensor([value or 0 for value in told])))
    return {
        "following": following.double(),
        "thing": right.double().mean(1),
        "fit": reading.fit.double().mean(1),
        "identity": away.thing.double().mean(1),
        "speed": motion_amplitude(reading).double(),
        "flicker/background": flicker(films, reading).double(),
        "drift/colour": away.colour[:, CHUNK:].double().mean(1),
        "drift/background": away.background[:, CHUNK:].double().mean(1),
    }


def film_features(films: Tensor, reading: Reading) -> Tensor:
    """(B, 18) of films (B, F, 3, 32, 32): places at four moments, speed, size, colours, fit, all about 0 to 1."""
    frames = films.shape[1]
    moments = torch.linspace(0, frames - 1, _MOMENTS).round().long()
    places = reading.centres[:, moments].flatten(1) / SIDE
    sides = (reading.sides - QUIET) / (LOUD - QUIET)
    opacity = reading.opacity[:, :, None]
    thing = (films.float() * opacity).sum((1, 3, 4)) / opacity.sum((1, 3, 4)).clamp(min=1e-6) / 255
    alone = (motion_amplitude(reading) / 2, sides.mean(1), sides.std(1), reading.fit.clamp(min=0).mean(1))
    return torch.cat([places, torch.stack(alone, 1), reading.colours.mean(1) / 255, thing], 1)
