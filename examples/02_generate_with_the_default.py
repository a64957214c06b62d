"""A sampling loop with the default method, and the density of its attention at every step.

    python examples/02_generate_with_the_default.py

It runs on the CPU in about a minute. The weights are random; with a checkpoint, nothing else changes.
"""

import torch
from diffusers import WanTransformer3DModel

import sparsify_compiler

STEPS = 10


def main() -> None:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=64
    ).eval()
    latents = torch.randn(1, 16, 9, 24, 32)  # 9 frames of 24 x 32, in patches of 2 x 2
    prompt, empty = torch.randn(1, 32, 64), torch.zeros(1, 32, 64)

    # The guard would run so few tokens dense where that is faster.
    options = {"measure_recall": 0.02, "guard": "off"}
    fast = torch.compile(model, backend="sparsify", options=options)
    # Guidance in two calls. Without `generation`, a first video counts as one of 50 steps, a fifth of them dense.
    with torch.no_grad(), sparsify_compiler.generation(steps=STEPS, streams=2):
        for step in range(STEPS):
            time = torch.tensor([1000 * (STEPS - step) / STEPS])
            wanted, unwanted = (
                fast(hidden_states=latents, timestep=time, encoder_hidden_states=text, return_dict=False)[0]
                for text in (prompt, empty)
            )
            latents = latents - (unwanted + 4.0 * (wanted - unwanted)) / STEPS

    stats = sparsify_compiler.stats(fast)
    print(stats)
    print(f"A heat map of density over layers and steps: {stats.save_picture('demo_out/density.png')}")


if __name__ == "__main__":
    main()
