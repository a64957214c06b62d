"""Sparse attention in standard operators: gathers, matrix products and softmax.

A site is a selection, one node that attends under a table, and the far field:

    table      = constants, or chosen by the means of blocks (`selection.py`)
    out, lse   = sparsify::BlockSparseAttention(query, key, value, *table, key_bias)    (`node.py`)
    out        = out, merged with a virtual key for each block that is not read (`far_field.py`)

The node has a body in standard operators (`bodies.py`), so a runtime needs nothing of ours. A library may run a
kernel in its place: the table says all that it needs. All sizes are constants, except that of the batch.
Shape letters: B batch, H heads, S tokens, D head dim, V tokens of the video, N blocks, Nq blocks of queries, K
blocks of keys that a block of queries reads.
"""

from sparsify_compiler.exporting.standard.bodies import Body, body_of
from sparsify_compiler.exporting.standard.node import INPUTS, OPERATOR, Attend, Bodies, Kind
from sparsify_compiler.exporting.standard.sites import CubesSite, StaticSite, standard_site
from sparsify_compiler.exporting.standard.support import check, check_config

__all__ = [
    "INPUTS",
    "OPERATOR",
    "Attend",
    "Bodies",
    "Body",
    "CubesSite",
    "Kind",
    "StaticSite",
    "body_of",
    "check",
    "check_config",
    "standard_site",
]
