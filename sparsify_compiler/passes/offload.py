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

    PyTorch does not move inputs, such as the tables of `tile`, which are short. It does not move one of several
    results either, so backward reads a copy of such a list.
    """
    backward = ops.sparsify.block_sparse_attention_backward.default
    place = [argument.name for argument in backward._schema.arguments].index("kv_indices")
    found: dict[fx.Node, fx.Node] = {}
    for call in graph.find_nodes(op="call_function", target=backward):
        node = call.args[place]
        if node.op != "call_function" or (_torch.hint(node.meta["val"].nbytes) or 0) < LEAST:
            continue
        if node not in found:
            found[node] = _copied(graph, node) if node.target is getitem else node
        call.update_arg(place, found[node])
    return list(found.values())


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    with graph.inserting_after(node):
        copy = graph.call_function(ops.aten.clone.default, (node,))
    copy.meta["val"] = node.meta["val"].clone()
    return copy
