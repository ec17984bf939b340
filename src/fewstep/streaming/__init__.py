"""Videos made chunk by chunk: `rollout` is the endless sampler and what training sees of it, `student` a saved one."""

from fewstep.streaming.rollout import CausalPath, ChunkNoise, Memory, stream

__all__ = ["CausalPath", "ChunkNoise", "Memory", "stream"]
