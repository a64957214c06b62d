"""A site whose heads are computed part by part, since its lists of single keys are long, is the site as a whole."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.sites import Inputs, Site
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.runtime import site as sites
from sparsify_compiler.testing.strategies import qkv

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Cpu:
    """The device, as `benchmarks.gpu.sites` uses one."""

    name = "cpu"

    def size(self, real: Any, tiny: Any) -> Any:
        return tiny


def called(
    method: Any, far_field: str, kv_heads: int, bias_heads: int, provider: str = "cpu"
) -> tuple[list[Tensor], int]:
    """(results of two calls of a site, number of parts)."""
    device: Any = Cpu()
    layout = TokenLayout(tokens=2 + 4 * 4 * 4 + 1, grid=(4, 4, 4), before=2, after=1)
    heads = 6 if provider == "cpu" else 2
    query, key, value = qkv(1, heads, kv_heads, layout.tokens, layout.tokens, 8, 8, torch.float32)
    bias = torch.zeros(1, bias_heads, layout.tokens)
    bias[..., 7::5] = -torch.inf
    bias[:, -1, 9] = 2.0
    inputs = Inputs(layout=layout, query=query, key=key, value=value, key_bias=bias)
    site = Site(device, method, 0.25, far_field, provider, inputs)
    found = []
    for warm in (False, True):
        found += [site.call(warm), site.report.clone(), *(t.clone() for t in site.state)]
    return found, site.module.function._parts(query, key, value, None)


@pytest.mark.parametrize("far_field", ["drop", "mean"])
@pytest.mark.parametrize(
    "method", [Keys(kv_budget=9, q_clusters=5, kmeans_iters=(2, 1)), Dsv(query_group=(2, 2, 2))], ids=str
)
def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch, method: Any, far_field: str) -> None:
    for kv_heads, bias_heads in ((6, 1), (6 if method.name == "dsv" else 3, 6)):
        monkeypatch.setattr(sites, "SHORT_LISTS", 2**28)
        whole, one = called(method, far_field, kv_heads, bias_heads)
        monkeypatch.setattr(sites, "SHORT_LISTS", 0)
        monkeypatch.setattr(sites, "LISTS", 1e-9)
        parts, several = called(method, far_field, kv_heads, bias_heads)
        assert (one, several) == (1, kv_heads)
        for got, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.skipif(not INTERPRETED, reason="tests/kernels/test_far_field.py runs it in Triton's interpreter")
@pytest.mark.parametrize(
    "method", [Keys(kv_budget=9, q_clusters=3, kmeans_iters=(1, 1)), Dsv(query_group=(2, 4, 4))]
)
def test_parts_on_triton_are_the_whole(monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    """There, clusters, statistics and exact rows are those of all heads."""
    whole, one = called(method, "mean", 2, 1, "triton")
    monkeypatch.setattr(sites, "SHORT_LISTS", 0)
    monkeypatch.setattr(sites, "LISTS", 1e-9)
    parts, several = called(method, "mean", 2, 1, "triton")
    assert (one, several) == (1, 2)
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
