"""A model on real ranks, through torch.compile."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import sparsify_compiler
import sparsify_compiler.backend
from sparsify_compiler import OptionError
from sparsify_compiler._torch import process_group
from sparsify_compiler.errors import RankError
from sparsify_compiler.options import configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.rates import in_best_form, measured_cluster
from sparsify_compiler.testing.dits import Attend
from sparsify_compiler.testing.parallel import compare, graphs_of
from sparsify_compiler.testing.ranks import Pool

VIDEO = torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(1))
"""18 tokens."""


def attend() -> tuple[nn.Module, Mapping[str, Any]]:
    torch.manual_seed(0)
    return Attend(), {"video": VIDEO}


def test_svg2_keeps_its_state_over_calls_of_one_program(pool: Pool) -> None:
    options = {"method": "svg2", "inner_backend": "eager", "provider": "reference"}
    for outcome, programs in pool.run(3, partial(compare, build=attend, options=options, calls=3)):
        assert outcome.output <= 1e-5
        assert len(outcome.sharding.sites) == 1
        assert programs == 1


def test_inductor_trains_with_the_gradients_of_one_process(pool: Pool) -> None:
    options = {"method": "tile", "provider": "reference"}
    for outcome, _ in pool.run(2, partial(compare, build=attend, options=options, trains=True)):
        assert outcome.output <= 1e-5
        assert outcome.gradient <= 1e-5
        assert len(outcome.sharding.sites) == 1


def family(name: str) -> tuple[nn.Module, Mapping[str, Any]]:
    from sparsify_compiler.testing.models import CASES

    return CASES[name].build()


@pytest.mark.nightly
def test_inductor_keeps_the_order_of_exchanges_of_independent_streams(pool: Pool) -> None:
    """Blocks of the control video and of the video do not depend on each other; ranks compare every exchange."""
    options = {"method": "tile", "provider": "reference"}
    for outcome, _ in pool.run(2, partial(compare, build=partial(family, "wan_vace"), options=options)):
        assert outcome.output <= 1e-5
        assert len(outcome.sharding.sites) > 2


def of_all_sizes(ranks: Ranks | None) -> list[Tensor]:
    """Outputs of one compiled model for several sizes, which Dynamo makes symbols from the second on."""
    torch._dynamo.reset()
    options = {"method": "tile", "inner_backend": "eager", "provider": "reference"}
    more = {} if ranks is None else {"parallel": parallel(ranks)}
    compiled = torch.compile(attend()[0], backend="sparsify", options={**options, **more})
    sizes = ((1, 4, 3, 4, 6), (2, 4, 3, 6, 8), (2, 4, 3, 8, 8), (3, 4, 2, 2, 10))
    with torch.no_grad():
        return [compiled(torch.ones(size).cumsum(-1).sin()) for size in sizes]


def test_every_size_of_the_video_gets_its_own_shares(pool: Pool) -> None:
    alone = of_all_sizes(None)
    for outputs in pool.run(2, of_all_sizes):
        for output, wanted in zip(outputs, alone, strict=True):
            torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)


class Broken(nn.Module):
    """Two attentions with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))

    def attend(self, x: Tensor, layer: int) -> Tensor:
        q, k, v = self.qkv[layer](x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, video: Tensor) -> Tensor:
        x = self.attend(self.patch(video).flatten(2).transpose(1, 2), 0)
        torch._dynamo.graph_break()
        return self.attend(x, 1)


def broken() -> tuple[nn.Module, Mapping[str, Any]]:
    return Broken(), {"video": VIDEO}


def test_attention_after_a_graph_break_is_sparse_on_ranks_too(pool: Pool) -> None:
    options = {
        "method": "cubes",
        "inner_backend": "eager",
        "provider": "reference",
        "cube": (1, 2, 2),
        "top_p": 0.3,
    }
    for outcome, programs in pool.run(2, partial(compare, build=broken, options=options, calls=2)):
        assert outcome.output <= 1e-5
        assert programs == 3, "the second graph has a program under the labels of the first, and one without"


def parallel(ranks: Ranks) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(process_group(ranks.group), "cpu")
    return {"form": "hcp", "mesh": mesh, "timeout": ranks.timeout}


