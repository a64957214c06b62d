"""The machines that programs call: `Numbers`, a small model, and `Places`, whose tokens carry their origin.

A program moves tokens with plain PyTorch and calls `m` for everything else. On `Places` every element of a token is
the code of the token, operators that mix channels keep codes, and attention records the codes that reach it. So the
place of a token is read from data that moved, never from a label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import nested_compile_region
from torch.utils.checkpoint import checkpoint

from sparsify_compiler.testing.fuzzing.cases import Scene

Program = Callable[..., Any]
"""program(m, video, text) -> a tensor, or several."""

CHANNELS, WIDTH, HEADS = 4, 16, 2
"""Channels of a video, channels of a token, and heads of an attention."""

MIXED = torch.nan
"""The code of a mixture of several tokens."""


def scale_of(tag: int) -> float:
    """The scale of attention number `tag` of a program. Every attention has its own, which identifies its plan."""
    return 0.5 + tag / 64


def heads(x: Tensor) -> Tensor:
    """[B, S, C] -> [B, HEADS, S, D], a view."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, HEADS, S, D] -> [B, S, C]."""
    return x.transpose(1, 2).flatten(2)


def self_attention(x: Tensor, scale: float) -> Tensor:
    """Self-attention of [B, S, C]."""
    return joined(F.scaled_dot_product_attention(heads(2 * x.sin()), heads(x.cos()), heads(x), scale=scale))


_region = nested_compile_region(self_attention)


