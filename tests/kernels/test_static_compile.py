"""`benchmarks/results/static.json`: it is whole, it is of these launches, and what it says of them is good."""

from dataclasses import replace

import pytest
import torch
from compiling import MODULES, line_of, static, table

from benchmarks import sass
from benchmarks.kernels import kernels
from benchmarks.launches import FLOAT32, Example
from sparsify_compiler.kernels.triton import configs

LESS_SHARED_MEMORY = 99 * 1024
"""Of 8.6, 8.9 and 12.0, which share the tiles of 8.0."""

SPILLED = 32
"""Bytes of a thread, at most, that any kernel may spill: a few registers, set aside round a loop."""

TENSOR_CORES = {80: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05"}
MULTIPLY = ("block_sparse_attention", "queries", "keys", "nearest", "top_k", "softmax", "add_up")
"""Kernels whose products of half precision take the best instructions of a GPU."""

PLACES = [(arch, number) for arch in static.GPUS for number in range(len(static.of_gpu(arch)))]


def every() -> list[tuple[int, Example, dict]]:
    """(arch, example, line of the table)."""
    return [(a, static.of_gpu(a)[n], line_of(a, static.of_gpu(a)[n])) for a, n in PLACES]


def test_the_table_has_every_launch_and_nothing_else():
    assert [static.case(a, static.of_gpu(a)[n]) for a, n in PLACES] == [
        {name: line[name] for name in ("gpu", "kernel", "case", "head_dim", "dtype", "tiles")}
        for line in table()["cases"]
    ], "static.json is not of these launches: run python -m benchmarks.static"


@pytest.mark.parametrize("arch", static.GPUS)
def test_no_kernel_of_the_package_is_missing(arch):
    assert {example.kernel for example in static.of_gpu(arch)} == set(kernels())
    assert {kernel.__module__.split(".", 2)[2] for kernel in kernels().values()} == set(MODULES)


def test_every_kernel_that_reads_heads_is_there_in_every_type_and_width():
    for arch in static.GPUS:
        found = {(e.kernel, e.head_dim, e.dtype) for e in static.of_gpu(arch)}
        of_heads = {kernel for kernel, head_dim, dtype in found if dtype == torch.bfloat16}
        for kernel in of_heads - {"top_k_kernel", "softmax_kernel", "add_up_kernel"}:
            for head_dim in (64, 128, 256):
                assert {d for k, h, d in found if (k, h) == (kernel, head_dim)} == {
                    torch.bfloat16,
                    torch.float16,
                    torch.float32,
                }


def test_everything_fits():
    for arch, _, line in every():
        limit = LESS_SHARED_MEMORY if arch < 90 else static.GPUS[arch].program_memory
        assert line["shared"] <= limit, line
        assert line["programs"] >= 1, line


def test_next_to_nothing_is_spilled():
    for _, _, line in every():
        assert line["spilled"] <= SPILLED, line


def test_tensor_cores():
    """On 9.0 from 64 rows on; of the backward pass at head dim 256 those of Ampere."""
    for arch, example, line in every():
        kernel = example.kernel.removesuffix("_kernel")
        if kernel not in MULTIPLY or example.dtype in (None, FLOAT32):
            continue
        is_short = kernel == "block_sparse_attention" and example.launch.arguments["BLOCK_M"] < 64
        is_wide = kernel in ("queries", "keys") and example.head_dim == 256
        assert line["products"] == ("mma" if is_short or is_wide else TENSOR_CORES[arch]), line


def test_copies_run_ahead_of_the_loop():
    """All stages but one precede it. Where tokens are found through an order, every second stage copies them."""
    for _, example, line in every():
        arguments = example.launch.arguments
        if example.kernel not in ("block_sparse_attention_kernel", "queries_kernel", "keys_kernel"):
            continue
        order = arguments["q_order" if example.kernel == "keys_kernel" else "kv_order"]
        stages = example.launch.num_stages if order is None else (example.launch.num_stages + 1) // 2
        assert line["async_copies"] >= 2 * stages, line


def test_floats_are_added_by_atomics_only_where_asked_for():
    for _, example, line in every():
        assert bool(line["float_atomics"]) == (example.case == "atomics"), line


def test_stored_scores_are_loaded_four_at_a_time():
    lines = [line for _, example, line in every() if example.kernel == "add_up_kernel"]
    assert len(lines) >= len(static.GPUS)
    assert all(line["wide_loads"] for line in lines)


def test_row_fill():
    """Of one block: full tiles, then the shortest that holds what is left."""
    tiles, _ = configs.HALF[90, 128]
    for size, rows in (
        (128, 128),
        (129, 160),
        (160, 160),
        (161, 192),
        (192, 192),
        (193, 256),
        (3, 32),
        (256, 256),
    ):
        assert static.row_fill(torch.tensor([size]), tiles) == pytest.approx(size / rows)
    sizes = torch.tensor([0, 1, 130])
    assert static.row_fill(sizes, replace(tiles, tails=())) == pytest.approx(131 / 384)
    fill = table()["row_fill"]
    assert fill["mean_size"] == 252
    assert fill["with_tails"] >= 0.9 > fill["alone"]


LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 BRA 0x90 ;                      /* 0x0000000000748947 */
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/                   BRA.U UP0, 0x60 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/               @P1 MUFU.EX2 R2, R3 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR5], R4 ;
        /*0070*/              @!P2 BRA 0x60 ;
        /*0080*/               @P3 BRA 0x20 ;
        /*0090*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00a0*/               @P4 BRA 0x90 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_the_main_loop_of_a_listing():
    """It multiplies; a wait is no loop in it; a uniform branch skips two of its instructions."""
    loop = sass.main_loop(sass.instructions(LISTING))
    assert [i.address for i in loop.skipped] == [0x40, 0x50]
    assert [i.address for i in loop.always] == [0x20, 0x30, 0x60, 0x70, 0x80]
    assert sass.main_loop(sass.instructions(LISTING.split("/*0010*/")[0])) is None


@pytest.mark.parametrize(
    ("arch", "rows", "columns", "depth", "warps"), [(80, 16, 8, 16, 1), (90, 64, 0, 16, 4)]
)
def test_the_main_loop_multiplies_a_tile(arch, rows, columns, depth, warps):
    """As many products as a tile of queries has with a tile of keys, and a tile of weights with one of values."""
    example = next(e for e in static.of_gpu(arch) if e.kernel == "block_sparse_attention_kernel")
    arguments = example.launch.arguments
    code = sass.instructions(static.printed(static.compiled(example.launch, arch), "-sass"))
    products = 0
    for instruction in sass.main_loop(code).always:
        if sass.MATRIX.match(instruction.name):
            width = columns or int(instruction.name.split(".")[1].split("x")[1])
            products += rows * width * depth * example.launch.num_warps // warps
    assert products == arguments["BLOCK_M"] * arguments["BLOCK_N"] * 2 * example.head_dim
