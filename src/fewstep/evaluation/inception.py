"""The Inception network of the published Fréchet Inception Distance: 2048 features before the classifier.

Inception-v3 (Szegedy et al. 2015) as in the TensorFlow graph of 2015-12-05 that Heusel et al. 2017 used, which differs
from later ones: averages leave padding out, the last block takes a maximum instead, images are resized the way of
TensorFlow 1. The names of the parameters are those of `pt_inception-2015-12-05-6726825d.pth`, so its tensors, saved as
safetensors, load as they are (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from fewstep.core.files import read_weights
from fewstep.errors import FewstepError

SIDE = 299
FEATURES = 2048

Step = tuple[str, int, int | tuple[int, int], int]
"""A convolution of a branch: name, channels, kernel, stride."""


class Convolution(nn.Module):
    """Convolution, batch norm, ReLU; padded to keep the size where the stride is 1 unless told."""

    def __init__(self, before: int, after: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(before, after, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches of convolutions side by side; `forks` are branches that end in two convolutions of one input.

    `pool` is what the last branch does to the input first: "average", "maximum", or "stride" for a maximum that halves
    the size, without a convolution.
    """

    def __init__(self, before: int, branches: Sequence[Sequence[Step]], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool, self.out, self._paths = pool, 0, []
        for branch in branches:
            width, names, fork = before, [], []
            for name, after, kernel, stride in branch:
                setattr(self, name, Convolution(width, after, kernel, stride))
                if name[-1] in "ab" and name[-2] in "23":
                    fork.append(name)
                    self.out += after
                else:
                    width = after
                    names.append(name)
            self._paths.append((names, fork))
            self.out += 0 if fork else width
        if pool == "stride":
            self.out += before
        else:
            self.branch_pool = Convolution(before, pooled, 1)
            self.out += pooled

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for names, fork in self._paths:
            y = x
            for name in names:
                y = getattr(self, name)(y)
            parts += [getattr(self, name)(y) for name in fork] or [y]
        if self.pool == "stride":
            return torch.cat([*parts, max_pool2d(x, 3, 2)], 1)
        smooth = max_pool2d(x, 3, 1, 1) if self.pool == "maximum" else avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*parts, self.branch_pool(smooth)], 1)


def _a(before: int, pooled: int) -> Mixed:
    five = [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)]
    three = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)]
    return Mixed(before, [[("branch1x1", 64, 1, 1)], five, three], "average", pooled)


def _b() -> Mixed:
    three = [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)]
    return Mixed(288, [[("branch3x3", 384, 3, 2)], three], "stride")


def _c(width: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    seven: list[Step] = [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, wide, 1), ("branch7x7_3", 192, tall, 1)]
    twice: list[Step] = [("branch7x7dbl_1", width, 1, 1), ("branch7x7dbl_2", width, tall, 1)]
    twice += [("branch7x7dbl_3", width, wide, 1), ("branch7x7dbl_4", width, tall, 1), ("branch7x7dbl_5", 192, wide, 1)]
    return Mixed(768, [[("branch1x1", 192, 1, 1)], seven, twice], "average", 192)


def _d() -> Mixed:
    seven: list[Step] = [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1)]
    seven += [("branch7x7x3_3", 192, (7, 1), 1), ("branch7x7x3_4", 192, 3, 2)]
    return Mixed(768, [[("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)], seven], "stride")


def _e(before: int, pool: str) -> Mixed:
    three: list[Step] = [("branch3x3_1", 384, 1, 1), ("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)]
    twice: list[Step] = [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1)]
    twice += [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)]
    return Mixed(before, [[("branch1x1", 320, 1, 1)], three, twice], pool, 192)


class Inception(nn.Module):
    """uint8 images (B, 3, H, W) of any size -> features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b()
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = _c(128), _c(160), _c(160), _c(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = _d(), _e(1280, "average"), _e(2048, "maximum")

    def forward(self, images: Tensor) -> Tensor:
        x = (resized(images.float(), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))

    @classmethod
    def load(cls, path: Path) -> Inception:
        """Read weights saved as safetensors; the classifier, if it is among them, is left out.

        Raises:
            FewstepError: another file.
        """
        network = cls()
        tensors = {name: value for name, value in read_weights(path).items() if not name.startswith("fc.")}
        missing, unexpected = network.load_state_dict(tensors, strict=False)
        wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
        if wrong:
            raise FewstepError(
                f"found {path} without or with {wrong[0]}, expected the tensors of pt_inception-2015-12-05-6726825d, "
                "fix: convert them as docs/evaluation.md shows"
            )
        return network.eval().requires_grad_(False)


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), bilinear the way of TensorFlow 1: pixel i is taken at i H / side."""
    for axis in (2, 3):
        length = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=images.dtype) * (length / side)
        low = place.long()
        share = (place - low).view((-1, 1) if axis == 2 else (1, -1))
        first = images.index_select(axis, low)
        images = first + share * (images.index_select(axis, (low + 1).clamp(max=length - 1)) - first)
    return images
