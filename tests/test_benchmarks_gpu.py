"""What of `benchmarks.gpu` needs no GPU: its tables, its sampling, its report."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify_compiler.table import BlockTable

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
