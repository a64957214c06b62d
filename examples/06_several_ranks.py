"""Run a diffusers video transformer on several ranks, and compare with one process.

    torchrun --nproc-per-node 2 examples/06_several_ranks.py

It runs on the CPU in about a minute. The weights are random. They are the same on every rank, since all ranks draw
them with one seed. On GPUs, give every rank its device: `torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))`.
"""

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel

import sparsify_compiler

OPTIONS = {"method": "svg2", "dense_steps": 0, "dense_layers": 0}


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=64
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 24, 32),  # latents: 5 frames of 24 x 32, in patches of 2 x 2
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 32, 64),
        "return_dict": False,
    }
    shared = {**OPTIONS, "parallel": "auto"}
    if dist.get_rank() == 0:
        print(sparsify_compiler.explain(model, **inputs, options=shared))

    with torch.no_grad():
        together = torch.compile(model, backend="sparsify", options=shared)(**inputs)[0]
        torch.compiler.reset()
        alone = torch.compile(model, backend="sparsify", options=OPTIONS)(**inputs)[0]
    difference = (together - alone).abs().max() / alone.abs().max()
    print(f"rank {dist.get_rank()}: the output differs from that of one process by {difference:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
