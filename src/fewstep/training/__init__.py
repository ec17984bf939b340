"""Training: the loop, its options, checkpoints that survive a kill, the averaged student, the log.

Start reading at `loop.train`.
"""
