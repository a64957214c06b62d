"""The check samples each prompt from its own noise, and measures every attention."""

import torch

from sparsify_compiler.lab import check, world
from sparsify_compiler.lab.model import CONFIG, build

TINY = build(CONFIG | {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64})


def test_samples_do_not_depend_on_how_many_there_are():
    torch.nn.init.normal_(TINY.proj_out.weight, std=0.1)
    prompts = [world.scene(world.HELD_OUT, index).prompt for index in range(check.BATCH + 1)]
    videos = check.samples(TINY, prompts, steps=1, guidance=2.0)
    assert videos.shape == (check.BATCH + 1, 3, world.FRAMES, world.HEIGHT, world.WIDTH)
    torch.testing.assert_close(
        videos[:2], check.samples(TINY, prompts[:2], steps=1, guidance=2.0), atol=2e-2, rtol=0
    )
    assert not torch.allclose(videos[0], videos[check.BATCH], atol=0.1)


def test_critical_shares_are_of_every_layer_and_head():
    shares = check.shares(TINY, 0.5)
    assert shares.shape == (1, 1)
    assert 0 < shares.item() < 1
