"""What of `benchmarks.gpu` needs no GPU: its tables, its sampling, its report."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify_compiler.kernels.reference import attention as reference
from sparsify_compiler.kernels.triton import backward
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.strategies import qkv

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch):
    """The module; `benchmarks` is no part of the package, so it is imported from the checkout."""
    monkeypatch.syspath_prepend(ROOT)
    import benchmarks.gpu

    return benchmarks.gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", "nowhere"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr == "benchmarks.gpu needs a CUDA GPU, and torch sees none\n"


def test_block_of_token_is_that_of_the_mask(gpu):
    table = gpu.cluster_table(100, 4, 7, 0.5)
    q_block, kv_block = (
        gpu.block_of_token(bounds, order)
        for bounds, order in ((table.q_bounds, table.q_order), (table.kv_bounds, table.kv_order))
    )
    assert torch.equal(table.block_mask()[0, 0][q_block][:, kv_block], table.mask()[0, 0])


def test_flex_reads_the_same_blocks(gpu):
    table = gpu.random_table(1024, 256, 128, 0.5)
    assert torch.equal(gpu.flex_mask(table).to_dense().bool(), table.block_mask().repeat_interleave(2, -2))
    assert gpu.flex_mask(gpu.random_table(1024, 256, 64, 0.5)) is None
    assert gpu.flex_mask(gpu.cluster_table(1024, 4, 4, 0.5)) is None


def test_report(gpu):
    times = {"ours": 1.0, "cudnn": 4.0, "flash": 5.0}
    line = {"case": "some", **gpu.figures(torch.Size((1, 2, 1000, 64)), 0.2, times)}
    assert line["speedup"] == 4.0
    assert line["efficiency"] == pytest.approx(0.8)
    swept = {"case": "some", "head_dim": 64, "ms": {"fast": 0.5, "shipped": 1.0}}
    text = gpu.markdown([{"check": "fine"}, line, swept])
    assert "| some | 1000 | 2 | 64 | 0.200 | 1.00 | 4.00 | 5.00 |  |  | 0 | 4.00 | 0.80 |" in text
    assert "| some | 64 | 1.00 | 0.50 | fast |" in text


def test_every_case_has_a_table_and_is_swept_by_its_name(gpu):
    assert all(isinstance(table, BlockTable) for table in gpu.cases().values())
    assert set(gpu.SWEPT) <= set(gpu.cases())


def test_single_keys_at_the_density_asked_for(gpu):
    table = gpu.single_key_table(100, 20, 0.13, "cpu")
    assert table.kv_indices.shape == (1, 1, 5, 16)
    assert torch.equal(table.mask()[0, 0].sum(-1), torch.full((100,), 13))


@pytest.fixture
def gpu_of_references(gpu, monkeypatch):
    """The module, with the reference in place of the kernels and a clock that stands still."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(
        gpu,
        "attention",
        lambda q, k, v, table, *_: gpu.block_sparse_attention(q, k, v, table, provider="reference"),
    )
    monkeypatch.setattr(backward, "backward", lambda *arguments: reference.backward(*arguments[:-1]))
    monkeypatch.setattr(gpu, "milliseconds", lambda function, *args: function(*args) and 1.0)
    return gpu


@pytest.mark.parametrize("deterministic", [False, True])
def test_training_is_checked_and_timed(gpu_of_references, deterministic):
    gpu = gpu_of_references
    line = gpu.trained(lambda: gpu.single_key_table(128, 32, 0.25, "cpu"), 128, deterministic)
    assert (line["tokens"], line["heads"], line["head_dim"], line["density"]) == (128, 4, 128, 0.25)
    assert set(line["ms"]) == {"ours", "flash"}
    assert line["tflops"] == pytest.approx(3.5 * 0.25 * 4 * 128**2 * 128 * 4 / 1e9)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_gradients_are_seen(gpu_of_references, monkeypatch, wrong):
    gpu = gpu_of_references
    table = gpu.cluster_table(100, 4, 7, 0.5)
    inputs = qkv(1, 2, 2, 100, 100, 16, 16, torch.float32)
    gpu.assert_sampled_gradients(*inputs, table)

    def broken(*arguments):
        gradients = reference.backward(*arguments[:-1])
        gradients[wrong].add_(1e-3)
        return gradients

    monkeypatch.setattr(backward, "backward", broken)
    with pytest.raises(AssertionError):
        gpu.assert_sampled_gradients(*inputs, table)


def test_every_way_of_the_backward_pass_is_checked(gpu):
    ways = list(gpu.backward_ways(90))
    assert {(config.keys is None, config.group) for _, config, _ in ways} == {
        (True, 1),
        (False, 1),
        (False, 64),
    }
    assert {(width, dtype) for width, _, dtype in ways} == {
        (width, dtype) for width in (64, 128, 256) for dtype in (torch.bfloat16, torch.float32)
    }
