"""Families that are not built on another one."""

import math
from typing import Any

import torch

from sparsify_compiler.testing.models.case import (
    CROSS,
    DENSE,
    LAYERS,
    TEXT,
    Expected,
    Grid,
    Made,
    family,
    latents,
    layers_with_cross,
    lengths,
    padding,
    prompt,
    text_first,
    time_step,
)


@family(layers_with_cross)
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
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        **time_step(batch),
    }


@family(layers_with_cross)
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
        "hidden_states": latents(grid, batch),
        "attention_mask": pixels,
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        "image_rotary_emb": (tables, [position[None] for position in positions.T.contiguous()]),
        **time_step(batch),
    }


@family(text_first)
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
    return model, {"hidden_states": latents(grid, batch), **prompt(batch), **time_step(batch)}


@family(layers_with_cross)
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
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "attention_mask": padding(batch).bool(),
        "fps": 24,
        **time_step(batch),
    }


@family(lambda grid, batch: [DENSE] * LAYERS + [Expected(grid=grid), CROSS] * LAYERS)
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
        "hidden_states": latents(grid, batch).movedim(1, -1).contiguous(),
        **prompt(batch),
        "pooled_projections": torch.randn(batch, 8),
        "visual_rope_pos": tuple(torch.arange(n) for n in grid),
        "text_rope_pos": torch.arange(TEXT),
        **time_step(batch),
    }


@family(
    lambda grid, batch: (
        [DENSE] * (2 * LAYERS) + [Expected(grid=grid), CROSS, DENSE, CROSS, CROSS, CROSS] * LAYERS
    )
)
def kandinsky6(grid: Grid, batch: int) -> Made:
    """Channels last; video and audio attend to themselves and to text of their own, then to each other."""
    from diffusers import Kandinsky6Transformer3DModel

    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        visual_cond=False,
        in_audio_dim=4,
        out_audio_dim=4,
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
        "hidden_states": latents(grid, batch).movedim(1, -1).contiguous(),
        "audio_hidden_states": torch.randn(batch, 13, 4),
        **prompt(batch),
        "pooled_projections": torch.randn(batch, 8),
        **time_step(batch),
    }


@family(lambda grid, batch: [Expected(grid=grid), DENSE, CROSS, CROSS, CROSS, CROSS] * LAYERS)
def ltx2(grid: Grid, batch: int) -> Made:
    """Packed video and packed audio: each attends to itself, then to its text, then to the other."""
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
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        "audio_encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "audio_encoder_attention_mask": padding(batch),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 13,
        **time_step(batch),
    }


@family(
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
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        **time_step(batch),
    }


@family(
    lambda grid, batch: (
        [CROSS] + [Expected(grid=grid, after=length, kind="joint") for length in lengths(batch)] * LAYERS
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
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "encoder_attention_mask": padding(batch).bool(),
        **time_step(batch),
    }


@family(lambda grid, batch: [CROSS] * LAYERS)
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
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        **time_step(batch),
    }


@family(lambda grid, batch: [DENSE, CROSS, DENSE] * LAYERS)
def latte(grid: Grid, batch: int) -> Made:
    """Layers within a frame (frames in the batch) and along time (pixels in the batch) alternate."""
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
    return model, {"hidden_states": latents(grid, batch), **prompt(batch), **time_step(batch)}


@family(lambda grid, batch: [DENSE, DENSE] * LAYERS)
def temporal(grid: Grid, batch: int) -> Made:
    """Frames in the batch, attention along time."""
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    model = TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=32, num_layers=LAYERS, norm_num_groups=4
    )
    frames, height, width = grid
    return model, {"hidden_states": torch.randn(batch * frames, 32, height, width), "num_frames": frames}


@family(lambda grid, batch: [DENSE] * LAYERS + [Expected(grid=None, kind="joint")] * LAYERS)
def minimax_h3(grid: Grid, batch: int) -> Made:
    """Index tensors give the places of text, video and audio: nothing in a graph shows the order."""
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
        **prompt(batch),
        "timestep": torch.tensor([0.5]),
        "timestep_indices": torch.zeros(sum(sizes), dtype=torch.long),
        "token_tags": torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(sizes)),
        "position_ids": torch.cat([torch.arange(TEXT + audio)[:, None].expand(-1, 3), places]),
        "video_indices": video_at,
        "audio_indices": audio_at,
        "text_indices": text_at,
    }
