"""Random small video DiTs in many spellings, each with its expected sites; and the smallest video model, `Attend`.

A `Recipe` holds the choices for a model; `recipes()` draws one. Some recipes have a trap: tokens in another order
than the grid's, or an attention that must not be rewritten.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler.testing.models import CROSS, Expected, Grid, Inputs

CHANNELS = 4
LAYERS = 2

ORDERS = ("shuffled", "rolled", "flipped", "frames last", "first token cut")
"""Traps for all layers: the sequence of video tokens is not the grid in row-major order."""

REGROUPED = ("within frames", "along time", "within rows")
"""Traps for one layer: attention over a part of the video, with the rest in the batch."""

INSIDE = ("causal", "query mask", "dropout", "pooled keys", "rolled keys")
"""Traps for one layer, inside the attention."""

SDPA = ("positional", "all positional", "keywords", "gqa")
UNFUSED = ("matmul", "operators", "einsum", "bmm", "baddbmm", "two roots")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The choices that make a model."""

    grid: Grid
    batch: int
    patch: Literal["conv3d", "conv2d", "linear", "packed"]
    frames_first: bool
    """Input [B, F, C, H, W] instead of [B, C, F, H, W]; without effect on packed input, [B, S, C]."""
    position: Literal["none", "added", "rope halves", "rope pairs", "rope complex"]
    text: Literal["none", "first", "last", "cross"]
    text_tokens: int
    extra_tokens: int
    """Number of conditioning tokens directly before the video's."""
    streams: bool
    """Video and other tokens have separate projections, joined as queries, keys and values."""
    mask: Literal["none", "bool", "additive", "per head"]
    """The mask of padded keys."""
    heads: int
    kv_heads: int
    head_dim: int
    split: Literal["linears", "chunks", "permute"]
    """Queries, keys and values from three linear layers, from one and a split, or from one, reshape and permute."""
    view: Literal["view", "unflatten", "reshape"]
    """The operator that makes an axis of the heads."""
    norm: bool
    """Whether queries and keys are normalised."""
    spelling: str
    """One of `SDPA` or `UNFUSED`."""
    scale: float | None
    trap: str
    """Empty, or one of `ORDERS`, `REGROUPED`, `INSIDE`."""
    trapped: int
    """The layer with the trap, if the trap is for one layer."""

    @property
    def video_tokens(self) -> int:
        return math.prod(self.grid) - (self.trap == "first token cut")

    @property
    def parts(self) -> list[int]:
        """Numbers of tokens: before the video's, the video's, after the video's."""
        first, last = (self.text_tokens * (self.text == place) for place in ("first", "last"))
        return [first + self.extra_tokens, self.video_tokens, last]

    def trap_of(self, layer: int) -> str:
        """The trap in a layer's own attention, or ""."""
        return self.trap if layer == self.trapped and self.trap not in ORDERS else ""

    def expect(self) -> list[Expected]:
        """All attention calls in order. The grid of packed tokens without positions cannot be known."""
        before, _, after = self.parts
        kind: Literal["self", "joint"] = "joint" if before + after else "self"
        found = Expected(grid=self.grid, before=before, after=after, kind=kind)
        blind = self.trap in ORDERS or (self.patch == "packed" and self.position == "none")
        calls = []
        for layer in range(LAYERS):
            if self.trap_of(layer) == "pooled keys":
                calls.append(CROSS)
            else:
                calls.append(Expected(grid=None, kind=kind) if blind or self.trap_of(layer) else found)
            if self.text == "cross":
                calls.append(CROSS)
        return calls

    def build(self, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model and the inputs of one forward; the model is in training mode only if its trap is dropout."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model = _DiT(self).train(self.trap == "dropout")
            for weight in model.parameters():
                nn.init.normal_(weight, std=0.3)
            return model, self._inputs()

    def _inputs(self) -> Inputs:
        frames, height, width = self.grid
        inputs: Inputs = {"t": torch.rand(self.batch, 1)}
        if self.patch == "packed":
            inputs["x"] = torch.randn(self.batch, math.prod(self.grid), CHANNELS)
            inputs |= {"i": frames, "j": height, "k": width}
        else:
            inputs["x"] = torch.randn(self.batch, CHANNELS, frames, 2 * height, 2 * width)
            if self.frames_first:
                inputs["x"] = inputs["x"].transpose(1, 2).contiguous()
        if self.text != "none":
            inputs["y"] = torch.randn(self.batch, self.text_tokens, CHANNELS)
        if self.extra_tokens:
            inputs["z"] = torch.randn(self.batch, self.extra_tokens, CHANNELS)
        if self.mask != "none":
            inputs["keep"] = torch.rand(self.batch, sum(self.parts)) < 0.8
            inputs["keep"][:, 0] = True
        return inputs


class _DiT(nn.Module):
    order: Tensor

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        dim = recipe.heads * recipe.head_dim
        patch = {
            "conv3d": lambda: nn.Conv3d(CHANNELS, dim, (1, 2, 2), (1, 2, 2)),
            "conv2d": lambda: nn.Conv2d(CHANNELS, dim, 2, 2),
            "linear": lambda: nn.Linear(CHANNELS * 4, dim),
            "packed": lambda: nn.Linear(CHANNELS, dim),
        }
        self.embed = patch[recipe.patch]()
        self.embed_y = nn.Linear(CHANNELS, dim)
        self.embed_z = nn.Linear(CHANNELS, dim)
        self.register_buffer("order", torch.randperm(math.prod(recipe.grid)))
        self.layers = nn.ModuleList(_Layer(recipe, layer) for layer in range(LAYERS))
        self.out = nn.Linear(dim, CHANNELS)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        z: Tensor | None = None,
        keep: Tensor | None = None,
        i: int = 0,
        j: int = 0,
        k: int = 0,
    ) -> Tensor:
        recipe = self.recipe
        x, grid = self.patch(x, (i, j, k))
        places = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in grid), indexing="ij")
        angles = _angles(torch.stack(places, -1).flatten(0, 2), recipe.head_dim // 2)
        if recipe.position == "added":
            x = x + torch.cat([angles.sin(), angles.cos()], -1).repeat(1, recipe.heads)
        x, angles = self.reorder(x, grid), self.reorder(angles[None], grid)[0]

        y = None if y is None else self.embed_y(y)
        parts = [None if z is None else self.embed_z(z), x]
        parts = [y, *parts] if recipe.text == "first" else [*parts, y] if recipe.text == "last" else parts
        x = torch.cat([part for part in parts if part is not None], 1)
        before, video, after = recipe.parts
        angles = F.pad(angles, (0, 0, before, after))
        for layer in self.layers:
            x = layer(x, t, y, keep, angles, grid)
        return self.out(x[:, before : before + video])

    def patch(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(tokens [B, S, C], grid)."""
        if self.recipe.patch == "packed":
            return self.embed(x), grid
        if self.recipe.frames_first:
            x = x.transpose(1, 2)
        if self.recipe.patch == "conv3d":
            x = self.embed(x)
            frames, height, width = x.shape[2:]
            return x.flatten(2).transpose(1, 2), (frames, height, width)
        batch, channels, frames, height, width = x.shape
        grid = frames, height // 2, width // 2
        if self.recipe.patch == "conv2d":
            x = self.embed(x.permute(0, 2, 1, 3, 4).flatten(0, 1)).flatten(2).transpose(1, 2)
            return x.reshape(batch, -1, x.shape[-1]), grid
        x = x.reshape(batch, channels, frames, grid[1], 2, grid[2], 2).permute(0, 2, 3, 5, 1, 4, 6)
        return self.embed(x.flatten(4)).flatten(1, 3), grid

    def reorder(self, x: Tensor, grid: Grid) -> Tensor:
        """Bring tokens [B, S, C] into the order of the trap."""
        match self.recipe.trap:
            case "shuffled":
                return x[:, self.order]
            case "rolled":
                return x.roll(3, 1)
            case "flipped":
                return x.flip(1)
            case "frames last":
                return x.unflatten(1, grid).permute(0, 2, 3, 1, 4).flatten(1, 3)
            case "first token cut":
                return x[:, 1:]
        return x


class _Layer(nn.Module):
    def __init__(self, recipe: Recipe, layer: int) -> None:
        super().__init__()
        self.recipe, self.trap = recipe, recipe.trap_of(layer)
        dim = recipe.heads * recipe.head_dim
        self.widths = [dim, *[recipe.kv_heads * recipe.head_dim] * 2]
        widths = self.widths if recipe.split == "linears" else [sum(self.widths)]
        streams = 3 if recipe.streams else 1
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(dim, w) for w in widths) for _ in range(streams))
        self.modulate = nn.Linear(1, 3 * dim)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.proj = nn.Linear(dim, dim)
        self.cross = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None, keep: Tensor | None, angles: Tensor, grid: Grid
    ) -> Tensor:
        shift, scale, gate = self.modulate(t)[:, None].chunk(3, -1)
        x = x + gate * self.proj(self.attend(self.norm(x) * (1 + scale) + shift, keep, angles, grid))
        if self.recipe.text == "cross":
            assert y is not None
            q, k, v = (
                _heads(linear(tokens), self.recipe)
                for linear, tokens in zip(self.cross, (x, y, y), strict=True)
            )
            x = x + _attention(self.recipe, q, k, v).transpose(1, 2).flatten(2)
        return x + self.mlp(self.norm(x))

    def attend(self, x: Tensor, keep: Tensor | None, angles: Tensor, grid: Grid) -> Tensor:
        if self.trap in REGROUPED:
            return self.attend_in_groups(x, grid)
        recipe, trap = self.recipe, self.trap
        q, k, v = self.project(x)
        if recipe.position.startswith("rope"):
            q, k = (_rotate(each, angles, recipe.position) for each in (q, k))
        mask = None if keep is None else _key_mask(keep, recipe)
        match trap:
            case "pooled keys":
                k, v = (each.unflatten(2, (grid[0], -1)).mean(2) for each in (k, v))
            case "rolled keys":
                k, v = (each.roll(3, 2) for each in (k, v))
            case "query mask":
                at = torch.arange(x.shape[1])
                mask = (at[:, None] - at).abs() <= x.shape[1] // 2
        dropout = 0.2 if trap == "dropout" and self.training else 0.0
        return _attention(recipe, q, k, v, mask, dropout, trap == "causal").transpose(1, 2).flatten(2)

    def attend_in_groups(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention among the tokens of each group. The groups move to the batch and back."""
        frames, _, width = grid
        groups = x.unflatten(1, grid).transpose(1, 2).flatten(2, 3)  # rows
        if self.trap != "within rows":
            groups = x.unflatten(1, (frames, -1))
        if self.trap == "along time":
            groups = groups.transpose(1, 2)
        q, k, v = self.project(groups.flatten(0, 1))
        out = _attention(self.recipe, q, k, v).transpose(1, 2).flatten(2).unflatten(0, groups.shape[:2])
        if self.trap == "within rows":
            out = out.unflatten(2, (frames, width)).transpose(1, 2).flatten(2, 3)
        if self.trap == "along time":
            out = out.transpose(1, 2)
        return out.flatten(1, 2)

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, H, S, D] from tokens [B, S, C]."""
        recipe = self.recipe
        parts = x.split(recipe.parts, 1) if recipe.streams else [x]
        joined = [
            torch.cat([linear(part) for linear, part in zip(linears, parts, strict=True)], 1)
            for linears in zip(*self.qkv, strict=True)
        ]
        if recipe.split == "permute" and recipe.heads == recipe.kv_heads:
            qkv = joined[0].reshape(*x.shape[:2], 3, recipe.heads, recipe.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        else:
            each = joined if recipe.split == "linears" else joined[0].split(self.widths, -1)
            q, k, v = (_heads(one, recipe) for one in each)
        if recipe.norm:
            q, k = (F.rms_norm(one, (recipe.head_dim,)) for one in (q, k))
        return [q, k, v]


def _angles(places: Tensor, count: int) -> Tensor:
    """[S, count]: the three coordinates of each token, at falling frequencies."""
    return torch.cat([places / 2**power for power in range(count)], -1)[:, :count]


def _heads(x: Tensor, recipe: Recipe) -> Tensor:
    match recipe.view:
        case "view":
            return (
                x.contiguous()
                .view(x.shape[0], -1, x.shape[-1] // recipe.head_dim, recipe.head_dim)
                .transpose(1, 2)
            )
        case "unflatten":
            return x.unflatten(-1, (-1, recipe.head_dim)).transpose(1, 2)
    return x.reshape(*x.shape[:2], -1, recipe.head_dim).permute(0, 2, 1, 3)


def _rotate(x: Tensor, angles: Tensor, position: str) -> Tensor:
    match position:
        case "rope halves":
            cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin
        case "rope pairs":
            cos, sin = angles.cos(), angles.sin()
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def _key_mask(keep: Tensor, recipe: Recipe) -> Tensor:
    keep = keep[:, None, None]
    if recipe.mask == "bool":
        return keep
    bias = (1 - keep.float()) * -10000.0
    return bias.repeat(1, recipe.heads, 1, 1) if recipe.mask == "per head" else bias


def _attention(
    recipe: Recipe,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q kT + mask) v over [B, H, S, D], as the recipe spells it."""
    if k.shape[1] != q.shape[1] and recipe.spelling != "gqa":
        k, v = (each.repeat_interleave(recipe.heads // recipe.kv_heads, 1) for each in (k, v))
    if recipe.spelling in SDPA:
        return _sdpa(recipe, q, k, v, mask, dropout, causal)
    if causal:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return _unfused(recipe, q, k, v, mask, dropout)


def _sdpa(
    recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    more: dict[str, Any] = {} if recipe.scale is None else {"scale": recipe.scale}
    if recipe.spelling == "gqa":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=True, **more)
    if recipe.spelling == "positional" and not (dropout or causal):
        return F.scaled_dot_product_attention(q, k, v, mask, **more)
    if recipe.spelling == "keywords":
        more |= {"attn_mask": mask, "dropout_p": dropout, "is_causal": causal}
        return F.scaled_dot_product_attention(value=v, key=k, query=q, **more)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **more)


def _unfused(recipe: Recipe, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    scale = recipe.head_dim**-0.5 if recipe.scale is None else recipe.scale
    lead = q.shape[:2]
    match recipe.spelling:
        case "matmul":
            scores = torch.matmul(q, k.transpose(-2, -1)) * scale
        case "operators":
            scores = (scale * q) @ k.mT
        case "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / (1 / scale)
        case "bmm":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).mul(scale).unflatten(0, lead)
        case "baddbmm":
            q, k = q.flatten(0, 1), k.flatten(0, 1)
            zero = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])
            scores = torch.baddbmm(zero, q, k.transpose(1, 2), beta=0, alpha=scale).unflatten(0, lead)
        case _:
            scores = (q * scale**0.5) @ (k * scale**0.5).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    match recipe.spelling:
        case "matmul":
            weights = F.softmax(scores, dim=-1)
        case "einsum" | "bmm":
            weights = torch.softmax(scores.float(), -1).to(v.dtype)
        case _:
            weights = scores.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    if recipe.spelling == "einsum":
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)
    if recipe.spelling in ("bmm", "baddbmm"):
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, lead)
    return weights @ v


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any valid recipe. About half of them have a trap."""

    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    grid = draw(st.tuples(st.integers(2, 5), st.integers(2, 4), st.integers(2, 5)))
    trap = one_of("", one_of(*ORDERS, *REGROUPED, *INSIDE))
    alone = trap in REGROUPED or trap == "pooled keys"  # a sequence with other tokens cannot be regrouped
    heads = one_of(2, 4)
    text = one_of("none", "cross") if alone else one_of("none", "first", "last", "cross")
    extra_tokens = 0 if alone else one_of(0, 0, 3, grid[1] * grid[2])
    return Recipe(
        grid=grid,
        batch=one_of(1, 2),
        patch=one_of("conv3d", "conv2d", "linear", "packed"),
        frames_first=draw(st.booleans()),
        position=one_of("none", "added", "rope halves", "rope pairs", "rope complex"),
        text=text,
        text_tokens=one_of(7, math.prod(grid)),
        extra_tokens=extra_tokens,
        streams=draw(st.booleans()) and not alone,
        mask="none" if alone or trap in INSIDE else one_of("none", "bool", "additive", "per head"),
        heads=heads,
        kv_heads=one_of(heads, heads // 2),
        head_dim=one_of(8, 12),
        split=one_of("linears", "chunks", "permute"),
        view=one_of("view", "unflatten", "reshape"),
        norm=draw(st.booleans()),
        spelling=one_of(*SDPA, *UNFUSED),
        scale=one_of(None, 0.25),
        trap=trap,
        trapped=draw(st.integers(0, LAYERS - 1)),
    )


class Attend(nn.Module):
    """The smallest video transformer: patches by a 3-D convolution, and one attention with two heads of 16
    channels.

    Its input is [B, 4, F, H, W], with the grid (F, H / 2, W / 2).
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(32, 96)

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)
