"""Training on several ranks: gradients, checkpoints, the predictor of `dsv`, DDP and FSDP2."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import nested_compile_region
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparsify_compiler import DSVTrainer
from sparsify_compiler._torch import process_group
from sparsify_compiler.methods import predictor
from sparsify_compiler.parallel import ops
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.dits import Recipe
from sparsify_compiler.testing.parallel import compare, in_threads
from sparsify_compiler.testing.ranks import Pool
from sparsify_compiler.testing.videos import Video, latents

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

    def noting(transfers: Any, ranks: Ranks, what: str) -> None:
        found.append(f"rank {ranks.rank} {what}")
        transfer(transfers, ranks, what)

    transfer = ops.transfer
    with patch.object(ops, "transfer", noting):
        yield found


@pytest.mark.parametrize(
    ("way", "method"),
    [("checkpoint", "svg2"), ("own policy", "keys"), ("region", "dense"), ("attention alone", "tile")],
)
def test_checkpoints_are_shared_and_exchange_nothing_twice(way: str, method: str) -> None:
    options = {"method": method, "provider": "reference"}
    trains = way != "region"  # PyTorch trains these regions with a compiler alone
    with noted() as exchanges:
        (found,) = in_threads(Streams(way), {"video": VIDEO}, options, 3, trains=trains)
    assert len(found.sharding.sites) == 2
    assert [name.partition(" ")[0] for name, _ in found.sharding.gathered] == ["output"]
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    orders = [[one[7:] for one in exchanges if one.startswith(f"rank {rank}")] for rank in range(3)]
    assert orders[0] == orders[1] == orders[2]
    numbers = [one for one in orders[0] if "(numbers of its heads)" in one]
    assert len(numbers) == (2 if method == "svg2" else 0), "the choice is made once"
    # Two layers, to heads and back, and the gathering of the result; each has a gradient.
    assert len(orders[0]) - len(numbers) == (1 + trains) * (2 * 2 + 1)


GQA = Recipe(
    grid=(3, 4, 5), batch=2, patch="conv3d", frames_first=False, position="rope halves", text="first",
    text_tokens=3, extra_tokens=0, streams=True, mask="none", heads=4, kv_heads=2, head_dim=8, split="linears",
    view="view", norm=True, spelling="gqa", scale=None, trap="", trapped=0,
)  # fmt: skip


@pytest.mark.parametrize(("size", "far_field", "trains"), [(3, "linear", True), (2, "drop", False)])
def test_dsv_reads_with_the_predictor_of_the_heads_of_a_rank(
    size: int, far_field: str, trains: bool, tmp_path: Path
) -> None:
    """Other weights and another share for every head; one head is dense."""
    model, inputs = GQA.build()
    path = tmp_path / "predictor.safetensors"
    generator, sites = torch.Generator().manual_seed(3), {}
    for name in ("layers.0", "layers.1"):
        weights, shares = torch.randn(4 + 2, 8, 4, generator=generator), torch.tensor([0.05, 0.4, 1.0, 0.2])
        sites[name] = predictor.Trained(weights=weights, shares=shares, group=(1, 2, 2), chosen_by="all")
    predictor.save_predictor(path, sites)
    options = {"method": "dsv", "predictor": path, "provider": "reference", "far_field": far_field}
    (found,) = in_threads(model, inputs, options, size, trains=trains)
    assert len(found.sharding.sites) == 2
    assert found.output <= BOUND
    assert found.gradient <= BOUND


class Predictors:
    """The state of a trainer for torch.distributed.checkpoint: one object, whatever training has reached."""

    def __init__(self, trainer: DSVTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.save(self.trainer.state_dict(), file)
        return {"dsv": file.getvalue()}

    def load_state_dict(self, state: Mapping[str, bytes]) -> None:
        self.trainer.load_state_dict(torch.load(io.BytesIO(state["dsv"]), weights_only=True))


def parallel(ranks: Ranks) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(process_group(ranks.group), "cpu")
    return {"form": "hcp", "mesh": mesh, "timeout": ranks.timeout}


def train(
    ranks: Ranks | None, steps: int, load: Path | None = None, save: Path | None = None
) -> tuple[list[float], dict[str, Any]]:
    """(losses, the state of the predictors) of a training, alone or on all ranks, which checkpoint activations."""
    torch._dynamo.reset()
    model = Video(2)
    more = {}
    if ranks is not None:
        model.use_reentrant = False
        more = {"parallel": parallel(ranks)}
    options = {"method": "dsv", "rank": 4, "inner_backend": "eager", "provider": "reference", **more}
    fast = torch.compile(model, backend="sparsify", options=options)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(3, 3), break_even=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    state = {"model": model.state_dict(), "predictors": Predictors(dsv)}
    if load is not None:
        dcp.load(state, checkpoint_id=load)
    losses = []
    for _ in range(steps):
        loss = fast(latents((3, 4, 4), 2, seed=dsv.steps), torch.tensor([900.0, 300.0])).square().mean()
        loss.backward()
        for one in model.parameters() if ranks is not None else ():
            dist.all_reduce(one.grad)
            one.grad /= ranks.size
        optimizer.step()
        optimizer.zero_grad()
        dsv.step()
        losses.append(float(loss.detach()))
    if save is not None:
        dcp.save({**state, "model": model.state_dict()}, checkpoint_id=save)
    return losses, dsv.state_dict()


def assert_alike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for part in ("steps", "sparse", "choices"):
        assert found[part] == wanted[part]
    assert found["learned"].keys() == wanted["learned"].keys()
    for name, tensor in wanted["learned"].items():
        torch.testing.assert_close(found["learned"][name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cut", [pytest.param(2, marks=pytest.mark.nightly), 5])
def test_two_stages_are_those_of_one_process_and_go_on_with_other_ranks(cut: int, tmp_path: Path) -> None:
    """Saved on two ranks, between two profiles; loaded on three, of which one has no head, and on one."""
    losses, wanted = train(None, 7)
    assert wanted["sparse"]
    assert any(0 < float(one.min()) < 1 for name, one in wanted["learned"].items() if name.endswith("shares"))
    with Pool(2) as two:
        first = two.run(2, train, cut, None, tmp_path / "saved")
    with Pool(3) as three:
        results = three.run(3, train, 7 - cut, tmp_path / "saved")
    results.append(train(None, 7 - cut, tmp_path / "saved"))
    for begin, _ in first:
        assert begin == pytest.approx(losses[:cut], rel=1e-5)
    for rest, state in results:
        assert rest == pytest.approx(losses[cut:], rel=1e-5)
        assert_alike(state, wanted)


def gradients_of(model: nn.Module, run: Callable[..., Tensor]) -> dict[str, Tensor]:
    """The gradients of a call, whole ones also where each rank has a shard."""
    run(VIDEO).sin().sum().backward()
    found = {}
    for name, one in model.named_parameters():
        assert one.grad is not None, name
        found[name] = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad.clone()
        one.grad = None
    return found


def wrapped(ranks: Ranks, way: str) -> dict[str, float]:
    """The largest difference from the gradients of one process, of the mean over ranks and of the sum."""
    options = {"method": "svg2", "inner_backend": "eager", "provider": "reference", "dense_layers": 0}
    torch._dynamo.reset()
    model = Streams("checkpoint")
    wanted = gradients_of(model, torch.compile(model, backend="sparsify", options=options))
    torch._dynamo.reset()
    shared: Any = torch.compile(model, backend="sparsify", options={**options, "parallel": parallel(ranks)})
    group = process_group(ranks.group)
    if way == "ddp":
        shared = DistributedDataParallel(shared, process_group=group)
    elif way == "fsdp2":
        fully_shard(shared, mesh=DeviceMesh.from_group(group, "cpu"))
    with noted() as exchanges:
        found = gradients_of(model, shared)
    assert len(exchanges) == 2 * (2 * 2 + 1) + 2, exchanges
    if way == "by hand":
        for one in found.values():
            dist.all_reduce(one, group=group)
            one /= ranks.size
    largest = max(float(one.abs().max()) for one in wanted.values())
    return {
        name: max(float((found[key] * times - one).abs().max()) for key, one in wanted.items()) / largest
        for name, times in (("mean", 1), ("sum", ranks.size))
    }


@pytest.mark.parametrize("way", ["by hand", "ddp", "fsdp2"])
def test_the_mean_over_ranks_is_the_gradient_of_one_process(pool: Pool, way: str) -> None:
    for errors in pool.run(2, wrapped, way):
        assert errors["mean"] <= BOUND
        assert errors["sum"] > 0.5, "the sum over ranks is another gradient"


def streams() -> tuple[nn.Module, Mapping[str, Any]]:
    return Streams("checkpoint"), {"video": VIDEO}


@pytest.mark.nightly  # two processes compile four graphs each
def test_inductor_trains_streams_that_do_not_read_each_other(pool: Pool) -> None:
    """Every exchange compares its name with those of the other ranks, so another order would raise."""
    options = {"method": "cubes", "provider": "reference"}
    for outcome, programs in pool.run(2, partial(compare, build=streams, options=options, trains=True)):
        assert outcome.output <= BOUND
        assert outcome.gradient <= BOUND
        assert len(outcome.sharding.sites) == 2
        assert programs == 1
