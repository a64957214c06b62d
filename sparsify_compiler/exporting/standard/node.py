"""The node that attends under a table."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsify_compiler.exporting.standard.bodies import body_of, merges
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable

OPERATOR = "sparsify::BlockSparseAttention"

INPUTS = ("query", "key", "value", *BlockTable.__slots__, "key_bias")
"""The inputs of a node, in order."""


class Kind(NamedTuple):
    """An input of a node."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]
    """None for the size of the batch."""

    def example(self) -> Tensor:
        """A tensor of this kind, with a batch of 2."""
        return torch.zeros([2 if size is None else size for size in self.shape], dtype=self.dtype)


class Bodies:
    """The distinct bodies of the nodes of a model."""

    def __init__(self) -> None:
        self.found: dict[Hashable, tuple[AttentionPlan, list[Kind | None]]] = {}
        """Plan and inputs of a node with this body, by number."""

    def number(self, plan: AttentionPlan, inputs: Sequence[Tensor | None]) -> int:
        """The number of the body of a node. `inputs`: those of the node."""
        kinds = [
            one
            if one is None
            else Kind(one.dtype, tuple(size if isinstance(size, int) else None for size in one.shape))
            for one in inputs
        ]
        key = plan.settings, plan.layout, plan.site.scale, merges(plan), tuple(kinds)
        self.found.setdefault(key, (plan, kinds))
        return [*self.found].index(key)


class Attend(nn.Module):
    """One node that attends under a table."""

    def __init__(self, plan: AttentionPlan, bodies: Bodies | None = None) -> None:
        """Args:
        bodies: gets the body of the node when it is exported.
        """
        super().__init__()
        self.plan, self.bodies = plan, bodies

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Sequence[Tensor | None],
        key_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out [B, H, S, Dv], lse [B, H, S] fp32); lse is None if nothing is merged with the output."""
        inputs = [query, key, value, *table, key_bias]
        if self.bodies is None:
            return body_of(self.plan)(*inputs)
        kinds = [(query.dtype, [*query.shape[:3], value.shape[3]]), (torch.float32, [*query.shape[:3]])]
        kinds = kinds if merges(self.plan) else kinds[:1]
        outputs = torch.onnx.ops.symbolic_multi_out(
            OPERATOR,
            inputs,
            {"scale": self.plan.site.scale, "body": self.bodies.number(self.plan, inputs)},
            dtypes=[dtype for dtype, _ in kinds],
            shapes=[shape for _, shape in kinds],
            version=1,
        )
        return outputs[0], outputs[1] if merges(self.plan) else None
