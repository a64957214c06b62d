"""Attention by hand stays as it is where its tensors are written to or reshaped."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    BIAS,
    GRID,
    NO,
    SEEN,
    D,
    Function,
    H,
    Outcome,
    X,
    heads,
    is_rewritten,
    outcomes,
    project,
    stays,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@torch.library.custom_op("sparsify_tests::overwrite", mutates_args=("out",))
def overwrite(out: Tensor, source: Tensor) -> None:
    out.copy_(source)


@torch.library.custom_op("sparsify_tests::look", mutates_args=())
def look(x: Tensor) -> Tensor:
    return x + 1


look.register_fake(torch.empty_like)


@torch.compiler.allow_in_graph
def kept_whole(x: Tensor) -> Tensor:
    return x.zero_().sum()


class Tensors:
    """What attention is made of: k is a view of y, q of z, v of w."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.y, self.z, self.w = x, 2 * x.sin(), 2 * x, x.cos().cumsum(-1)
        self.q, self.k, self.v = heads(self.z), heads(self.y), heads(self.w)
        self.m = BIAS + 0


def writing(write: Callable[[Tensors], object], when: str = "after the product") -> Function:
    """Attention during which something is written."""

    def function(x: Tensor) -> Tensor:
        t = Tensors(x)
        scores = t.q @ t.k.mT * 0.5
        if when == "after the product":
            write(t)
        scores = scores + t.m
        if when == "after the mask":
            write(t)
        weights = scores.softmax(-1)
        if when == "after the softmax":
            write(t)
        out = weights @ t.v
        if when == "after all":
            write(t)
        return out + 0

    return function


WRITTEN: dict[str, Function] = {
    "key": writing(lambda t: t.k.zero_()),
    "its base": writing(lambda t: t.y.zero_(), "after the softmax"),
    "base of the query": writing(lambda t: t.z.mul_(3)),
    "another view": writing(lambda t: t.y.view(-1)[::2].fill_(2.0)),
    "setitem": writing(lambda t: t.z.__setitem__((slice(None), 0), 5.0)),
    "setitem by a mask": writing(lambda t: t.y.__setitem__(t.y > 0, 0.0)),
    "as_strided": writing(lambda t: t.y.as_strided((5,), (3,)).fill_(9.0)),
    "a piece": writing(lambda t: t.y.chunk(2, 1)[1].zero_()),
    "a row": writing(lambda t: t.y.unbind(1)[3].zero_()),
    "detached": writing(lambda t: t.y.detach().zero_()),
    "data": writing(lambda t: t.y.data.zero_()),
    "bits": writing(lambda t: t.y.view(torch.int32).zero_()),
    "out": writing(lambda t: torch.add(t.z, 1, out=t.y)),
    "operator": writing(lambda t: t.y.__iadd__(1)),
    "foreach": writing(lambda t: torch._foreach_mul_([t.w, t.y], 2.0)),
    "in place by a flag": writing(lambda t: F.relu(t.y, True)),
    "ATen": writing(lambda t: torch.ops.aten.mul_.Tensor(t.y, 2)),
    "index_put": writing(lambda t: t.y.index_put_((torch.tensor([0]),), torch.tensor(3.0))),
    "custom operator": writing(lambda t: torch.ops.sparsify_tests.overwrite(t.y.view(-1), t.z.view(-1))),
    "function kept whole": writing(lambda t: kept_whole(t.y)),
    "checkpointed body": writing(lambda t: checkpoint(lambda y: y.mul_(2).sum(), t.y, use_reentrant=False)),
    "other memory": writing(lambda t: t.y.set_(t.z)),
    "mask": writing(lambda t: t.m.zero_(), "after the mask"),
    "view of the mask": writing(lambda t: t.m.view(-1).zero_(), "after the softmax"),
}
UNTOUCHED: dict[str, Function] = {
    "input": writing(lambda t: t.x.zero_()),
    "value": writing(lambda t: t.w.mul_(2)),
    "copy of the key": writing(lambda t: t.k.clone().zero_()),
    "mask that is not read yet": writing(lambda t: t.m.mul_(2)),
    "read by a custom operator": writing(lambda t: torch.ops.sparsify_tests.look(t.y)),
    "read by a function": writing(lambda t: F.layer_norm(t.y, (H * D,))),
    "read by a condition": writing(lambda t: torch.cond(t.x.sum() > 0, torch.sum, torch.mean, (t.y,))),
    "after all": writing(lambda t: (t.y.zero_(), t.z.zero_(), t.m.zero_()), "after all"),
}


@pytest.fixture(scope="module")
def written() -> dict[str, Outcome]:
    return outcomes(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_writes_between_the_products(name: str, written: dict[str, Outcome]) -> None:
    stays(written[name], "is written to between its products")


@pytest.fixture(scope="module")
def untouched() -> dict[str, Outcome]:
    return outcomes(UNTOUCHED)


@pytest.mark.parametrize("name", UNTOUCHED)
def test_other_writes_do_not_matter(name: str, untouched: dict[str, Outcome]) -> None:
    is_rewritten(untouched[name])


def test_inverted_masks_are_read_where_they_are_inverted() -> None:
    def early(x: Tensor) -> Tensor:
        mask = SEEN.clone()
        hidden = ~mask
        mask.fill_(True)
        q, k, v = project(x)
        return (q @ k.mT).masked_fill(hidden, NO).softmax(-1) @ v

    stays(outcomes({"early": early})["early"], "its mask is written to")


@pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")
def test_inputs_may_overlap_in_another_call() -> None:
    """Dynamo's guards do not tell: two inputs of the first call are apart."""

    def together(x: Tensor, keys: Tensor, other: Tensor) -> Tensor:
        scores = heads(x) @ heads(keys).mT
        other.mul_(3)
        return scores.softmax(-1) @ heads(x.cos())

    torch._dynamo.reset()
    options = {"method": "tile", "grid": GRID, "reference_frames": GRID[0], "inner_backend": "eager"}
    fast = torch.compile(together, backend="sparsify", options=options)
    fast(X, X.sin(), torch.ones(1))
    keys = X.sin()
    exact = together(X, keys.clone(), torch.ones(1))
    assert torch.equal(fast(X, keys, keys.view(-1)[:1]), exact)


def test_tensors_that_are_reshaped_later_on() -> None:
    """Dynamo records the last shape alone. Before the call it does not matter."""

    def later(x: Tensor) -> Tensor:
        q, k, v = (t.contiguous() for t in project(x))
        out = F.scaled_dot_product_attention(q, k, v)
        q.transpose_(1, 2)
        return out + q.sum()

    stays(outcomes({"later": later})["later"], "reshaped in place")