def disagree(ranks: Ranks, about: str) -> str:
    """The error of a rank, of which the last one differs from the others."""
    torch._dynamo.reset()
    other = ranks.rank == ranks.size - 1
    model = attend()[0]
    torch.manual_seed(other and about == "seed")
    if other and about == "weights":
        model.qkv.weight.data[0, 0] += 1e-3
    video = VIDEO.flip(-1) if other and about == "values" else VIDEO
    video = VIDEO[..., :2] if other and about == "sizes" else video
    frames = 2 if other and about == "options" else 1
    options = {
        "method": "tile",
        "reference_frames": frames,
        "inner_backend": "eager",
        "guard": "measured",  # it asks rank 0 for times before
        "parallel": parallel(ranks),
    }
    try:
        with torch.no_grad():
            torch.compile(model, backend="sparsify", options=options, dynamic=False)(video)
    except RankError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("about", "named"),
    [
        ("options", "options, got {'method': 'tile', 'reference_frames': 1"),
        ("seed", "seed, got 0 on rank 0 and 1 on rank 2"),
        ("weights", "input self.qkv.weight, got [96, 32] float32 with sums"),
        ("values", "input video, got [1, 4, 3, 4, 6] float32 with sums"),
        ("sizes", "input video, got [1, 4, 3, 4, 6] float32 with sums"),
    ],
)
def test_ranks_that_differ_say_so_before_they_exchange_anything(pool: Pool, about: str, named: str) -> None:
    for message in pool.run(3, disagree, about):
        assert f"ranks must have the same {named}" in message
        assert "on rank 2: all ranks call one model with the same options, weights and inputs" in message
        assert "\n" not in message


def explained(ranks: Ranks) -> tuple[str, Tensor, Tensor]:
    """(the explanation, the density of each head that stats knows on this rank, and in one process)."""
    torch._dynamo.reset()
    model, inputs = attend()
    options = {"method": "svg2", "inner_backend": "eager", "dense_steps": 0, "dense_layers": 0}
    model.compile(backend="sparsify", options={**options, "parallel": parallel(ranks)})
    text = str(sparsify_compiler.explain(model, **inputs))
    found = []
    for more in ({"parallel": parallel(ranks)}, {}):
        torch._dynamo.reset()
        again, inputs = attend()
        with torch.no_grad():
            torch.compile(again, backend="sparsify", options={**options, **more}, dynamic=False)(**inputs)
        found.append(torch.as_tensor(sparsify_compiler.stats(again).measurements[0].density))
    return text, found[0], found[1]


def test_explain_and_stats_show_all_heads_on_every_rank(pool: Pool) -> None:
    for text, shared, alone in pool.run(2, explained):
        assert "2 ranks share 18 tokens, and the heads of 1 attention calls" in text
        # Query, key and value of one of 2 heads of 16 channels, for 9 of 18 tokens; the result comes back.
        said = f"a rank sends at most {4 * 9 * 16 * 4 / 1e6:.3g} MB in a call, and computes at most 1 times"
        assert (
            f"Graph 0, form hcp 2x1: the form that the option names. Predicted: for attention {said}"
            in " ".join(text.split())
        )
        assert shared.numel() == 2
        assert torch.equal(shared, alone)


def of_a_second_video(ranks: Ranks) -> str:
    """The error where ranks draw other noise for a second video."""
    torch._dynamo.reset()
    options = {"method": "tile", "inner_backend": "eager", "parallel": parallel(ranks)}
    compiled = torch.compile(attend()[0], backend="sparsify", options=options, dynamic=False)
    with torch.no_grad():
        compiled(VIDEO)
        compiled(VIDEO.flip(-1))
        try:
            compiled(VIDEO + ranks.rank)
        except RankError as error:
            return str(error)
    return "no error"


def test_inputs_are_compared_in_every_call(pool: Pool) -> None:
    for message in pool.run(2, of_a_second_video):
        assert "ranks must have the same input video, got [1, 4, 3, 4, 6] float32 with sums" in message


def test_ranks_share_heads_where_attention_needs_all_queries() -> None:
    plan = graph_plan(pipeline.analyse(graphs_of(*attend())[0][0], configure({"method": "cubes"})))
    ranks = Ranks(0, 3, "no group, so nothing can be measured")
    assert in_best_form(plan, ranks, "auto", recall=False, measure=True) is ranks


