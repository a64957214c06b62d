"""Provider `cpu` against float64 dense attention under `table.mask()`, kernel and packed SDPA alike."""

import ctypes
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from any_provider import threads_of_torch
from cpu_problems import DTYPES, HEAD_DIMS, full_table, problems, symbol_without_amx, uniform_table
from hypothesis import given, settings
from torch import Tensor

from sparsify_compiler.kernels import cpu
from sparsify_compiler.kernels.attention import cpu as attention
from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing import oracles
from sparsify_compiler.testing.strategies import qkv

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@pytest.fixture(params=["kernel", "kernel without AMX", "packed"])
def forward(request, monkeypatch):
    """All ways to compute."""
    if request.param == "packed":
        return attention.packed_sdpa
    assert library.build_info().library is not None, library.build_info().reason
    if request.param == "kernel without AMX":
        monkeypatch.setattr(library, "symbol", symbol_without_amx)
    return attention.forward


def layout(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def check(
    forward, query, key, value, table: BlockTable, bias: Tensor | None = None, scale: float = 0.2
) -> None:
    out, lse = forward(query, key, value, table, bias, scale)
    expected = empty_outputs(query, value)
    for got, like in zip((out, lse), expected, strict=True):
        assert (got.dtype, got.shape, layout(got)) == (like.dtype, like.shape, layout(like))
    oracles.assert_close_to_float64(out, lse, query, key, value, table.mask(), key_bias=bias, scale=scale)


@given(problems())
@settings(max_examples=200)
def test_kernel_equals_float64_on_any_table(problem):
    check(attention.forward, *problem)


@given(problems())
@settings(max_examples=80)
def test_packed_sdpa_equals_float64_on_any_table(problem):
    check(attention.packed_sdpa, *problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [63, 1000])
def test_head_dims_and_odd_lengths(forward, dtype, head_dim, tokens):
    query, key, value = qkv(1, 2, 1, tokens, tokens, head_dim, head_dim, dtype, seed=head_dim)
    blocks = torch.ones(-(-tokens // 50), -(-tokens // 50), dtype=torch.bool).tril()
    sizes = torch.tensor([50] * (tokens // 50) + [tokens % 50] * (tokens % 50 > 0))[None, None]
    check(forward, query, key, value, BlockTable.from_block_mask(blocks[None, None], sizes, sizes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [5, *HEAD_DIMS])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_few_queries_of_single_keys(forward, dtype, head_dim, queries):
    query, key, value = qkv(1, 2, 1, 24, 200, head_dim, 72, dtype, seed=head_dim)
    blocks = torch.rand(24 // queries, 200, generator=torch.Generator().manual_seed(0)) < 0.4
    check(forward, query, key, value, uniform_table(blocks, queries, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [1, 64])
def test_permuted_tokens_in_blocks_of_any_size(forward, dtype, block):
    query, key, value = qkv(2, 3, 3, 256, 256, 64, 32, dtype)
    generator = torch.Generator().manual_seed(block)
    orders = {f"{s}_order": torch.randperm(256, generator=generator).int()[None, None] for s in ("q", "kv")}
    blocks = torch.rand(4, 256 // block, generator=generator) < 0.3
    check(forward, query, key, value, uniform_table(blocks, 64, block, **orders))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(forward, dtype):
    """Slices of one fused projection, a last dimension that is not dense, and expanded keys."""
    table = full_table(90, 90)
    fused = torch.randn(2, 90, 4, 3 * 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    query, key, value = fused.transpose(1, 2).split(40, dim=-1)
    check(forward, query, key, value, table)
    check(forward, query.mT.contiguous().mT, key[..., ::2].repeat(1, 1, 1, 2), value[..., ::2], table)
    check(forward, query, key[:1, :1].expand_as(key), value[:1, :1].expand_as(value), table)


def test_query_without_keys_gives_zero_and_minus_infinity(forward):
    query, key, value = qkv(1, 2, 2, 100, 100, 16, 16, torch.float32)
    blocks = torch.tensor([[False, False], [True, True]])
    out, lse = forward(query, key, value, uniform_table(blocks, 50, 50), None, 0.25)
    assert (out[:, :, :50] == 0).all()
    assert (lse[:, :, :50] == -torch.inf).all()
    assert out[:, :, 50:].isfinite().all()


@pytest.mark.parametrize(("q_tokens", "kv_tokens"), [(0, 10), (10, 0)])
def test_no_tokens(forward, q_tokens, kv_tokens):
    query, key, value = qkv(1, 1, 1, q_tokens, kv_tokens, 16, 16, torch.float32)
    check(forward, query, key, value, full_table(q_tokens, kv_tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("dims", [(16, 16), (37, 21)])
@pytest.mark.parametrize("queries", [2, 21])
def test_what_is_not_finite_reaches_exactly_the_rows_that_read_it(
    forward, dtype, poison, where, dims, queries
):
    """Odd dimensions and block sizes: every kind of padding lies beside the poisoned element."""
    query, key, value = qkv(1, 2, 2, 210, 210, *dims, dtype)
    blocks = torch.rand(210 // queries, 10, generator=torch.Generator().manual_seed(1)) < 0.5
    table = uniform_table(blocks, queries, 21)
    readers = torch.zeros(1, 2, 210, dtype=torch.bool)
    readers[0, 0] = table.mask()[0, 0, :, 104]
    assert readers.any()
    clean, _ = forward(query, key, value, table, None, 0.2)
    (key if where == "key" else value)[0, 0, 104, -1] = poison
    out, lse = forward(query, key, value, table, None, 0.2)
    assert out[~readers].isfinite().all()
    assert lse[~readers].isfinite().all()
    if where == "key":
        check(forward, query, key, value, table)
    else:  # float64 attention under a mask is no oracle here: it multiplies hidden values by 0
        assert torch.equal(out[~readers], clean[~readers])
        assert torch.equal(out[readers][:, :-1], clean[readers][:, :-1])
        assert not out[readers][:, -1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow(forward, dtype):
    query, key, value = qkv(1, 1, 1, 70, 70, 64, 64, dtype)
    check(forward, query * 8, key * 8, value, full_table(70, 70), scale=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_does_not_depend_on_threads(dtype):
    query, key, value = qkv(2, 2, 2, 500, 500, 64, 64, dtype)
    blocks = torch.rand(10, 50, generator=torch.Generator().manual_seed(2)) < 0.4
    table, results = uniform_table(blocks, 50, 10), []
    for count in (1, 2, 3):
        with threads_of_torch(count):
            results.append(attention.forward(query, key, value, table, None, 0.125))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_with_strided_views(dtype):
    query, key, value = qkv(2, 4, 2, 63, 63, 48, 48, dtype)
    blocks = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.6
    table = uniform_table(blocks, 21, 9, kv_order=torch.randperm(63).int()[None, None])
    for bias in (None, torch.zeros(1, 1, 63)):
        torch.library.opcheck(
            torch.ops.sparsify.block_sparse_attention.default,
            (query, key, value, *table.tensors().values(), bias, 0.2, "cpu"),
        )


def test_supports_names_what_it_cannot_do():
    def ask(**changes):
        return cpu.supports(
            **{"device": "cpu", "dtype": torch.float32, "head_dim": 64, "value_dim": 64} | changes
        )

    assert ask() is None
    assert ask(device="cuda") == "device must be cpu, got cuda"
    assert ask(dtype=torch.float64) == "dtype must be one of float32, float16, bfloat16, got float64"


BUILD = """
import sys, logging, torch
torch.hub.set_dir(sys.argv[1] + "/hub")
from sparsify_compiler.kernels.attention import cpu as attention
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.table import BlockTable
library._COMPILERS = sys.argv[2:] or library._COMPILERS
print(library.build_info().cached, library.build_info().library)
query = torch.ones(1, 1, 4, 8)
bounds, one = torch.tensor([[[0, 4]]]).int(), torch.ones(1, 1, 1).int()
table = BlockTable(q_bounds=bounds, kv_bounds=bounds, kv_num_blocks=one, kv_indices=0 * one[..., None])
assert (attention.forward(query, query, query, table, None, 1.0)[0] == 1).all()
"""


def start_build(cache, *compilers: str) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(cache), *compilers]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def hasty_compiler(tmp_path):
    """A compiler that links what the real one has linked from the same sources, and compiles nothing else."""
    built = library.build_info()
    path = tmp_path / "hasty-g++"
    path.write_text(
        f"""#!/bin/sh
case "$*" in
*-dM*) exec {built.compiler} "$@" ;;
*" -c "*) for object; do :; done; sleep 0.2; exec touch "$object" ;;
*) for linked; do :; done; exec cp {built.library} "$linked" ;;
esac
"""
    )
    path.chmod(0o755)
    return str(path)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """(what a process printed, what it logged)."""
    output, log = process.communicate()
    assert process.returncode == 0, log
    return output, log


def test_of_two_processes_at_once_one_builds_and_a_third_finds_the_library(tmp_path, hasty_compiler):
    both = [finish(process) for process in [start_build(tmp_path, hasty_compiler) for _ in range(2)]]
    for output, log in both:
        built = output.startswith("False")
        assert built == ("built the CPU attention kernel in" in log)
        assert built == (f"building the CPU attention kernel with {hasty_compiler}" in log)
    assert sum(output.startswith("False") for output, _ in both) == 1
    output, log = finish(start_build(tmp_path, hasty_compiler))
    assert log == ""
    assert output.startswith(f"True {tmp_path}/sparsify_compiler/attention-")
    assert len(list((tmp_path / "sparsify_compiler").iterdir())) == 1


@pytest.fixture
def small_sources(tmp_path, monkeypatch, caplog):
    """Sources of one function in place of the kernels', and a cache of their own: the cache's folder."""
    sources, cache = tmp_path / "sources", tmp_path / "cache"
    for folder in (sources, cache):
        folder.mkdir()
    (sources / "small.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(library, "_SOURCES", sources)
    monkeypatch.setattr(library, "cache_folder", lambda: cache)
    caplog.set_level("WARNING", "sparsify_compiler")
    return cache


def build() -> library.BuildInfo:
    return library.build_info.__wrapped__()


def test_a_build_is_announced_before_it_begins(small_sources, monkeypatch, caplog):
    plain, seen = subprocess.run, []

    def run(command, **options):
        if "-c" in command:
            seen.append(caplog.text)
        return plain(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    assert not build().cached
    assert "building the CPU attention kernel" in seen[0]
    assert build().cached


def test_a_process_waits_for_another_that_builds(small_sources, caplog):
    held = os.open(small_sources, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(build)
        while "another process builds" not in caplog.text:
            assert not waits.done()
        assert not list(small_sources.iterdir())
        os.close(held)
        assert not waits.result().cached


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:1000] + bytes(1000) + content[2000:],
        lambda content: content[:-1],
        lambda content: content[:-32],
        lambda _: b"",
        lambda _: b"not a library",
    ],
    ids=["half", "overwritten", "a byte short", "without its digest", "empty", "another file"],
)
def test_a_damaged_library_is_built_again(small_sources, caplog, damage):
    path = build().library
    assert path is not None
    damaged = damage(path.read_bytes())
    path.unlink()  # this process has it loaded
    path.write_bytes(damaged)
    again = build()
    assert (again.library, again.cached) == (path, False)
    assert f"is damaged and is built again: {path}" in caplog.text
    assert ctypes.CDLL(str(path)).answer() == 42
    assert build().cached


def test_the_compilers_words_are_told_as_it_wrote_them(small_sources, caplog):
    (library._SOURCES / "small.cpp").write_bytes("int café = no_such_name;".encode())
    info = build()
    assert info.library is None
    assert "small.cpp:1:" in info.reason
    assert "no_such_name" in info.reason
    assert "b'" not in info.reason
    assert "\\n" not in info.reason
    assert info.reason in caplog.text
    assert not list(small_sources.iterdir())


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no C++ compiler found (looked for"), ("false", "false")]
)
def test_without_a_compiler_packed_sdpa_runs_and_says_so_once(tmp_path, compiler, reason):
    output, log = finish(start_build(tmp_path, compiler))
    assert output.strip() == "False None"
    assert log.count("packed SDPA runs instead") == 1
    assert reason in log


def test_build_info_is_what_doctor_shows():
    info = library.build_info()
    assert info.library is not None
    assert info.library.is_file()
    assert info.compiler is not None
    assert info.seconds > 0
    assert info.compiler in info.reason