class Machine:
    """The common part of `Numbers` and `Places`."""

    two: float
    """A factor that changes numbers but not codes."""
    one: float
    """A summand that changes numbers but not codes."""
    zero: float
    """A factor that makes numbers 0. Tokens keep their places, so codes do not change."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene

    heads = staticmethod(heads)
    joined = staticmethod(joined)

    def attend(self, x: Tensor, tag: int) -> Tensor:
        """Self-attention of [B, S, C]."""
        return self.attend_to(x, x, tag)

    def attend_to(self, x: Tensor, y: Tensor, tag: int) -> Tensor:
        """Attention of the tokens of x to those of y."""
        q, k, v = heads(self.sin(x)), heads(self.cos(y)), heads(y)
        return joined(self.attention(q, k, v, tag))

    def sin(self, x: Tensor) -> Tensor:
        """A function of every element, in new memory."""
        raise NotImplementedError

    def cos(self, x: Tensor) -> Tensor:
        """Another such function."""
        raise NotImplementedError

    def attention(self, q: Tensor, k: Tensor, v: Tensor, tag: int) -> Tensor:
        """scaled_dot_product_attention of [B, H, S, D]."""
        raise NotImplementedError


class Numbers(Machine):
    """A small model with seeded weights. Attention is PyTorch's, dense."""

    two, one, zero = 2.0, 1.0, 0.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._linear: dict[int, Tensor] = {}
        self._kernels: dict[tuple[int, ...], Tensor] = {}
        self._mix = _randn(WIDTH, WIDTH, 3) / 6
        self._bank = _randn(64, WIDTH, seed=4)
        self._bias = _randn(WIDTH, seed=5) / 8

    def inputs(self) -> list[Tensor]:
        """The video and the text, as new tensors in every call."""
        scene, shape = self.scene, _video_shape(self.scene)
        return [_randn(*shape, seed=1), _randn(scene.batch, scene.text, WIDTH, seed=2)]

    def conv3d(self, video: Tensor) -> Tensor:
        """[B, C, F, H, W] in pixels to [B, WIDTH, F, H, W] in tokens."""
        patch = self.scene.patch
        return F.conv3d(video, self._kernel(video.shape[1], *patch), stride=patch)

    def conv2d(self, images: Tensor) -> Tensor:
        """[N, C, H, W] in pixels to [N, WIDTH, H, W] in tokens."""
        patch = self.scene.patch[1:]
        return F.conv2d(images, self._kernel(images.shape[1], *patch), stride=patch)

    def linear(self, x: Tensor) -> Tensor:
        """A linear layer from a last dimension of any size to WIDTH."""
        width = x.shape[-1]
        if width not in self._linear:
            self._linear[width] = _randn(WIDTH, width, seed=width) / width**0.5
        return F.linear(x, self._linear[width], self._bias if width == WIDTH else None)

    def _kernel(self, *shape: int) -> Tensor:
        if shape not in self._kernels:
            self._kernels[shape] = _randn(WIDTH, *shape, seed=3) / 4
        return self._kernels[shape]

    def norm(self, x: Tensor) -> Tensor:
        """Layer norm over the channels."""
        return F.layer_norm(x, x.shape[-1:])

    def act(self, x: Tensor) -> Tensor:
        """An activation."""
        return F.silu(x)

    def sin(self, x: Tensor) -> Tensor:
        return 2 * x.sin()

    def cos(self, x: Tensor) -> Tensor:
        return x.cos()

    def conv1d(self, x: Tensor) -> Tensor:
        """A convolution along the tokens, which keep their places."""
        return F.conv1d(x.transpose(1, 2), self._mix, padding=1).transpose(1, 2)

    def cumsum(self, x: Tensor) -> Tensor:
        """The cumulative sum over the tokens."""
        return x.cumsum(1) / 8

    def softmax(self, x: Tensor) -> Tensor:
        """The softmax over the tokens."""
        return x.softmax(1) * 8

    def pooled(self, x: Tensor) -> Tensor:
        """The mean of all tokens, [B, 1, C]. Adding the same to all tokens moves none."""
        return x.mean(1, keepdim=True)

    def causal(self, x: Tensor) -> Tensor:
        """An attention that stays dense for all tokens."""
        return joined(F.scaled_dot_product_attention(heads(self.sin(x)), heads(x), heads(x), is_causal=True))

    def turned(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """Tokens [B, F * H * W, C] with rotary positions of a grid, by complex numbers."""
        f, h, w = (torch.arange(size).float() for size in (frames, rows, columns))
        angles = (f[:, None, None] + 0.3 * h[:, None] + 0.1 * w).flatten()[:, None] * torch.arange(1, 9)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(turned * torch.polar(torch.ones_like(angles), angles)).flatten(2)

    def mesh(self, frames: int, rows: int, columns: int, how: str = "meshgrid") -> Tensor:
        """[1, F * H * W, WIDTH] positions on a grid, row-major."""
        places = torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")
        f, h, w = places
        match how:
            case "index":
                return (self._bank[f] + self._bank[h].sin() + self._bank[w].cos()).reshape(1, -1, WIDTH)
            case "embedding":
                at = torch.stack([f, h + 8, w + 16])
                return F.embedding(at, self._bank).sum(0).flatten(0, 2)[None]
            case "repeats":
                f, h, w = (torch.arange(size) for size in (frames, rows, columns))
                f = f.repeat_interleave(rows * columns)
                h = h.repeat_interleave(columns).repeat(frames)
                places = f, h, w.repeat(frames * rows)
            case "sums":
                f, h, w = (torch.arange(size) for size in (frames, rows, columns))
                sums = f[:, None, None] + 0.3 * h[None, :, None] + 0.1 * w[None, None, :]
                return sums.reshape(1, -1, 1).expand(-1, -1, WIDTH).cos()
        table = torch.stack(places, -1).reshape(1, -1, 3).float()
        return table.repeat(1, 1, 6)[..., :WIDTH].cos()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, tag: int) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale_of(tag))

    def scores(self, q: Tensor, k: Tensor, tag: int) -> Tensor:
        """The first half of an attention by hand: [..., Sq, Sk]."""
        return q @ k.transpose(-1, -2) * scale_of(tag)

    def weights(self, scores: Tensor, tag: int) -> Tensor:
        """The softmax between the two products of an attention by hand."""
        return scores.softmax(-1)

    def sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """scaled_dot_product_attention with any arguments."""
        return F.scaled_dot_product_attention(*args, **kwargs)

    def hidden(self, scores: Tensor) -> Tensor:
        """The scores before a softmax that the program spells, unchanged."""
        return scores

    def bank(self, count: int, width: int) -> Tensor:
        """[count, width] weights of the model, for keys and values."""
        return self._bank[:count, :width]

    def checkpointed(self, x: Tensor, tag: int) -> Tensor:
        """`attend` in its own body."""
        return checkpoint(self_attention, x, scale_of(tag), use_reentrant=False)

    def region(self, x: Tensor, tag: int) -> Tensor:
        """`attend` in a body that all calls with this tag may share."""
        return _region(x, scale_of(tag))


