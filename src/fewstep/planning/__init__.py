"""What a training run would take, before it is launched: memory by part, forwards, time, cost, and what to change.

`build.py` makes the networks from a folder's configs alone, without weights; `trace.py` runs them with nothing but
shapes and counts the bytes that a forward and a backward hold; `calls.py` asks the method which calls it makes;
`memory.py` adds up; `advice.py` tries changes. Used by `fewstep plan` and by `benchmarks/training_step.py`.
"""
