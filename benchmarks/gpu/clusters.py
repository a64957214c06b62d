"""k-means, sorting by cluster and the selection of blocks by estimated attention, against float64."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import DTYPES, generator, named, randn
from benchmarks.gpu.runner import Case
from sparsify_compiler.kernels.clustering import kmeans, sort_by_label, top_p_blocks

ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Error of a squared distance, relative to the largest: centroids are rounded to the type of the points."""

CLOSE = 2e-5
"""Error of a share of the attention in fp32."""


def cases(device: Device) -> Iterable[Case]:
    """All kernels of clustering."""
    for dtype in DTYPES:
        for width in device.size((64, 80, 128), (80,)):
            yield f"k-means {named(dtype)} D {width}", partial(check_kmeans, device, width, dtype)
        yield f"k-means {named(dtype)} far from 0", partial(check_blobs, device, dtype)
    yield "k-means, a point that is not finite", partial(check_not_finite, device)
    for tokens, count in device.size(((75_600, 1000), (1000, 300), (511, 3)), ((600, 20), (31, 3))):
        yield f"sort {tokens} tokens, {count} labels", partial(check_sort, device, tokens, count)
    for rows, count in device.size(((300, 1000), (350, 1440), (65, 4800)), ((1, 33),)):
        yield f"top-p {rows} x {count}", partial(check_top_p, device, rows, count)


def points_in_blobs(
    device: Device, batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype, offset: float = 0.0
) -> Tensor:
    """[B, H, S, D] around some centres; a slice along S of a tensor with NaN outside."""
    blobs = 8
    blob = torch.randint(blobs, (tokens,), generator=generator(device, 1), device=device.name)
    inside = 2 * randn(device, batch, blobs, heads, width, seed=2)[:, blob]
    inside = inside + 0.5 * randn(device, batch, tokens, heads, width, seed=3)
    inside = inside + offset * randn(device, heads, width, seed=4)
    whole = torch.full((batch, tokens + 5, heads, width), torch.nan, device=device.name)
    whole[:, 3:-2] = inside
    return whole.to(dtype).transpose(1, 2)[:, :, 3:-2]


def squared_distances(points: Tensor, centroids: Tensor) -> Tensor:
    """[B, H, S, C] float64, from differences."""
    exactly = "donot_use_mm_for_euclid_dist"
    return torch.cdist(points.double(), centroids.double(), compute_mode=exactly).square()


