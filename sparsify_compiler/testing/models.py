"""Small diffusers video transformers with seeded weights and inputs, and the expected sites of each.

The expectations come from the sources of the models, never from the compiler: tests compare the compiler with them.
Weights are the family's initial weights plus noise, so that no zero gate hides an attention.
"""

import math
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
"""A model and its inputs. Any, since a type checker does not see that diffusers' mixins are an nn.Module."""

_Make = Callable[[Grid, int], Made]

GRID: Grid = (5, 7, 9)
"""The usual grid: three different odd sizes, so that no other product matches it by chance."""

TEXT = 11
"""Number of tokens of every prompt."""

LAYERS = 2
"""Number of layers of each kind in every model."""

NOISE = 0.1
"""Standard deviation of the noise added to every weight."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One attention call: the video tokens in its sequence, and the numbers of other tokens around them."""

    grid: Grid | None
    """None if this attention must stay dense: over text, within a frame, along time, or cross."""
    before: int = 0
    """Number of other tokens before the video's in the sequence."""
    after: int = 0
    """Number of other tokens after the video's."""
    kind: Literal["self", "joint", "cross"] = "self"

    @property
    def tokens(self) -> int | None:
        """Number of query tokens of the call; None without a grid."""
        if self.grid is None:
            return None
        return self.before + math.prod(self.grid) + self.after


CROSS = Expected(grid=None, kind="cross")
DENSE = Expected(grid=None)
"""Self-attention among tokens that are not the video's, or among a part of the video's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model family: a function that makes a small model, and its attention calls in the order of a forward."""

    name: str
    make: _Make
    """(grid, batch) -> (model, forward's keyword arguments), drawn from the global generator."""
    calls: Callable[[Grid, int], list[Expected]]
    """Every call of scaled_dot_product_attention, for a grid and a batch."""

    def expect(self, grid: Grid = GRID, batch: int = 2) -> list[Expected]:
        """The expected sites of the model that `build` makes for the same grid and batch."""
        return self.calls(grid, batch)

    def build(self, grid: Grid = GRID, batch: int = 2, seed: int = 0) -> tuple[nn.Module, Inputs]:
        """The model in eval mode and the inputs of one forward. The global generator does not change."""
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            model, inputs = self.make(grid, batch)
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=NOISE)
        return model.eval(), inputs | {"return_dict": False}


CASES: dict[str, Case] = {}


def _case(calls: Callable[[Grid, int], list[Expected]]) -> Callable[[_Make], _Make]:
    def register(make: _Make) -> _Make:
        CASES[make.__name__] = Case(name=make.__name__, make=make, calls=calls)
        return make

    return register


def _latents(grid: Grid, batch: int, *, channels: int = 4, patch: Grid = (1, 2, 2)) -> Tensor:
    """[B, C, F, H, W] noise, whose patches form the grid."""
    return torch.randn(batch, channels, *(n * p for n, p in zip(grid, patch, strict=True)))


def _prompt(batch: int, width: int = 16, tokens: int = TEXT) -> Inputs:
    return {"encoder_hidden_states": torch.randn(batch, tokens, width)}


def _lengths(batch: int) -> list[int]:
    """Number of tokens of each prompt without padding."""
    return [TEXT - 3 - item % 4 for item in range(batch)]


def _padding(batch: int) -> Tensor:
    """[B, TEXT] of 1 and 0: prompts of different lengths, each padded at its end."""
    return (torch.arange(TEXT) < torch.tensor(_lengths(batch))[:, None]).long()


def _time(batch: int) -> Inputs:
    return {"timestep": torch.full((batch,), 500)}


def _layers_with_cross(grid: Grid, batch: int) -> list[Expected]:
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


@_case(lambda grid, batch: [Expected(grid=grid), CROSS, CROSS] * LAYERS)
def wan_i2v(grid: Grid, batch: int) -> Made:
    """Cross-attention to image tokens comes before that to the text, which must have 512 tokens."""
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


def _hunyuan_sites(grid: Grid, batch: int) -> list[Expected]:
    """The text refiner, then double-stream and single-stream layers: video first, padded text last."""
    return [DENSE] * LAYERS + [Expected(grid=grid, after=TEXT, kind="joint")] * (2 * LAYERS)


