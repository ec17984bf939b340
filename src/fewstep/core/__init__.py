"""Pure mathematics of diffusion and flow models, without training state: see each module's own page.

Read in this order: process, prediction, grids, solvers, rollout, renoise, guidance, streams.
"""
