"""Activation checkpointing runs blocks again in backward, as in forward."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsify_compiler
from sparsify_compiler.runtime import recomputing
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.testing.videos import Video, latents

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

SVG2: dict[str, Any] = {
    "method": "svg2", "q_clusters": 6, "kv_clusters": 12, "kmeans_iters": (4, 2), "top_p": 0.6, "dense_layers": 0,
    "far_field": "drop", "dense_steps": 3, "inner_backend": "eager",
}  # fmt: skip
EXACT = SVG2 | {"top_p": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "blocks": {"regional": True},
    "broken": {"breaks": "before"},
    "alone": {"breaks": "around"},
}


def applied(
    options: dict[str, Any], way: dict[str, Any], use_reentrant: bool | None, layers: int = 2
) -> tuple[Video, Any]:
    way = dict(way)
    model = Video(layers, breaks=way.pop("breaks", "nowhere"))
    model.use_reentrant = use_reentrant
    return model, sparsify_compiler.apply(model, **way, **options)


def gradients(run: Any, model: nn.Module, *grids: tuple[int, int, int]) -> list[Tensor]:
    """The gradients of one backward pass after a forward pass for each grid."""
    model.zero_grad()
    losses = [run(latents(grid), torch.tensor([900.0])).square().sum() for grid in grids]
    sum(losses[1:], losses[0]).backward()
    return [one.grad.clone() for one in model.parameters() if one.grad is not None]


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("way", "use_reentrant"),
    [("whole", False), ("blocks", False), ("blocks", True), ("broken", True), ("alone", False)],
)
def test_a_block_runs_in_backward_as_in_forward(way: str, use_reentrant: bool) -> None:
    """Two videos of as many tokens wait for one backward pass. Dynamo has one program for both."""
    grids = (4, 6, 8), (6, 8, 4)
    model, changed = applied(SVG2, WAYS[way], use_reentrant)
    got = gradients(model, model, *grids)
    again = gradients(model, model, *grids)
    (one,) = changed.models
    assert [plan.method for plan in one.plans] == ["svg2", "svg2"]
    (state,) = states_of([model])
    assert not state.history, "training neither counts steps nor keeps state"
    torch._dynamo.reset()
    plain, _ = applied(SVG2, WAYS[way], None)
    expected = gradients(plain, plain, *grids)
    assert error(got, expected) < 1e-6
    assert error(again, expected) < 1e-6
    full = Video(2)
    assert error(got, gradients(full, full, *grids)) > 1e-3, "the options leave out keys"


@pytest.mark.parametrize(("way", "use_reentrant"), [("whole", True), ("blocks", False), ("blocks", True)])
def test_gradients_of_exact_options_are_those_of_eager(way: str, use_reentrant: bool) -> None:
    model, _ = applied(EXACT | {"inner_backend": "inductor"}, WAYS[way], use_reentrant, layers=1)
    full = Video(1)
    assert error(gradients(model, model, (4, 6, 8)), gradients(full, full, (4, 6, 8))) < 1e-5


def test_training_and_inference_take_turns() -> None:
    """A reentrant checkpoint runs its blocks without gradients, in the programs of inference."""
    model, _ = applied(SVG2, {"regional": True}, True)
    first = gradients(model, model, (4, 6, 8))
    with torch.no_grad():
        for step in range(5):
            model(latents((4, 6, 8)), torch.tensor([900.0 - 100 * step]))
    (state,) = states_of([model])
    assert "".join(record.phase[0] for record in state.history) == "dddss"
    assert error(gradients(model, model, (4, 6, 8)), first) == 0
    assert len(state.history) == 5


def test_calls_without_a_backward_pass_are_forgotten() -> None:
    model, _ = applied(SVG2, {"regional": True}, False)
    for calls in range(5):
        kept = model(latents((4, 6, 8)), torch.tensor([900.0]))
        if calls == 1:
            before = len(recomputing._logs)
    assert len(recomputing._logs) == before
    assert recomputing._logs[-1].needed
    kept.sum().backward()
    del kept
    assert not recomputing._logs[-1].needed


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of one process, and a small first bucket."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", [{}, {"regional": True}], ids=["whole", "blocks"])
def test_a_model_in_ddp_has_small_buckets(way: dict[str, Any]) -> None:
    """Dynamo splits the graph of the whole model at the buckets."""
    model, changed = applied(EXACT, way, False)
    run = DistributedDataParallel(model, bucket_cap_mb=0.01)
    full = Video(2)
    assert error(gradients(run, model, (4, 6, 8)), gradients(full, full, (4, 6, 8))) < 1e-5
    (one,) = changed.models
    assert [plan.method for plan in (*one.plans, *one.outside)] == ["svg2", "svg2"]
