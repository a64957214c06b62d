"""Small diffusers video transformers with seeded weights and inputs, and what is to be found in each.

What is expected was read off the models' sources, never off the compiler: it is what the compiler is held to.
Weights are as the family initialises them plus noise, so that no zero gate hides an attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
"""(frames, height, width) in latent tokens, after patching."""

Inputs = dict[str, Any]
"""Keyword arguments of a model's forward."""

Made = tuple[Any, Inputs]
"""A model and its inputs; a type checker doesn't see that diffusers' mixins are an nn.Module."""

_Make = Callable[[Grid, int], Made]

GRID: Grid = (5, 7, 9)
"""The usual grid: three different odd sizes, so that no other product matches it by accident."""

TEXT = 11
"""Tokens of every prompt."""

LAYERS = 2
"""Layers of each kind in every model."""

NOISE = 0.1
"""Standard deviation of what is added to every weight."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One attention call: the video tokens in its sequence and their neighbours, or why there are none."""

    grid: Grid | None
    """None: this attention must stay dense, be it over text, within a frame, along time or cross."""
    before: int = 0
    """Other tokens before the video's in the sequence."""
    after: int = 0
    """Other tokens after the video's."""
    kind: Literal["self", "joint", "cross"] = "self"

    @property
    def tokens(self) -> int | None:
        """Query tokens of the call; None without a grid."""
        if self.grid is None:
            return None
        frames, height, width = self.grid
        return self.before + frames * height * width + self.after


CROSS = Expected(grid=None, kind="cross")
DENSE = Expected(grid=None)
"""Self-attention among other tokens than the video's, or among a part of the video's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model family: how to make a small one, and its attention calls in the order a forward makes them."""

    name: str
    make: _Make
    """(grid, batch) -> (model, forward's keyword arguments), drawn from the global generator."""
    expect: Callable[[Grid], list[Expected]]
    """Every call of scaled_dot_product_attention, for a grid."""

    def build(self, grid: Grid = GRID, batch: int = 2, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model in eval mode and the inputs of one forward; the global generator is left as it was."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model, inputs = self.make(grid, batch)
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=NOISE)
        return model.eval(), inputs | {"return_dict": False}


CASES: dict[str, Case] = {}


def _case(expect: Callable[[Grid], list[Expected]]) -> Callable[[_Make], _Make]:
    def register(make: _Make) -> _Make:
        CASES[make.__name__] = Case(name=make.__name__, make=make, expect=expect)
        return make

    return register


def _latents(grid: Grid, batch: int, *, channels: int = 4, patch: Grid = (1, 2, 2)) -> Tensor:
    """[B, C, F, H, W] of noise that is patched to the grid."""
    return torch.randn(batch, channels, *(n * p for n, p in zip(grid, patch, strict=True)))


def _prompt(batch: int, width: int = 16, tokens: int = TEXT) -> Inputs:
    return {"encoder_hidden_states": torch.randn(batch, tokens, width)}


def _padding(batch: int, tokens: int = TEXT) -> Tensor:
    """[B, tokens] of 1 and 0: prompts of different lengths, each padded at its end."""
    return (torch.arange(tokens) < tokens - 3 - torch.arange(batch)[:, None] % 4).long()


def _time(batch: int) -> Inputs:
    return {"timestep": torch.full((batch,), 500)}


def _layers_with_cross(grid: Grid) -> list[Expected]:
    """Self-attention over the video, then cross-attention to the prompt, in every layer."""
    return [Expected(grid=grid), CROSS] * LAYERS


_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": LAYERS,
}


@_case(_layers_with_cross)
def wan(grid: Grid, batch: int) -> Made:
    """conv3d patches; text by cross-attention."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN), {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        **_time(batch),
    }


@_case(lambda grid: [Expected(grid=grid), CROSS, CROSS] * LAYERS)
def wan_i2v(grid: Grid, batch: int) -> Made:
    """A cross-attention to image tokens comes before the one to the text, of which there must be 512 tokens."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN, image_dim=16, added_kv_proj_dim=32), {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch, tokens=512),
        "encoder_hidden_states_image": torch.randn(batch, 13, 16),
        **_time(batch),
    }


_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "num_refiner_layers": LAYERS,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}


