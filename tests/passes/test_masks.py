"""A mask with a row for each query: the video is sparse where its rows are proved alike, and every row is right."""

import contextlib
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsify_compiler.backend import configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.testing.oracles import tile_mask

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID, TEXT, HEADS, D = (3, 2, 4), 6, 2, 16
VIDEO = GRID[0] * GRID[1] * GRID[2]
TOKENS = VIDEO + TEXT
KEEP = torch.tensor([[True, True, True, True, False, False], [True] * 5 + [False]])
Build = Callable[[Tensor, Tensor], Tensor]
"""(keep [2, TEXT], hidden states) -> mask"""


class Model(nn.Module):
    """Attention over a video and `TEXT` tokens after it, or before it."""

    def __init__(self, build: Build, *, text_first: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.build, self.text_first, self.by_hand = build, text_first, by_hand
        self.patch = nn.Conv3d(4, HEADS * D, (1, 2, 2), (1, 2, 2))
        self.text, self.qkv = nn.Linear(8, HEADS * D), nn.Linear(HEADS * D, 3 * HEADS * D)
        self.requires_grad_(False)

    def project(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [self.patch(video).flatten(2).transpose(1, 2), self.text(text)]
        x = torch.cat(parts[::-1] if self.text_first else parts, 1)
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        return x, q, k, v

    def forward(self, video: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        x, q, k, v = self.project(video, text)
        mask = self.build(keep, x)
        if self.by_hand:
            scores = q @ k.mT * D**-0.5
            scores = scores.masked_fill(~mask, -1e9) if mask.dtype == torch.bool else scores + mask
            return scores.softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, mask)


def run(model: Model, keep: Tensor = KEEP) -> tuple[AttentionPlan, Tensor, Tensor]:
    """(plan, output of the compiled model, float64 output under the model's mask and the tile method's)."""
    torch.manual_seed(1)
    video, text = torch.randn(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]), torch.randn(2, TEXT, 8)
    plans: list[AttentionPlan] = []

    def backend(gm: fx.GraphModule, inputs: object) -> object:
        config = configure({"method": "tile", "reference_frames": 1})
        analysed = pipeline.analyse(gm, config)
        plans.extend(graph_plan(analysed))
        return pipeline.rewrite(analysed, config).forward

    out = torch.compile(model, backend=backend, fullgraph=True)(video, text, keep)
    x, q, k, v = model.project(video, text)
    mask = model.build(keep, x)
    before = TEXT if model.text_first else 0
    read = tile_mask(GRID[0], 1, GRID[1] * GRID[2])
    read = F.pad(read, (before, TEXT - before, before, TEXT - before), value=True)
    scores = q.double() @ k.double().mT * D**-0.5
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e9 if model.by_hand else -torch.inf)
    else:
        scores = scores + mask
    (plan,) = plans
    sparse = plan.method != "dense"
    scores = scores.masked_fill(~read, -torch.inf) if sparse else scores
    return plan, out, scores.softmax(-1) @ v.double()


def padded(keep: Tensor, value: bool = True) -> Tensor:
    return F.pad(keep, (VIDEO, 0), value=value)


def both_seen_by_views(keep: Tensor, x: Tensor) -> Tensor:
    rows = padded(keep).view(2, 1, 1, TOKENS).repeat(1, 1, TOKENS, 1)
    mask = (rows & rows.transpose(2, 3)).bool()
    mask[:, :, :, 0] = True  # queries of padding see a key
    return mask


def written(keep: Tensor, x: Tensor) -> Tensor:
    mask = torch.zeros(2, TOKENS, TOKENS, dtype=torch.bool)
    mask[:, :VIDEO, :VIDEO] = True
    mask[:, :VIDEO, VIDEO:] = keep[:, None]
    mask[:, VIDEO:, VIDEO:] = True
    return mask[:, None]


def written_through_a_view(keep: Tensor, x: Tensor) -> Tensor:
    segments = x.new_zeros(2, TOKENS, dtype=torch.long)
    segments.view(2, 1, TOKENS)[:, 0, VIDEO:].copy_(1 - keep.long())
    return segments.unsqueeze(2).eq(segments.unsqueeze(1)).unsqueeze(1)


def additive(keep: Tensor, x: Tensor) -> Tensor:
    segments = padded(~keep, False).to(x)
    return (1 - (segments[:, None, :, None] == segments[:, None, None]).to(x.dtype)) * -10000.0


def chosen(keep: Tensor, x: Tensor) -> Tensor:
    segments = padded(keep.long(), True)
    alike = torch.eq(segments[:, :, None], segments[:, None]).unsqueeze(1)
    return torch.where(alike, 0.0, torch.finfo(x.dtype).min)