class Masked(Numbers):
    """The same model with a given mask for each of its attention calls."""

    def __init__(self, scene: Scene, masks: Sequence[Tensor | None]) -> None:
        super().__init__(scene)
        self._masks, self._first = iter(masks), masks[0] if masks else None
        self._by_tag: dict[int, Tensor | None] = {}

    def attention(self, q: Tensor, k: Tensor, v: Tensor, tag: int) -> Tensor:
        mask = next(self._masks)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale_of(tag))

    def scores(self, q: Tensor, k: Tensor, tag: int) -> Tensor:
        self._by_tag[tag] = next(self._masks)
        return super().scores(q, k, tag)

    def weights(self, scores: Tensor, tag: int) -> Tensor:
        mask = self._by_tag[tag]
        return super().weights(scores if mask is None else scores.masked_fill(~mask, -torch.inf), tag)

    def sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        mask, own = next(self._masks), kwargs.pop("attn_mask", None)
        if own is not None and mask is not None:
            hidden = ~mask | ~own if own.dtype == torch.bool else ~mask
            mask = torch.zeros_like(own, dtype=torch.float32) if own.dtype == torch.bool else own
            mask = mask.masked_fill(hidden, -torch.inf)
        return super().sdpa(*args, **kwargs, attn_mask=own if mask is None else mask)

    def hidden(self, scores: Tensor) -> Tensor:
        """The scores under the mask of the only attention of such a program."""
        return scores if self._first is None else scores.masked_fill(~self._first, -torch.inf)

    def checkpointed(self, x: Tensor, tag: int) -> Tensor:
        return self.attend(x, tag)

    def region(self, x: Tensor, tag: int) -> Tensor:
        return self.attend(x, tag)


@dataclass(frozen=True)
class Call:
    """An attention call of a run on places."""

    tag: int
    query: Tensor
    """[B, H, S, D] codes at the time of the scores."""
    key: Tensor


