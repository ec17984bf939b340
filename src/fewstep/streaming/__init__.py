"""Videos made chunk by chunk: `rollout` is the endless sampler and what training sees of it, `student` a saved one.

`pipeline` is the sampler spread over processes, `throughput` how fast that is, `film` a file that grows.
"""

from fewstep.streaming.rollout import CausalPath, ChunkNoise, Memory, stream

__all__ = ["CausalPath", "ChunkNoise", "Memory", "stream"]
