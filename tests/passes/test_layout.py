"""Traps for layout inference: tokens that are moved, whatever moves them, must not get a grid from a mesh of
positions; sizes that no layout rests on must stay free; what mutates must still mutate."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import planned
from torch import Tensor, fx, nn

from sparsify_compiler import SparsifyWarning
from sparsify_compiler.backend import sparsify
from sparsify_compiler.errors import warn_once
from sparsify_compiler.runtime.program import Program

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Grid = tuple[int, int, int]
GRID: Grid = (5, 7, 9)
TOKENS, WIDTH = 315, 16
PERM = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
MATRIX = torch.eye(TOKENS)[PERM]


def mesh() -> Tensor:
    """[1, S, WIDTH]: row-major positions of the grid."""
    places = torch.meshgrid(*(torch.arange(n).float() for n in GRID), indexing="ij")
    return torch.stack(places, -1).flatten(0, 2).repeat(1, 6)[None, :, :WIDTH]


def attend(x: Tensor, places: Tensor | None = None) -> Tensor:
    """Self-attention whose queries and keys are multiplied by a mesh of positions."""
    places = mesh().cos() if places is None else places
    q, k, v = (t[:, None] for t in (x * places, x.sin() * places, x))
    return F.scaled_dot_product_attention(q, k, v)


def write_halves(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:, ::2], y[:, 1::2] = x[:, :158], x[:, 158:]
    return y


def write_rolled(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :-3], y[:, -3:] = x[:, 3:], x[:, :3]
    return y


def swap_thirds(x: Tensor) -> Tensor:
    a, b, c = x.split([100, 115, 100], 1)
    return torch.cat([c, b, a], 1)


def written(write: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A copy of the tokens after a write that gets (the copy, the tokens)."""

    def move(x: Tensor) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        write(y, x)
        return y

    return move


def write_steps(y: Tensor, x: Tensor) -> None:
    y[:, 0:314:2], y[:, 1::2] = x[:, 1::2], x[:, 0:314:2]


def write_tokens(y: Tensor, x: Tensor) -> None:
    y[:, 0], y[:, 70] = x[:, 70], x[:, 0]


def swap_frames(y: Tensor, x: Tensor) -> None:
    frames = y.unflatten(1, (5, 63))
    kept = frames[:, 1].clone()
    frames[:, 1] = frames[:, 2]
    frames[:, 2] = kept


def roll_by_slices(y: Tensor, x: Tensor) -> None:
    y[:, 1:], y[:, :1] = x[:, :-1], x[:, -1:]


def write_after_a_view(y: Tensor, x: Tensor) -> None:
    rows = y.view(1, 45, 7, WIDTH)
    y.copy_(x.flip(1))
    rows.mul_(2.0)


def write_where(y: Tensor, x: Tensor) -> None:
    hidden = x[0, :, 0] > 0
    y[:, hidden] = x[:, hidden].flip(1)


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "steps": write_steps,
    "tokens": write_tokens,
    "frames through a view": swap_frames,
    "roll by slices": roll_by_slices,
    "after a view": write_after_a_view,
    "one frame over another": lambda y, x: y[:, :63].copy_(x[:, 63:126]),
    "one token everywhere": lambda y, x: y.copy_(x[:, 9:10].expand_as(x)),
    "one token over a frame": lambda y, x: y[:, 63:126].copy_(x[:, 9:10].expand(1, 63, WIDTH)),
    "half over half": lambda y, x: y[:, :157].copy_(x[:, 157:314]),
    "rows through a transpose": lambda y, x: y.transpose(0, 1)[9:18].copy_(x.transpose(0, 1)[18:27]),
    "index_put_": lambda y, x: y.index_put_((torch.tensor([0]), PERM), x[0]),
    "index by tensor": lambda y, x: y[0].__setitem__(PERM, x[0]),
    "scatter_": lambda y, x: y.scatter_(1, PERM[None, :, None].expand_as(x), x),
    "index_copy_": lambda y, x: y.index_copy_(1, PERM, x),
    "index_add_": lambda y, x: y.index_add_(1, PERM, x),
    "masked_scatter_": lambda y, x: y.masked_scatter_(x > 0, x.flip(1)),
    "boolean index": write_where,
    "as_strided": lambda y, x: y.as_strided((315, WIDTH), (WIDTH, 1)).copy_(x[0].flip(0)),
    "flat": lambda y, x: y.view(-1)[: 9 * WIDTH].copy_(x.reshape(-1)[9 * WIDTH : 18 * WIDTH]),
    "detached": lambda y, x: y.detach().copy_(x.roll(1, 1)),
    "data": lambda y, x: y.data.copy_(x.roll(1, 1)),
    "out": lambda y, x: torch.index_select(x, 1, PERM, out=y),
    "out, element by element": lambda y, x: torch.add(x.flip(1).contiguous(), 0.0, out=y),
    "moved tokens added": lambda y, x: y.add_(x.flip(1)),
    "neighbours added": lambda y, x: y[:, 1:].add_(x[:, :-1]),
    "steps added to steps": lambda y, x: y[:, 1::2].add_(x[:, 0:314:2]),
    "foreach": lambda y, x: torch._foreach_copy_([y], [x.roll(1, 1)]),
    "foreach, added": lambda y, x: torch._foreach_add_([y], [x.roll(1, 1)]),
}
"""Writes that move tokens, or that nothing proves to move none."""

