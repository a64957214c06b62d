"""Train a diffusers video transformer with method `dsv` and FSDP2 on several ranks, and continue on another number.

    torchrun --nproc-per-node 2 examples/07_train_on_several_ranks.py checkpoint
    torchrun --nproc-per-node 3 examples/07_train_on_several_ranks.py checkpoint

All ranks share every video. FSDP2 shards the weights over the same ranks, and takes the mean of the gradients. It
runs on the CPU in a few minutes, with random weights and data.
"""

import io
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from diffusers import WanTransformer3DModel
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from sparsify_compiler import DSVTrainer

STEPS = 6


class Predictors:
    """The state of a trainer as one object, since its keys change in training."""

    def __init__(self, trainer: DSVTrainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, bytes]:
        file = io.BytesIO()
        torch.save(self.trainer.state_dict(), file)
        return {"dsv": file.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        self.trainer.load_state_dict(torch.load(io.BytesIO(state["dsv"])))


def main(folder: Path) -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=32, ffn_dim=128, num_layers=2, text_dim=64
    )
    model.enable_gradient_checkpointing()
    options = {"method": "dsv", "rank": 8, "parallel": "auto"}
    compiled: Any = torch.compile(model, backend="sparsify", options=options)
    fully_shard(compiled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    # Settings with which heads become sparse in the first steps.
    dsv = DSVTrainer(compiled, threshold=10.0, profile_every=(2, 2), break_even=1.0)

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "predictors": Predictors(dsv)}

    if folder.exists():
        found = state()
        dcp.load(found, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    for _ in range(STEPS):
        torch.manual_seed(dsv.steps)  # all ranks train on the same video
        out = compiled(
            hidden_states=torch.randn(1, 16, 5, 24, 32),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 32, 64),
        ).sample
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dsv.step()
        if dist.get_rank() == 0:
            print(f"step {dsv.steps}, stage {dsv.stage}: loss {float(loss):.6f}", flush=True)
    dcp.save(state(), checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