def filled(keep: Tensor, x: Tensor) -> Tensor:
    segments = torch.cat([torch.zeros_like(x[:, :VIDEO, 0]), (~keep).to(x.dtype)], 1)
    differ = torch.logical_xor(segments[:, :, None] > 0, segments[:, None, :] > 0)
    return torch.zeros(2, 1, TOKENS, TOKENS).masked_fill_(differ[:, None], -torch.inf)


def by_a_product(keep: Tensor, x: Tensor) -> Tensor:
    seen = padded(keep).to(x.dtype)
    mask = torch.einsum("bi,bj->bij", seen, seen)
    mask[:, VIDEO:] = 1
    return (mask > 0)[:, None]


def of_constant_segments(keep: Tensor, x: Tensor) -> Tensor:
    """Text in two segments; the video sees the first."""
    segments = torch.cat(
        [torch.zeros(VIDEO // 2), torch.zeros(VIDEO - VIDEO // 2), torch.tensor([0, 0, 0, 1, 1, 1.0])]
    )
    return segments[:, None] <= segments


def of_text_rows(keep: Tensor, x: Tensor) -> Tensor:
    """The video sees everything; the text sees text by its causal order."""
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[VIDEO:, VIDEO:] = torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
    return mask


PROVED = (both_seen_by_views, written, written_through_a_view, additive, chosen, filled, by_a_product,
          of_constant_segments, of_text_rows)  # fmt: skip


@pytest.mark.parametrize("by_hand", [False, True], ids=["sdpa", "by hand"])
@pytest.mark.parametrize("build", PROVED, ids=lambda build: build.__name__)
def test_masks_whose_rows_of_the_video_are_alike(build: Build, by_hand: bool) -> None:
    plan, out, exact = run(Model(build, by_hand=by_hand))
    assert plan.method == "tile", plan.reason
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


def test_text_before_the_video() -> None:
    def build(keep: Tensor, x: Tensor) -> Tensor:
        segments = F.pad(~keep, (0, VIDEO))
        return (segments[:, :, None] == segments[:, None])[:, None]

    plan, out, exact = run(Model(build, text_first=True))
    assert (plan.method, plan.layout.before) == ("tile", TEXT)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


def of_all_tokens(keep: Tensor, x: Tensor) -> Tensor:
    segments = (x[:, :, 0] > 0).long()
    return (segments[:, :, None] == segments[:, None])[:, None]


def causal_in_frames(keep: Tensor, x: Tensor) -> Tensor:
    frame = torch.arange(TOKENS) // (GRID[1] * GRID[2])
    return frame[:, None] >= frame


def causal(keep: Tensor, x: Tensor) -> Tensor:
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def of_two_segments(keep: Tensor, x: Tensor) -> Tensor:
    segments = torch.cat([torch.zeros(VIDEO - 4), torch.ones(4 + TEXT)])
    return segments[:, None] <= segments


def written_in_part(keep: Tensor, x: Tensor) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask[:5][:, 3:].copy_(torch.zeros(5, TOKENS - 3))
    return mask


def written_by_index(keep: Tensor, x: Tensor) -> Tensor:
    mask = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)
    mask[:, :, torch.tensor([1, 4]), 3] = False
    return mask


def written_through_all(keep: Tensor, x: Tensor) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    mask.view(-1)[: 3 * TOKENS : 2] = False
    return mask


def counted(keep: Tensor, x: Tensor) -> Tensor:
    return (torch.ones(TOKENS, TOKENS).cumsum(0) % 3 > 0) | torch.eye(TOKENS, dtype=torch.bool)


def branches_swapped(keep: Tensor, x: Tensor) -> Tensor:
    here, there, some = torch.ones(12), torch.zeros(12), torch.ones(12) > 0
    first, second = torch.where(some, here, there), torch.where(some, there, here)
    segments = torch.cat([first, second, torch.ones(TEXT)])
    return segments[:, None] <= segments


DIFFERENT = {
    of_all_tokens: "input",
    causal_in_frames: "'arange'",
    causal: "'tril'",
    of_two_segments: f"after token {VIDEO - 4}",
    written_in_part: "after token 5",
    written_by_index: "cannot be followed",
    written_through_all: "fill_",
    counted: "'cumsum'",
    branches_swapped: "after token 12",
}


@pytest.mark.parametrize("build", DIFFERENT, ids=lambda build: build.__name__)
def test_masks_that_differ_within_the_video_say_by_what(build: Build) -> None:
    plan, out, exact = run(Model(build))
    assert plan.method == "dense"
    assert plan.reason.startswith("its mask depends on the query: rows of the video")
    assert DIFFERENT[build] in plan.reason
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_mask_from_outside_is_not_believed() -> None:
    plan, _, _ = run(Model(lambda keep, x: keep), keep=torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool))
    assert plan.reason == "its mask depends on the query: rows of the video may differ by input 'keep'"


