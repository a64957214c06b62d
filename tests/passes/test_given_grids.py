"""A grid from the user is obeyed wherever the graph does not show that it is wrong, or refused; never ignored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import planned
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler import GridError, OptionError
from sparsify_compiler.backend import configure

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (3, 2, 5)
TOKENS, WIDTH = 30, 16
_noise = torch.Generator().manual_seed(0)


def noise(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=_noise)


VIDEO, X, TEXT = noise(2, 4, 3, 4, 10), noise(2, TOKENS, WIDTH), noise(2, 7, WIDTH)
Q, K, V = noise(3, 2, 2, TOKENS, 8).unbind()
PERM = torch.randperm(TOKENS, generator=_noise)
conv = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)).requires_grad_(False)


@torch.library.custom_op("layouts_test::exchange", mutates_args=())
def exchange(x: Tensor) -> Tensor:
    """As an all-to-all of sequence parallelism: nothing tells what it does."""
    return x.clone()


exchange.register_fake(lambda x: torch.empty_like(x))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def project(x: Tensor, y: Tensor | None = None) -> list[Tensor]:
    """Queries of x, keys and values of y."""
    y = x if y is None else y
    return [heads(linear(t)) for linear, t in zip(linears, (x, y, y), strict=True)]


def embed(video: Tensor) -> Tensor:
    return conv(video).flatten(2).transpose(1, 2)


def joined(q: Tensor, k: Tensor, v: Tensor, text: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(torch.cat([text, t], 2) for t in (q, k, v)))


attend = F.scaled_dot_product_attention
LONG = noise(3, 2, 2, TOKENS + 7, 8).unbind()

OBEYED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any], tuple[int, int]]] = {
    "queries, keys and values as inputs": (attend, (Q, K, V), {}, (0, 0)),
    "normalised and rotated": (
        lambda q, k, v, table: attend(*(F.rms_norm(t, (8,)) * table for t in (q, k)), v),
        (Q, K, V, noise(1, 1, TOKENS, 8)),
        {},
        (0, 0),
    ),
    "inputs with the heads in the channels": (
        lambda *qkv: attend(*map(heads, qkv)),
        (X, X + 1, X - 1),
        {},
        (0, 0),
    ),
    "after an exchange": (lambda x: attend(*map(exchange, project(x))), (X,), {}, (0, 0)),
    "a video after an exchange": (lambda v: attend(*map(exchange, project(embed(v)))), (VIDEO,), {}, (0, 0)),
    "shuffled alike": (lambda v: attend(*project(embed(v)[:, PERM])), (VIDEO,), {}, (0, 0)),
    "keys from before": (lambda x, k, v: attend(project(x)[0], k, v), (X, K, V), {}, (0, 0)),
    "in place of what is inferred": (
        lambda v: attend(*project(embed(v))),
        (VIDEO,),
        {"grid": (2, 3, 5)},
        (0, 0),
    ),
    "beside text, which the graph shows": (
        lambda x, text: attend(*project(torch.cat([text, x], 1))),
        (X, TEXT),
        {},
        (7, 0),
    ),
    "text before": (attend, LONG, {"text": (7, 0)}, (7, 0)),
    "text around": (attend, LONG, {"text": (3, 4)}, (3, 4)),
    "text after, in one input": (
        lambda x: attend(*project(x)),
        (noise(2, TOKENS + 7, WIDTH),),
        {"text": (0, 7)},
        (0, 7),
    ),
    "text elsewhere": (attend, (Q, K, V), {"text": (7, 0)}, (0, 0)),
    "joined inputs": (joined, (Q, K, V, noise(2, 2, 7, 8)), {"text": (7, 0)}, (7, 0)),
}
"""(function, inputs, options, tokens before and after the video)"""


@pytest.mark.parametrize("name", OBEYED)
def test_a_grid_is_obeyed(name: str) -> None:
    function, inputs, options, around = OBEYED[name]
    options = {"grid": GRID, **options}
    (plan,) = planned(function, *inputs, **options)
    assert plan.method == "tile", plan.reason
    assert plan.layout.grid == options["grid"]
    assert (plan.layout.before, plan.layout.after) == around
    assert plan.site.kind == ("joint" if any(around) else "self")


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], dict[str, Any], str]] = {
    "text of as many tokens": (lambda x, text: attend(*project(x, text)), (X, X + 1), {}, "not the tokens"),
    "a video and text of as many tokens": (
        lambda v, text: attend(*project(embed(v), text)),
        (VIDEO, X),
        {},
        "not the tokens",
    ),
    "keys rolled": (
        lambda v: attend(*project(embed(v), embed(v).roll(1, 1))),
        (VIDEO,),
        {},
        "not the tokens",
    ),
    "packed keys rolled": (lambda x: attend(*project(x, x.roll(1, 1))), (X,), {}, "not the tokens"),
    "another video": (
        lambda v: (lambda x: attend(*project(x[:1], x[1:])))(embed(v)),
        (VIDEO,),
        {},
        "other videos",
    ),
    "another packed video": (lambda x: attend(*project(x[:1], x[1:])), (X,), {}, "other videos"),
    "columns first": (
        lambda v: attend(*project(conv(v).permute(0, 4, 2, 3, 1).flatten(1, 3))),
        (VIDEO,),
        {"grid": (5, 3, 2)},
        "order",
    ),
    "no such number": (attend, (Q, K, V), {"grid": (3, 2, 4)}, "multiply to the video tokens .* 24 tokens"),
    "text that does not add up": (attend, LONG, {"text": (7, 7)}, "14 others"),
    "text not told": (attend, LONG, {}, "'text'"),
    "text elsewhere than the graph shows": (
        lambda v, text: attend(*project(torch.cat([text, embed(v)[:, PERM]], 1))),
        (VIDEO, TEXT),
        {"text": (0, 7)},
        "grid must be",
    ),
}
"""(function, inputs, options, what the error says)"""


@pytest.mark.parametrize("name", REFUSED)
def test_a_grid_that_is_wrong_is_refused(name: str) -> None:
    function, inputs, options, says = REFUSED[name]
    with pytest.raises(GridError, match=says):
        planned(function, *inputs, **{"grid": GRID, **options})


def test_attention_over_other_tokens_stays_dense_beside_it() -> None:
    def function(x: Tensor, text: Tensor) -> list[Tensor]:
        frames = x.unflatten(1, (3, 10)).flatten(0, 1)
        return [
            attend(*project(x)),
            attend(*project(x, text)),
            attend(*project(x, text[:, :1].expand(-1, TOKENS, -1) + text.mean())),
            attend(*project(text)),
            attend(*project(frames)),
        ]

    plans = planned(function, X, TEXT, grid=GRID)
    assert [plan.method for plan in plans] == ["tile"] + ["dense"] * 4


class Broken(nn.Module):
    """The queries, keys and values come out of one graph and go into the next; a third has no attention."""

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = embed(video)
        q, k, v = project(x)
        torch._dynamo.graph_break()
        out = attend(q, k, v)
        torch._dynamo.graph_break()
        x = x + out.transpose(1, 2).flatten(2)
        torch._dynamo.graph_break()
        q, k, v = project(x, text)
        torch._dynamo.graph_break()
        return attend(q, k, v)


def test_every_graph_of_a_model_that_breaks_is_looked_at_by_itself() -> None:
    explained = sparsify_compiler.explain(Broken(), VIDEO, TEXT, options={"method": "tile", "grid": GRID})
    assert [(plan.method, plan.site.kind) for plan in explained.plans] == [
        ("tile", "self"),
        ("dense", "cross"),
    ]


@torch.no_grad()
def test_outputs_are_those_of_the_given_grid() -> None:
    options = {
        "method": "tile",
        "reference_frames": 1,
        "grid": GRID,
        "text": (7, 0),
        "inner_backend": "eager",
    }
    out = torch.compile(attend, backend="sparsify", options=options)(*LONG)
    frame = torch.arange(TOKENS) // 10
    mask = torch.ones(TOKENS + 7, TOKENS + 7, dtype=torch.bool)
    mask[7:, 7:] = (frame[:, None] == frame) | (frame[:, None] == 0) | (frame == 0)
    torch.testing.assert_close(out, attend(*LONG, mask))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"text": (7, 0)}, "give grid too"),
        ({"grid": GRID, "text": 7}, "two integers"),
        ({"grid": GRID, "text": (7,)}, "two integers"),
        ({"grid": GRID, "text": (7, -1)}, "at least 0"),
        ({"grid": GRID, "text": (7, 0.5)}, "two integers"),
        ({"grid": GRID, "text": (True, 0)}, "two integers"),
        ({"grid": GRID, "txt": (7, 0)}, "Did you mean 'text'"),
    ],
)
def test_text_must_be_two_counts_beside_a_grid(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        configure({"method": "tile", **options})
    assert configure({"grid": GRID, "text": [7, 0]}).text == (7, 0)


def test_a_grid_that_replaces_another_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def attends(video: Tensor) -> Tensor:
        x = conv(video).flatten(2).mT.unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x)

    with caplog.at_level("WARNING", "sparsify_compiler"):
        (plan,) = planned(attends, VIDEO, grid=(5, 3, 2), reference_frames=1)
    assert plan.layout.grid == (5, 3, 2)
    assert "uses the given grid (5, 3, 2) in place of (3, 2, 5)" in caplog.text
