"""Every spelling of attention is found, computes the same afterwards, and what must stay says why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from sparsify_compiler.backend import configure
from sparsify_compiler.kernels import block_sparse_attention
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.capture import attention, capture
from sparsify_compiler.passes.fx import copy_graph, module_path
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import GraphPlan
from sparsify_compiler.testing.oracles import masked_attention, tile_mask
from sparsify_compiler.testing.strategies import qkv

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, H, F_, HW, D = 2, 4, 3, 5, 16
S = F_ * HW
OPTIONS = {"method": "tile", "reference_frames": 1, "grid": (F_, 1, HW)}
MASK = tile_mask(F_, 1, HW)


def compiled(function: Callable[..., Tensor], *args: Any, **options: Any) -> tuple[Tensor, GraphPlan]:
    """Output and plan of a function of tokens [B, S, ...] under the tile method."""
    plans: list[GraphPlan] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        config = configure(OPTIONS | {"inner_backend": "eager"} | options)
        analysed = pipeline.analyse(gm, config)
        plans.append(graph_plan(analysed))
        return pipeline.rewrite(analysed, config).forward

    out = torch.compile(function, backend=backend, fullgraph=True)(*args)
    (plan,) = plans
    return out, plan


def heads(x: Tensor, n: int = H) -> Tensor:
    return x.unflatten(-1, (n, D)).transpose(1, 2)


def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the same tokens, different from each other."""
    return heads(x), heads(x.sin()), heads(x.cos())


