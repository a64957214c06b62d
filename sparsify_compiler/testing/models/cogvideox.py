"""CogVideoX and the families built on it."""

from sparsify_compiler.testing.models.case import (
    GRID,
    LAYERS,
    TEXT,
    Grid,
    Inputs,
    Made,
    family,
    latents,
    prompt,
    text_first,
    time_step,
)

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
        "hidden_states": latents(grid, batch, patch=patch).transpose(1, 2).contiguous(),
        **prompt(batch),
        **time_step(batch),
    }


def _cogvideox_rope(grid: Grid) -> Inputs:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return {"image_rotary_emb": get_3d_rotary_pos_embed(16, ((0, 0), grid[1:]), grid[1:], grid[0])}


@family(text_first)
def cogvideox(grid: Grid, batch: int) -> Made:
    """Frames before channels, conv2d patches; positions are added, from a buffer if the grid is the usual one."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(**_COGVIDEOX), _cogvideox_inputs(grid, batch, (1, 2, 2))


@family(text_first)
def cogvideox_rope(grid: Grid, batch: int) -> Made:
    """Positions by rotary embeddings that are inputs."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, _cogvideox_inputs(grid, batch, (1, 2, 2)) | _cogvideox_rope(grid)


@family(text_first)
def cogvideox_15(grid: Grid, batch: int) -> Made:
    """Patches of two frames, by reshape, permute and a linear layer."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True, patch_size_t=2)
    return model, _cogvideox_inputs(grid, batch, (2, 2, 2)) | _cogvideox_rope(grid)


@family(text_first)
def consisid(grid: Grid, batch: int) -> Made:
    """CogVideoX under another name."""
    from diffusers import ConsisIDTransformer3DModel

    model = ConsisIDTransformer3DModel(**_COGVIDEOX, use_rotary_positional_embeddings=True)
    return model, _cogvideox_inputs(grid, batch, (1, 2, 2)) | _cogvideox_rope(grid)