def _hunyuan_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6.0),
        **_time(batch),
    }


def _hunyuan_sites(grid: Grid) -> list[Expected]:
    """The text refiner, then double-stream and single-stream layers: video first, padded text last."""
    return [DENSE] * LAYERS + [Expected(grid=grid, after=TEXT, kind="joint")] * (2 * LAYERS)


@_case(_hunyuan_sites)
def hunyuan_video(grid: Grid, batch: int) -> Made:
    """conv3d patches; a mask of keys in the joint layers, one of query and key in the text refiner."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**_HUNYUAN), _hunyuan_inputs(grid, batch)


@_case(_hunyuan_sites)
def hunyuan_video_i2v(grid: Grid, batch: int) -> Made:
    """The first frame is modulated apart from the others, so layers cut the sequence and join it."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**_HUNYUAN, image_condition_type="token_replace")
    return model, _hunyuan_inputs(grid, batch)


_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": LAYERS,
    "max_text_seq_length": TEXT,
    "sample_frames": 4 * (GRID[0] - 1) + 1,
    "sample_height": 2 * GRID[1],
    "sample_width": 2 * GRID[2],
}


def _cogvideox_inputs(grid: Grid, batch: int, patch: Grid) -> Inputs:
    return {
        "hidden_states": _latents(grid, batch, patch=patch).transpose(1, 2).contiguous(),
        **_prompt(batch),
        **_time(batch),
    }


def _cogvideox_rope(grid: Grid) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return {"image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), grid[1:]), grid[1:], grid[0])}


def _text_first(grid: Grid) -> list[Expected]:
    """Joint attention with the text before the video in every layer."""
    return [Expected(grid=grid, before=TEXT, kind="joint")] * LAYERS


@_case(_text_first)
def cogvideox(grid: Grid, batch: int) -> Made:
    """Frames before channels, conv2d patches; positions added, from a buffer if the grid is the usual one."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**_COGVIDEOX), _cogvideox_inputs(grid, batch, (1, 2, 2))


@_case(_text_first)
def cogvideox_rope(grid: Grid, batch: int) -> Made:
    """Positions by rotary embeddings that come as inputs."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, _cogvideox_inputs(grid, batch, (1, 2, 2)) | _cogvideox_rope(grid)


@_case(_text_first)
def cogvideox_15(grid: Grid, batch: int) -> Made:
    """Patches of two frames, by reshape, permute and a linear layer."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True, patch_size_t=2)
    return model, _cogvideox_inputs(grid, batch, (2, 2, 2)) | _cogvideox_rope(grid)


@_case(_layers_with_cross)
def ltx(grid: Grid, batch: int) -> Made:
    """Packed tokens: the grid comes as three integers, for the rotary embedding alone."""
    from diffusers import LTXVideoTransformer3DModel

    frames, height, width = grid
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=LAYERS,
        caption_channels=16,
    )
    return model, {
        "hidden_states": torch.randn(batch, frames * height * width, 4),
        "num_frames": frames,
        "height": height,
        "width": width,
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        **_time(batch),
    }


@_case(_layers_with_cross)
def allegro(grid: Grid, batch: int) -> Made:
    """conv2d patches; a mask over the video's own tokens; positions of tokens and their tables as inputs."""
    from diffusers import AllegroTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        cross_attention_dim=24,
        caption_channels=16,
    )
    rope: Any = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (height, width)), (height, width), frames)
    *tables, t, y, x = rope
    positions = torch.cartesian_prod(t.round().long(), y.round().long(), x.round().long())
    pixels = torch.ones(batch, frames, 2 * height, 2 * width)
    pixels[-1, :, :, -2:] = 0  # the last video of the batch is one token narrower
    return model, {
        "hidden_states": _latents(grid, batch),
        "attention_mask": pixels,
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        "image_rotary_emb": (tables, [position[None] for position in positions.T.contiguous()]),
        **_time(batch),
    }


@_case(_text_first)
def easyanimate(grid: Grid, batch: int) -> Made:
    """conv2d patches; one layer with weights of its own for the text, one without."""
    from diffusers import EasyAnimateTransformer3DModel

    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=LAYERS,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=16,
    )
    return model, {"hidden_states": _latents(grid, batch), **_prompt(batch), **_time(batch)}
