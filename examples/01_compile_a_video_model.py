"""Compile a diffusers video transformer with block-sparse attention, and show the plan and the changed output.

    python examples/01_compile_a_video_model.py

It runs on the CPU in less than a minute. The weights are random. For a checkpoint, write
`WanTransformer3DModel.from_pretrained(...)` instead; nothing else changes.
"""

import torch
from diffusers import WanTransformer3DModel

import sparsify_compiler

OPTIONS = {"method": "tile", "reference_frames": 2}


def main() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=64
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 9, 24, 32),  # latents: 9 frames of 24 x 32, in patches of 2 x 2
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }

    print(sparsify_compiler.explain(model, **inputs, options=OPTIONS))

    sparse = torch.compile(model, backend="sparsify", options=OPTIONS)
    with torch.no_grad():
        (dense_video,) = model(**inputs)
        (sparse_video,) = sparse(**inputs)
    change = (sparse_video - dense_video).norm() / dense_video.norm()
    print(f"\nThe output moved by {change:.1%} from the dense model's.")


if __name__ == "__main__":
    main()
