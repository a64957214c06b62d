"""The clustering ops on every provider, against brute force in float64: k-means, and what holds for all ops.

The Triton provider needs a GPU, or the interpreter: `test_triton_in_the_interpreter` runs this file and
`test_top_p.py` again in a process that has it.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from any_provider import (
    HAS_TRITON,
    IS_SLOW,
    POISONED,
    PROVIDERS,
    device_of,
    examples,
    generator,
    opcheck,
    pass_in_the_interpreter,
    threads_of_torch,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler.errors import OptionError, ProviderError
from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.clustering import (
    cluster,
    cpu,
    kmeans,
    kmeans_of_both,
    sort_by_label,
    top_p_blocks,
)
from sparsify_compiler.kernels.cpu import library

pytestmark = POISONED
any_example = examples(5, 25)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Tolerance of a squared distance, relative to the largest: a provider may round centroids to the points' type."""


def points_like_keys(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    blobs: int = 8,
    offset: float = 0.0,
    provider: str = "reference",
) -> Tensor:
    """[B, H, S, D] around a few centres, as a slice along S of a tensor [B, S', H, D] with NaN outside of it."""
    random = generator(seed)
    centres = 2 * torch.randn(batch, blobs, heads, dim, generator=random)
    blob = torch.randint(blobs, (tokens,), generator=random)
    inside = centres[:, blob] + 0.5 * torch.randn(batch, tokens, heads, dim, generator=random)
    inside = inside + offset * torch.randn(heads, dim, generator=random)
    whole = torch.full((batch, tokens + 5, heads, dim), torch.nan)
    whole[:, 3:-2] = inside
    return whole.to(device_of(provider), dtype).transpose(1, 2)[:, :, 3:-2]