def _step(draw: random.Random, known: list[Tensor]) -> Tensor | None:
    """A random operator on random tensors; None for a write."""
    x, y = draw.choice(known), draw.choice(known)
    dim = draw.randrange(x.dim())
    start = draw.randrange(x.shape[dim])
    size = draw.randint(1, x.shape[dim] - start)
    match draw.randrange(24):
        case 0:
            return torch.full((2, 6), draw.randrange(2))
        case 1:
            return torch.randint(0, 2, (2, 6))
        case 2 | 3:
            return x.narrow(dim, start, size)
        case 4:
            return torch.cat([x, x.narrow(dim, start, size)], dim)
        case 5:
            return F.pad(x, (draw.randrange(3), draw.randrange(2)), value=draw.randrange(2))
        case 6:
            return F.pad(x, (0, 1, 2, 0)) if x.dim() > 1 else None
        case 7 | 8:
            return x.unsqueeze(draw.randrange(x.dim() + 1))
        case 9:
            return x.transpose(dim, draw.randrange(x.dim()))
        case 10:
            return x.select(dim, start) if x.dim() > 1 else None
        case 11:
            return x.clone() if draw.randrange(2) else 1 - x
        case 12 | 13:
            return (x == y).long() if draw.randrange(2) else x & y
        case 14:
            return torch.where(x > 0, y, x) if draw.randrange(2) else torch.where(y > 0, y, x)
        case 15:
            return x.expand(2, *x.shape)
        case 16:
            return x.repeat(*[draw.randint(1, 2) for _ in x.shape])
        case 17:
            return x.amax(dim, keepdim=bool(draw.randrange(2))) if x.dim() > 1 else None
        case 18:
            return torch.stack([x, x.flip(dim)], draw.randrange(x.dim() + 1))
        case 19:
            x.narrow(dim, start, size).fill_(draw.randrange(2))
        case 20:
            x.narrow(dim, start, size).copy_(y)
        case 21:
            x.narrow(dim, start, size).mul_(y)
        case 22:
            x.select(dim, start).zero_()
        case 23:
            x.view(-1)[start] = 1
    return None


@pytest.mark.parametrize("seed", range(6))
def test_slices_said_to_be_alike_are_equal(seed: int) -> None:
    draw, claims = random.Random(seed), 0
    torch.manual_seed(seed)
    for _ in range(12):
        tracker, known = AxisTracker(), [torch.randint(0, 2, (2, 6))]
        tracker.alike.put_input(known[0], "x")
        with tracker:
            known += [torch.zeros(2, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)]
            for _ in range(25):
                with contextlib.suppress(RuntimeError):  # sizes do not fit, or memory overlaps
                    made = _step(draw, known)
                    if made is not None and made.dim() <= 4 and made.numel() < 2000:
                        known.append(made)
        for tensor in known:
            for dim, pieces in enumerate(tracker.alike.of(tensor)):
                slices = tensor.unbind(dim)
                assert sum(piece.size for piece in pieces) == len(slices)
                first: dict[object, Tensor] = {}
                contents = [piece.content for piece in pieces for _ in range(piece.size)]
                for content, one in zip(contents, slices, strict=True):
                    if content is not None:
                        claims += content in first
                        assert torch.equal(first.setdefault(content, one), one)
    assert claims > 500


def test_a_write_and_another_number_change_the_content() -> None:
    tracker, x = AxisTracker(), torch.randn(1, 6)
    tracker.alike.put_input(x, "x")
    with tracker:
        row, some, zeros = x.clone(), torch.ones(3, 6) > 0, torch.zeros(3, 6)
        before = row + zeros
        row[0, 0] = 5.0
        written = torch.cat([before, row + zeros])
        filled = torch.cat([zeros.masked_fill(some, 1.0), zeros.masked_fill(some, 2.0)])
        alike = torch.cat([zeros.masked_fill(some, 1.0), zeros.masked_fill(some, 1.0)])
    sizes = [[piece.size for piece in tracker.alike.of(one)[0]] for one in (written, filled, alike)]
    assert sizes == [[3, 3], [3, 3], [6]]
