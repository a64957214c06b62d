"""What a rewritten attention call computes; traced into the graph, so that only the ops in it are opaque."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.kernels.far_field import attention_with_far_field
from sparsify_compiler.methods import DynamicMethod
from sparsify_compiler.methods.selection import Memory, Tokens
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.table import BlockTable

GUARD_ROWS = 16
"""Rows of each head that are computed exactly, to see whether the far field helps."""

REPORT = ("density", "kept", "recall", "far_field")
"""What a dynamic site reports of each call, for every batch and head: share of the token pairs computed; mean
attention mass that the method estimates to be kept; mean mass truly kept on sampled rows, NaN without; whether
the far field is on, 1 or 0."""


class SparseSite(nn.Module):
    """One attention call, as its plan has it."""

    def __init__(
        self, plan: AttentionPlan, constants: tuple[str, ...], remembers: bool, sampled_rows: int
    ) -> None:
        """Args:
        constants: names of the method's constant tensors, in the order in which `forward` gets them.
        remembers: whether the calls share a memory; else every call starts anew and reports nothing.
        sampled_rows: rows of each head to measure the recall on.
        """
        super().__init__()
        self.plan, self.constants, self.remembers, self.sampled_rows = (
            plan,
            constants,
            remembers,
            sampled_rows,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        """Select, attend, remember.

        Args:
            query, key, value, key_bias: as in `kernels.attention.block_sparse_attention`.
            tensors: the method's constants; then, if calls share a memory, `warm` (None where nothing but a report
                is kept), the memory's tensors and the report [4, B, H], which are written to.
        """
        plan, method = self.plan, self.plan.settings
        constants, memory, report = self._sort(tensors)
        kept = None
        if isinstance(method, DynamicMethod):
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                tokens = self._tokens(query, key)
                selection, learnt = method.select(tokens, memory or self._blank(tokens), **constants)
                table, kept = selection
                if memory is not None:
                    _remember(memory, learnt)
        else:
            table = BlockTable(**constants)
        guarded = GUARD_ROWS if plan.far_field != "drop" else 0
        out, _, sampled = attention_with_far_field(
            query,
            key,
            value,
            table,
            far_field=plan.far_field,
            key_bias=key_bias,
            scale=plan.site.scale,
            provider=plan.provider,
            sampled_rows=max(guarded, self.sampled_rows),
        )
        if report is not None and kept is not None:
            with torch.no_grad():
                rows = (table.densities(), kept.mean(-1), sampled.recall, sampled.gate)
                report.copy_(torch.stack([row.float().expand(report.shape[1:]) for row in rows]))
        return out

    def observe(self, query: Tensor, key: Tensor, *tensors: Tensor | None) -> None:
        """Remember what a dense call shows."""
        method = self.plan.settings
        assert isinstance(method, DynamicMethod)
        constants, memory, _ = self._sort(tensors)
        assert memory is not None
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            _remember(memory, method.observe(self._tokens(query, key), memory, **constants))

    def _tokens(self, query: Tensor, key: Tensor) -> Tokens:
        plan = self.plan
        return Tokens(
            query=query.detach(),
            key=key.detach(),
            layout=plan.layout,
            scale=plan.site.scale,
            provider=plan.provider,
        )

    def _sort(
        self, tensors: tuple[Tensor | None, ...]
    ) -> tuple[dict[str, Any], Memory | None, Tensor | None]:
        """(constants by name, memory, report)."""
        count = len(self.constants)
        constants = dict(zip(self.constants, tensors[:count], strict=True))
        if not self.remembers:
            return constants, None, None
        warm, *held, report = tensors[count:]
        blank = torch.zeros((), dtype=torch.bool, device="cpu")
        return (
            constants,
            Memory(blank if warm is None else warm, tuple(t for t in held if t is not None)),
            report,
        )

    def _blank(self, tokens: Tokens) -> Memory:
        """The memory of a call that none came before."""
        shapes = shapes_of(self.plan)
        zeros = (torch.zeros(shape, device=tokens.query.device) for shape in shapes.values())
        return Memory(torch.zeros((), dtype=torch.bool, device="cpu"), tuple(zeros))


class Observer(nn.Module):
    """A dense attention call that its site looks at."""

    def __init__(self, site: SparseSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, out: Tensor, query: Tensor, key: Tensor, *tensors: Tensor | None) -> Tensor:
        """`out`, the call's output, as it is; see `SparseSite.observe`."""
        self.site.observe(query, key, *tensors)
        return out


def shapes_of(plan: AttentionPlan) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of what a site remembers."""
    method = plan.settings
    assert isinstance(method, DynamicMethod)
    return method.memory(plan.site, plan.layout)


def _remember(memory: Memory, learnt: tuple[Tensor, ...]) -> None:
    for held, new in zip(memory.tensors, learnt, strict=True):
        held.copy_(new)
