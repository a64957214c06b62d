"""The critical share, where it is known."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.lab.sparsity import critical_share, critical_shares


def test_even_attention_needs_theta_of_its_keys():
    query, key = torch.zeros(1, 2, 100, 8), torch.randn(1, 2, 100, 8)
    assert critical_share(query, key, 0.9).tolist() == pytest.approx([0.9, 0.9], abs=0.011)
    assert critical_share(query, key, 0.5).tolist() == pytest.approx([0.5, 0.5], abs=0.011)


def test_attention_to_one_key_needs_one():
    key = torch.eye(64).expand(1, 1, 64, 64)
    query = torch.cat([400 * key, 0 * key], dim=1)
    shares = critical_share(query, key.expand(1, 2, 64, 64), rows=64)
    assert shares.tolist() == pytest.approx([1 / 64, 58 / 64])


def test_every_self_attention_is_heard_in_order_and_cross_attention_is_not():
    video, text = torch.randn(1, 2, 50, 8), torch.randn(1, 2, 5, 8)

    def call():
        scaled_dot_product_attention(0 * video, video, video)
        scaled_dot_product_attention(video, text, text)
        return scaled_dot_product_attention(query=1000 * video, key=video, value=video)

    shares = critical_shares(call)
    assert shares.shape == (2, 2)
    assert (shares[0] > 0.85).all()
    assert (shares[1] < 0.1).all()