HARMLESS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scaled": lambda y, x: y.mul_(2.0).clamp_(max=3.0),
    "some scaled": lambda y, x: y[:, ::2].mul_(2.0),
    "a frame scaled": lambda y, x: y.view(1, 5, 7, 9, WIDTH)[:, 1].mul_(2.0),
    "a bias on all but a frame": lambda y, x: y[:, 63:].add_(torch.ones(WIDTH)),
    "tokens of their own": lambda y, x: y[:, 63:126].copy_(x[:, 63:126] * 2),
    "a token of its own": lambda y, x: y[:, 70].copy_(x[:, 70].cos()),
    "steps of channels": lambda y, x: y[..., ::2].copy_(-x[..., 1::2]),
    "zeros": lambda y, x: (y[:, 9:18].zero_(), y[:, 3].fill_(0.0)),
    "a constant by index": lambda y, x: y.__setitem__((slice(None), PERM[:9]), 0.0),
    "masked": lambda y, x: y.masked_fill_(x > 3, 0.0),
    "itself": lambda y, x: y[:, 9:18].copy_(y[:, 9:18]),
    "all again": lambda y, x: y.copy_(x.sin()),
    "out": lambda y, x: torch.add(x.contiguous(), 1.0, out=y),
    "foreach": lambda y, x: torch._foreach_mul_([y], 2.0),
}
"""Writes that leave every token where it was."""


def fill_by_slices(x: Tensor) -> Tensor:
    y = x.new_zeros(1, TOKENS + 20, WIDTH)
    y[:, :20] = x.mean(1, keepdim=True)
    y[:, 20:] = x
    return y


def fill_channels(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., ::2], y[..., 1::2] = x[..., ::2].sin(), x[..., 1::2].cos()
    return y


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"write: {name}": written(write) for name, write in WRITES.items()},
    "take by a token": lambda x: x[:, 5:6].expand_as(x),
    "negative pad": lambda x: torch.cat([F.pad(x, (0, 0, -63, 0)), x[:, :63]], 1),
    "shift by padding": lambda x: F.pad(x, (0, 0, 63, -63)),
    "moved tokens added": lambda x: x + x.flip(1),
    "some moved": lambda x: torch.where(x > 0, x, x.flip(1)),
    "channels shifted": lambda x: torch.cat([x[..., :8], F.pad(x[..., 8:], (0, 0, 63, -63))], -1),
    "stacked with moved": lambda x: torch.stack([x.roll(1, 1), x])[0],
    "roll": lambda x: x.roll(3, 1),
    "flip": lambda x: x.flip(1),
    "index": lambda x: x[:, PERM],
    "gather": lambda x: x.gather(1, PERM[None, :, None].expand_as(x)),
    "argsort": lambda x: x[:, x[0, :, 0].argsort()],
    "roll by cat": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "roll by a frame": lambda x: torch.cat([x[:, 63:], x[:, :63]], 1),
    "interleave": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "swap thirds": swap_thirds,
    "write halves": write_halves,
    "write rolled": write_rolled,
    "shuffling reshape": lambda x: x.view(1, 7, 45, WIDTH).transpose(1, 2).reshape(1, TOKENS, WIDTH),
    "matrix": lambda x: MATRIX @ x,
    "einsum": lambda x: torch.einsum("st,btc->bsc", MATRIX, x),
    "linear": lambda x: F.linear(x.mT, MATRIX).mT,
    "embedding": lambda x: F.embedding(PERM, x[0])[None],
}

conv = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
VIDEO = torch.randn(1, 4, 5, 14, 18, generator=torch.Generator().manual_seed(1))
PACKED = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def embed(video: Tensor) -> Tensor:
    return conv(video).flatten(2).transpose(1, 2)


SOURCES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "convolution": (embed, VIDEO),
    "packed": (lambda x: x, PACKED),
}


