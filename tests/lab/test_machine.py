"""Products in the dtype that the CPU multiplies, and bfloat16 products for CPUs that do not."""

import pytest
import torch

from sparsify_compiler.lab import machine


@pytest.mark.parametrize("supported", [True, False])
def test_fast_products_are_in_what_the_cpu_multiplies(monkeypatch, supported):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: supported)
    wanted = torch.bfloat16 if supported else torch.float32
    with machine.fast_products():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == wanted
    assert machine.machine()["fast_products"] == str(wanted).removeprefix("torch.")


def test_widened_products_round_once_as_bfloat16_products_do():
    """Against float64, for every product that a model, attention or Muon takes; others are left alone."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(48, 32).bfloat16()
    x, y = torch.randn(2, 5, 48).bfloat16(), torch.randn(2, 48, 7).bfloat16()
    q = torch.randn(1, 2, 9, 16).bfloat16()
    mask = torch.randn(9, 9).bfloat16()
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), machine.Widened():
        masked = attend(q, q, q, attn_mask=mask)
        found = [linear(x), x @ y, torch.baddbmm(x[..., :7], x, y, beta=2.0), attend(q, q, q), masked, x + x]
        float32 = x.float() @ y.float()
    exact = [
        x.double() @ linear.weight.double().T + linear.bias.double(),
        x.double() @ y.double(),
        2 * x[..., :7].double() + x.double() @ y.double(),
        attend(q.double(), q.double(), q.double()),
        attend(q.double(), q.double(), q.double(), attn_mask=mask.double()),
        2 * x.double(),
    ]
    for one, like in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits, and float32's own error.
        torch.testing.assert_close(one.double(), like, rtol=2**-8, atol=1e-5)
    assert float32.dtype == torch.float32


def test_muon_steps_alike_with_widened_products():
    found = []
    for mode in (machine.Widened(), torch.no_grad()):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(24, 40))
        weight.grad = torch.randn(24, 40)
        with mode:
            torch.optim.Muon([weight], lr=0.1).step()
        found.append(weight.detach())
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)
