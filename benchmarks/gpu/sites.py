"""Every method as a model calls it: selection, attention and far field of a site, by Triton and by the reference.

By rounding, the selections of two providers may differ in a few blocks: a point may lie between two clusters. So
the reference runs twice on the same inputs. With the selection of the Triton site it must give the same output;
with its own selection, an output as near to dense attention.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.inputs import by_heads, named, randn, site_of, some_rows
from benchmarks.gpu.runner import Case
from sparsify_compiler import methods
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods import DynamicMethod, LearningMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dsv import Choice, Dsv, most_share
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.sta import Sta
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.site import SparseSite, settled
from sparsify_compiler.runtime.site_inputs import REPORT, SiteInputs, state_shapes
from sparsify_compiler.testing import oracles

SAME = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest |one - other| / |other| of two providers with the same selection."""

Grid = tuple[int, int, int]
VIDEO: Grid = (21, 45, 80)
"""Wan at 720p: 75,600 tokens."""

METHODS = tuple(name for name in methods.METHODS if name != "dense")
DENSITIES = (0.1, 0.2, 0.3)


def method_of(device: Device, name: str, density: float, min_gain: float | None, grid: Grid) -> Any:
    """The method with about this share of the keys; in a dry run with few iterations and small blocks.

    A method without a case here has its default options, at any density.

    Args:
        min_gain: for methods that have one, with the linear far field.
        grid: the grid of the video.
    """
    by_share = {"top_p": 1e-6, "min_kv_ratio": density, "min_gain": min_gain}
    match name:
        case "svg2":
            small = {"q_clusters": 2, "kv_clusters": 4, "kmeans_iters": (1, 1)}
            return Svg2(**by_share, **device.size({}, small))
        case "cubes":
            return Cubes(**by_share, **device.size({}, {"cube": (2, 2, 2), "query_cube": (2, 2, 4)}))
        case "keys":
            return Keys(kv_budget=density, **device.size({}, {"q_clusters": 2, "kmeans_iters": (1, 1)}))
        case "dsv":
            return Dsv(query_group=(2, 4, 4))
        case "tile":
            frames = dict(zip(DENSITIES, (1, 2, 3), strict=True))
            return Tile(reference_frames=device.size(frames[density], 1))
        case "sta":  # a window has 3 tiles in each dimension
            tiles = dict(zip(DENSITIES, ((5, 7, 8), (4, 5, 7), (3, 5, 6)), strict=True))[density]
            return Sta(tile=tuple(-(-size // count) for size, count in zip(grid, tiles, strict=True)))
        case _:
            return methods.METHODS[name]()


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The inputs of a site."""

    layout: TokenLayout
    query: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None = None


def planted(
    device: Device, layout: TokenLayout, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> Inputs:
    """Inputs in which queries resemble keys of their own kind, of some tens; values partly follow the kind."""
    tokens, kinds = layout.tokens, device.size(60, 4)
    kind = torch.randint(kinds, (tokens,), generator=torch.Generator().manual_seed(0)).to(device.name)

    def of_kind(heads: int, strength: float, seed: int, shared: int) -> Tensor:
        centre = randn(device, kinds, kv_heads, width, seed=shared).repeat_interleave(heads // kv_heads, 1)
        found = strength * (centre[kind] + 0.5 * randn(device, tokens, heads, width, seed=seed))
        return found.to(dtype)[None].transpose(1, 2)

    return Inputs(
        layout=layout,
        query=of_kind(heads, 1.0, seed=1, shared=9),
        key=of_kind(kv_heads, 0.7, seed=2, shared=9),
        value=of_kind(kv_heads, 1.0, seed=3, shared=8),
    )


class Site:
    """A site of a model with a method, its constants and its state, that a provider runs."""

    def __init__(
        self, device: Device, method: Any, density: float, far_field: str, provider: str, inputs: Inputs
    ) -> None:
        """Args:
        density: share of the keys that heads read, for a method that is trained.
        """
        site, layout = site_of(inputs.query, inputs.key), inputs.layout
        assert not (why := method.refusal(layout)), why
        fitted = method.fit(site, layout)
        self.plan = AttentionPlan(
            site=site,
            layout=layout,
            method=method.name,
            settings=fitted,
            provider=provider,
            far_field=far_field,
            reason="",
        )
        if isinstance(fitted, DynamicMethod):
            tensors = fitted.constants(layout)
        else:
            tensors = {n: t for n, t in fitted.table(layout).tensors().items() if t is not None}
        self.choice, trained = None, dict[str, Tensor]()
        if isinstance(fitted, LearningMethod):
            shares = {"shares": torch.full((site.heads,), density)}
            trained = fitted.trained(site, layout) | shares
            self.choice = Choice(fitted.groups[0], most_share(density), "all")
        self.method = settled(self.plan, self.choice)
        self.operands = {n: t.to(device.name) for n, t in (tensors | trained).items()}
        shapes = state_shapes(self.plan)
        self.state = [torch.zeros(shape, device=device.name) for shape in shapes.values()]
        self.report = torch.zeros(len(REPORT), 1, site.heads, device=device.name)
        self.names = SiteInputs(
            constants=tuple(n for n in tensors if n not in trained),
            trained=tuple(trained),
            state=tuple(shapes),
            remembers=True,
        )
        self.module = SparseSite(self.plan, self.names, choice=self.choice)
        self.inputs, self.cold, self.warm = inputs, torch.tensor(False), torch.tensor(True)

    def call(self, warm: bool = True) -> Tensor:
        """Run a call of a generation: its first, or a later one, which continues from the state."""
        given = self.inputs
        state = (self.warm if warm else self.cold), *self.state, self.report
        return self.module(
            given.query, given.key, given.value, given.key_bias, *self.operands.values(), *state
        )

    def reported(self) -> dict[str, float]:
        """Means over the heads of the last call's report."""
        return {name: float(row.nan_to_num().mean()) for name, row in zip(REPORT, self.report, strict=True)}


@contextmanager
def selecting_by_triton(method: Any) -> Iterator[None]:
    """Make the method select by the Triton kernels, for any provider of its site."""
    kind = type(method)
    if not isinstance(method, DynamicMethod):
        yield
        return
    plain = kind.select

    def select(self: Any, tokens: Any, *rest: Any, **constants: Any) -> Any:
        return plain(self, replace(tokens, provider="triton"), *rest, **constants)

    with mock.patch.object(kind, "select", select):
        yield


TINY: Grid = (2, 2, 4)
"""The grid of a dry run."""


def cases(name: str, device: Device) -> Iterable[Case]:
    """The cases of one method: small, in every type, with text, hidden keys and grouped heads; larger; and at video
    size without the reference, which takes too long, but without synchronisation and in a graph."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for dtype, far_field in device.size(tuple(product(dtypes, FAR_FIELDS)), ((torch.float16, "mean"),)):
        what = f"{name} {far_field} {named(dtype)}, text, hidden keys, grouped heads"
        yield what, partial(check_small, device, name, far_field, dtype)
    for far_field in device.size(FAR_FIELDS, ("linear",)):
        yield f"{name} {far_field} of a short video", partial(check_short, device, name, far_field)
    for far_field in device.size(FAR_FIELDS, ("linear",)):
        yield f"{name} {far_field} at video size", partial(check_video, device, name, far_field)


def check_small(device: Device, name: str, far_field: str, dtype: torch.dtype) -> dict[str, Any]:
    """Check a video with text before and after it, hidden keys, and two query heads for each key head."""
    grid: Grid = device.size((6, 10, 12), TINY)
    before, after = 5, 3
    layout = TokenLayout(tokens=before + math.prod(grid) + after, grid=grid, before=before, after=after)
    bias = torch.zeros(1, 1, layout.tokens, device=device.name)
    bias[..., ::9] = -torch.inf
    inputs = planted(device, layout, *device.size((4, 2, 64), (2, 1, 16)), dtype)
    return compare(device, name, 0.3, far_field, replace(inputs, key_bias=bias))


def check_short(device: Device, name: str, far_field: str) -> dict[str, Any]:
    """Check a video of 8,640 tokens."""
    return compare(device, name, 0.2, far_field, video_inputs(device, (9, 24, 40), 4))


def video_inputs(device: Device, grid: Grid, heads: int) -> Inputs:
    """Inputs in bfloat16 with a head dim of 128."""
    grid = device.size(grid, TINY)
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)
    return planted(device, layout, *device.size((heads, heads, 128), (1, 1, 16)), torch.bfloat16)


def check_video(device: Device, name: str, far_field: str) -> dict[str, Any]:
    """Check video size with eight heads; 40 heads run the same compiled kernels."""
    inputs = video_inputs(device, VIDEO, 8)
    method = method_of(device, name, 0.1, gain(far_field), inputs.layout.grid)
    site = Site(device, method, 0.1, far_field, "triton", inputs)
    for warm in device.size((False, True), ()):  # compile before the check, since compilation synchronises
        site.call(warm)
    for warm in (False, True):
        with device.not_synchronising():
            out = site.call(warm)
    assert out.isfinite().all(), "not all of the output is finite"
    return {"density": round(site.reported()["density"], 4)} | check_graph(device, site)


def gain(far_field: str) -> float | None:
    """The default `min_gain` of methods that have one."""
    return 0.02 if far_field == "linear" else None


def check_graph(device: Device, site: Site) -> dict[str, Any]:
    """Check that a graph of a later call, replayed with other inputs, gives the result of a call."""
    start = [t.clone() for t in site.state]

    def rewind() -> None:
        for held, was in zip(site.state, start, strict=True):
            held.copy_(was)

    out, replay = device.captured(site.call)
    given = site.inputs
    for tensor in (given.query, given.key, given.value):
        tensor.copy_(tensor.flip(2) + 0.1 * tensor.roll(1, 2))
    rewind()
    expected = site.call().clone()
    rewind()
    replay()
    device.synchronise()
    off = difference(out, expected)
    assert off <= 1e-3, f"the replay of a graph is {off:.1e} off"
    return {"graph_off": off}


def difference(one: Tensor, other: Tensor) -> float:
    """|one - other| / |other|."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def compare(device: Device, name: str, density: float, far_field: str, inputs: Inputs) -> dict[str, Any]:
    """Compare a first and a later call by both providers."""
    method = method_of(device, name, density, gain(far_field), inputs.layout.grid)

    def new(provider: str) -> Site:
        return Site(device, method, density, far_field, provider, inputs)

    ours, following, alone = new("triton"), new("reference"), new("reference")
    worst = 0.0
    for warm in (False, True):
        out = ours.call(warm)
        assert out.isfinite().all(), "not all of the output is finite"
        with selecting_by_triton(method):
            same = following.call(warm)
        # Rounding in the sampled rows may switch a head's far field. Such heads are not compared.
        agree = (ours.report[3] == following.report[3])[0]
        assert agree.any(), "the far field of every head differs: on with one provider, off with the other"
        worst = max(worst, difference(out[:, agree], same[:, agree]))
        assert worst <= SAME[out.dtype], f"{worst:.1e} from the reference with the same selection"
    alone.call(warm=False)
    of_dense = [distance_from_dense(one, inputs) for one in (out, alone.call())]
    assert of_dense[0] <= 1.15 * of_dense[1] + SAME[out.dtype], (
        f"{of_dense[0]:.2e} from dense attention, the reference {of_dense[1]:.2e}"
    )
    report = ours.reported()
    return {
        "off": worst,
        "from_dense": of_dense[0],
        "reference_from_dense": of_dense[1],
        "density": round(report["density"], 4),
        "far_field_on": report["far_field"],
        "heads_judged_otherwise": int((~agree).sum()),
    }


def distance_from_dense(out: Tensor, inputs: Inputs) -> float:
    """|out - dense| / |dense| on a few rows, dense in float64."""
    rows = some_rows(inputs.layout.tokens, 32, out)
    everything = torch.ones(1, dtype=torch.bool, device=out.device)
    off = size = 0.0
    for some, of_keys in by_heads(out.shape[1], inputs.key.shape[1]):
        exact, _ = oracles.masked_attention(
            inputs.query[:, some][:, :, rows],
            inputs.key[:, of_keys],
            inputs.value[:, of_keys],
            everything,
            key_bias=inputs.key_bias,
        )
        off += float((out[:, some][:, :, rows].double() - exact).square().sum())
        size += float(exact.square().sum())
    return math.sqrt(off / size)