def sdpa_positional(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.scaled_dot_product_attention(q, k, v, None, 0.0, False)


def sdpa_keywords(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.scaled_dot_product_attention(value=v, query=q, key=k, attn_mask=None, dropout_p=0.0, scale=0.3)


def sdpa_gqa(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def sdpa_three_dimensions(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])[:, None]


def by_operators(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return ((q @ k.transpose(-2, -1)) * D**-0.5).softmax(-1) @ v


def by_matmul_in_float32(x: Tensor) -> Tensor:
    q, k, v = project(x)
    weights = torch.matmul(q, k.mT) / D**0.5
    weights = F.dropout(F.softmax(weights.float(), dim=-1).to(v.dtype), 0.5, training=False)
    return torch.matmul(weights, v)


def by_einsum(x: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in project(x))
    weights = torch.einsum("bihd,bjhd->bhij", q * D**-0.5, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def by_einsum_with_keys_first(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return torch.einsum(
        "b h i j, b h j d -> b h i d", torch.einsum("bhjd,bhid->bhij", k, q).mul(0.25).softmax(3), v
    )


def by_bmm(x: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in project(x))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.25, -1), v).unflatten(0, (B, H))


def by_bmm_with_scores_regrouped(x: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in project(x))
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, S, S) * 0.25
    return torch.bmm(scores.softmax(-1).view(B * H, S, S), v).view(B, H, S, D)


def by_baddbmm(x: Tensor) -> Tensor:
    q, k, v = (t.flatten(0, 1) for t in project(x))
    nothing = torch.empty(B * H, S, S)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (B, H))


def flex(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return flex_attention(q, k, v, scale=0.3)


def flex_gqa(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return flex_attention(q, k[:, :2], v[:, :2], enable_gqa=True)


def flex_with_scores(x: Tensor) -> Tensor:
    return flex_attention(*project(x), score_mod=lambda score, *_: 2 * score)


def flex_with_a_mask(x: Tensor) -> Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, S, S, "cpu")
    return flex_attention(*project(x), block_mask=mask)


def flex_with_lse(x: Tensor) -> Tensor:
    out, aux = flex_attention(*project(x), return_aux=AuxRequest(lse=True))
    return out + aux.lse[..., None]


SPELLINGS = {
    flex: 0.3,
    flex_gqa: 0.25,
    sdpa_positional: 0.25,
    sdpa_keywords: 0.3,
    sdpa_gqa: 0.25,
    sdpa_three_dimensions: 0.25,
    by_operators: 0.25,
    by_matmul_in_float32: 0.25,
    by_einsum: 0.25,
    by_einsum_with_keys_first: 0.25,
    by_bmm: 0.25,
    by_bmm_with_scores_regrouped: 0.25,
    by_baddbmm: 0.25,
}
"""Function -> the scale it applies to q kᵀ."""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, S, H * D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_is_rewritten(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    q, k, v = project(x)
    if function in (sdpa_gqa, flex_gqa):
        k, v = k[:, :2], v[:, :2]
    if function is sdpa_three_dimensions:
        q, k, v = q[:, :1], k[:, :1], v[:, :1]
    exact, _ = masked_attention(q, k, v, MASK, scale=SPELLINGS[function])
    out, plan = compiled(function, x)
    assert [p.method for p in plan] == ["tile"]
    assert plan.plans[0].site.kind == "self"
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", ["sdpa", "operators", "bmm"])
@pytest.mark.parametrize("kind", ["bool", "additive", "per head", "expanded", "two dimensions"])
def test_masks_of_the_key_alone(kind: str, spelling: str, x: Tensor) -> None:
    seen = torch.rand(B, 1, 1, S, generator=torch.Generator().manual_seed(1)) > 0.3
    bias = torch.randn(B, H, 1, S, generator=torch.Generator().manual_seed(2))
    mask = {
        "bool": seen,
        "additive": torch.zeros(B, 1, 1, S).masked_fill(~seen, -torch.inf),
        "per head": bias,
        "expanded": seen.expand(B, 1, S, S),
        "two dimensions": seen[0, 0],
    }[kind]

    def function(x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = project(x)
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if spelling == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores.unflatten(0, (B, H)) if spelling == "bmm" else scores
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        weights = weights.flatten(0, 1) if spelling == "bmm" else weights
        return (weights @ v).view(B, H, S, D)

    allowed, added = (
        (mask, torch.zeros(B, H, S)) if mask.dtype == torch.bool else (MASK, mask[:, :, 0].expand(B, H, S))
    )
    exact, _ = masked_attention(*project(x), MASK & allowed, key_bias=added)
    out, plan = compiled(function, x, mask)
    assert [p.method for p in plan] == ["tile"], plan.plans[0].reason
    assert plan.plans[0].site.mask == "key"
    rows = exact.isfinite().all(-1) & (MASK & (allowed if mask.dtype == torch.bool else MASK)).any(-1)
    torch.testing.assert_close(out.double()[rows], exact[rows], rtol=1e-5, atol=1e-5)


def _with(**options: Any) -> Callable[..., Tensor]:
    def function(x: Tensor, *mask: Tensor) -> Tensor:
        q, k, v = project(x)
        return F.scaled_dot_product_attention(q, k, v, *mask, **options)

    return function


def cross(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7])


def cross_of_equal_length(x: Tensor, y: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x), heads(y), heads(y))


def pooled(x: Tensor) -> Tensor:
    q, k, v = project(x)
    k, v = (F.avg_pool1d(t.flatten(0, 1).mT, 3).mT.unflatten(0, (B, H)) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


MODULE = torch.nn.MultiheadAttention(H * D, H, batch_first=True).requires_grad_(False)


def by_module(x: Tensor) -> Tensor:
    return MODULE(x, x, x, need_weights=False)[0]


def by_module_function_in_keywords(x: Tensor) -> Tensor:
    q = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        query=q,
        key=q,
        value=q,
        embed_dim_to_check=H * D,
        num_heads=H,
        in_proj_weight=MODULE.in_proj_weight,
        in_proj_bias=MODULE.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=MODULE.out_proj.weight,
        out_proj_bias=MODULE.out_proj.bias,
        need_weights=False,
    )
    return out


def unfused_with_dropout(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


def softmax_into_out(x: Tensor) -> Tensor:
    q, k, v = project(x)
    scores = q @ k.mT
    torch.softmax(scores, -1, out=scores)
    return scores @ v


def softmax_copied(x: Tensor) -> Tensor:
    q, k, v = project(x)
    scores = torch.empty(B, H, S, S)
    scores[:] = q @ k.mT
    weights = torch.empty_like(scores).copy_(scores.softmax(-1))
    return weights @ v


@torch.compiler.allow_in_graph
def kept_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.compiler.allow_in_graph
def kept_whole_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def softmax_over_queries(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return (q @ k.mT).softmax(-2) @ v


def linear_attention(x: Tensor) -> Tensor:
    q, k, v = project(x)
    return q.softmax(-1) @ (k.mT @ v)


@pytest.mark.parametrize(
    ("function", "more", "reason"),
    [
        (_with(is_causal=True), (), "causal"),
        (_with(dropout_p=0.1), (), "dropout"),
        (_with(), (torch.rand(S, S) > 0.1,), "mask depends on the query"),
        (_with(), (torch.randn(B, 1, S, S),), "mask depends on the query"),
        (_with(), (torch.randn(1, 1, 1, S, requires_grad=True),), "mask needs a gradient"),
        (cross, (), "cross"),
        (pooled, (), "cross"),
        (unfused_with_dropout, (), "dropout"),
        (softmax_into_out, (), "written to another tensor"),
        (softmax_copied, (), "written to another tensor"),
        (lambda x: kept_whole(*project(x)), (), "kept_whole, which allow_in_graph hides"),
        (lambda x: kept_whole_by_hand(*project(x)), (), "kept_whole_by_hand, which allow_in_graph hides"),
        (flex_with_scores, (), "flex_attention"),
        (flex_with_a_mask, (), "flex_attention"),
        (flex_with_lse, (), "flex_attention"),
        (by_module, (), "nn.MultiheadAttention"),
        (by_module_function_in_keywords, (), "nn.MultiheadAttention"),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_what_stays_dense_says_why(function: Any, more: tuple[Any, ...], reason: str, x: Tensor) -> None:
    torch.manual_seed(0)
    exact = function(x, *more)
    torch.manual_seed(0)
    out, plan = compiled(function, x, *more)
    assert [p.method for p in plan] == ["dense"]
    assert reason in plan.plans[0].reason
    assert torch.equal(out, exact)  # the model's own call, bit for bit


def test_keys_of_another_input_stay_dense_unless_a_grid_is_given(x: Tensor) -> None:
    y = torch.randn(B, S, H * D)
    out, (plan,) = compiled(cross_of_equal_length, x, y, grid=None)
    assert plan.method == "dense"
    assert plan.reason == "keys are not the tokens of the queries"
    assert torch.equal(out, cross_of_equal_length(x, y))
    torch._dynamo.reset()
    _, (plan,) = compiled(cross_of_equal_length, x, y)
    assert plan.layout.grid == OPTIONS["grid"]


@pytest.mark.parametrize("function", [softmax_over_queries, linear_attention])
def test_what_is_not_attention_is_no_site(function: Any, x: Tensor) -> None:
    out, plan = compiled(function, x)
    assert not plan.plans
    assert torch.equal(out, function(x))


def test_sites_are_named_by_their_modules_and_numbered() -> None:
    stack = {
        "1": ("L['self'].__dict__['_modules']['blocks'].0", int),
        "2": ("L['self']._modules['blocks'].0.attn1", int),
    }
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = stack
    assert module_path(node) == "blocks.0.attn1"
    node.meta["nn_module_stack"] = {"1": ("L['self']", int)}
    assert module_path(node) == ""


def test_a_dense_plan_puts_the_models_own_call_back(x: Tensor) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        twin = capture(copy_graph(gm))
        assert [n.target for n in twin.graph.nodes].count(attention) == 1
        config = configure({"method": "dense"})
        graph = pipeline.rewrite(pipeline.analyse(gm, config), config)
        graphs.append(graph)
        assert [n.target for n in graph.graph.nodes] == [n.target for n in gm.graph.nodes]
        return graph.forward

    for function in (sdpa_keywords, by_einsum):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(function, backend=backend)(x), function(x))
    assert len(graphs) == 2


@pytest.mark.parametrize("provider", ["reference", "cpu"])
def test_strided_views_as_models_pass_them(provider: str) -> None:
    """[B, S, H, D] in memory, slices of a fused projection: what the ops promise holds on them too."""
    q, k, v = qkv(B, H, H, S, S, D, D, torch.float32)
    fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    from sparsify_compiler.methods.tile import FittedTile
    from sparsify_compiler.plan import TokenLayout

    table = FittedTile(reference_frames=1).table(TokenLayout(tokens=S, grid=(F_, 1, HW)))
    exact, _ = masked_attention(q, k, v, MASK)
    out, _ = block_sparse_attention(*fused, table, provider=provider)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