@_case(_hunyuan_sites)
def hunyuan_video(grid: Grid, batch: int) -> Made:
    """conv3d patches; a mask of keys in the joint layers, a mask of query and key in the text refiner."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**_HUNYUAN), _hunyuan_inputs(grid, batch)


@_case(_hunyuan_sites)
def hunyuan_video_i2v(grid: Grid, batch: int) -> Made:
    """The first frame is modulated separately, so layers cut the sequence and join it."""
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


def _text_first(grid: Grid, batch: int) -> list[Expected]:
    """Joint attention with the text before the video in every layer."""
    return [Expected(grid=grid, before=TEXT, kind="joint")] * LAYERS


@_case(_text_first)
def cogvideox(grid: Grid, batch: int) -> Made:
    """Frames before channels, conv2d patches; positions are added, from a buffer if the grid is the usual one."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**_COGVIDEOX), _cogvideox_inputs(grid, batch, (1, 2, 2))


@_case(_text_first)
def cogvideox_rope(grid: Grid, batch: int) -> Made:
    """Positions by rotary embeddings that are inputs."""
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
    """Packed tokens: the grid is three integer inputs, used only by the rotary embedding."""
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
        "hidden_states": torch.randn(batch, math.prod(grid), 4),
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
    """conv2d patches; one layer with separate weights for the text, one without."""
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


# Further families, for which the compiler was not written.


@_case(_layers_with_cross)
def skyreels_v2(grid: Grid, batch: int) -> Made:
    """Wan with a time step per frame."""
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_WAN), {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "timestep": torch.full((batch, grid[0]), 500),
        "enable_diffusion_forcing": True,
    }


@_case(lambda grid, batch: [DENSE, CROSS] * LAYERS)
def skyreels_v2_causal(grid: Grid, batch: int) -> Made:
    """Blocks of frames attend to themselves and to earlier blocks: a mask of query and key."""
    from diffusers import SkyReelsV2Transformer3DModel

    block = next(n for n in range(2, grid[0] + 1) if grid[0] % n == 0)
    return SkyReelsV2Transformer3DModel(**_WAN, num_frame_per_block=block), {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        **_time(batch),
    }


@_case(lambda grid, batch: [Expected(grid=grid), CROSS] * (2 * LAYERS))
def wan_vace(grid: Grid, batch: int) -> Made:
    """A second stream of control tokens, joined with a padding of zero tokens, runs through layers first."""
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**_WAN, vace_layers=[*range(LAYERS)], vace_in_channels=6), {
        "hidden_states": _latents(grid, batch),
        "control_hidden_states": _latents(grid, batch, channels=6),
        **_prompt(batch),
        **_time(batch),
    }


@_case(lambda grid, batch: [Expected(grid=grid), CROSS, CROSS, Expected(grid=grid), CROSS])
def wan_animate(grid: Grid, batch: int) -> Made:
    """Pose is added in place to all frames except the first; faces enter by cross-attention within each frame."""
    from diffusers import WanAnimateTransformer3DModel

    config = _WAN | {"in_channels": 12, "latent_channels": 4}
    model = WanAnimateTransformer3DModel(
        **config,
        image_dim=None,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=LAYERS,
    )
    frames, height, width = grid
    return model, {
        "hidden_states": _latents(grid, batch, channels=12),
        "pose_hidden_states": _latents((frames - 1, height, width), batch),
        "face_pixel_values": torch.randn(batch, 3, 4 * (frames - 2) + 1, 16, 16),
        **_prompt(batch),
        **_time(batch),
    }


@_case(_layers_with_cross)
def chronoedit(grid: Grid, batch: int) -> Made:
    """Wan again; head dimension 12."""
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**_WAN | {"attention_head_dim": 12}), {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        **_time(batch),
    }


@_case(_layers_with_cross)
def anyflow(grid: Grid, batch: int) -> Made:
    """Frames before channels, then conv3d patches."""
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(**_WAN), {
        "hidden_states": _latents(grid, batch).transpose(1, 2).contiguous(),
        **_prompt(batch),
        "timestep": torch.full((batch, grid[0]), 500.0),
        "r_timestep": torch.full((batch, grid[0]), 400.0),
    }


