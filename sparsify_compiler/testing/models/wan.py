"""Wan and the families built on it."""

import torch

from sparsify_compiler.testing.models.case import (
    CROSS,
    DENSE,
    LAYERS,
    Expected,
    Grid,
    Made,
    family,
    history,
    latents,
    layers_with_cross,
    prompt,
    time_step,
)

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


@family(layers_with_cross)
def wan(grid: Grid, batch: int) -> Made:
    """conv3d patches; text by cross-attention."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN), {
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        **time_step(batch),
    }


@family(lambda grid, batch: [Expected(grid=grid), CROSS, CROSS] * LAYERS)
def wan_i2v(grid: Grid, batch: int) -> Made:
    """Cross-attention to image tokens comes before that to the text, which must have 512 tokens."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**_WAN, image_dim=16, added_kv_proj_dim=32), {
        "hidden_states": latents(grid, batch),
        **prompt(batch, tokens=512),
        "encoder_hidden_states_image": torch.randn(batch, 13, 16),
        **time_step(batch),
    }


@family(layers_with_cross)
def skyreels_v2(grid: Grid, batch: int) -> Made:
    """Wan with a time step per frame."""
    from diffusers import SkyReelsV2Transformer3DModel

    return SkyReelsV2Transformer3DModel(**_WAN), {
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        "timestep": torch.full((batch, grid[0]), 500),
        "enable_diffusion_forcing": True,
    }


@family(lambda grid, batch: [DENSE, CROSS] * LAYERS)
def skyreels_v2_causal(grid: Grid, batch: int) -> Made:
    """Blocks of frames attend to themselves and to earlier blocks: a mask of query and key."""
    from diffusers import SkyReelsV2Transformer3DModel

    block = next(n for n in range(2, grid[0] + 1) if grid[0] % n == 0)
    return SkyReelsV2Transformer3DModel(**_WAN, num_frame_per_block=block), {
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        **time_step(batch),
    }


@family(lambda grid, batch: [Expected(grid=grid), CROSS] * (2 * LAYERS))
def wan_vace(grid: Grid, batch: int) -> Made:
    """A second stream of control tokens, joined with a padding of zero tokens, runs through layers first."""
    from diffusers import WanVACETransformer3DModel

    return WanVACETransformer3DModel(**_WAN, vace_layers=[*range(LAYERS)], vace_in_channels=6), {
        "hidden_states": latents(grid, batch),
        "control_hidden_states": latents(grid, batch, channels=6),
        **prompt(batch),
        **time_step(batch),
    }


@family(lambda grid, batch: [Expected(grid=grid), CROSS, CROSS, Expected(grid=grid), CROSS])
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
        "hidden_states": latents(grid, batch, channels=12),
        "pose_hidden_states": latents((frames - 1, height, width), batch),
        "face_pixel_values": torch.randn(batch, 3, 4 * (frames - 2) + 1, 16, 16),
        **prompt(batch),
        **time_step(batch),
    }


@family(layers_with_cross)
def chronoedit(grid: Grid, batch: int) -> Made:
    """Wan again; head dimension 12."""
    from diffusers import ChronoEditTransformer3DModel

    return ChronoEditTransformer3DModel(**_WAN | {"attention_head_dim": 12}), {
        "hidden_states": latents(grid, batch),
        **prompt(batch),
        **time_step(batch),
    }


@family(layers_with_cross)
def anyflow(grid: Grid, batch: int) -> Made:
    """Frames before channels, then conv3d patches."""
    from diffusers import AnyFlowTransformer3DModel

    return AnyFlowTransformer3DModel(**_WAN), {
        "hidden_states": latents(grid, batch).transpose(1, 2).contiguous(),
        **prompt(batch),
        "timestep": torch.full((batch, grid[0]), 500.0),
        "r_timestep": torch.full((batch, grid[0]), 400.0),
    }


@family(
    lambda grid, batch: [Expected(grid=grid, before=history(grid, 4, 2, 1, 1), kind="joint"), CROSS] * LAYERS
)
def helios(grid: Grid, batch: int) -> Made:
    """History at three scales before the video; text reaches only the video's tokens."""
    from diffusers import HeliosTransformer3DModel

    model = HeliosTransformer3DModel(**_WAN, rope_dim=(4, 6, 6), is_amplify_history=True)
    inputs = {"hidden_states": latents(grid, batch), **prompt(batch), **time_step(batch)}
    inputs["indices_hidden_states"] = (7 + torch.arange(grid[0])).expand(batch, -1)
    start = 0
    for name, frames in {"long": 4, "mid": 2, "short": 2}.items():
        inputs[f"latents_history_{name}"] = latents((frames, *grid[1:]), batch)
        inputs[f"indices_latents_history_{name}"] = torch.arange(start, start + frames).expand(batch, -1)
        start += frames
    return model, inputs