def each_moved(moves: dict[str, Callable[[Tensor], Tensor]], source: str) -> dict[str, Grid | None]:
    """The grid of an attention after each of several moves, all of them in one graph."""
    tokens, inputs = SOURCES[source]

    def run(inputs: Tensor) -> list[Tensor]:
        x, places = tokens(inputs), mesh().cos()
        return [attend(move(x), places) for move in (*moves.values(), lambda x: x)]

    *grids, unmoved = [plan.layout.grid for plan in planned(run, inputs)]
    assert unmoved == GRID
    return dict(zip(moves, grids, strict=True))


@pytest.mark.parametrize("source", SOURCES)
def test_moved_tokens_stay_dense(source: str) -> None:
    assert each_moved(MOVES, source) == dict.fromkeys(MOVES)


@pytest.mark.parametrize("source", SOURCES)
def test_writes_that_move_nothing_keep_the_grid(source: str) -> None:
    moves = {name: written(write) for name, write in HARMLESS.items()} | {"channels filled": fill_channels}
    assert each_moved(moves, source) == dict.fromkeys(moves, GRID)


def test_a_buffer_filled_in_parts_is_their_concatenation() -> None:
    (plan,) = planned(lambda video: attend_plain(fill_by_slices(embed(video))), VIDEO)
    assert (plan.layout.grid, plan.layout.before, plan.layout.after) == (GRID, 20, 0)


def test_tokens_that_are_not_moved_do_get_their_grid() -> None:
    for function, x in ((lambda video: attend(embed(video)), VIDEO), (attend, PACKED)):
        torch._dynamo.reset()
        (plan,) = planned(function, x)
        assert plan.layout.grid == GRID
        assert plan.site.kind == "self"


def patches(video: Tensor, weights: nn.Linear) -> Tensor:
    """[B, 1, S, WIDTH], tokens of 2 x 2 pixels."""
    batch, _, frames, height, width = video.shape
    cut = video.reshape(batch, -1, frames, height // 2, 2, width // 2, 2)
    return weights(cut.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))[:, None]


@pytest.mark.parametrize("size", [(14, 18), (28, 72)])
def test_a_mask_of_another_resolution_is_a_channel_of_the_video(size: tuple[int, int]) -> None:
    weights = nn.Linear(20, WIDTH)

    def run(video: Tensor, mask: Tensor) -> Tensor:
        resized = F.interpolate(mask, size=(14, 18), mode="nearest")
        x = patches(torch.cat([video, resized[:, :, None].repeat(1, 1, 5, 1, 1)], 1), weights)
        return F.scaled_dot_product_attention(x, x, x)

    (plan,) = planned(run, VIDEO, torch.ones(1, 1, *size))
    assert plan.layout.grid == GRID


def test_columns_between_others_are_no_keys_of_theirs() -> None:
    weights = nn.Linear(16, WIDTH)

    def run(video: Tensor) -> Tensor:
        even, odd = patches(video[..., ::2], weights), patches(video[..., 1::2], weights)
        return F.scaled_dot_product_attention(even, odd, odd)

    (plan,) = planned(run, torch.randn(1, 4, 5, 14, 36))
    assert (plan.layout.grid, plan.method) == (None, "dense")


def test_a_deep_stack_of_convolutions_is_followed_in_linear_time() -> None:
    """Each of five dimensions of 16 convolutions comes from five others: more paths than could be walked."""
    kernel = torch.ones(4, 4, 1, 1, 1)

    def function(video: Tensor) -> Tensor:
        for _ in range(16):
            video = F.conv3d(video.sin(), kernel)
        return attend(embed(video))

    (plan,) = planned(function, VIDEO)
    assert plan.layout.grid == GRID


def test_the_same_mesh_on_other_tokens_is_cross_attention() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return F.scaled_dot_product_attention((a * mesh())[:, None], (b * mesh())[:, None], b[:, None])

    (plan,) = planned(function, PACKED, PACKED.flip(0).clone())
    assert plan.method == "dense"
    assert plan.site.kind != "self"


