"""Long index lists wait on the host between forward and backward, as in DSV (arXiv 2502.07590).

A pass over the joint graph of forward and backward, before it is cut in two. It chooses what is to be saved there,
and PyTorch's activation offloading moves it: to the host once forward has read it, back when backward is about to.
"""

from torch import Tensor, fx, int32, ops
from torch.utils.checkpoint import CheckpointPolicy

LEAST = 2**20
"""Bytes of a tensor that is worth the way."""


def offload_indices(graph: fx.Graph) -> None:
    """Mark the int32 tensors of at least `LEAST` bytes that attention reads in backward.

    Only what is computed in the graph by an op that returns one tensor: PyTorch moves neither inputs nor one of
    several results.
    """
    backward = ops.sparsify.block_sparse_attention_backward.default
    for call in graph.find_nodes(op="call_function", target=backward):
        for node in call.all_input_nodes:
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype != int32 or not isinstance(value.numel(), int):
                continue
            if value.nbytes >= LEAST and isinstance(node.target, type(backward)):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                node.meta["should_offload"] = True
