"""Monitors: what a run looks at after every iteration, what is healthy, and what is done where it is not.

`conditions` has the table, `watch` compares an iteration's numbers with it, `guard` acts on what it finds, `best` keeps
the best student so far, and `null` looks once at the empty prompt. docs/monitors.md is the user's page.
"""