def _history(grid: Grid, *scales: int) -> int:
    """Number of tokens of one patched frame of history over all scales, with height and width padded to patches."""
    return sum(-(-grid[1] // n) * -(-grid[2] // n) for n in scales)


@_case(
    lambda grid, batch: [Expected(grid=grid, before=_history(grid, 4, 2, 1, 1), kind="joint"), CROSS] * LAYERS
)
def helios(grid: Grid, batch: int) -> Made:
    """History at three scales before the video; text reaches only the video's tokens."""
    from diffusers import HeliosTransformer3DModel

    model = HeliosTransformer3DModel(**_WAN, rope_dim=(4, 6, 6), is_amplify_history=True)
    inputs = {"hidden_states": _latents(grid, batch), **_prompt(batch), **_time(batch)}
    inputs["indices_hidden_states"] = (7 + torch.arange(grid[0])).expand(batch, -1)
    start = 0
    for name, frames in {"long": 4, "mid": 2, "short": 2}.items():
        inputs[f"latents_history_{name}"] = _latents((frames, *grid[1:]), batch)
        inputs[f"indices_latents_history_{name}"] = torch.arange(start, start + frames).expand(batch, -1)
        start += frames
    return model, inputs


@_case(
    lambda grid, batch: (
        [DENSE] * LAYERS
        + [Expected(grid=grid, before=_history(grid, 4, 2, 1), after=3 + TEXT, kind="joint")] * (2 * LAYERS)
    )
)
def hunyuan_framepack(grid: Grid, batch: int) -> Made:
    """History at three scales before the video, image and text after it; masks are built item by item."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    model = HunyuanVideoFramepackTransformer3DModel(
        **_HUNYUAN, has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True
    )
    inputs = _hunyuan_inputs(grid, batch)
    inputs["encoder_attention_mask"][0] = 1  # a batch of one is cut to its length, here all of it
    inputs["image_embeds"] = torch.randn(batch, 3, 8)
    inputs["indices_latents"] = 7 + torch.arange(grid[0])
    start = 0
    for name, frames in {"history_4x": 4, "history_2x": 2, "clean": 1}.items():
        inputs[f"latents_{name}"] = _latents((frames, *grid[1:]), batch)
        inputs[f"indices_latents_{name}"] = torch.arange(start, start + frames)
        start += frames
    return model, inputs


@_case(lambda grid, batch: [DENSE] * LAYERS + [Expected(grid=None, kind="joint")] * LAYERS)
def hunyuan_video_15(grid: Grid, batch: int) -> Made:
    """A mask of query and key, although only keys are padded; text is sorted by boolean indexing."""
    from diffusers import HunyuanVideo15Transformer3DModel

    model = HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        num_refiner_layers=LAYERS,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return model, {
        "hidden_states": _latents(grid, batch, patch=(1, 1, 1)),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        "encoder_hidden_states_2": torch.randn(batch, TEXT, 8),
        "encoder_attention_mask_2": _padding(batch),
        "image_embeds": torch.randn(batch, 3, 8),
        "timestep": torch.full((batch,), 500.0),
    }


@_case(_text_first)
def consisid(grid: Grid, batch: int) -> Made:
    """CogVideoX under another name."""
    from diffusers import ConsisIDTransformer3DModel

    model = ConsisIDTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, _cogvideox_inputs(grid, batch, (1, 2, 2)) | _cogvideox_rope(grid)


@_case(_layers_with_cross)
def cosmos(grid: Grid, batch: int) -> Made:
    """Patches by reshape, permute and a linear layer; learned positions added in every layer."""
    from diffusers import CosmosTransformer3DModel

    model = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        concat_padding_mask=False,
    )
    return model, {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "attention_mask": _padding(batch).bool(),
        "fps": 24,
        **_time(batch),
    }


@_case(lambda grid, batch: [DENSE] * LAYERS + [Expected(grid=grid), CROSS] * LAYERS)
def kandinsky5(grid: Grid, batch: int) -> Made:
    """Channels last; the positions of the axes are inputs."""
    from diffusers import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=LAYERS,
        num_visual_blocks=LAYERS,
        axes_dims=(4, 6, 6),
    )
    return model, {
        "hidden_states": _latents(grid, batch).movedim(1, -1).contiguous(),
        **_prompt(batch),
        "pooled_projections": torch.randn(batch, 8),
        "visual_rope_pos": tuple(torch.arange(n) for n in grid),
        "text_rope_pos": torch.arange(TEXT),
        **_time(batch),
    }


@_case(lambda grid, batch: [Expected(grid=grid), DENSE, CROSS, CROSS, CROSS, CROSS] * LAYERS)
def ltx2(grid: Grid, batch: int) -> Made:
    """Packed video and packed audio: each attends to itself, to its text, then to the other."""
    from diffusers import LTX2VideoTransformer3DModel

    frames, height, width = grid
    model = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=LAYERS,
        caption_channels=16,
    )
    return model, {
        "hidden_states": torch.randn(batch, math.prod(grid), 4),
        "audio_hidden_states": torch.randn(batch, 13, 4),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        "audio_encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "audio_encoder_attention_mask": _padding(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 13,
        **_time(batch),
    }


@_case(
    lambda grid, batch: (
        [Expected(grid=grid, after=TEXT, kind="joint"), CROSS] * (LAYERS + 1)
        + [Expected(grid=grid, after=math.prod(grid), kind="joint")]
    )
)
def motif_video(grid: Grid, batch: int) -> Made:
    """The last layer is a decoder: the patches again, followed by the encoder's tokens of the same video."""
    from diffusers import MotifVideoTransformer3DModel

    model = MotifVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return model, {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        **_time(batch),
    }


@_case(
    lambda grid, batch: (
        [CROSS] + [Expected(grid=grid, after=length, kind="joint") for length in _lengths(batch)] * LAYERS
    )
)
def mochi(grid: Grid, batch: int) -> Made:
    """Text is pooled by attention; then each video of the batch has its own attention, with unpadded text."""
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TEXT,
    )
    return model, {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch).bool(),
        **_time(batch),
    }


