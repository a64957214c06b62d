"""Example launches of every Triton kernel, on meta tensors: all tiles in `configs`, for every data type.

Tensors are views [B, H, S, D] of [B, S, H, D], as models pass them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.kernels import clustering as clustering_ops
from sparsify_compiler.kernels.attention import empty_outputs
from sparsify_compiler.kernels.attention import triton as attention
from sparsify_compiler.kernels.attention import triton_backward as backward
from sparsify_compiler.kernels.clustering import triton as clustering
from sparsify_compiler.kernels.far_field import triton as far_field
from sparsify_compiler.kernels.far_field import virtual_keys
from sparsify_compiler.kernels.prediction import empty_top_k
from sparsify_compiler.kernels.prediction import triton as prediction
from sparsify_compiler.kernels.statistics import empty_means, empty_statistics
from sparsify_compiler.kernels.statistics import triton as statistics
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.configs import BackwardConfig, Config
from sparsify_compiler.kernels.triton.launcher import Launch
from sparsify_compiler.table import BlockTable

BATCH, HEADS, TOKENS, BLOCKS = 2, 8, 32768, 21
BFLOAT16, FLOAT16, FLOAT32 = DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (64, 128, 256)
ODD_HEAD_DIMS = (48, 72, 80, 96)
"""Head dims between powers of two, for some kernels."""
RANKS = (16, 64, 128)
"""Head dims of predictors."""
CLUSTERS = (1000, 9450, 20000)
"""Numbers of key clusters, of which a query cluster selects some."""


@dataclass(frozen=True, slots=True)
class Example:
    """One launch, with a description."""

    case: str
    """The blocks and arguments, in words."""
    head_dim: int | None
    """None where no tensor has one."""
    dtype: torch.dtype | None
    launch: Launch

    @property
    def kernel(self) -> str:
        """The name in `benchmarks.kernels`."""
        return str(self.launch.kernel.__name__)

    @property
    def name(self) -> str:
        """The launches of all examples of a GPU."""
        words = (
            self.kernel,
            self.case,
            self.head_dim and f"D {self.head_dim}",
            self.dtype and str(self.dtype)[6:],
        )
        return ", ".join(word for word in words if word)


def examples(arch: int) -> Iterator[Example]:
    """All examples of a GPU with this compute capability, 80 for 8.0."""
    row = configs.row(arch // 10)
    yield from _forward(row)
    yield from _backward(row)
    yield from _clustering()
    yield from _far_field()
    yield from _prediction()
    yield from _counts()


def _forward(row: int) -> Iterator[Example]:
    for head_dim in HEAD_DIMS:
        width = configs.width(head_dim)
        for dtype in DTYPES:
            tiles = {"": configs.SINGLE[width]} if dtype == FLOAT32 else _by_length(configs.HALF[row, width])
            for length, config in tiles.items():
                for ordered, biased in ((False, False), (False, True), (True, False), (True, True)):
                    if dtype == FLOAT16 and not (ordered and biased):
                        continue  # compiled to the same code as bfloat16
                    words = _words(length, "orders" if ordered else "", "bias" if biased else "")
                    for launch in _forward_launches(head_dim, dtype, config, ordered, biased):
                        tail = (
                            f"tails of {launch.arguments['BLOCK_M']}" if launch.arguments["TAIL_OF"] else ""
                        )
                        yield Example(_words(words, tail), head_dim, dtype, launch)
    for head_dim in ODD_HEAD_DIMS:
        config, _ = configs.HALF[row, configs.width(head_dim)]
        yield Example("long blocks", head_dim, BFLOAT16, next(_forward_launches(head_dim, BFLOAT16, config)))


def _forward_launches(
    head_dim: int, dtype: torch.dtype, config: Config, ordered: bool = False, biased: bool = False
) -> Iterator[Launch]:
    q, bias = _tensor(head_dim, dtype), torch.empty(BATCH, 1, TOKENS, device="meta") if biased else None
    return attention.forward_launches(q, q, q, _table(ordered), bias, 0.1, *empty_outputs(q, q), config)


def _by_length(pair: tuple[Config, Config]) -> dict[str, Config]:
    return dict(zip(("long blocks", "short blocks"), pair, strict=True))


def _backward(row: int) -> Iterator[Example]:
    """Examples of attention with orders and a key bias, which need most registers."""
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            for way, config in _ways(row, head_dim, dtype).items():
                for launch in _backward_launches(head_dim, dtype, config):
                    yield Example(way, head_dim, dtype, launch)
    for head_dim in ODD_HEAD_DIMS[:2]:
        way, config = next(iter(_ways(row, head_dim, BFLOAT16).items()))
        *_, launch = _backward_launches(head_dim, BFLOAT16, config)
        yield Example(way, head_dim, BFLOAT16, launch)
    yield Example("", None, None, backward.readers_launch(_table(True), _readers(_table(True))))


def _ways(row: int, head_dim: int, dtype: torch.dtype) -> dict[str, BackwardConfig]:
    """The configs of the backward pass, by the method that adds up the gradients of keys."""
    width = configs.width(head_dim)
    if dtype == FLOAT32:
        queries = keys = (configs.BACKWARD_SINGLE[width],) * 2
    else:
        queries, keys = configs.BACKWARD_HALF[row, width]
    return {
        "blocks": BackwardConfig(queries[0], keys[0]),
        "groups of blocks": BackwardConfig(queries[1], keys[1], configs.WORD),
        "atomics": BackwardConfig(queries[1], None),
    }


def _backward_launches(head_dim: int, dtype: torch.dtype, config: BackwardConfig) -> Iterator[Launch]:
    q = _tensor(head_dim, dtype)
    out, lse = empty_outputs(q, q)
    rows, bias = backward.empty_rows(q), torch.empty(BATCH, 1, TOKENS, device="meta")
    table = _table(True, kv_blocks=BLOCKS if config.group == 1 else TOKENS)
    gradient = torch.empty(q.shape, dtype=dtype, device="meta")
    sums = (None, None) if config.keys else (gradient.float(),) * 2
    if config.keys:
        yield backward.rows_launch(q, q, out, out, lse, lse, table, bias, 0.1, *rows, config)
    yield backward.queries_launch(q, q, q, out, table, bias, 0.1, *rows, gradient, *sums, config)
    if config.keys:
        yield backward.keys_launch(
            *(q, q, q, out, table, _readers(table), bias, 0.1, *rows, gradient, gradient, config)
        )


def _clustering() -> Iterator[Example]:
    for head_dim in HEAD_DIMS:
        for dtype in DTYPES:
            points = _tensor(head_dim, dtype)
            sides = [
                clustering.Points.of(
                    points,
                    torch.empty(BATCH, HEADS, count, head_dim, device="meta"),
                    torch.empty(count, dtype=torch.int64, device="meta"),
                    blocks=clustering.Blocks(
                        *clustering_ops.empty_blocks(points, count, HEADS, 0, 512), 0, 512
                    ),
                )
                for count in (300, CLUSTERS[0])
            ]
            start, _, moving, nearest, last = clustering.kmeans_launches(sides, warm=True, iterations=2)
            yield Example("", head_dim, dtype, nearest)
            yield Example("last iteration", head_dim, dtype, last)
            if (head_dim, dtype) == (128, BFLOAT16):
                yield Example("points in bfloat16", head_dim, None, start)
                yield Example("not the last iteration", head_dim, dtype, moving)
    labels = _index(BATCH, HEADS, TOKENS)
    order, bounds = clustering_ops.empty_sort(labels, CLUSTERS[0])
    counts = _index(BATCH, HEADS, CLUSTERS[0], TOKENS // clustering.TILE)
    yield Example("", None, None, clustering.rank(labels, labels, counts))
    yield Example("", None, None, clustering.place(labels, labels, counts, bounds, order))
    for head_dim in HEAD_DIMS:
        q, k = (torch.empty(BATCH, HEADS, count, head_dim, device="meta") for count in (300, CLUSTERS[0]))
        launch = clustering.scores(q, k, torch.empty(BATCH, HEADS, 300, CLUSTERS[0], device="meta"))
        yield Example("", head_dim, FLOAT32, launch)
    for clusters in CLUSTERS:
        q, k = (torch.empty(BATCH, HEADS, count, 64, device="meta") for count in (300, clusters))
        products = torch.empty(BATCH, HEADS, 300, clusters, device="meta")
        sizes = _index(1, 1, clusters).expand(BATCH, HEADS, -1)
        launch = clustering.select(products, sizes, *clustering_ops.empty_top_p(q, k), 0.1, 0.9, 1)
        yield Example(f"{clusters} clusters", None, None, launch)


def _far_field() -> Iterator[Example]:
    """Examples of the far field with orders; statistics also have a key bias."""
    bounds, order = _index(1, HEADS, BLOCKS + 1), _index(1, HEADS, TOKENS)
    bias = torch.empty(BATCH, 1, TOKENS, device="meta")
    for head_dim in (*HEAD_DIMS, 96):
        for dtype in DTYPES if head_dim in HEAD_DIMS else (BFLOAT16,):
            tokens = _tensor(head_dim, dtype)
            out, lse = empty_outputs(tokens, tokens)
            matrices = torch.empty(BATCH, HEADS, BLOCKS, head_dim, head_dim, device="meta")
            linear = matrices, matrices[..., 0], bounds, order, 0.1
            found = empty_statistics(tokens, tokens, bounds, order, bias, True)
            for launch in (
                statistics.means_launch(tokens, bounds, order, *empty_means(tokens, bounds)),
                statistics.statistics_launch(tokens, tokens, bounds, order, bias, found),
                far_field.merge_launch(tokens, out, lse, out, lse, *linear, out, lse),
            ):
                yield Example("", head_dim, dtype, launch)

    for head_dim in (128, 256):
        tokens = _tensor(head_dim, BFLOAT16)
        means = empty_means(tokens, bounds)
        found = empty_statistics(tokens, tokens, bounds, order, bias, True)
        listed = virtual_keys.empty_listed(tokens, means[0], found[2])
        table = bounds, bounds, _index(1, HEADS, BLOCKS), _index(1, HEADS, BLOCKS, 16)
        for launch in far_field.list_launches(tokens, *means, *found[:-1], *table, 0.02, 0.1, listed):
            yield Example("queries in bfloat16", head_dim, None, launch)
    yield from _judge(_tensor(128, BFLOAT16))


def _judge(tokens: Tensor) -> Iterator[Example]:
    """Examples of judging the far field, for which 16 rows read 64 parts of the keys."""
    count, parts, (_, _, _, head_dim) = 16, 64, tokens.shape
    samples = tokens.new_empty(BATCH, HEADS, parts * count, head_dim)
    bounds, numbers, table = _index(BATCH, HEADS, BLOCKS + 1), _index(4, parts + 1), _table(True)
    lead = torch.empty(BATCH, HEADS, BLOCKS, device="meta")
    limits = lead[..., None].expand(*lead.shape, head_dim).contiguous()
    matrices = tokens.new_empty(*lead.shape, head_dim, head_dim)
    far = virtual_keys.VirtualKeys(tokens, tokens, lead, matrices, limits)
    found = virtual_keys.Judged(limits, lead[..., 0], lead[..., 0])
    exact, near, rest = (empty_outputs(one, one) for one in (samples, tokens, tokens))
    for launch in (
        far_field.sample_launch(
            tokens, TOKENS, table.q_bounds, table.q_order, samples, bounds, numbers, count
        ),
        far_field.judge_launch(samples, bounds, table.q_order, exact, near, rest, far, count, 0.1, found),
    ):
        yield Example("queries in bfloat16", head_dim, None, launch)


def _prediction() -> Iterator[Example]:
    """Examples of prediction with a key bias."""
    groups, width = 2048, 4096
    for rank in RANKS:
        for dtype in DTYPES:
            query, key = (
                torch.empty(BATCH, HEADS, count, rank, dtype=dtype, device="meta")
                for count in (groups, TOKENS)
            )
            highest, bounds = torch.empty(BATCH, HEADS, groups, device="meta"), _index(129)
            bias = torch.empty(BATCH, 1, TOKENS, dtype=dtype, device="meta")
            inputs = prediction.scored(query, key, _index(1, HEADS), bias, 0.25)
            for launch in (
                prediction.choose(inputs, *empty_top_k(query, None, width)),
                prediction.softmax(inputs, highest, highest),
                prediction.add_up(inputs, highest, highest, bounds, *empty_top_k(query, bounds, width)),
            ):
                yield Example("", rank, dtype, launch)


def _counts() -> Iterator[Example]:
    """Examples of the counts of listed keys."""
    table = _table(False)
    pairs = torch.empty(1, HEADS, BLOCKS, dtype=torch.int64, device="meta")
    rows = table.q_bounds, table.kv_bounds, table.kv_num_blocks, table.kv_indices
    yield Example("", None, None, statistics.pairs_launch(*rows, pairs))
    counts, indices = _index(BATCH, HEADS, BLOCKS), _index(BATCH, HEADS, BLOCKS, 4096)
    left = _index(BATCH, HEADS, BLOCKS, 2048)
    launch = statistics.left_launch(_index(1, 1, 2048), _index(TOKENS), counts, indices, left)
    yield Example("", None, None, launch)


def _words(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _tensor(head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(BATCH, TOKENS, HEADS, head_dim, dtype=dtype, device="meta").transpose(1, 2)


def _index(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device="meta")


def _table(ordered: bool, kv_blocks: int = BLOCKS) -> BlockTable:
    order = _index(1, HEADS, TOKENS) if ordered else None
    return BlockTable(
        q_bounds=_index(1, HEADS, BLOCKS + 1),
        kv_bounds=_index(1, HEADS, kv_blocks + 1),
        kv_num_blocks=_index(1, HEADS, BLOCKS),
        kv_indices=_index(1, HEADS, BLOCKS, 16),
        q_order=order,
        kv_order=order,
    )


def _readers(table: BlockTable) -> Tensor:
    blocks = table.kv_bounds.shape[-1] - 1
    words = -(-blocks // configs.WORD)
    return torch.empty(1, HEADS, words, BLOCKS, dtype=torch.int64, device="meta")
