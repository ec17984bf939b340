"""Adaptive block-sparse attention (Video-BLADE, arXiv 2508.10774): a network attends to the blocks that matter to it.

`order` puts neighbours of a picture or video into one block, `choosing` says which blocks of keys a block of queries
sees, `engines` compute attention over these, `adaptive` is all of it on queries, keys and values, and `network` puts it
into a stock network. docs/sparse.md has the rest.
"""

from fewstep.attention.sparse.adaptive import sparse_attention
from fewstep.attention.sparse.network import make_sparse
from fewstep.attention.sparse.options import SparseOptions

__all__ = ["SparseOptions", "make_sparse", "sparse_attention"]
