"""A frozen base in 8 or 4 bits: the linear layers of its blocks, which hold nearly all of its weights.

| kind | package          | bytes a weight | what                                                             |
|------|------------------|----------------|------------------------------------------------------------------|
| int8 | torchao          | 1              | symmetric, one scale per row                                     |
| nf4  | bitsandbytes     | 0.56           | 4-bit normal float (QLoRA, arXiv 2305.14314), a scale for each 64 |

Only what nobody trains can be quantised: adapters on top stay float32 and see the rounded layers, so they also learn to
make up for the rounding. What a student is merged into at the end are the teacher's own weights, read again.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import FewstepError
from fewstep.models.blocks import repeated_blocks

Quantised = Literal["int8", "nf4"]
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}


def quantise_(network: nn.Module, kind: str, device: torch.device | str) -> None:
    """Round the weights of all linear layers in the blocks of `network`, layer by layer, and leave them on `device`.

    Args:
        network: frozen, on any device; what is not quantised stays where it is.
        kind: "int8" or "nf4".
        device: where the rounded weights go. Only one layer at a time is there unrounded.

    Raises:
        FewstepError: an unknown kind, a package that is missing, or a network without repeated blocks.
    """
    check(kind)
    layers = [
        (block, name)
        for block in repeated_blocks(network).values()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not layers:
        raise FewstepError(
            f"found no linear layers in blocks of {type(network).__name__}, expected some to quantise, "
            "fix: load the base in bfloat16"
        )
    rounded = _int8 if kind == "int8" else _nf4
    for block, name in layers:
        block.set_submodule(name, rounded(block.get_submodule(name), device))
    network.requires_grad_(False)


def check(kind: str) -> None:
    """Raises FewstepError if `kind` is unknown or its package is not installed."""
    if kind not in PACKAGES:
        raise FewstepError(f"found a base in {kind!r}, expected one of {get_args(Quantised)}, fix: name one of these")
    package = PACKAGES[kind]
    if find_spec(package) is None:
        raise FewstepError(
            f"found no package {package}, expected it for a base in {kind}, fix: pip install 'fewstep[{package}]'"
        )


def _int8(layer: Any, device: torch.device | str) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layer = layer.to(device)
    quantize_(layer, Int8WeightOnlyConfig(version=2))
    rounded = Int8Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    rounded.weight, rounded.bias = layer.weight, layer.bias
    return rounded


class Int8Linear(nn.Linear):
    """A frozen linear layer over torchao's rounded weights, which are unrounded for a moment in each direction.

    torchao's own keeps the unrounded weights of every layer for the backward, which is what a small base is to avoid.
    """

    def forward(self, input: Tensor) -> Tensor:
        output = _Unrounded.apply(input, self.weight)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class _Unrounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return functional.linear(x, weight.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return (gradient @ ctx.weight.dequantize().to(gradient.dtype)).to(ctx.dtype), None


def _nf4(layer: Any, device: torch.device | str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, bias = layer.weight.dtype, layer.bias is not None
    rounded = Linear4bit(
        layer.in_features, layer.out_features, bias, compute_dtype=dtype, compress_statistics=False, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    if bias:
        rounded.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
    told = {"requires_grad": False, "compress_statistics": False, "quant_type": "nf4", "module": rounded}
    rounded.weight = Params4bit(layer.weight.detach(), **told).to(device)  # rounds on the way
    return rounded


def rounded_bytes(kind: str) -> Callable[[torch.Size, int], int]:
    """(shape of a linear layer's weight (out, in), bytes a number has unrounded) -> bytes it takes in `kind`.

    int8: a byte each and per row a scale and a zero point (a byte); nf4: half a byte each, and four bytes for 64.
    """
    if kind == "int8":
        return lambda shape, width: shape.numel() + shape[0] * (width + 1)
    return lambda shape, width: (shape.numel() + 1) // 2 + 4 * -(-shape.numel() // 64)