@_case(lambda grid, batch: [CROSS] * LAYERS)
def sana_video(grid: Grid, batch: int) -> Made:
    """Linear attention over the video, without a softmax: no attention can become sparse."""
    from diffusers import SanaVideoTransformer3DModel

    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=LAYERS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
    )
    return model, {
        "hidden_states": _latents(grid, batch),
        **_prompt(batch),
        "encoder_attention_mask": _padding(batch),
        **_time(batch),
    }


@_case(lambda grid, batch: [DENSE, CROSS, DENSE] * LAYERS)
def latte(grid: Grid, batch: int) -> Made:
    """Layers within a frame (frames in the batch) and along time (pixels in the batch), in turns."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=grid[0],
    )
    return model, {"hidden_states": _latents(grid, batch), **_prompt(batch), **_time(batch)}


@_case(lambda grid, batch: [DENSE, DENSE] * LAYERS)
def temporal(grid: Grid, batch: int) -> Made:
    """Frames in the batch, attention along time."""
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    model = TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=LAYERS, norm_num_groups=4
    )
    frames, height, width = grid
    return model, {"hidden_states": torch.randn(batch * frames, 32, height, width), "num_frames": frames}


@_case(lambda grid, batch: [DENSE] * LAYERS + [Expected(grid=None, kind="joint")] * LAYERS)
def minimax_h3(grid: Grid, batch: int) -> Made:
    """Text, video and audio are copied to places given by index tensors: no graph shows the order."""
    from diffusers import MiniMaxH3Transformer3DModel

    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=LAYERS,
        num_refiner_layers=LAYERS,
        ffn_dim=64,
        in_channels=1,
        audio_in_channels=4,
        text_dim=16,
        freq_dim=8,
        time_embed_hidden_dim=16,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    audio, video = 5, math.prod(grid)
    sizes = [TEXT, audio, video]
    text_at, audio_at, video_at = torch.arange(sum(sizes)).split(sizes)
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    return model, {
        "hidden_states": torch.randn(batch, video, 4),
        "audio_hidden_states": torch.randn(batch, audio, 4),
        **_prompt(batch),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(sum(sizes), dtype=torch.long),
        "token_tags": torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(sizes)),
        "position_ids": torch.cat([torch.arange(TEXT + audio)[:, None].expand(-1, 3), places]),
        "video_indices": video_at,
        "audio_indices": audio_at,
        "text_indices": text_at,
    }
