"""Attention of causal students: what they see, where it lies in time, and what they remember.

`layout` says it in numbers, `causal` lets a stock network attend within a context, and there are two contexts: `memory`
for one chunk after the other (`noisy`, where history stays as it was called), `parallel` for all at once. `seat` is how
they are called.
"""

from fewstep.attention.layout import Layout
from fewstep.attention.memory import CachedMemory
from fewstep.attention.noisy import NoisyMemory
from fewstep.attention.seat import CausalSeat

__all__ = ["CachedMemory", "CausalSeat", "Layout", "NoisyMemory"]
