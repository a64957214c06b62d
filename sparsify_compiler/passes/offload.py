"""Long lists of single keys wait on the host between forward and backward, as in DSV (arXiv 2502.07590).

The pass sees the joint graph of forward and backward, before it is cut in two, and says what is to wait. PyTorch's
activation offloading moves it: to the host once forward has read it, back when backward is about to.
"""

from operator import getitem

from torch import fx, ops

from sparsify_compiler import _torch

LEAST = 2**20
"""Bytes of a list that is worth the way."""


def long_lists(graph: fx.Graph) -> list[fx.Node]:
    """The `kv_indices` of at least `LEAST` bytes that attention reads in backward.

    PyTorch moves neither inputs, as the tables of `tile` are, nor one of several results, as the lists of clusters
    and cubes are; both are short.
    """
    backward = ops.sparsify.block_sparse_attention_backward.default
    place = [argument.name for argument in backward._schema.arguments].index("kv_indices")
    lists = {call.args[place]: None for call in graph.find_nodes(op="call_function", target=backward)}
    return [
        node for node in lists if _is_movable(node) and (_torch.hint(node.meta["val"].nbytes) or 0) >= LEAST
    ]


def _is_movable(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not getitem
