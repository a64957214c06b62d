"""Graphs whose tokens ranks share: equal to one process, in threads that exchange real tensors."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from sparsify_compiler.errors import OptionError
from sparsify_compiler.passes.sharding import folded
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.dits import Recipe
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.parallel import Outcome, compare_graph, in_threads

PLAIN = Recipe(
    grid=(3, 4, 5), batch=1, patch="conv3d", frames_first=False, position="rope halves", text="none",
    text_tokens=3, extra_tokens=0, streams=False, mask="none", heads=3, kv_heads=3, head_dim=8, split="linears",
    view="view", norm=True, spelling="keywords", scale=None, trap="", trapped=0,
)  # fmt: skip
GQA = replace(PLAIN, heads=4, kv_heads=2, spelling="gqa", batch=3)
JOINT = replace(
    GQA, text="first", text_tokens=5, streams=True, mask="additive", split="chunks", view="unflatten"
)
MASKED = replace(
    PLAIN, mask="per head", text="last", extra_tokens=2, position="rope complex", split="permute"
)
BY_HAND = replace(
    PLAIN, spelling="matmul", mask="bool", text="cross", patch="linear", position="added", batch=2
)
PACKED = replace(PLAIN, patch="packed", position="rope pairs", frames_first=False, view="reshape")
BOUND = 1e-5
"""Rounding in float32: matrix products of fewer rows may add in another order."""


def outcome(recipe: Recipe, method: str, size: int, trains: bool = False, **others: Any) -> Outcome:
    model, inputs = recipe.build()
    options = {"method": method, "provider": "reference"}
    (found,) = in_threads(model, inputs, options, size, trains=trains, **others)
    return found


@pytest.mark.parametrize(
    ("recipe", "method", "size", "trains"),
    [
        pytest.param(PLAIN, "tile", 2, True, id="tile-3-heads-2-ranks-training"),
        pytest.param(PLAIN, "svg2", 4, False, id="svg2-3-heads-4-ranks"),
        pytest.param(JOINT, "keys", 3, False, id="keys-joint-gqa-mask-batch-3"),
        pytest.param(JOINT, "tile", 4, True, id="tile-joint-gqa-mask-training"),
        pytest.param(MASKED, "cubes", 2, False, id="cubes-mask-of-each-head"),
        pytest.param(MASKED, "dense", 4, True, id="dense-mask-of-each-head-4-ranks-training"),
        pytest.param(BY_HAND, "dense", 4, True, id="dense-by-hand-cross-training"),
        pytest.param(PACKED, "cubes", 3, False, id="cubes-packed"),
    ],
)
def test_ranks_compute_what_one_process_computes(
    recipe: Recipe, method: str, size: int, trains: bool
) -> None:
    found = outcome(recipe, method, size, trains)
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    assert len(found.sharding.sites) == 2, found.sharding
    assert found.sharding.tokens == 60
    assert [name for name, _ in found.sharding.gathered] == ["output"], "tokens are gathered once, at the end"


def move_a_cut(graph: fx.GraphModule, ranks: Ranks) -> None:
    """On the last rank, take the positions of the tokens from one place too early."""
    if ranks.rank == ranks.size - 1:
        cuts = [node for node in graph.graph.nodes if node.target == "narrow"]
        of_angles = next(
            node for node in cuts if node.args[1] == node.args[0].meta["example_value"].dim() - 2
        )
        source, dim, first, length = of_angles.args
        of_angles.args = source, dim, first - 1, length
        graph.recompile()


def test_a_position_that_is_off_by_one_shows() -> None:
    assert outcome(PLAIN, "dense", 2, change=move_a_cut).output > 1e-3


class Around(nn.Module):
    """Attention over tokens, and functions of the tokens before and after it."""

    def __init__(self, before: Any = nn.Identity(), after: Any = nn.Identity()) -> None:  # noqa: B008
        super().__init__()
        self.before, self.after = before, after
        self.patch = nn.Conv3d(2, 12, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(12, 36)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.before(self.patch(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.after(tokens).sin()


def of(model: Around) -> Outcome:
    """The outcome of training on three ranks, 30 tokens, in float64, since some functions amplify rounding."""
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 2, 2, 6, 10, dtype=torch.float64)}
    (found,) = in_threads(model.double(), inputs, {"method": "dense"}, 3, trains=True)
    assert found.output <= 1e-12
    assert found.gradient <= 1e-10
    return found


def written(x: Tensor) -> Tensor:
    """Tokens written into a tensor made for them, every other channel at a time, as rotary embeddings do."""
    made = torch.zeros(2, 30, 12, dtype=x.dtype)
    made[..., 0::2] = x[..., 1::2]
    made[..., 1::2] = -x[..., 0::2]
    return made.add_(x)


MIXING = {
    "cumsum": (lambda x: x + x.cumsum(1), "cumsum mixes tokens"),
    "mean": (lambda x: x - x.mean(1, keepdim=True), "mean mixes tokens"),
    "softmax": (lambda x: x * x.softmax(1), "_softmax mixes tokens"),
    "flip": (lambda x: x + x.flip(1), "flip mixes tokens"),
    "narrow": (lambda x: x + x.narrow(1, 3, 1), "its result has only some tokens"),
    "matmul": (lambda x: x + (x.mT @ x).mean(), "bmm mixes tokens"),
    "layer_norm": (lambda x: F.layer_norm(x, (30, 12)), "native_layer_norm mixes tokens"),
    "index_select": (lambda x: x.index_select(1, torch.arange(29, -1, -1)), "index_select mixes tokens"),
}
"""Operator -> (a function of tokens with it, a part of the reason why it needs all tokens)."""

APART = (
    written,
    lambda x: F.layer_norm(x, (12,)) * torch.linspace(0, 1, 30)[:, None],
    lambda x: x.reshape(60, 12).softmax(-1).view(2, 30, 12),
    lambda x: torch.cat([x.chunk(2, -1)[1], x[..., :6]], -1),
    lambda x: x + torch.arange(x.size(1)).remainder(7)[None, :, None],
    lambda x: torch.where(torch.arange(30)[:, None] < 11, x, -x),
    lambda x: x.split([4, 8], dim=-1)[1].repeat(1, 1, 2)[..., :12].clone().mul_(2),
    lambda x: torch.cat([x.new_ones(2, 4, 12), x], 1).sin().narrow(1, 4, 30),
    lambda x: torch.cat([x, x.new_ones(2, 4, 12)], 1).sin().split([30, 4], 1)[0].expand(2, 30, 12),
)
"""Functions of tokens that keep them apart."""


def chain(functions: Any) -> Any:
    """All functions, one after the other."""
    return lambda x: functools.reduce(lambda value, function: function(value), functions, x)


def test_what_mixes_tokens_gets_all_of_them_and_is_named() -> None:
    found = of(Around(after=chain([function for function, _ in MIXING.values()]))).sharding
    reasons = dict(found.gathered)
    for name, (_, why) in MIXING.items():
        assert why in reasons[name]
        assert f"{name}: {reasons[name]}" in str(found)


def test_what_keeps_tokens_apart_runs_on_each_ranks_tokens() -> None:
    found = of(Around(chain(APART), chain(APART))).sharding
    assert [name for name, _ in found.gathered] == ["output"], found


def test_numbers_drawn_for_tokens_are_refused() -> None:
    model = Around(nn.Dropout(0.5)).train()
    with pytest.raises(OptionError, match=r"draws no random numbers for its tokens.*Set dropout to 0"):
        in_threads(model, {"x": torch.randn(1, 2, 2, 4, 4)}, {"method": "dense"}, 2, trains=True)


@pytest.mark.parametrize(
    ("model", "x", "why"),
    [
        (Around(), torch.randn(1, 2, 1, 2, 4), "2 tokens are fewer than ranks"),
        (nn.Conv3d(2, 2, 1), torch.randn(1, 2, 2, 2, 2), "no attention over its own tokens"),
    ],
)
def test_a_graph_that_cannot_be_shared_runs_whole_with_the_reason(model: Any, x: Tensor, why: str) -> None:
    def call(x: Tensor) -> Tensor:
        return model(x)

    (found,) = in_threads(call, {"x": x}, {"method": "dense"}, 3)
    assert found.output == 0
    assert why in found.sharding.reason
    assert "runs the whole graph" in str(found.sharding)


@pytest.mark.nightly
def test_a_mask_that_depends_on_the_query_is_read_whole() -> None:
    """Padded text of HunyuanVideo 1.5 has other rows of the mask than valid text."""
    model, inputs = CASES["hunyuan_video_15"].build()
    for found in in_threads(model, inputs, {"method": "dense"}, 2):
        assert found.output <= BOUND


def test_places_that_differ_in_numbers_alone_are_one() -> None:
    places = [
        ("view in blocks.0.attn1", "why"),
        ("view in blocks.1.attn1", "why"),
        ("conv3d", "other"),
        ("view", "why"),
    ]
    assert folded(places) == ["view in blocks.*.attn1: why (2 times)", "conv3d: other", "view: why"]


class Prompted(nn.Module):
    """Attention of text and video in a checkpoint, which slices both out of its result again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(2, 12, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return checkpoint(self.attend, x, text, use_reentrant=False)

    def attend(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.cat([text, x], 1)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + out[:, text.shape[1] :] * out[:, : text.shape[1]].mean(1, keepdim=True)


def test_the_length_of_a_prompt_that_is_free_in_a_checkpoint_is_a_number_of_the_call() -> None:
    model, x, graphs = Prompted(), torch.randn(1, 2, 2, 6, 10), list[Any]()

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            graphs.append((gm, args))
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for length in (3, 5):
        compiled(x, torch.randn(1, length, 12))
    found = compare_graph(graphs[1], {"method": "tile", "provider": "reference"}, 3, trains=True)
    assert found.output <= BOUND
    assert found.gradient <= BOUND
    assert [name for name, _ in found.sharding.gathered] == ["output"]
