"""The league: all methods on equal terms, the same budget of network forwards for each, in tables.

entries.py   who plays, and with which options at how many steps
budget.py    how many iterations a budget of network forwards buys
cells.py     method x steps x seed, one result file each: claims, failures, resuming
mixtures.py  cells on a mixture of Gaussians in the plane, whose right answer is known
emoji.py     cells on the embedded teacher
report.py    the tables of docs/results.md
"""
