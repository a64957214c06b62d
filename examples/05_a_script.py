"""A script that knows nothing of this package: a sampling loop over the time steps of a scheduler.

    sparsify run --option method=tile --option dense_steps=0.2 --stats examples/05_a_script.py --steps 10

It runs on the CPU in about a minute. The weights are random; with a checkpoint, nothing else changes.
"""

import argparse

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel


def main() -> None:
    parser = argparse.ArgumentParser(prog="python examples/05_a_script.py", description="Sample once.")
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=64
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    latents, prompt = torch.randn(1, 16, 9, 24, 32), torch.randn(1, 32, 64)

    model.compile_repeated_blocks(fullgraph=True)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for time in scheduler.timesteps:
            velocity = model(latents, time.expand(1), prompt, return_dict=False)[0]
            latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    print(f"latents of shape {list(latents.shape)}")


if __name__ == "__main__":
    main()
