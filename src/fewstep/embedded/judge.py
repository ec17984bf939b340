"""The judge: a small network that names the thing, style, background and placement of a scene.

It measures how well a generator follows its captions, and its features are the space of the Fréchet distance and of
precision and recall. It is trained on scenes as the autoencoder returns them, worn by chance: blurred, noised, with a
second scene shining through, as in the means that too few steps produce. It must name what is drawn all the same, and
say how worn it is: without the latter its features would not see the difference between 4 and 50 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate, mse_loss

from fewstep.core.files import read_weights
from fewstep.data.scenes import ATTRIBUTES, COUNTS, Scenes

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

FEATURES = 128
WEAR = ("blur", "noise", "ghost")
"""Ways in which training images are worn, each by a number in [0, 1] that the judge has to tell."""
WEAR_WEIGHT = 10.0
"""Weight of the squared error of that, against the cross-entropies of the attributes."""


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> features (B, 128) and class scores per attribute."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Conv2d(before, after, 4, 2, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, COUNTS[name]) for name in ATTRIBUTES})
        self.wear = nn.Linear(FEATURES, len(WEAR))

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, 128)."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def attributes(self, images: Tensor) -> np.ndarray:
        """The most likely attributes, (B, 4) in the order of `ATTRIBUTES`."""
        return torch.stack([scores.argmax(1) for scores in self(images).values()], 1).cpu().numpy()

    def save(self, path: Path) -> None:
        """Write the weights in half precision."""
        from safetensors.torch import save_file

        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, path)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read weights written by `save`."""
        judge = cls()
        judge.load_state_dict({k: v.float() for k, v in read_weights(path).items()})
        return judge.eval()


def _wear(images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images blurred, noised, mixed with each other and shifted by up to two pixels; how much of each of `WEAR` (B, 3).

    Blur is averaging over 2 or 3 pixels, noise has a strength of up to 0.15, the other scene a share of up to 0.45;
    each is absent half of the time.
    """
    wear = rng.random((len(images), 3)).astype(np.float32) * (rng.random((len(images), 3)) < 0.5)
    wear[:, 0] = np.ceil(2 * wear[:, 0]) / 2
    blur, noise, ghost = torch.from_numpy(wear).to(images).view(-1, 3, 1, 1, 1).unbind(1)
    other = images[torch.from_numpy(rng.permutation(len(images))).to(images.device)]
    images = torch.lerp(images, other, 0.45 * ghost)
    for level, pixels in ((0.5, 2), (1.0, 3)):
        small = avg_pool2d(images, pixels, ceil_mode=True)
        blurred = interpolate(small, size=images.shape[-2:], mode="bilinear")
        images = torch.where(blur == level, blurred, images)
    images = torch.roll(images, tuple(int(s) for s in rng.integers(-2, 3, 2)), (2, 3))
    grain = torch.from_numpy(rng.standard_normal(images.shape, np.float32)).to(images)
    return images + 0.15 * noise * grain, torch.from_numpy(wear).to(images)


def train_judge(
    autoencoder: AutoencoderTiny,
    iterations: int,
    report: Callable[[int, float], None],
    *,
    batch: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    device: str = "cpu",
) -> Judge:
    """Train from nothing; `report(iteration, loss)` is called every 100 iterations and at the end.

    One batch in four goes through the autoencoder.
    """
    torch.manual_seed(seed)
    judge, autoencoder = Judge().to(device), autoencoder.to(device)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, iterations, pct_start=0.1)
    scenes, rng = Scenes(), np.random.default_rng([seed, 2])
    for iteration in range(1, iterations + 1):
        images, _, attributes = scenes.draw(batch, rng)
        images = images.to(device)
        if iteration % 4 == 0:
            with torch.no_grad():
                images = autoencoder.decode(autoencoder.encode(images).latents).sample
        worn, wear = _wear(images, rng)
        features = judge.features(worn)
        scores = {name: head(features) for name, head in judge.heads.items()}
        targets = torch.from_numpy(attributes).to(device)
        loss = sum(
            (cross_entropy(scores[name], targets[:, i]) for i, name in enumerate(ATTRIBUTES)),
            WEAR_WEIGHT * mse_loss(judge.wear(features), wear),
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if iteration % 100 == 0 or iteration == iterations:
            report(iteration, loss.item())
    return judge.cpu().eval()


@torch.no_grad()
def judge_accuracy(judge: Judge, count: int = 2048, seed: int = 1234) -> dict[str, float]:
    """Share of attributes named rightly on fresh clean scenes of held-out captions."""
    from fewstep.data.scenes import draw_caption

    scenes, rng = Scenes(), np.random.default_rng(seed)
    captions = [draw_caption(rng, for_evaluation=True) for _ in range(count)]
    images, _, attributes = scenes.draw(count, rng, captions)
    named = np.concatenate([judge.attributes(part) for part in images.split(256)])
    return {name: float((named[:, i] == attributes[:, i]).mean()) for i, name in enumerate(ATTRIBUTES)}
