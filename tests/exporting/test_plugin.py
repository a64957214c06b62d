"""The kernel of an ahead-of-time plugin: the PTX assembles, and parameters, constants and grid are right."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler import BlockTable, OptionError
from sparsify_compiler.kernels.attention import block_sparse_attention, empty_outputs

triton = pytest.importorskip("triton")

from sparsify_compiler.exporting import plugin  # noqa: E402
from sparsify_compiler.exporting.standard import Kind  # noqa: E402
from sparsify_compiler.kernels.attention import triton as launches  # noqa: E402
from sparsify_compiler.kernels.triton import configs  # noqa: E402
from sparsify_compiler.kernels.triton.launcher import Launch  # noqa: E402

interpreted = triton.knobs.runtime.interpret
HERE = Path(__file__).parents[2]


def problem(dtype: torch.dtype, *, orders: bool, bias: bool, head_dim: int = 64) -> dict[str, Tensor | None]:
    """Attention of 4 heads to 2, with blocks of uneven sizes and a table for each head and batch."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 150, head_dim, generator=draw).to(dtype)
    key, value = (torch.randn(2, 2, 120, head_dim, generator=draw).to(dtype) for _ in range(2))
    sizes = torch.tensor([70, 1, 79]), torch.tensor([30, 7, 33, 50])
    kept = torch.rand(2, 4, 3, 4, generator=draw) < 0.5
    order = [torch.randperm(n, generator=draw).int()[None, None] for n in (150, 120)]
    table = BlockTable.from_block_mask(
        kept,
        *(one[None, None] for one in sizes),
        q_order=order[0] if orders else None,
        kv_order=order[1] if orders else None,
    )
    key_bias = torch.randn(2, 1, 120, generator=draw) if bias else None
    return {"query": query, "key": key, "value": value, **table.tensors(), "key_bias": key_bias}


def kinds(inputs: dict[str, Tensor | None]) -> dict[str, Kind | None]:
    """With a batch that is free, where it is not shared."""
    return {
        name: None if one is None else Kind(one.dtype, (None if one.shape[0] > 1 else 1, *one.shape[1:]))
        for name, one in inputs.items()
    }


CASES = [
    (80, torch.float16, True, False, 64),
    pytest.param(89, torch.float32, False, True, 64, marks=pytest.mark.nightly),
    (100, torch.float16, False, False, 128),
]


@pytest.mark.skipif(interpreted, reason="nothing is compiled under TRITON_INTERPRET=1")
@pytest.mark.parametrize(("gpu", "dtype", "orders", "bias", "head_dim"), CASES)
def test_the_ptx_assembles_and_takes_inputs_then_outputs(
    gpu: int, dtype: torch.dtype, orders: bool, bias: bool, head_dim: int, tmp_path: Path
) -> None:
    inputs = problem(dtype, orders=orders, bias=bias, head_dim=head_dim)
    kernel = plugin.attention_kernel(kinds(inputs), scale=0.3, gpu=gpu)
    present = [name for name, one in inputs.items() if one is not None]
    assert kernel.parameters == (*present, "out", "lse")
    (entry,) = re.findall(r"\.visible \.entry (\w+)\((.*?)\)", kernel.ptx, re.DOTALL)
    assert entry[0] == kernel.name
    assert len(re.findall(r"\.param \.u64", entry[1])) == len(kernel.parameters)
    assert f".target sm_{gpu}" in kernel.ptx
    file = tmp_path / "kernel.ptx"
    file.write_text(kernel.ptx)
    name = "ptxas-blackwell" if gpu >= 100 else "ptxas"
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    target = re.search(r"\.target (\w+)", kernel.ptx)
    assert target is not None
    built = tmp_path / "kernel.cubin"
    subprocess.run([assembler, f"-arch={target[1]}", file, "-o", built], check=True)
    assert built.stat().st_size > 1000
    (threads,) = re.findall(r"\.reqntid (\d+)", kernel.ptx)
    assert int(threads) == kernel.threads

    tensors: dict[str, Any] = {name: one for name, one in inputs.items() if one is not None}
    table = BlockTable.of(*(inputs[name] for name in BlockTable.__slots__))  # type: ignore[arg-type]
    tiles = plugin._tiles(plugin._checked(kinds(inputs), gpu), gpu)
    outputs = empty_outputs(tensors["query"], tensors["value"])
    (launch,) = launches.forward_launches(
        *(tensors[name] for name in ("query", "key", "value")),
        *(table, inputs["key_bias"], 0.3, *outputs, tiles),
    )
    assert kernel.grid(tensors["query"].shape, tensors["q_bounds"].shape) == launch.grid
    assert kernel.threads == 32 * launch.num_warps


