"""Find the long lists of single keys that move to the host between forward and backward (DSV, arXiv 2502.07590).

The pass sees the joint graph of forward and backward before PyTorch partitions it. PyTorch's activation offloading
moves the lists: to the host after forward reads them, back before backward reads them.
"""

from operator import getitem

from torch import fx, ops

from sparsify_compiler import _torch

LEAST = 2**20
"""The smallest list that moves, in bytes."""


def long_lists(graph: fx.Graph) -> list[fx.Node]:
    """The `kv_indices` of at least `LEAST` bytes that attention reads in backward.

    PyTorch moves neither inputs, such as the tables of `tile`, nor one of several results, such as the lists of
    clusters and cubes; both are short.
    """
    backward = ops.sparsify.block_sparse_attention_backward.default
    place = [argument.name for argument in backward._schema.arguments].index("kv_indices")
    lists = {call.args[place]: None for call in graph.find_nodes(op="call_function", target=backward)}
    return [
        node for node in lists if _is_movable(node) and (_torch.hint(node.meta["val"].nbytes) or 0) >= LEAST
    ]


def _is_movable(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not getitem