class Mutating(nn.Module):
    """Writes whose value nobody reads, around an attention or without one."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.conv, self.relu, self.norm = nn.Conv3d(4, WIDTH, 1), nn.ReLU(inplace=True), nn.BatchNorm3d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        self.relu(y)
        y.mul_(2.0)
        y[:, :1].clamp_(max=0.5)
        self.calls.add_(1)
        torch.add(y, 1.0, out=y)
        tokens = y.flatten(2).transpose(1, 2)
        return attend_plain(tokens) if self.attention else tokens


def attend_plain(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


@pytest.mark.parametrize("attention", [False, True])
@torch.no_grad()
def test_writes_are_kept(attention: bool) -> None:
    video = torch.randn(1, 4, 3, 4, 5)
    results = []
    for backend in (None, "sparsify"):
        torch.manual_seed(0)
        model = Mutating(attention).train()
        options = {"method": "tile", "reference_frames": 3, "inner_backend": "aot_eager"}
        run = model if backend is None else torch.compile(model, backend=backend, options=options)
        outputs = [run(video) for _ in range(2)]
        results.append([*outputs, model.calls, model.norm.running_mean, model.norm.num_batches_tracked])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def changed(scores: Tensor, how: str) -> Tensor:
    bias = torch.ones(TOKENS)
    match how:
        case "masked_fill_":
            scores.masked_fill_(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
        case "mul_":
            scores.mul_(3.0)
        case "setitem":
            scores[..., 200:] = -torch.inf
        case "out":
            torch.mul(scores, 3.0, out=scores)
        case "alpha":
            scores = torch.add(scores, bias.cumsum(0), alpha=0.01)
        case "rounding":
            scores = torch.div(scores, 0.7, rounding_mode="floor")
        case "bool":
            scores = scores + (bias.cumsum(0) > 100)
    return scores


@pytest.mark.parametrize("how", ["masked_fill_", "mul_", "setitem", "out", "alpha", "rounding", "bool"])
@torch.no_grad()
def test_scores_changed_on_the_way_are_not_mistaken(how: str) -> None:
    def function(video: Tensor) -> Tensor:
        x = embed(video)
        return changed(x @ x.mT, how).softmax(-1) @ x

    exact = function(VIDEO)
    options = {"method": "tile", "reference_frames": 5, "inner_backend": "aot_eager"}
    torch.testing.assert_close(torch.compile(function, backend="sparsify", options=options)(VIDEO), exact)


@pytest.mark.parametrize("how", ["floats in, weights back", "floats out", "softmax in float32", "minus 1e9"])
@torch.no_grad()
def test_types_mixed_by_hand(how: str) -> None:
    def function(video: Tensor) -> Tensor:
        x = embed(video).bfloat16()
        if how == "floats in, weights back":
            return (x.float() @ x.float().mT * 0.1).softmax(-1).to(x.dtype) @ x
        if how == "floats out":
            return (x @ x.mT * 0.1).float().softmax(-1) @ x.float()
        if how == "softmax in float32":
            return F.softmax(x @ x.mT * 0.1, -1, dtype=torch.float32) @ x.float()
        hidden = torch.ones(TOKENS, dtype=torch.bool)  # every key: eager weighs them all the same
        return (x.float() @ x.float().mT * 0.1).masked_fill(hidden, -1e9).softmax(-1) @ x.float()

    exact = function(VIDEO)
    for provider in ("cpu", "reference"):
        torch._dynamo.reset()
        options = {
            "method": "tile",
            "reference_frames": 5,
            "inner_backend": "aot_eager",
            "provider": provider,
        }
        programs: list[Program] = []

        def backend(
            gm: fx.GraphModule, inputs: list[Any], options: Any = options, programs: Any = programs
        ) -> Any:
            programs.append(sparsify(gm, inputs, options=options))
            return programs[-1]

        out = torch.compile(function, backend=backend)(VIDEO)
        assert [plan.method for plan in programs[0].plan] == ["tile"]
        assert out.dtype == exact.dtype
        torch.testing.assert_close(out.float(), exact.float(), rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_sizes_that_no_layout_rests_on_stay_free() -> None:
    def function(video: Tensor, text: Tensor) -> Tensor:
        x = embed(video)
        q, t = x[:, None], text[:, None]
        return attend_plain(x) + F.scaled_dot_product_attention(q, t, t)

    compiled_graphs: list[Program] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        options = {"method": "tile", "reference_frames": 5, "inner_backend": "eager"}
        compiled_graphs.append(sparsify(gm, inputs, options=options))
        return compiled_graphs[-1]

    compiled = torch.compile(function, backend=backend)
    for length in range(4, 16):
        text = torch.randn(1, length, WIDTH)
        torch.testing.assert_close(compiled(VIDEO, text), function(VIDEO, text))
    assert len(compiled_graphs) == 2


@torch.no_grad()
def test_the_last_program_is_announced() -> None:
    warn_once.cache_clear()
    options = {"method": "tile", "inner_backend": "eager"}
    compiled = torch.compile(lambda video: attend_plain(embed(video)), backend="sparsify", options=options)
    videos = [torch.randn(1, 4, frames, 4, 6) for frames in (3, 4)]
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled(videos[0])
        with pytest.warns(SparsifyWarning, match="last program"):
            compiled(videos[1])