def state_like(points: Tensor, clusters: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(centroids, start): centroids near points, as an earlier call would have returned, and tokens."""
    start = torch.randint(points.shape[2], (clusters,), generator=generator(seed))
    noise = 0.3 * torch.randn(*points.shape[:2], clusters, points.shape[3], generator=generator(seed + 1))
    centroids = points[:, :, start.to(points.device)].float() + noise.to(points.device)
    return centroids, start.to(points.device)


def run(provider: str, points: Tensor, centroids: Tensor, start: Tensor, warm: bool, first=1, later=1):
    return kmeans(points, centroids, start, torch.tensor(warm), first=first, later=later, provider=provider)


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """[B, H, S, C] float64, from differences."""
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points.double(), centroids.double(), compute_mode=exact).square()


def inertia(points: Tensor, centroids: Tensor) -> float:
    return squared_distances(points, centroids).amin(-1).sum().item()


def assert_nearest(points: Tensor, centroids: Tensor, labels: Tensor) -> None:
    """No other centroid is nearer than rounding may hide."""
    assert labels.dtype == torch.int32
    assert labels.shape == points.shape[:3]
    assert ((labels >= 0) & (labels < centroids.shape[2])).all()
    distances = squared_distances(points, centroids)
    chosen = distances.gather(-1, labels.long()[..., None])[..., 0]
    spread = (centroids.double() - centroids.double().mean(2, keepdim=True)).square().sum(-1).max()
    offset = points.double().norm(dim=-1).max() * spread.sqrt()  # what the fp32 sums of products reach
    allowed = ROUNDING[points.dtype] * (distances.max() + spread) + 1e-6 * offset
    assert ((chosen - distances.amin(-1)) <= allowed).all()


def assert_means(points: Tensor, labels: Tensor, before: Tensor, after: Tensor) -> None:
    """Every centroid is the mean of its points; one without points has not moved."""
    assert (after.dtype, after.shape) == (torch.float32, before.shape)
    is_own = labels[:, :, None] == torch.arange(before.shape[2], device=labels.device)[:, None]
    sizes = is_own.sum(-1, keepdim=True)
    means = is_own.double() @ points.double() / sizes
    is_empty = (sizes == 0).expand_as(before)
    assert ((after - means).abs()[~is_empty] <= 2e-6 * points.double().abs().max()).all()
    assert torch.equal(after[is_empty], before[is_empty])


@st.composite
def problems(draw: st.DrawFn, provider: str) -> tuple[Tensor, Tensor, Tensor]:
    """(points, centroids, start) of shapes that divide by nothing."""
    batch, heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)] if IS_SLOW else [(1, 1), (2, 3)]))
    tokens = draw(st.sampled_from([1, 2, 15, 64, 97, *([] if IS_SLOW else [130, 300])]))
    dim = draw(st.sampled_from([1, 5, 16, 48, 64, 80, 128]))
    clusters = draw(st.sampled_from([1, 3, 17, *([] if IS_SLOW else [48, 65, 130])]))
    points = points_like_keys(
        *(batch, heads, tokens, dim, draw(st.sampled_from(DTYPES))),
        seed=draw(st.integers(0, 99)),
        blobs=draw(st.sampled_from([1, 4, 40])),
        offset=draw(st.sampled_from([0.0, 10.0])),
        provider=provider,
    )
    return points, *state_like(points, clusters)


@any_example
@given(data=st.data())
def test_an_iteration_assigns_to_the_nearest_and_then_takes_means(provider, data):
    points, centroids, start = data.draw(problems(provider))
    after, labels = run(provider, points, centroids, start, warm=True)
    assert_nearest(points, centroids, labels)
    assert_means(points, labels, centroids, after)


@any_example
@given(data=st.data())
def test_starts_and_iterations(provider, data):
    """A cold start is a warm one from the points of `start`; n and then m iterations are n + m; none is worse."""
    points, centroids, start = data.draw(problems(provider))
    unread = torch.full_like(centroids, torch.nan)
    at_start = points[:, :, start].float()
    one, labels = run(provider, points, unread, start, warm=False, first=1, later=7)
    same, same_labels = run(provider, points, at_start, start, warm=True, first=7, later=1)
    assert torch.equal(one, same)
    assert torch.equal(labels, same_labels)
    three, labels = run(provider, points, unread, start, warm=False, first=3)
    two_more, later_labels = run(provider, points, one, start, warm=True, later=2)
    assert torch.equal(three, two_more)
    assert torch.equal(labels, later_labels)
    start_of_last, _ = run(provider, points, one, start, warm=True)
    assert_means(points, labels, start_of_last, three)
    slack = 1e-9 + ROUNDING[points.dtype] * squared_distances(points, at_start).amax(-1).sum().item()
    assert inertia(points, three) <= inertia(points, one) + slack <= inertia(points, at_start) + 2 * slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 40.0])
def test_separate_blobs_are_told_apart_however_far_from_zero(provider, dtype, offset):
    """Keys often share a large vector, beside which their differences are rounding errors of a product."""
    points = points_like_keys(2, 2, 100, 64, dtype, offset=offset, blobs=6, provider=provider)
    exact = points.double()
    start = torch.zeros(6, dtype=torch.long)  # a point of every blob, by farthest point
    for c in range(1, 6):
        distance = (exact[0, 0][:, None] - exact[0, 0][start[:c]]).square().sum(-1).amin(-1)
        start[c] = distance.argmax()
    start = start.to(points.device)
    unread = torch.full((2, 2, 6, 64), torch.nan, device=points.device)
    centroids, labels = run(provider, points, unread, start, warm=False, first=3)
    assert torch.equal(labels, squared_distances(points, centroids).argmin(-1).int())
    assert (labels == labels[:1, :1]).all()
    assert len(labels.unique()) == 6


def test_equal_distances_go_to_the_lowest_index(provider):
    """More clusters than distinct points: all copies of a centroid but the first stay empty."""
    device = device_of(provider)
    grid = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], device=device)
    points = grid.repeat(30, 8)[None, None]
    start = torch.arange(75, device=device).flip(0)
    centroids, labels = run(provider, points, torch.zeros(1, 1, 75, 16, device=device), start, warm=False)
    assert torch.equal(labels[0, 0], torch.tensor([2, 1, 0], dtype=torch.int32, device=device).repeat(30))
    assert torch.equal(centroids, points[:, :, start])
    halfway = torch.tensor([-1.0, 1.0, 1.0, -1.0], device=device)[:, None].expand(4, 16)[None, None]
    _, labels = run(provider, torch.zeros(1, 1, 3, 16, device=device), halfway, start[:4] * 0, warm=True)
    assert not labels.any()


def test_points_that_are_not_finite_keep_to_themselves(provider):
    points = points_like_keys(1, 2, 150, 16, blobs=3, provider=provider)
    centroids, start = state_like(points, 70)
    points[0, 0, 70, 3], points[0, 0, 90, 5] = torch.nan, torch.inf
    after, labels = run(provider, points, centroids, start, warm=True, later=2)
    assert ((labels >= 0) & (labels < 70)).all()
    assert after[0, 1].isfinite().all()
    assert (~after[0, 0].isfinite()).any(-1).sum() <= 2
    poisoned = torch.full_like(centroids, torch.nan)
    _, labels = run(provider, points, poisoned, start, warm=True, later=2)
    assert not labels.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_of_any_kind(provider, dtype):
    points = points_like_keys(2, 2, 70, 48, dtype, provider=provider)
    centroids, start = state_like(points, 5)
    expected = run(provider, points, centroids, start, warm=True)
    scattered = points.mT.contiguous().mT
    spaced = torch.stack([centroids, centroids * torch.nan], -1)[..., 0]
    for got in (
        run(provider, scattered, centroids, start, warm=True),
        run(provider, points.contiguous(), spaced, start, warm=True),
    ):
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    shared, _ = run(provider, points[:1, :1].expand_as(points), centroids, start, warm=True)
    alone, _ = run(provider, points[:1, :1], centroids[:1, :1], start, warm=True)
    assert torch.equal(shared[:1, :1], alone)


def test_float64_points_on_the_reference():
    points = points_like_keys(1, 2, 60, 16).double()
    centroids, start = state_like(points, 9)
    after, labels = run("reference", points, centroids, start, warm=True)
    assert torch.equal(labels, squared_distances(points, centroids).argmin(-1).int())
    assert_means(points, labels, centroids, after)


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(provider, dtype):
    points = points_like_keys(2, 3, 1500, 48, dtype)
    centroids, start = state_like(points, 50)
    results = []
    for count in (1, 2, 3, 3):
        with threads_of_torch(count):
            means, labels = run(provider, points, centroids, start, warm=False, first=3)
            order, bounds = sort_by_label(labels, 50, provider=provider)
            chosen = {"scale": 0.1, "top_p": 0.7, "min_blocks": 1, "provider": provider}
            selected = top_p_blocks(means, means, bounds.diff(dim=-1), **chosen)
            results.append((means, labels, order, bounds, *selected))
    for result in results[1:]:
        assert all(torch.equal(got, was) for got, was in zip(result, results[0], strict=True))


def test_two_runs_give_the_same_bits(provider):
    points = points_like_keys(1, 2, 150, 64, torch.bfloat16, provider=provider)
    centroids, start = state_like(points, 15)
    once, again = (run(provider, points, centroids, start, warm=False, first=3) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])


def test_opcheck_with_strided_views(provider):
    points = points_like_keys(2, 2, 40, 24, torch.bfloat16, provider=provider)
    centroids, start = state_like(points, 3)
    ops = torch.ops.sparsify
    for warm in (True, False):
        arguments = (points, centroids.mT.contiguous().mT, start, torch.tensor(warm), 1, 1, provider)
        opcheck(ops.kmeans.default, arguments)
    labels = torch.zeros(2, 40, 2, dtype=torch.int32, device=points.device).transpose(1, 2)
    opcheck(ops.sort_by_label.default, (labels, 3, provider))
    sizes = torch.ones(1, 1, 6, dtype=torch.int32, device=points.device)[..., ::2]
    arguments = (centroids[:, :, :1].flip(1), centroids[:, :1], sizes, 0.3, 0.5, 1, provider)
    opcheck(ops.top_p_blocks.default, arguments)


def test_autocast_and_autograd_change_nothing(provider):
    device = device_of(provider)
    points = points_like_keys(1, 2, 90, 32, offset=3.0, provider=provider)
    centroids, start = state_like(points, 12)
    sizes = torch.ones(1, 1, 12, dtype=torch.int32, device=device)

    def everything() -> tuple[Tensor, ...]:
        means, labels = run(provider, points, centroids, start, warm=True, later=2)
        chosen = {"scale": 0.2, "top_p": 0.7, "min_blocks": 1, "provider": provider}
        return means, labels, *top_p_blocks(means, centroids, sizes, **chosen)

    plain = everything()
    points, centroids = points.requires_grad_(), centroids.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        results = everything()
    for got, was in zip(results, plain, strict=True):
        assert torch.equal(got, was)
        assert not got.requires_grad


def test_one_program_serves_cold_and_warm_starts(provider):
    points = points_like_keys(1, 2, 60, 16, provider=provider)
    centroids, start = state_like(points, 7)
    program = torch.compile(
        lambda warm: torch.ops.sparsify.kmeans(points, centroids, start, warm, 2, 1, provider),
        backend="aot_eager",
        fullgraph=True,
    )
    for warm in (False, True):
        with torch.compiler.set_stance("default" if not warm else "fail_on_recompile"):
            got = program(torch.tensor(warm))
        expected = run(provider, points, centroids, start, warm, first=2, later=1)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])


def test_without_a_compiler_the_definition_runs(monkeypatch):
    monkeypatch.setattr(library, "symbol", lambda *_: None)
    points = points_like_keys(1, 2, 60, 16)
    centroids, start = state_like(points, 7)
    for module in (cpu, providers.load("reference", "clustering")):
        means, labels = module.kmeans(points, centroids, start, torch.tensor(True), 1, 2)
        _, bounds = module.sort_by_label(labels, 7)
        counts, *_ = module.top_p_blocks(means, means, bounds.diff(dim=-1), 0.2, 0.5, 1)
        assert counts.shape == (1, 2, 7)


POINTS = torch.zeros(2, 4, 6, 8)
CENTROIDS = torch.zeros(2, 4, 3, 8)
START = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"points": POINTS[0]},
            ValueError,
            r"points must be a float tensor \[B, H, S, D\], got float32 \[4, 6",
        ),
        ({"points": POINTS[:, :, :0]}, ValueError, "at least one token"),
        ({"points": POINTS.int()}, ValueError, "points must be a float tensor"),
        ({"points": POINTS.double(), "provider": "cpu"}, ProviderError, "dtype"),
        ({"centroids": CENTROIDS[:, :, 0]}, ValueError, r"centroids must be float32 \[2, 4, C, 8\]"),
        ({"centroids": CENTROIDS[:1]}, ValueError, "centroids must be"),
        ({"centroids": CENTROIDS[:, :2]}, ValueError, "centroids must be"),
        ({"centroids": CENTROIDS.half()}, ValueError, r"got float16 \[2, 4, 3, 8\]"),
        ({"centroids": CENTROIDS[:, :, :0], "start": START[:0]}, ValueError, "at least one cluster"),
        ({"start": START[:2]}, ValueError, r"start must be int64 \[3\].*got int64 \[2\]"),
        ({"start": START.int()}, ValueError, "got int32"),
        ({"start": START.to("meta")}, ValueError, "start on meta"),
        ({"warm": torch.tensor([True])}, ValueError, "warm must be a 0-d bool tensor on the CPU"),
        ({"warm": torch.tensor(1)}, ValueError, "got int64"),
        ({"warm": torch.tensor(True, device="meta")}, ValueError, "on meta"),
        ({"first": 0}, ValueError, "at least 1 iteration, got 0 and 1"),
        ({"later": -1}, ValueError, "at least 1 iteration, got 1 and -1"),
        ({"provider": "gpu"}, OptionError, "provider 'gpu'"),
    ],
)
def test_kmeans_refuses(change: dict[str, Any], error: Any, words: str) -> None:
    arguments: dict[str, Any] = {
        **{"points": POINTS, "centroids": CENTROIDS, "start": START, "warm": torch.tensor(True)},
        **{"first": 1, "later": 1, "provider": "reference"},
    } | change
    with pytest.raises(error, match=words):
        kmeans(**arguments)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("heads", "before", "after"), [(2, 0, 0), (4, 3, 0), (2, 0, 5), (2, 40, 1)])
def test_clusters_are_blocks_of_the_sequence(provider, heads, before, after):
    """Of both sides at once, as of each; sorted here by Python."""
    sides = [points_like_keys(1, h, 75, 16, torch.bfloat16, seed=h, provider=provider) for h in (heads, 2)]
    states = [state_like(sides[0], 5), state_like(sides[1], 40)]
    centroids, starts = zip(*states, strict=True)
    for warm in (True, False):
        options = {"first": 2, "later": 1, "provider": provider}
        inputs = *sides, *centroids, *starts, torch.tensor(warm)
        found = cluster(*inputs, before=before, after=after, **options)
        alone = kmeans_of_both(*inputs, **options)
        for side, means, points, state in zip(found, alone, sides, states, strict=True):
            expected, labels = run(provider, points, *state, warm, first=2)
            assert torch.equal(side.centroids, expected)
            assert torch.equal(means, expected)
            repeat = heads // points.shape[1]
            for head in range(heads):
                of_token = labels[0, head // repeat].tolist()
                numbers = range(expected.shape[2])
                blocks = [[i for i, label in enumerate(of_token) if label == number] for number in numbers]
                assert side.sizes[0, head // repeat].tolist() == [len(block) for block in blocks]
                whole = [[i + before for i in block] for block in blocks]
                whole = [list(range(before))] * (before > 0) + whole
                whole += [list(range(before + 75, before + 75 + after))] * (after > 0)
                assert side.order[0, head].tolist() == [i for block in whole for i in block]
                bounds = [0, *itertools.accumulate(len(block) for block in whole)]
                assert side.bounds[0, head].tolist() == bounds


@pytest.mark.skipif(HAS_TRITON, reason="its cases run in this process")
def test_triton_in_the_interpreter():
    pass_in_the_interpreter(__file__, str(Path(__file__).with_name("test_top_p.py")), "-k", "triton")
