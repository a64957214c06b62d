"""`python -m benchmarks.roofline`: the least time that svg2 can take on a GPU, counted, not measured.

It counts every product and every byte of a warm sparse call, kernel by kernel, at the rates that the makers
state. A kernel takes at least the time of its products at the full rate, or of its bytes at the full bandwidth,
whichever is longer. Kernels run one after another, so a call takes the sum. Launches, partial tiles and further
cache misses are left out: no measurement can be faster.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import write_json

NARROW, WIDE, INDEX = 2, 4, 4
"""Bytes of bf16, fp32 and int32."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates that the maker states, dense, without sparsity features."""

    name: str
    tensor: float
    """bf16 products with fp32 sums, FLOP/s."""
    vector: float
    """fp32 outside of tensor cores, FLOP/s."""
    bandwidth: float
    """Memory bandwidth, bytes/s."""


GPUS = (
    Gpu("A100 SXM", 312e12, 19.5e12, 2.04e12),
    Gpu("H100 SXM", 989e12, 67e12, 3.35e12),
    Gpu("H200 SXM", 989e12, 67e12, 4.8e12),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One attention of one video, bf16."""

    tokens: int
    heads: int
    head_dim: int
    q_clusters: int
    kv_clusters: int
    density: float
    iterations: int = 2
    """Iterations of k-means in a warm call."""


WAN_720P = {"tokens": 75_600, "heads": 40, "head_dim": 128}


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a kernel, for all heads."""

    kernel: str
    part: str
    """`selection`, `far field` or `near field`."""
    tensor: float
    """FLOP on tensor cores."""
    vector: float
    """FLOP outside of tensor cores: products in fp32."""
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        """The least time."""
        return max(self.tensor / gpu.tensor, self.vector / gpu.vector, self.bytes / gpu.bandwidth)


def dense(shape: Shape) -> Work:
    """Attention to everything: two products of S x S x D; q, k, v and out once."""
    rows = shape.heads * shape.tokens * shape.head_dim
    return Work("dense attention", "dense", 4.0 * rows * shape.tokens, 0, 4 * rows * NARROW)


def sparse(shape: Shape) -> Iterator[Work]:
    """The kernels of a warm call of svg2 with the linear far field, in their order."""
    heads, tokens, dim = shape.heads, shape.tokens, shape.head_dim
    clusters = shape.q_clusters + shape.kv_clusters
    rows, labels = heads * tokens * dim * NARROW, heads * tokens * INDEX
    virtual = heads * shape.kv_clusters
    pairs = heads * shape.q_clusters * shape.kv_clusters
    times = shape.iterations
    yield Work(
        "k-means: nearest",
        "selection",
        times * 2.0 * heads * tokens * dim * clusters,
        0,
        times * 2 * (rows + labels),
    )
    # rank reads labels and writes ranks; place reads both and writes the order; for queries and keys.
    yield Work("k-means: sort", "selection", 0, 0, (times + 1) * 2 * 5 * labels)
    yield Work(
        "k-means: means",
        "selection",
        0,
        times * 2.0 * rows,
        times * (2 * (rows + labels) + heads * clusters * dim * WIDE),
    )
    yield Work("top-p", "selection", 0, 2.0 * pairs * dim, 2 * pairs * WIDE)
    matrices = virtual * dim * dim * WIDE
    yield Work("statistics", "far field", 2.0 * heads * tokens * dim * dim, 0, 3 * rows + matrices)
    yield Work(
        "matrices of the linear term",
        "far field",
        2.0 * pairs * dim * dim,
        0,
        2 * matrices + heads * shape.q_clusters * dim * dim * WIDE,
    )
    yield Work(
        "virtual keys",
        "far field",
        4.0 * heads * tokens * dim * shape.kv_clusters * (1 - shape.density),
        0,
        2 * rows + 2 * virtual * dim * NARROW,
    )
    yield Work(
        "merge with the linear term",
        "far field",
        2.0 * heads * tokens * dim * dim,
        0,
        4 * rows + heads * shape.q_clusters * dim * dim * WIDE,
    )
    yield Work("near field", "near field", 4.0 * heads * tokens * tokens * shape.density * dim, 0, 4 * rows)


def case(gpu: Gpu, shape: Shape) -> dict[str, Any]:
    """Milliseconds by kernel, shares of dense attention by part, and the upper bound of the efficiency."""
    whole = dense(shape).seconds(gpu)
    works = list(sparse(shape))
    parts = {work.part: 0.0 for work in works}
    for work in works:
        parts[work.part] += work.seconds(gpu)
    without = parts["selection"] + parts["near field"]
    return {
        "gpu": gpu.name,
        "tokens": shape.tokens,
        "clusters": [shape.q_clusters, shape.kv_clusters],
        "density": shape.density,
        "dense_ms": round(1e3 * whole, 2),
        "ms": {work.kernel: round(1e3 * work.seconds(gpu), 3) for work in works},
        "share_of_dense": {part: round(seconds / whole, 4) for part, seconds in parts.items()},
        "efficiency_at_most": {
            "drop": round(whole / without * shape.density, 3),
            "linear": round(whole / sum(parts.values()) * shape.density, 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/roofline.json"))
    arguments = parser.parse_args()
    cases = [
        case(gpu, Shape(**WAN_720P, q_clusters=q, kv_clusters=kv, density=density))
        for gpu in GPUS
        for q, kv in ((100, 500), (300, 1000))
        for density in (0.1, 0.2, 0.3)
    ]
    for one in cases:
        print(one)
    write_json(arguments.json, cases)


if __name__ == "__main__":
    main()