def _laid_out(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give the result of a method of `Places` the strides that it has on `Numbers`.

    So views, copies and shared memory are the same on both.
    """

    @wraps(method)
    def laid_out(self: "Places", *args: Any) -> Tensor:
        blanks = (
            torch.empty_strided(a.shape, a.stride()).zero_() if isinstance(a, Tensor) else a for a in args
        )
        like = getattr(self.numbers, method.__name__)(*blanks)
        codes = method(self, *args)
        return torch.empty_strided(like.shape, like.stride(), dtype=torch.float64).copy_(codes)

    return laid_out


class Places(Machine):
    """A machine on which every element of a token is the token's code; tokens that are not the video's are 0.

    Operators that keep every token in its place keep codes, even if they change channels.
    """

    two, one, zero = 1.0, 0.0, 1.0

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self.numbers = Numbers(scene)
        self.calls: list[Call] = []
        """The attention calls so far, in order."""
        count = scene.batch * scene.tokens
        generator = torch.Generator().manual_seed(0)
        # Codes are far apart and random, so that the mean of two is almost never a third code.
        drawn = torch.randint(1, 2**16, (count,), generator=generator).double()
        self._codes = (drawn + 2**16 * torch.arange(1, count + 1)).reshape(scene.batch, *scene.grid)

    def inputs(self) -> list[Tensor]:
        """The video as codes, and the text."""
        scene = self.scene
        text = torch.zeros(scene.batch, scene.text, WIDTH, dtype=torch.float64)
        if scene.source == "packed":
            return [self._codes.flatten(1)[..., None].repeat(1, 1, WIDTH), text]
        video = self._codes[:, None]
        for dim, size in enumerate(scene.patch):
            video = video.repeat_interleave(size, dim + 2)
        video = video.repeat(1, CHANNELS, 1, 1, 1)
        return [video.transpose(1, 2).contiguous() if scene.source == "frames first" else video, text]

    def places(self, codes: Tensor) -> Tensor:
        """[..., 4] int64: video in the batch, frame, row and column of every code; -1 for other codes."""
        known = self._codes.flatten()
        at = torch.searchsorted(known, codes.nan_to_num(0.0).contiguous()).clamp(max=len(known) - 1)
        found = torch.stack(torch.unravel_index(at, self._codes.shape), -1)
        return found.where((known[at] == codes)[..., None], -1)

    @_laid_out
    def conv3d(self, video: Tensor) -> Tensor:
        """The common code of all pixels of a patch."""
        return _patches(video, self.scene.patch)

    @_laid_out
    def conv2d(self, images: Tensor) -> Tensor:
        """The common code of all pixels of a patch of an image."""
        return _patches(images, self.scene.patch[1:])

    @_laid_out
    def linear(self, x: Tensor) -> Tensor:
        """The common code of all channels."""
        return _one(x, WIDTH)

    @_laid_out
    def norm(self, x: Tensor) -> Tensor:
        """The common code of all channels."""
        return _one(x, x.shape[-1])

    @_laid_out
    def act(self, x: Tensor) -> Tensor:
        """The same codes, as in the next methods."""
        return x

    @_laid_out
    def sin(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def cos(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def conv1d(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def cumsum(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def softmax(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def causal(self, x: Tensor) -> Tensor:
        return x

    @_laid_out
    def turned(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        return x

    @_laid_out
    def pooled(self, x: Tensor) -> Tensor:
        """Zeros: adding the mean moves no token."""
        return torch.zeros_like(x[:, :1])

    @_laid_out
    def mesh(self, frames: int, rows: int, columns: int, how: str = "meshgrid") -> Tensor:
        """Zeros: adding positions moves no token."""
        return torch.zeros(1, frames * rows * columns, WIDTH, dtype=torch.float64)

    @_laid_out
    def attention(self, q: Tensor, k: Tensor, v: Tensor, tag: int) -> Tensor:
        """The codes of the queries: an output token has the place of its query."""
        self.calls.append(Call(tag, q.clone(), k.clone()))
        return _one(q, v.shape[-1])

    @_laid_out
    def scores(self, q: Tensor, k: Tensor, tag: int) -> Tensor:
        """The identity, as weights: every query attends to the key with the same number."""
        self.calls.append(Call(tag, q.clone(), k.clone()))
        return torch.eye(q.shape[-2], k.shape[-2], dtype=torch.float64).expand(*q.shape[:-2], -1, -1)

    @_laid_out
    def weights(self, scores: Tensor, tag: int) -> Tensor:
        return scores

    def checkpointed(self, x: Tensor, tag: int) -> Tensor:
        return self.attend(x, tag)

    def region(self, x: Tensor, tag: int) -> Tensor:
        return self.attend(x, tag)


def _patches(pixels: Tensor, patch: Sequence[int]) -> Tensor:
    """[N, C, ...] -> [N, WIDTH, ...]: the common code of all pixels of every patch."""
    for dim, size in enumerate(patch):
        pixels = pixels.unflatten(dim + 2, (-1, size)).movedim(dim + 3, -1)
    return _one(pixels.flatten(-len(patch)).movedim(1, -1).flatten(-2), WIDTH).movedim(-1, 1)


def _one(x: Tensor, width: int) -> Tensor:
    """[..., width]: the common code of the last dimension; MIXED where codes differ."""
    first = x[..., :1]
    return first.where((x == first).all(-1, keepdim=True), MIXED).repeat(*[1] * (x.dim() - 1), width)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _video_shape(scene: Scene) -> tuple[int, ...]:
    if scene.source == "packed":
        return scene.batch, scene.tokens, WIDTH
    pixels = [n * size for n, size in zip(scene.grid, scene.patch, strict=True)]
    if scene.source == "frames first":
        return scene.batch, pixels[0], CHANNELS, *pixels[1:]
    return scene.batch, CHANNELS, *pixels
