"""Training on several ranks: gradients, checkpoints, the predictor of `dsv`, DDP and FSDP2."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import nested_compile_region
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparsify_compiler._torch import process_group
from sparsify_compiler.parallel import ops
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.parallel import compare, in_threads
from sparsify_compiler.testing.ranks import Pool

VIDEO = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
"""18 tokens."""
BOUND = 1e-5
"""Rounding in float32: matrix products of fewer rows add in another order."""


class Streams(nn.Module):
    """Patches, and two layers of attention that do not read each other's results; then their sum."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.patch = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.mlp = nn.Linear(16, 16)

    def attend(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = (one.unflatten(2, (2, 8)).transpose(1, 2) for one in self.qkv[layer](x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def layer(self, x: Tensor, layer: int) -> Tensor:
        return self.attend(x, layer) + self.mlp(x).relu()

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        return sum(WAYS[self.way](self, x, layer) for layer in range(2))


@nested_compile_region
def region(model: Streams, x: Tensor, layer: int) -> Tensor:
    return model.layer(x, layer)


def keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.MUST_RECOMPUTE


WAYS: dict[str, Callable[[Streams, Tensor, int], Tensor]] = {
    "plain": Streams.layer,
    "checkpoint": lambda model, x, layer: checkpoint(model.layer, x, layer, use_reentrant=False),
    "reentrant": lambda model, x, layer: checkpoint(model.layer, x, layer, use_reentrant=True),
    "own policy": lambda model, x, layer: checkpoint(
        model.layer, x, layer, use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, keep_products),
    ),
    "region": region,
    "attention alone": lambda model, x, layer: checkpoint(model.attend, x, layer, use_reentrant=False),
}  # fmt: skip


@contextmanager
def noted() -> Iterator[list[str]]:
    """The names of the exchanges of all ranks of this process."""
    found: list[str] = []

    def noting(messages: Any, shapes: Any, ranks: Ranks, what: str) -> Any:
        found.append(f"rank {ranks.rank} {what}")
        return exchange(messages, shapes, ranks, what)

    exchange = ops.exchange
    with patch.object(ops, "exchange", noting):
        yield found


@pytest.mark.parametrize(
    ("way", "method"),
    [("checkpoint", "svg2"), ("own policy", "keys"), ("region", "dense"), ("attention alone", "tile")],
)
def test_checkpoints_are_shared_and_exchange_nothing_twice(way: str, method: str) -> None:
    options = {"method": method, "provider": "reference"}
    with noted() as exchanges:
        (found,) = in_threads(Streams(way), {"video": VIDEO}, options, 3, trains=True)
    assert len(found.sharding.sites) == 2
    assert [name.partition(" ")[0] for name, _ in found.sharding.gathered] == ["output"]
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    orders = [[one[7:] for one in exchanges if one.startswith(f"rank {rank}")] for rank in range(3)]
    assert orders[0] == orders[1] == orders[2]
    numbers = [one for one in orders[0] if "one with the same plan" in one]
    assert len(numbers) == (2 if method == "svg2" else 0), "the choice is made once"
    # Two layers, to heads and back, and the gathering of the result; each has a gradient.
    assert len(orders[0]) - len(numbers) == 2 * (2 * 2 + 1)