def choosing(ranks: Ranks) -> tuple[str, str, float]:
    """(the explanations before and after the first call, the error of its output) where a form is left open."""
    torch._dynamo.reset()
    model, inputs = attend()
    model.eval()
    options = {"method": "tile", "inner_backend": "eager", "provider": "reference"}
    shared = {**options, "parallel": {**parallel(ranks), "form": "auto"}}
    before = str(sparsify_compiler.explain(model, **inputs, options=shared))
    with torch.no_grad():
        wanted, found = (
            torch.compile(attend()[0], backend="sparsify", options=one, dynamic=False)(**inputs)
            for one in (options, shared)
        )
    after = str(sparsify_compiler.explain(model, **inputs, options=shared))
    return " ".join(before.split()), " ".join(after.split()), float((found - wanted).norm() / wanted.norm())


def test_ranks_that_do_not_divide_the_heads_measure_before_they_choose_a_form(pool: Pool) -> None:
    found = pool.run(3, choosing)
    for before, after, error in found:
        assert (
            "Graph 0, form hcp or scp: chosen at the first call, by rates that ranks measure then" in before
        )
        assert ", predicted, against " in after
        assert ("(form 'scp')" in after) == ("Graph 0, form scp" in after)
        assert error <= 1e-5
    assert len({after for _, after, _ in found}) == 1


def test_ranks_measure_one_cluster(pool: Pool) -> None:
    first, second = pool.run(2, partial(measured_cluster, dtype="float32", provider="reference"))
    assert first == second
    assert (first.hosts, first.gpus, first.between) == (1, 2, float("inf"))
    assert min(first.products, first.attention, first.sparse, first.traffic, first.inside, first.latency) > 0


def without_group(form: Any) -> Tensor:
    model, inputs = attend()
    options = {"method": "tile", "inner_backend": "eager", "parallel": form}
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="sparsify", options=options, dynamic=False)(**inputs)


def test_without_a_process_group_auto_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = attend()
    options = {"method": "tile", "inner_backend": "eager"}
    torch._dynamo.reset()
    with torch.no_grad():
        alone = torch.compile(model, backend="sparsify", options=options, dynamic=False)(**inputs)
    assert torch.equal(without_group("auto"), alone)
    assert "parallel='auto' does nothing: there is no process group" in caplog.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"form": "hcp"}, "parallel's form 'hcp' needs a process group"),
        ("hcp", r"parallel must be 'auto' or a dict of form, mesh, balance, timeout, got 'hcp'"),
        ({"forms": "hcp"}, r"unknown option of parallel 'forms'.*Did you mean 'form'"),
        ({"form": "scp"}, r"parallel's form 'scp' needs a process group"),
        ({"form": "hybrid"}, r"parallel's form 'hybrid' needs a DeviceMesh of two dimensions.*got mesh=None"),
        ({"form": "hpc"}, r"unknown form of parallel 'hpc'.*Did you mean 'hcp'"),
        ({"form": None}, r"unknown form of parallel None"),
        ({"balance": "videos"}, r"unknown balance of parallel 'videos'.*Did you mean 'video'"),
        ({"balance": True}, r"unknown balance of parallel True"),
        ({"balance": 0}, r"parallel's balance must be at least 1 step, got 0"),
        ({"mesh": 2}, r"parallel's mesh must be a DeviceMesh of one dimension, got 2"),
        ({"timeout": 0}, r"parallel's timeout must be a positive number of seconds, got 0"),
        ({"timeout": True}, r"parallel's timeout must be a positive number of seconds, got True"),
    ],
)
def test_wrong_options_are_named(asked: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        without_group(asked)


def test_regional_compilation_is_refused() -> None:
    with pytest.raises(OptionError, match="parallel shares a whole model, got regional=True"):
        sparsify_compiler.apply(Attend(), regional=True, parallel="auto")


def with_graphs(ranks: Ranks) -> str:
    model, inputs = attend()
    torch._dynamo.reset()
    options = {"method": "tile", "parallel": parallel(ranks)}
    try:
        compiled: Any = partial(sparsify_compiler.backend.sparsify, options=options, mode="reduce-overhead")
        torch.compile(model, backend=compiled, dynamic=False)(**inputs)
    except OptionError as error:
        return str(error)
    return "no error"


def test_cuda_graphs_are_refused(pool: Pool) -> None:
    assert pool.run(1, with_graphs)[0].startswith("parallel does not work with CUDA graphs, got mode=")