@pytest.mark.skipif(interpreted, reason="nothing is compiled under TRITON_INTERPRET=1")
def test_the_code_of_the_documentation_makes_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles the kernel for compute capability 9.0; TensorRT's module is replaced."""
    page = (HERE / "docs" / "export.md").read_text("utf-8")
    (code,) = re.findall(r"### The kernel as a plugin.*?```python\n(.*?)```", page, re.DOTALL)
    implementations = {}

    def aot_impl(name: str) -> Any:
        return lambda function: implementations.setdefault(name, function)

    found = ModuleType("tensorrt.plugin")
    vars(found).update(
        aot_impl=aot_impl, KernelLaunchParams=SimpleNamespace, SymIntExprs=lambda size: [None] * size
    )
    whole = ModuleType("tensorrt")
    vars(whole).update(plugin=found)
    monkeypatch.setitem(sys.modules, "tensorrt", whole)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", found)
    sizes = {"heads": 2, "tokens": 1000, "q_blocks": 4, "kv_blocks": 16, "width": 16}
    exec(compile(code, "plugin", "exec"), {"torch": torch, **sizes})
    (implementation,) = implementations.values()
    shapes = [(Symbol("b"), 2, 1000, 128)] * 3 + [(1, 1, 5), (1, 1, 17), (1, 1, 4), (Symbol("b"), 2, 4, 16)]
    name, ptx, launch, extra = implementation(*(SimpleNamespace(shape_expr=one) for one in shapes), (), 0)
    assert f".entry {name}(" in ptx
    assert ".target sm_90a" in ptx
    assert (launch.grid_x, launch.grid_y, launch.grid_z.text) == (1000 // 128 + 4, 2, "b")
    assert launch.block_x % 32 == 0
    assert 0 < launch.shared_mem <= 227 * 1024
    assert not extra
    assert list(implementations) == ["sparsify::BlockSparseAttention"]


class Symbol:
    """A size that is only known later, as TensorRT's symbolic expressions: a text of its operations."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __floordiv__(self, other: object) -> "Symbol":
        return Symbol(f"({self.text}//{other})")

    def __add__(self, other: Any) -> "Symbol":
        return Symbol(f"({self.text}+{getattr(other, 'text', other)})")

    def __sub__(self, other: object) -> "Symbol":
        return Symbol(f"({self.text}-{other})")


def test_the_grid_is_one_of_symbols() -> None:
    kernel = plugin.AttentionKernel(name="", ptx="", parameters=(), threads=1, shared=0, queries=64)
    batch, heads, tokens, blocks = (Symbol(name) for name in ("b", "h", "s", "n"))
    grid = kernel.grid((batch, heads, tokens, 128), (1, 1, blocks))
    assert [one.text for one in grid] == ["((s//64)+(n-1))", "h", "b"]


@pytest.mark.skipif(
    not interpreted, reason="test_it_is_the_op_in_the_interpreter runs it in a process of its own"
)
@pytest.mark.parametrize(("orders", "bias"), [(False, False), (True, True)])
def test_it_is_the_op(orders: bool, bias: bool) -> None:
    inputs = problem(torch.float32, orders=orders, bias=bias, head_dim=16)
    given: dict[str, Any] = inputs
    table = BlockTable.of(*(given[name] for name in BlockTable.__slots__))
    query, key, value = (given[name] for name in ("query", "key", "value"))
    exact = block_sparse_attention(
        *(one.double() for one in (query, key, value)),
        table,
        key_bias=given["key_bias"],
        scale=0.3,
        provider="reference",
    )
    out, lse = torch.full((2, 4, 150, 16), torch.nan), torch.full((2, 4, 150), torch.nan)
    tiles = configs.Config(32, 32, 16, 4, 1)
    constants = plugin.kernel_constants(plugin._checked(kinds(inputs), 90), 0.3, tiles)
    kernel = plugin.AttentionKernel(name="", ptx="", parameters=(), threads=1, shared=0, queries=32)
    grid = kernel.grid(query.shape, given["q_bounds"].shape)
    Launch(plugin.attention_plugin_kernel, grid, {**inputs, "out": out, "lse": lse, **constants}, 4, 1)()
    for got, wanted in zip((out, lse), exact, strict=True):
        assert torch.equal(got.isinf(), wanted.isinf())
        seen = ~wanted.isinf()
        torch.testing.assert_close(got[seen].double(), wanted[seen], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(interpreted, reason="this is that process")
def test_it_is_the_op_in_the_interpreter() -> None:
    arguments = [
        "-m",
        "pytest",
        __file__,
        "-k",
        "test_it_is_the_op and not interpreter",
        "-p",
        "no:cacheprovider",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "2 passed" in ran.stdout


def test_what_the_kernel_does_not_take_is_named() -> None:
    given = kinds(problem(torch.float16, orders=False, bias=False))
    with pytest.raises(OptionError, match="gpu must be one of 80, 89, 90, 100, got 75"):
        plugin.attention_kernel(given, scale=1.0, gpu=75)
    with pytest.raises(OptionError, match="the kernel needs the input kv_bounds, got query, key, value"):
        plugin.attention_kernel({**given, "kv_bounds": None}, scale=1.0, gpu=90)
    with pytest.raises(
        OptionError, match="input query must be float16 or bfloat16 or float32, with all sizes"
    ):
        plugin.attention_kernel({**given, "query": Kind(torch.float64, (1, 4, 150, 64))}, scale=1.0, gpu=90)
    with pytest.raises(OptionError, match="input q_bounds must be int32, with all sizes but the batch known"):
        plugin.attention_kernel({**given, "q_bounds": Kind(torch.int32, (1, 1, None))}, scale=1.0, gpu=90)
