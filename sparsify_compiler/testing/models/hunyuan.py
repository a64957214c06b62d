"""HunyuanVideo and the families built on it."""

import torch

from sparsify_compiler.testing.models.case import (
    DENSE,
    LAYERS,
    TEXT,
    Expected,
    Grid,
    Inputs,
    Made,
    family,
    history,
    latents,
    padding,
    prompt,
    time_step,
)

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
_IMAGE = 3
"""Number of tokens of an image."""


def _hunyuan_inputs(grid: Grid, batch: int) -> Inputs:
    return {
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6.0),
        **time_step(batch),
    }


def _hunyuan_sites(grid: Grid, batch: int) -> list[Expected]:
    """The text refiner, then double-stream and single-stream layers: video first, padded text last."""
    return [DENSE] * LAYERS + [Expected(grid=grid, after=TEXT, kind="joint")] * (2 * LAYERS)


@family(_hunyuan_sites)
def hunyuan_video(grid: Grid, batch: int) -> Made:
    """conv3d patches; a mask of keys in the joint layers, a mask of query and key in the text refiner."""
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(**_HUNYUAN), _hunyuan_inputs(grid, batch)


@family(_hunyuan_sites)
def hunyuan_video_i2v(grid: Grid, batch: int) -> Made:
    """The first frame is modulated separately, so layers cut the sequence and join it."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(**_HUNYUAN, image_condition_type="token_replace")
    return model, _hunyuan_inputs(grid, batch)


@family(
    lambda grid, batch: (
        [DENSE] * LAYERS
        + [Expected(grid=grid, before=history(grid, 4, 2, 1), after=_IMAGE + TEXT, kind="joint")]
        * (2 * LAYERS)
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
    inputs["image_embeds"] = torch.randn(batch, _IMAGE, 8)
    inputs["indices_latents"] = 7 + torch.arange(grid[0])
    start = 0
    for name, frames in {"history_4x": 4, "history_2x": 2, "clean": 1}.items():
        inputs[f"latents_{name}"] = latents((frames, *grid[1:]), batch)
        inputs[f"indices_latents_{name}"] = torch.arange(start, start + frames)
        start += frames
    return model, inputs


@family(
    lambda grid, batch: (
        [DENSE] * LAYERS + [Expected(grid=grid, after=2 * TEXT + _IMAGE, kind="joint")] * LAYERS
    )
)
def hunyuan_video_15(grid: Grid, batch: int) -> Made:
    """A mask of query and key, although only keys are padded; text of two encoders and an image are sorted by
    boolean indexing, the padding last."""
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
        "hidden_states": latents(grid, batch, patch=(1, 1, 1)),
        **prompt(batch),
        "encoder_attention_mask": padding(batch),
        "encoder_hidden_states_2": torch.randn(batch, TEXT, 8),
        "encoder_attention_mask_2": padding(batch),
        "image_embeds": torch.randn(batch, _IMAGE, 8),
        "timestep": torch.full((batch,), 500.0),
    }
