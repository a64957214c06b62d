"""`python -m benchmarks.clustering`: the cost of selecting blocks by clusters, relative to dense attention.

One step of a video model is timed: warm k-means of queries and of keys (2 iterations each), both orders, and the
selection. Before that, the results are checked against the definition in float64. Dense is SDPA's flash attention
in the same run at the same number of threads.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import machine, write_json
from sparsify_compiler.kernels.clustering import kmeans, sort_by_label, top_p_blocks
from sparsify_compiler.testing.strategies import qkv
from sparsify_compiler.timing import interleaved_medians

ITERATIONS = 2
TOP_P = 0.9
WARM = torch.tensor(True)
DTYPES = ["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """The size of one step."""

    dtype: str
    tokens: int
    heads: int
    head_dim: int
    q_clusters: int
    kv_clusters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the benchmark; `share` is that of `total_ms` in `dense_ms`."""

    case: Case
    dense_ms: float
    kmeans_ms: float
    sort_ms: float
    select_ms: float
    total_ms: float
    share: float

    def __str__(self) -> str:
        c = self.case
        return (
            f"{c.dtype:<8} H={c.heads} S={c.tokens:<5} D={c.head_dim:<3} "
            f"clusters {c.q_clusters:>3}x{c.kv_clusters:<4} "
            f"dense {self.dense_ms:7.1f} ms  k-means {self.kmeans_ms:6.1f} ms  sort {self.sort_ms:4.1f} ms  "
            f"select {self.select_ms:4.1f} ms  total {self.total_ms:6.1f} ms = {100 * self.share:4.1f}%"
        )


class Step:
    """One step on fixed queries and keys, from the centroids of an earlier step."""

    def __init__(self, case: Case, provider: str) -> None:
        self.provider = provider
        self.query, self.key, self.value = qkv(
            1, case.heads, case.heads, *[case.tokens] * 2, *[case.head_dim] * 2, getattr(torch, case.dtype)
        )
        self.states = [
            self.cluster(points, *self.cold(points, clusters), torch.tensor(False))
            for points, clusters in ((self.query, case.q_clusters), (self.key, case.kv_clusters))
        ]
        self.sizes = self.order()[1][1].diff(dim=-1)

    @staticmethod
    def cold(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
        unread = points.new_zeros(*points.shape[:2], clusters, points.shape[3], dtype=torch.float32)
        return unread, torch.linspace(0, points.shape[2] - 1, clusters).long()

    def cluster(
        self, points: Tensor, centroids: Tensor, start: Tensor, warm: Tensor
    ) -> tuple[Tensor, Tensor]:
        return kmeans(
            points, centroids, start, warm, first=ITERATIONS, later=ITERATIONS, provider=self.provider
        )

    def kmeans(self) -> list[tuple[Tensor, Tensor]]:
        return [
            self.cluster(points, state, torch.zeros(state.shape[2], dtype=torch.long), WARM)
            for points, (state, _) in zip((self.query, self.key), self.states, strict=True)
        ]

    def order(self) -> list[tuple[Tensor, Tensor]]:
        return [
            sort_by_label(labels, state.shape[2], provider=self.provider) for state, labels in self.states
        ]

    def select(self) -> tuple[Tensor, Tensor, Tensor]:
        (q_centroids, _), (kv_centroids, _) = self.states
        return top_p_blocks(
            *(q_centroids, kv_centroids, self.sizes),
            scale=q_centroids.shape[-1] ** -0.5,
            top_p=TOP_P,
            min_blocks=1,
            provider=self.provider,
        )

    def dense(self) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(self.query, self.key, self.value)

    def verify(self) -> None:
        """Raise unless labels are nearest, centroids are means, orders are sorted, and rows hold their share."""
        for points, (state, _), (after, labels) in zip(
            (self.query, self.key), self.states, self.kmeans(), strict=True
        ):
            start = torch.zeros(state.shape[2], dtype=torch.long)
            before, _ = kmeans(points, state, start, WARM, first=1, later=1, provider=self.provider)
            some = torch.arange(0, points.shape[2], 61)
            distances = torch.cdist(points[:, :, some].double(), before.double()).square()
            chosen = distances.gather(-1, labels[:, :, some].long()[..., None])[..., 0]
            slack = (1e-5 if points.dtype == torch.float32 else 1.6e-2) * distances.max()
            assert (chosen <= distances.amin(-1) + slack).all()
            is_own = labels[:, :, None] == 0
            means = (is_own.double() @ points.double() / is_own.sum(-1, keepdim=True))[:, :, 0]
            torch.testing.assert_close(after[:, :, 0].double(), means, rtol=1e-5, atol=1e-5)
        for (_, labels), (order, bounds) in zip(self.states, self.order(), strict=True):
            torch.testing.assert_close(order.long(), labels.argsort(dim=-1, stable=True))
            assert (bounds[..., -1] == labels.shape[-1]).all()
        counts, _, kept = self.select()
        assert (kept >= TOP_P - 1e-5).all()
        assert (counts >= 1).all()


def measure(case: Case, repeats: int, provider: str) -> Result:
    """Check a case, then time in turns."""
    step = Step(case, provider)
    step.verify()
    functions = {"dense": step.dense, "kmeans": step.kmeans, "sort": step.order, "select": step.select}
    times = {f"{name}_ms": 1e3 * s for name, s in interleaved_medians(functions, repeats).items()}
    total = times["kmeans_ms"] + times["sort_ms"] + times["select_ms"]
    return Result(case=case, **times, total_ms=total, share=total / times["dense_ms"])


def cases(dtypes: list[str]) -> list[Case]:
    """Sizes x clusters: about 128 queries and 48 keys in a cluster, then fewer and more."""
    return [
        Case(dtype=dtype, tokens=tokens, heads=8, head_dim=head_dim, q_clusters=q, kv_clusters=kv)
        for dtype in dtypes
        for tokens, head_dim in ((8192, 64), (16384, 64), (16384, 128))
        for q, kv in ((tokens // 256, tokens // 96), (tokens // 128, tokens // 48), (100, 500))
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clustering", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    for case in cases(options.dtypes):
        result = measure(case, options.repeats, options.provider)
        print(result, flush=True)
        results.append(asdict(result))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
