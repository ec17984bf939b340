"""Sparse attention for the layers of a stock diffusers network: the stock processor runs, no forward is copied.

Within it, torch's own `scaled_dot_product_attention` is answered by `sparse_attention`. Queries, keys and values then
are whatever the family makes of them: normalised, turned, joined with those of a text. Where the network is to be dense
the stock processor runs as it is, to the bit; so a base with two adapters is dense teacher, dense critic and sparse
student in turn. Since activation checkpointing brings back the adapter of a forward, it brings back its attention too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from fewstep.attention.sparse.adaptive import Sequence, sparse_attention
from fewstep.attention.sparse.options import SparseOptions
from fewstep.errors import FewstepError


def make_sparse(
    network: nn.Module,
    layers: tuple[str, ...],
    sequence: Callable[[], Sequence],
    options: SparseOptions,
    active: Callable[[], bool] = lambda: True,
) -> None:
    """Let self-attention of `network` be sparse whenever `active`; its weights stay as they are.

    Args:
        network: changed in place: processors of its attention.
        layers: last parts of the names of the modules that are self-attention.
        sequence: says of a call what its tokens are.
        options: what they see.
        active: whether a call is sparse, asked in every one.

    Raises:
        FewstepError: no such layers.
    """
    found = [module for name, module in network.named_modules() if name.rpartition(".")[2] in layers]
    found = [module for module in found if hasattr(module, "set_processor")]
    if not found:
        raise FewstepError(
            f"found no attention called {' or '.join(layers)} in a {type(network).__name__}, expected the layers of a "
            "diffusers transformer, fix: leave --sparse at dense"
        )
    for number, module in enumerate(found):
        before: Any = module.processor
        stock = before._stock if isinstance(before, _Sparse) else before
        module.set_processor(_Sparse(stock, number, sequence, options, active))  # type: ignore[operator]


class _Sparse:
    """Processor of one layer."""

    def __init__(
        self,
        stock: Any,
        layer: int,
        sequence: Callable[[], Sequence],
        options: SparseOptions,
        active: Callable[[], bool],
    ) -> None:
        self._stock, self._layer, self._sequence = stock, layer, sequence
        self._options, self._active = options, active
        # diffusers asks the signature of this which arguments the processor takes, and drops others
        vars(self)["__call__"] = update_wrapper(partial(type(self).__call__, self), stock.__call__)

    def __call__(self, attn: Any, *args: Any, **more: Any) -> Any:
        if not self._active():
            return self._stock(attn, *args, **more)
        with _Answered(self._layer, self._sequence(), self._options) as answered:
            output = self._stock(attn, *args, **more)
        if answered.calls != 1:
            raise FewstepError(
                f"found an attention layer that called torch's attention {answered.calls} times, expected once, fix: "
                "leave the attention backend of diffusers at 'native'"
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sparse:
        """Of a copied network: as sparse as the first; backbone and switch are not copied."""
        return _Sparse(copy.deepcopy(self._stock, memo), self._layer, self._sequence, self._options, self._active)


class _Answered(TorchFunctionMode):
    """Within, attention is sparse."""

    def __init__(self, layer: int, sequence: Sequence, options: SparseOptions) -> None:
        super().__init__()
        self.calls = 0
        self._layer, self._sequence, self._options = layer, sequence, options

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        query, key, value = _asked(*args, **(kwargs or {}))
        return sparse_attention(query, key, value, self._sequence, self._options, self._layer)


def _asked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of torch's attention that there may be."""
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        raise FewstepError(
            "found attention under a mask, with dropout, a scale of its own or grouped heads, expected plain "
            "self-attention to be made sparse, fix: leave --sparse at dense for this network"
        )
    return query, key, value
