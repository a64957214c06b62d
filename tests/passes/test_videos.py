"""Three axes are a grid where they are the time, rows and columns of one video, and queries and keys are of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from planned import each_planned, planned
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

GRID = (3, 2, 5)
TOKENS, WIDTH = 30, 16
_noise = torch.Generator().manual_seed(0)


def noise(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=_noise)


VIDEO, OTHER = noise(2, 4, 3, 4, 10), noise(2, 4, 3, 4, 10)
PACKED, TEXT = noise(2, TOKENS, WIDTH), noise(2, 7, WIDTH)
PERM = torch.randperm(TOKENS, generator=_noise)
FRAMES = torch.tensor([2, 0, 1])
SOME, OTHERS = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 5])
with torch.no_grad():
    volume = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
    wide = nn.Conv3d(8, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
    grey = nn.Conv3d(1, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
    deep = nn.Conv3d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH).requires_grad_(False)
    image = nn.Conv2d(4, WIDTH, 2, 2).requires_grad_(False)
    channels = nn.Linear(4, WIDTH).requires_grad_(False)
    pairs = nn.Linear(2, WIDTH).requires_grad_(False)
    numbers = nn.Linear(1, WIDTH).requires_grad_(False)
    columns = nn.Linear(5 * WIDTH, WIDTH).requires_grad_(False)
    features = nn.Linear(WIDTH, WIDTH).requires_grad_(False)


def attend(q: Tensor, k: Tensor | None = None) -> Tensor:
    """Attention of one head over tokens [B, S, C]."""
    k = q if k is None else k
    return F.scaled_dot_product_attention(q.sin()[:, None], k.cos()[:, None], k[:, None])


def sequence(x: Tensor) -> Tensor:
    """[B, S, C] of [B, C, F, H, W]."""
    return x.flatten(2).transpose(1, 2)


def embed(video: Tensor) -> Tensor:
    return sequence(volume(video))


def mesh(*sizes: int, before: int = 0) -> Tensor:
    """[1, before + S, WIDTH]: row-major positions of a grid, after zeros."""
    places = torch.meshgrid(*(torch.arange(n).float() for n in sizes or GRID), indexing="ij")
    table = torch.stack(places, -1).flatten(0, -2).repeat(1, WIDTH)[None, :, :WIDTH]
    return F.pad(table, (0, 0, before, 0))


def scalars(x: Tensor) -> Tensor:
    """[B, S, WIDTH] of tokens that are numbers, [B, S]."""
    return x[..., None] * torch.ones(WIDTH)


def by_image(frames: Tensor) -> Tensor:
    """[N, S, C] of [N, 4, H, W]."""
    return image(frames).flatten(2).transpose(1, 2)


def frame_by_frame(video: Tensor) -> Tensor:
    """[B, F, S, C] of [B, C, F, H, W]."""
    return by_image(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3))


def in_windows(x: Tensor, columns: tuple[int, int], of: int) -> Tensor:
    """Tokens of [B, C, F, H, W] with the columns divided, one of the two divisions in the batch."""
    divided = x.unflatten(4, columns)
    others = [dim for dim in (2, 3, 4, 5) if dim != of]
    return divided.permute(0, of, *others, 1).flatten(0, 1).flatten(1, 3)


def swapped(x: Tensor) -> Tensor:
    """A batch of two after its videos changed places by writes."""
    y = x.clone()
    y[0], y[1] = x[1], x[0]
    return y


Videos = Callable[[Tensor, Tensor], Tensor]
NO_GRID: dict[str, Videos] = {
    # 1. whole
    "frames cut off": lambda v, _: attend(embed(v)[:, 10:]),
    "frames cut off by padding": lambda v, _: attend(F.pad(embed(v), (0, 0, -10, 0))),
    "a token cut off": lambda v, _: attend(embed(v)[:, 1:]),
    "a token cut off by padding": lambda v, _: attend(F.pad(embed(v), (0, 0, -1, 0))),
    "columns cut off": lambda v, _: attend(sequence(volume(v)[..., 1:])),
    "columns cut off by padding": lambda v, _: attend(sequence(F.pad(volume(v), (-1, 0)))),
    "every other frame": lambda v, _: attend(sequence(volume(v)[:, :, ::2])),
    "every other column": lambda v, _: attend(sequence(volume(v)[..., ::2])),
    "rolled by padding": lambda v, _: attend(
        torch.cat([F.pad(embed(v), (0, 0, -20, 0)), embed(v)[:, :20]], 1)
    ),
    "rest after padding": lambda v, _: (
        lambda x: attend(torch.cat([F.pad(x, (0, 0, -20, 0)), x[:, :20]], 1))
    )(embed(v)),
    "every other patch by index": lambda v, _: attend(
        channels(v.unflatten(4, (5, 2))[..., 0].permute(0, 2, 3, 4, 1)).flatten(1, 3)
    ),
    "windows": lambda v, _: attend(in_windows(volume(F.pad(v, (0, 2))), (2, 3), of=4)),
    "dilated": lambda v, _: attend(in_windows(volume(F.pad(v, (0, 2))), (3, 2), of=5)),
    "shifted windows": lambda v, _: attend(in_windows(volume(F.pad(v, (0, 2))).roll(1, 4), (2, 3), of=4)),
    # 2. one input
    "frames reversed before": lambda v, _: attend(embed(v.flip(2))),
    "frames shuffled before": lambda v, _: attend(embed(v[:, :, FRAMES])),
    "rows rolled before": lambda v, _: attend(embed(v.roll(2, 3))),
    "every other column before": lambda v, _: attend(embed(v[..., ::2])),
    "frames beside columns before": lambda v, _: attend(
        embed(v.permute(0, 1, 3, 4, 2).flatten(3)[:, :, None])
    ),
    "batch folded into frames": lambda v, _: attend(embed(v.transpose(0, 1).flatten(1, 2)[None])),
    "views folded into frames": lambda v, o: attend(embed(torch.stack([v, o], 2).flatten(2, 3))),
    "views folded between frames": lambda v, o: attend(embed(torch.stack([v, o], 3).flatten(2, 3))),
    "frames and frames reversed": lambda v, _: attend(embed(torch.cat([v, v.flip(2)], 2))),
    "frames and every other frame": lambda v, _: attend(embed(torch.cat([v, v[:, :, ::2]], 2))),
    "last frames first": lambda v, _: attend(embed(torch.cat([v[:, :, 1:], v[:, :, :1]], 2))),
    # 3. order
    "rows and columns": lambda v, _: attend(embed(v.transpose(3, 4))),
    "columns as time": lambda v, _: attend(embed(v.permute(0, 1, 4, 3, 2)[..., :2])),
    "frames last": lambda v, _: attend(volume(v).permute(0, 3, 4, 2, 1).flatten(1, 3)),
    # 4. not the batch
    "videos, by image": lambda v, _: attend(frame_by_frame(v).transpose(0, 1).flatten(1, 2)),
    "videos, by channels": lambda v, _: attend(channels(v.permute(2, 0, 3, 4, 1)).flatten(1, 3)),
    "videos as time": lambda v, _: attend(embed(v.permute(2, 1, 0, 3, 4))),
    # 5. channels
    "channels": lambda v, _: attend(scalars(v.transpose(1, 2).flatten(0, 1).flatten(1))),
    "channels and frames": lambda v, _: attend(scalars(v.permute(0, 4, 1, 2, 3).flatten(0, 1).flatten(1))),
    "channels of one frame": lambda v, _: attend(scalars(v[:, :, 0].flatten(1))),
    "channels, mean of frames": lambda v, _: attend(scalars(v.mean(2).flatten(1))),
    "channels, frames as features": lambda v, _: attend(v.permute(0, 1, 3, 4, 2).flatten(1, 3)),
    "channels, a head for each frame": lambda v, _: F.scaled_dot_product_attention(
        *[scalars(v.transpose(1, 2).flatten(2))] * 3
    ),
    "channels as time": lambda v, _: attend(sequence(grey(v.transpose(1, 2).flatten(0, 1)[:, None]))),
    "frames and columns": lambda v, _: attend(
        by_image(v.permute(0, 3, 1, 2, 4).flatten(0, 1)).unflatten(0, (2, 4)).flatten(1, 2)
    ),
    # 6. same axes
    "another video": lambda v, o: attend(embed(v), embed(o)),
    "text by two indices": lambda v, _: (
        lambda x: attend(torch.cat([x, TEXT[:, SOME]], 1), torch.cat([x, TEXT[:, OTHERS]], 1))
    )(embed(v)),
    "text by an index that changes": lambda v, _: (
        lambda x, i: attend(torch.cat([x, TEXT[:, i]], 1), torch.cat([x, TEXT[:, i.copy_(OTHERS)]], 1))
    )(embed(v), SOME.clone()),
    "video by an index": lambda v, _: (lambda x: attend(x[:, PERM].sin(), x[:, PERM].cos()))(embed(v)),
    "keys turned round": lambda v, _: attend(embed(v), embed(v).flip(1)),
    "halves of a sequence": lambda v, o: attend(*torch.cat([embed(v), embed(o)], 1).chunk(2, 1)),
    "halves of the channels": lambda v, o: attend(*torch.cat([embed(v), embed(o)], -1).chunk(2, -1)),
    "stacked videos": lambda v, o: attend(*torch.stack([embed(v), embed(o)])),
    "one or the other video": lambda v, o: (lambda x, y: attend(torch.where(x > 0, x, y)))(
        embed(v), embed(o)
    ),
    # 7. same videos
    "one video and the other": lambda v, _: (lambda x: attend(x[:1], x[1:]))(embed(v)),
    "one by index and the other": lambda v, _: (lambda x: attend(x[0][None], x[1][None]))(embed(v)),
    "every other video": lambda v, _: (lambda x: attend(x[::2], x[1::2]))(embed(v)),
    "videos turned round": lambda v, _: attend(embed(v), embed(v).flip(0)),
    "videos rolled": lambda v, _: (lambda x: attend(x, x.roll(1, 0)))(embed(v)),
    "videos by index": lambda v, _: (lambda x: attend(x, x[[1, 0]]))(embed(v)),
    "videos joined anew": lambda v, _: (lambda x: attend(x, torch.cat([x[1:], x[:1]])))(embed(v)),
    "videos stacked anew": lambda v, _: (lambda x: attend(x, torch.stack([x[1], x[0]])))(embed(v)),
    "the first for all": lambda v, _: (lambda x: attend(x, x[:1].expand(2, -1, -1)))(embed(v)),
    "the last for all": lambda v, _: (lambda x: attend(x, x[1:].repeat(2, 1, 1)))(embed(v)),
    "the mean for all": lambda v, _: (lambda x: attend(x, x.mean(0, keepdim=True).expand(2, -1, -1)))(
        embed(v)
    ),
    "mixed videos, joined": lambda v, _: (lambda x: attend(torch.cat([x[:1] + x[1:], x[1:]])[:1]))(embed(v)),
    "mixed videos, stacked": lambda v, _: (lambda x: attend(torch.stack([x[0] + x[1], x[1]])[:1]))(embed(v)),
    "one video and one of videos joined anew": lambda v, _: (
        lambda x: attend(x[:1], torch.cat([x[1:], x[:1]])[:1])
    )(embed(v)),
    "one video and one of videos stacked anew": lambda v, _: (
        lambda x: attend(x[:1], torch.stack([x[1], x[0]])[:1])
    )(embed(v)),
    "videos that change places": lambda v, _: (lambda x: attend(x, swapped(x)))(embed(v)),
    "halves of a batch": lambda v, o: attend(*embed(torch.cat([v, o])).chunk(2)),
    "halves of a batch of two": lambda v, o: attend(*embed(torch.cat([v[:1], o[:1]])).chunk(2)),
    "stacked ones of a batch": lambda v, _: (
        lambda x: attend(torch.stack([x[0], x[1]]), torch.stack([x[1], x[0]]))
    )(embed(v)),
    # nor do parts of two videos make one
    "a part of another video": lambda v, _: (lambda x: (x[0, 6:].copy_(x[1, 6:]), attend(x))[1])(
        embed(v).clone()
    ),
    "a frame of another video": lambda v, _: (
        lambda x: (x.unflatten(1, (3, 10))[0, 1].copy_(x.unflatten(1, (3, 10))[1, 1]), attend(x))[1]
    )(embed(v).clone()),
    "a part of another video, by index": lambda v, _: (
        lambda x: (x.__setitem__((0, torch.arange(6, 30)), x[1, 6:]), attend(x))[1]
    )(embed(v).clone()),
    "half over half, beside padding": lambda v, _: (
        lambda x: (x[:, :17].copy_(x[:, 17:].clone()), attend(x))[1]
    )(F.pad(embed(v), (0, 0, 3, 1)).clone()),
    "half of each video": lambda v, _: (lambda x: attend(torch.cat([x[:1, :15], x[1:, 15:]], 1)))(embed(v)),
    "one or the other of a batch": lambda v, _: (
        lambda x: attend(torch.where(torch.arange(30)[:, None] > 14, x[:1], x[1:]))
    )(embed(v)),
    # positions do not overrule what is known
    "mesh after a shuffle": lambda v, _: attend(embed(v)[:, PERM] * mesh()),
    "joined mesh after a shuffle": lambda v, o: attend(
        torch.cat([embed(o)[:, :7], embed(v)], 1).flip(1) * mesh(before=7)
    ),
    "joined mesh after padding": lambda v, o: attend(
        F.pad(torch.cat([embed(o)[:, :7], embed(v)[:, PERM]], 1), (0, 0, 3, -3)) * mesh(before=7)
    ),
    "mesh on every other frame's tokens": lambda v, _: attend(embed(v)[:, ::2] * mesh(3, 1, 5)),
}

GRIDS: dict[str, Videos] = {
    "volume": lambda v, _: attend(embed(v)),
    "by image": lambda v, _: attend(frame_by_frame(v).flatten(1, 2)),
    "patches by reshape": lambda v, _: attend(
        features(v.reshape(2, 4, 3, 2, 2, 5, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4)).flatten(1, 3)
    ),
    "zeros beside": lambda v, _: attend(embed(F.pad(v[..., 2:], (2, 0)))),
    "edges beside": lambda v, _: attend(embed(F.pad(v[..., 2:], (2, 0, 0, 0, 0, 0), mode="replicate"))),
    "nothing beside, round": lambda v, _: attend(embed(F.pad(v, (0, 0, 0, 0, 0, 0), mode="circular"))),
    "cropped before": lambda v, o: attend(embed(torch.cat([v, o], 2)[:, :, 2:5])),
    "with a mask": lambda v, o: attend(sequence(wide(torch.cat([v, o], 1)))),
    "after a frame": lambda v, o: attend(embed(torch.cat([o[:, :, :1], v[:, :, :2]], 2))),
    "noisy": lambda v, _: attend(embed(v * 0.5 + torch.randn_like(v))),
    "convolved twice": lambda v, _: attend(sequence(deep(volume(v)))),
    "and its convolution": lambda v, _: attend(embed(v) + sequence(deep(volume(v)))),
    "and another": lambda v, o: attend(embed(v) + embed(o)),
    "all of another video": lambda v, _: (lambda x: (x[0].copy_(x[1]), attend(x))[1])(embed(v).clone()),
    "one of the batch": lambda v, _: attend(embed(v)[1:]),
    "one of the batch by index": lambda v, _: attend(embed(v)[1][None]),
    "one of a batch in parts, joined": lambda v, _: (
        lambda x: attend(torch.cat([features(x[:1]), features(x[1:])])[:1])
    )(embed(v)),
    "one of a batch in parts, stacked": lambda v, _: (
        lambda x: attend(torch.stack([features(x[0]), features(x[1])])[1:])
    )(embed(v)),
    "text by one index": lambda v, _: (
        lambda x: attend(torch.cat([x, TEXT.sin()[:, SOME]], 1), torch.cat([x, TEXT.cos()[:, SOME]], 1))
    )(embed(v)),
    "half of a doubled batch": lambda v, _: attend(torch.cat([embed(v)] * 2).chunk(2)[1]),
    "gates first": lambda v, _: attend(v.mean((1, 2, 3, 4))[:, None, None] * embed(v)),
    "clipped": lambda v, _: (lambda x: attend(torch.where(x > 0, x, 0.0)))(embed(v)),
    "queries and keys of one length": lambda v, _: (
        lambda x: F.scaled_dot_product_attention(
            *(F.normalize(one, dim=-1)[:, None] for one in (x.sin(), x.cos())), x[:, None]
        )
    )(embed(v)),
    "tokens hidden": lambda v, _: (lambda x: attend(torch.where(x[..., :1] > 0, x, torch.ones(WIDTH))))(
        embed(v)
    ),
    "heads of their own": lambda v, _: (
        lambda x: F.scaled_dot_product_attention(
            *(features(x).unflatten(2, (2, 8)).transpose(1, 2) for _ in range(3))
        )
    )(embed(v)),
    "gates on queries": lambda v, o: (lambda x: attend(x * channels(o.mean((2, 3, 4)))[:, None], x))(
        embed(v)
    ),
    "gates of two others": lambda v, o: (lambda g: attend(embed(v[:1]) * (g[0] + g[1])))(
        channels(o.mean((2, 3, 4)))
    ),
    "gates of two frames": lambda v, _: (
        lambda g: attend(embed(v[:1]) * channels(g[..., 0] + g[..., 2])[:, None])
    )(v[:1].mean((3, 4))),
    "keys and values stacked": lambda v, _: (lambda x: attend(x, torch.stack([features(x), features(x)])[0]))(
        embed(v)
    ),
}


def test_what_may_not_be_one_video_stays_dense() -> None:
    plans = each_planned(NO_GRID, VIDEO, OTHER)
    assert {name: plan.layout.grid for name, plan in plans.items()} == dict.fromkeys(NO_GRID)
    assert "batch of videos" in plans["videos as time"].reason
    assert "channels" in plans["channels as time"].reason
    assert "order" in plans["columns as time"].reason
    assert "moved its tokens" in plans["mesh after a shuffle"].reason
    assert "part of the video grid" in plans["frames reversed before"].reason
    assert "other videos" in plans["one video and the other"].reason


def test_what_is_one_video_has_its_grid() -> None:
    plans = each_planned(GRIDS, VIDEO, OTHER)
    assert {name: plan.layout.grid for name, plan in plans.items()} == dict.fromkeys(GRIDS, GRID)


INPUTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int]] = {
    "no batch": (lambda v: attend(sequence(volume(v[None]))), (VIDEO[0],), 0),
    "one channel": (lambda v: attend(sequence(grey(v))), (VIDEO[:, :1],), 0),
    "frames first": (lambda v: attend(embed(v.transpose(1, 2))), (VIDEO.transpose(1, 2).contiguous(),), 0),
    "channels first, by a linear layer": (
        lambda v: attend(channels(v.permute(0, 2, 3, 4, 1)).flatten(1, 3)),
        (noise(2, 4, *GRID),),
        0,
    ),
    "channels last": (lambda v: attend(channels(v).flatten(1, 3)), (noise(2, 3, 2, 5, 4),), 0),
    "mesh": (lambda x: attend(features(x) + mesh()), (PACKED,), 0),
    "mesh without a batch": (lambda x: attend((features(x) + mesh()[0])[None]), (PACKED[0],), 0),
    "mesh and a table": (lambda x, table: attend(table * (x + mesh())), (PACKED, noise(1, TOKENS, WIDTH)), 0),
    "mesh on a part": (lambda x: attend(x * mesh(before=7)), (noise(2, TOKENS + 7, WIDTH),), 7),
    "mesh on a slice": (
        lambda x: attend(torch.cat([x[:, :7], x[:, 7:] * mesh()], 1)),
        (noise(2, TOKENS + 7, WIDTH),),
        7,
    ),
    "mesh on a frame's tokens": (
        lambda x: attend((features(x) + mesh(2, 5)[:, None]).flatten(1, 2)),
        (noise(2, 3, 10, WIDTH),),
        0,
    ),
    "mesh on a slice of a frame's tokens": (
        lambda x: attend((features(x)[:, :, 7:] + mesh(2, 5)[:, None]).flatten(1, 2)),
        (noise(2, 3, 17, WIDTH),),
        0,
    ),
    "weights over another batch": (
        lambda v, x: attend(embed(v) + features(x.t()).mean(0)),
        (VIDEO, noise(WIDTH, 3)),
        0,
    ),
    "text first": (lambda x, y: attend(torch.cat([y, x], 1) * mesh(before=7)), (PACKED, TEXT), 7),
    "packed, convolved": (
        lambda x: attend(sequence(deep(x.transpose(1, 2).unflatten(2, GRID)))),
        (PACKED,),
        0,
    ),
}
"""(function, its inputs, tokens before the video)"""


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_other_forms_have_their_grid(name: str) -> None:
    function, inputs, before = INPUTS[name]
    (plan,) = planned(function, *inputs)
    assert (plan.layout.grid, plan.layout.before, plan.layout.after) == (GRID, before, 0), plan.reason


def turned_round_through_an_alias(x: Tensor, alias: Tensor) -> Tensor:
    alias.copy_(alias.flip(1))
    return attend(features(x) * mesh())


def turned_round_where(x: Tensor) -> Tensor:
    y, seen = x.clone(), x[..., 0] > 0
    y[seen] = x[seen].flip(0)
    return attend(features(y) * mesh())


TRAPS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "batches of one video, joined": (
        lambda v, o: attend(*embed(torch.cat([v, o])).chunk(2)),
        (VIDEO[:1], OTHER[:1]),
    ),
    "mesh moved with its tokens": (
        lambda x: attend((x * mesh()).unflatten(1, GRID).permute(0, 2, 3, 1, 4).flatten(1, 3)),
        (PACKED,),
    ),
    "mesh on every other token": (
        lambda x: attend(features(x.unflatten(1, (TOKENS, 2))[:, :, 0]) * mesh()),
        (noise(2, 2 * TOKENS, WIDTH),),
    ),
    "mesh within windows of a frame's tokens": (
        lambda x: attend(
            (features(x).unflatten(2, (2, 10)).transpose(1, 2).flatten(0, 1) + mesh(2, 5)[:, None]).flatten(
                1, 2
            )
        ),
        (noise(2, 3, 20, WIDTH),),
    ),
    "mesh on a frame's tokens, weights on their mean": (
        lambda x: attend((x + features(x.mean(2, keepdim=True)) + mesh(2, 5)[:, None]).flatten(1, 2)),
        (noise(2, 3, 10, WIDTH),),
    ),
    "mesh on numbers": (
        lambda x: attend((numbers(x[..., None]) + mesh(2, 5)).flatten(0, 1)[None]),
        (noise(3, 10),),
    ),
    "pairs of frames": (
        lambda x: attend(features(x[:, :, None] * x[:, None]).flatten(1, 3)),
        (noise(2, 3, 10, WIDTH),),
    ),
    "columns by all columns": (
        lambda x: attend(columns((x[..., :, None, :] * x[..., None, :, :]).flatten(4)).flatten(1, 3)),
        (noise(2, 3, 2, 5, WIDTH),),
    ),
    "channels as time, of one patch": (
        lambda v: attend(sequence(grey(v.transpose(1, 2).flatten(0, 1)[:, None]))),
        (noise(2, 4, 3, 2, 2),),
    ),
    "packed, convolved, with other frames first": (
        lambda x: attend(
            (lambda y: sequence(deep(torch.cat([y[:, :, ::3], y[:, :, 2:]], 2))))(
                x.transpose(1, 2).unflatten(2, (5, 2, 3))
            )
        ),
        (PACKED,),
    ),
    "a mesh over images": (lambda x: attend(x.flatten(0, 1)[None] * mesh()), (noise(3, 10, WIDTH),)),
    "a mesh over rolled parts": (
        lambda x: attend(torch.cat([x[:, 10:] * mesh(2, 2, 5), x[:, :10] * mesh(1, 2, 5)], 1)),
        (PACKED,),
    ),
    "patches cut off": (
        lambda v: attend(channels(v.permute(0, 2, 3, 4, 1))[:, 1:].flatten(1, 3)),
        (VIDEO,),
    ),
    "videos as channels": (
        lambda v: attend(channels(v.permute(1, 2, 3, 0, 4).flatten(3)).flatten(0, 2)[None]),
        (noise(2, 4, 3, 4, 2),),
    ),
    "videos as channels, and apart": (
        lambda v: (lambda x: attend(x + features(x).mean(0) * embed(v)))(
            sequence(wide(v.flatten(0, 1)[None]))
        ),
        (VIDEO,),
    ),
    "videos as channels, by image": (
        lambda v: attend(
            pairs(
                image(v.transpose(1, 2).flatten(0, 1))
                .unflatten(0, (2, 3))
                .permute(2, 1, 3, 4, 0)
                .flatten(1, 3)
            )
        ),
        (VIDEO,),
    ),
    "mesh beside a text, and videos exchanged": (
        lambda x, t: attend((lambda y: y + y.flip(0))(torch.cat([features(x) * mesh(), t], 1))),
        (PACKED, TEXT),
    ),
    "two meshes beside a text, and videos exchanged": (
        lambda x, t: attend(
            (lambda y: y + y.flip(0))(torch.cat([features(x) * mesh(3, 3, 3) + mesh(3, 3, 3).cos(), t], 1))
        ),
        (noise(2, 27, WIDTH), TEXT),
    ),
    "mesh beside a text, and tokens exchanged": (
        lambda x, t: attend(
            (lambda y: y + y[:, torch.arange(37).flip(0)])(torch.cat([features(x) * mesh(), t], 1))
        ),
        (PACKED, TEXT),
    ),
    "images": (lambda x: attend(by_image(x).flatten(0, 1)[None]), (noise(3, 4, 4, 10),)),
    "channels of images": (lambda x: attend(sequence(grey(x[:, None]))), (noise(2, 3, 4, 10),)),
    "one table on two": (
        lambda x, y, table: attend(table * x, table * y),
        (PACKED, PACKED + 1, PACKED[:1] - 1),
    ),
    "one table and mesh on two": (
        lambda x, y, table: attend(mesh() * (table * x), mesh() * (table * y)),
        (PACKED, PACKED + 1, PACKED[:1] - 1),
    ),
    "mesh alone": (lambda x: attend(mesh() * x), (noise(1),)),
    "another grid's table": (
        lambda x, table: attend(features(x).flip(1) * table.flatten(0, 2)),
        (PACKED, noise(3, 2, 5, WIDTH)),
    ),
    "one packed video and the other": (lambda x: (lambda y: attend(y[:1], y[1:]))(x * mesh()), (PACKED,)),
    "one packed video by index": (
        lambda x: (lambda y: attend(y[0][None], y[1][None]))(x * mesh()),
        (PACKED,),
    ),
    "inputs that share memory": (
        turned_round_through_an_alias,
        (lambda x: (x, x.view(2, TOKENS, WIDTH)))(PACKED.clone()),
    ),
    "a write that is not followed": (turned_round_where, (PACKED,)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_inputs_that_are_no_video_stay_dense(name: str) -> None:
    function, inputs = TRAPS[name]
    (plan,) = planned(function, *inputs)
    assert plan.layout.grid is None, plan.reason


def written_as_far_as(x: Tensor, end: Tensor) -> Tensor:
    y, stop = x.clone(), end.item()
    torch._check(stop <= TOKENS)
    y.narrow(1, 0, stop).copy_(x.flip(1).narrow(1, 0, stop))
    return attend(features(y) * mesh())


def test_a_write_to_a_slice_of_unknown_size_is_followed_to_its_memory() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        (plan,) = planned(written_as_far_as, PACKED, torch.tensor(20))
    assert plan.layout.grid is None, plan.reason


@torch.library.custom_op("layouts_test::turn", mutates_args=("x",))
def turn(x: Tensor) -> None:
    x.copy_(x.flip(1))


def test_an_operator_of_another_library_may_write_anything() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.clone()
        turn(y)
        return attend(features(y) * mesh())

    (plan,) = planned(function, PACKED)
    assert plan.layout.grid is None, plan.reason


def test_views_of_what_attention_returns_are_followed() -> None:
    """Its strides decide what is a view: here tokens, of an attention along time, which is then turned round."""

    def model(video: Tensor) -> Tensor:
        x = embed(video).contiguous().unflatten(1, (3, 10)).transpose(1, 2).flatten(0, 1)
        heads = x.unflatten(2, (2, -1)).transpose(1, 2)
        in_time = F.scaled_dot_product_attention(heads.sin(), heads.cos(), heads).transpose(1, 2).flatten(2)
        tokens = in_time.unflatten(0, (1, -1)).transpose(1, 2).flatten(1, 2)
        in_time.copy_(in_time.flip(1))
        return attend(tokens)

    plans = planned(model, VIDEO[:1])
    assert plans[-1].layout.grid is None, plans[-1].reason
