"""Causal attention for a stock diffusers Wan transformer: processors and one hook, no copied forward.

The network hands what its `rope` returns to every block, and each block to its self-attention. So a hook on `rope`
returns a `Call` in the place of the stock angles whenever the network is called `within` a context, and the processors
do what the call says: where frames lie in time, what they see, what is remembered. Outside of a context the network is
the stock one to the bit, which is how one network can be a bidirectional teacher and a causal student in turn.

Since a call is an argument of the blocks, activation checkpointing computes again within the very same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fewstep.attention.rotary import rotary_table, rotate

KeysAndValues = tuple[Tensor, Tensor]
"""(B, N, H, D) each; keys normalised and not yet turned."""


class Context(Protocol):
    """What the frames of a forward attend to."""

    text: dict[int, KeysAndValues] | None
    """Keys and values of the prompt by layer, kept between calls without gradient; None: computed in every call."""

    def attend(self, call: Call, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What self-attention makes of the call's own tokens (B, N, H, D), none of them turned yet."""
        ...


class Call:
    """One forward within a context: the frames' size in tokens, and rotary tables made once for all layers."""

    def __init__(self, context: Context, height: int, width: int, head_width: int) -> None:
        self.context, self.tokens = context, height * width
        self._size = height, width, head_width
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def turned(self, x: Tensor, times: tuple[int, ...]) -> Tensor:
        """Queries or keys (B, N, H, D) of frames at `times`, turned."""
        if times not in self._tables:
            self._tables[times] = rotary_table(times, *self._size, x)
        return rotate(x, self._tables[times])


class CausalAttention:
    """Makes `network`, a WanTransformer3DModel, able to attend within a context; its weights stay as they are.

    Args:
        network: changed in place: processors of its attention, and a hook on its `rope`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.context: Context | None = None
        config: Any = network.config
        self._patch: tuple[int, int, int] = tuple(config.patch_size)
        self._head_width = int(config.attention_head_dim)
        blocks: Any = network.get_submodule("blocks")
        for layer, block in enumerate(blocks):
            block.attn1.set_processor(_OverFrames(layer, block.attn1.processor))
            block.attn2.set_processor(_OverText(layer, block.attn2.processor, self))
        network.get_submodule("rope").register_forward_hook(self._angles)

    @contextmanager
    def within(self, context: Context) -> Iterator[None]:
        """Calls of the network in here attend within `context`."""
        before, self.context = self.context, context
        try:
            yield
        finally:
            self.context = before

    def _angles(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        """The hook: a `Call` in the place of angles, within a context."""
        if self.context is None:
            return output
        height, width = inputs[0].shape[-2] // self._patch[1], inputs[0].shape[-1] // self._patch[2]
        return Call(self.context, height, width, self._head_width)


class _OverFrames:
    """Processor of a block's self-attention."""

    def __init__(self, layer: int, stock: Any) -> None:
        self._layer, self._stock = layer, stock

    def __call__(
        self, attn: Any, hidden_states: Tensor, text: Any = None, mask: Any = None, angles: Any = None, **more: Any
    ) -> Tensor:
        if not isinstance(angles, Call):
            return self._stock(attn, hidden_states, text, mask, angles, **more)
        key, value = _keys_and_values(attn, hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        return _out(attn, angles.context.attend(angles, self._layer, query, key, value), query)


class _OverText:
    """Processor of a block's cross-attention: the prompt's keys and values are computed once where nothing is trained.

    With gradient they are computed in every call, since they depend on what is trained.
    """

    def __init__(self, layer: int, stock: Any, owner: CausalAttention) -> None:
        self._layer, self._stock, self._owner = layer, stock, owner

    def __call__(
        self, attn: Any, hidden_states: Tensor, text: Tensor, mask: Any = None, angles: Any = None, **more: Any
    ) -> Tensor:
        context = self._owner.context
        kept = None if context is None or torch.is_grad_enabled() or attn.add_k_proj is not None else context.text
        if kept is None:
            return self._stock(attn, hidden_states, text, mask, angles, **more)
        if self._layer not in kept:
            kept[self._layer] = _keys_and_values(attn, text)
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        return _out(attn, attention(query, *kept[self._layer]), query)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain attention of (B, N, H, D) over (B, M, H, D): every token sees all M."""
    swapped = (part.transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(*swapped).transpose(1, 2)


def _keys_and_values(attn: Any, states: Tensor) -> KeysAndValues:
    key, value = attn.norm_k(attn.to_k(states)), attn.to_v(states)
    return key.unflatten(2, (attn.heads, -1)), value.unflatten(2, (attn.heads, -1))


def _out(attn: Any, attended: Tensor, query: Tensor) -> Tensor:
    flat = attended.flatten(2, 3).type_as(query)
    return attn.to_out[1](attn.to_out[0](flat))