def check_kmeans(device: Device, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Check that an iteration assigns every point to the nearest centroid and moves centroids to the means, and
    that two runs give the same bits."""
    batch, heads, tokens, count = device.size((2, 3, 1500, 130), (1, 1, 40, 7))
    points = points_in_blobs(device, batch, heads, tokens, width, dtype)
    start = torch.randperm(tokens, generator=generator(device, 5), device=device.name)[:count]
    unread = torch.full((batch, heads, count, width), torch.nan, device=device.name)
    first, _ = kmeans(points, unread, start, torch.tensor(False), first=2, later=9, provider="triton")
    after, labels = kmeans(points, first, start, torch.tensor(True), first=9, later=1, provider="triton")
    distances = squared_distances(points, first)
    assert ((labels >= 0) & (labels < count)).all(), "a label out of range"
    chosen = distances.gather(-1, labels.long()[..., None])[..., 0]
    too_far = float(((chosen - distances.amin(-1)) / distances.max()).max())
    assert too_far <= 2 * ROUNDING[dtype], f"a centroid {too_far:.1e} further than the nearest"
    own = (labels[:, :, None] == torch.arange(count, device=device.name)[:, None]).double()
    sizes = own.sum(-1, keepdim=True)
    means = torch.where(sizes > 0, own @ points.double() / sizes.clamp(min=1), first.double())
    error = float((after - means).abs().max() / points.double().abs().max())
    assert error <= 2e-6, f"a mean is {error:.1e} off"
    whole = kmeans(points, unread, start, torch.tensor(False), first=3, later=9, provider="triton")
    assert torch.equal(whole[0], after), "three iterations are not two and one"
    assert torch.equal(whole[1], labels)
    return {"off": error, "further": too_far}


def check_blobs(device: Device, dtype: torch.dtype) -> None:
    """Check that blobs far from 0 get different labels, although their differences are small next to their mean."""
    tokens = device.size(1000, 40)
    points = points_in_blobs(device, 1, 2, tokens, 64, dtype, offset=40.0)
    exact = points.double()
    start = torch.zeros(8, dtype=torch.long, device=device.name)
    for c in range(1, 8):  # a point of every blob: the point furthest from those before
        start[c] = squared_distances(exact[:, :1], exact[:, :1, start[:c]]).amin(-1)[0, 0].argmax()
    unread = torch.full((1, 2, 8, 64), torch.nan, device=device.name)
    found, labels = kmeans(points, unread, start, torch.tensor(False), first=3, later=1, provider="triton")
    assert torch.equal(labels, squared_distances(points, found).argmin(-1).int())
    assert torch.equal(labels[:, 0], labels[:, 1])


def check_not_finite(device: Device) -> None:
    """Check that a point that is not finite has a label, and affects at most one centroid, in its own head."""
    points = points_in_blobs(device, 1, 2, 90, 64, torch.float32).contiguous()
    points[0, 0, 70, 3] = torch.nan
    start = torch.arange(9, device=device.name) * 7
    unread = torch.full((1, 2, 9, 64), torch.nan, device=device.name)
    found, labels = kmeans(points, unread, start, torch.tensor(False), first=2, later=1, provider="triton")
    assert ((labels >= 0) & (labels < 9)).all()
    assert found[0, 1].isfinite().all()
    assert int((~found[0, 0].isfinite()).any(-1).sum()) <= 1


def check_sort(device: Device, tokens: int, count: int) -> None:
    """Check the stable sort, and the bounds of the labels."""
    labels = torch.randint(
        count, (1, tokens, 3), generator=generator(device, 1), device=device.name, dtype=torch.int32
    ).transpose(1, 2)
    order, bounds = sort_by_label(labels, count, provider="triton")
    assert torch.equal(order, labels.long().argsort(dim=-1, stable=True).int())
    sizes = torch.stack([torch.bincount(labels[0, h], minlength=count) for h in range(3)])
    assert torch.equal(bounds[0].diff(dim=-1), sizes.int())
    assert not bounds[..., 0].any()


def check_top_p(device: Device, rows: int, count: int) -> dict[str, Any]:
    """Check that a row keeps the fewest blocks that hold the share, at least `min_blocks`, and all from 1 on."""
    batch, kv_heads, heads, width, scale = device.size(2, 1), 2, 4, 128, 0.1
    q = randn(device, batch, heads, rows, width, seed=1)
    k = randn(device, batch, kv_heads, count, width, seed=2)
    sizes = torch.randint(0, 80, (batch, kv_heads, count), generator=generator(device, 3), device=device.name)
    shares = scale * q.double() @ k.double().repeat_interleave(2, 1).mT
    shares = shares + sizes.double().log().repeat_interleave(2, 1)[:, :, None]
    shares = shares.softmax(-1)
    worst, column = 0.0, torch.arange(count, device=device.name)
    for top_p, least in ((0.0, 1), (0.5, 4), (0.9, 1), (1.0, 1)):
        counts, indices, kept = top_p_blocks(
            q, k, sizes.int(), scale=scale, top_p=top_p, min_blocks=least, provider="triton"
        )
        assert torch.equal(indices.sort(-1).values, column.int().expand_as(indices)), "no permutation"
        inside = column < counts[..., None]
        # Kept blocks rise, and so do the others.
        rises = indices.diff(dim=-1) > 0
        border = column[1:] == counts[..., None]
        assert (rises | border).all(), "indices do not rise"
        mine = shares.gather(-1, indices.long())
        mass = (mine * inside).sum(-1)
        worst = max(worst, float((mass - kept.double()).abs().max()))
        assert worst <= CLOSE, f"a kept share is {worst:.1e} off"
        assert (counts >= least).all()
        if top_p == 1.0:
            assert (counts == count).all()
            continue
        smallest = mine.masked_fill(~inside, torch.inf).amin(-1)
        assert (mine.masked_fill(inside, 0.0).amax(-1) <= smallest + CLOSE).all(), "a larger one is left"
        assert (mass >= top_p - CLOSE).all(), "too little is kept"
        assert ((counts == least) | (mass - smallest < top_p + CLOSE)).all(), "one too many is kept"
    return {"off": worst}
