"""`python -m benchmarks.prediction`: the cost of selecting keys by low-rank scores, relative to dense attention.

Dense is a forward and a backward pass of SDPA's flash attention in the same run at the same number of threads.
Unfused is the selection by plain torch calls, with all scores at once: a product, `topk`, and a sort of the
indices, and before that a softmax and a sum if all queries of a group select. Before anything is timed, some rows
of every selection are checked against float64.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import machine, write_json
from sparsify_compiler.kernels.prediction import top_k_keys
from sparsify_compiler.methods.dsv import CHOSEN_BY
from sparsify_compiler.testing.strategies import qkv
from sparsify_compiler.timing import interleaved_medians

HEADS, HEAD_DIM = 4, 64
RANK, GROUP = 16, 16
SHARES = (0.1, 0.25)
DTYPES = ["float32", "bfloat16"]
UNIT = 2.0**-24
"""Largest relative error of one operation in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the benchmark; `share_of_dense` is that of `top_k_ms` in `dense_ms`."""

    dtype: str
    tokens: int
    heads: int
    head_dim: int
    rank: int
    groups: int
    chosen_by: str
    """The option of method `dsv` with this name."""
    keys: int
    dense_ms: float
    unfused_ms: float
    top_k_ms: float
    share_of_dense: float

    def __str__(self) -> str:
        return (
            f"{self.dtype:<8} H={self.heads} S={self.tokens:<5} D={self.head_dim} R={self.rank} "
            f"groups {self.groups:<4} by {self.chosen_by:<6} keys {self.keys:<4} dense {self.dense_ms:7.1f} ms  "
            f"unfused {self.unfused_ms:6.1f} ms  top-k {self.top_k_ms:5.1f} ms = "
            f"{100 * self.share_of_dense:4.2f}% of dense"
        )


def choose(query: Tensor, key: Tensor, keys: int, chosen_by: str, provider: str) -> tuple[Tensor, Tensor]:
    """With the length of a row rounded up to a power of two, as in a table."""
    budget = torch.tensor([[keys]], dtype=torch.int32, device=query.device)
    width, bounds = 1 << (keys - 1).bit_length(), None
    if chosen_by == "all":
        bounds = torch.arange(0, query.shape[2] + 1, GROUP, dtype=torch.int32, device=query.device)
    else:
        query = query[:, :, GROUP // 2 :: GROUP]
    scale = RANK**-0.5
    return top_k_keys(query, key, budget, width=width, q_bounds=bounds, scale=scale, provider=provider)


def choose_unfused(query: Tensor, key: Tensor, keys: int, chosen_by: str) -> Tensor:
    if chosen_by == "middle":
        query = query[:, :, GROUP // 2 :: GROUP]
    scores = RANK**-0.5 * (query.float() @ key.float().mT)
    if chosen_by == "all":
        scores = scores.softmax(-1).unflatten(2, (-1, GROUP)).sum(3)
    return scores.topk(keys, sorted=False).indices.sort().values


def verify(query: Tensor, key: Tensor, keys: int, chosen_by: str, provider: str) -> None:
    """Raise unless the selected keys rise and have the highest scores, within rounding."""
    counts, indices = (t[:, :, ::37] for t in choose(query, key, keys, chosen_by, provider))
    chosen = indices[..., :keys].long()
    assert (counts == keys).all()
    assert (chosen.diff(dim=-1) > 0).all()
    assert not indices[..., keys:].any()
    members = query.unflatten(2, (-1, GROUP))[:, :, ::37].double()
    query, key = members[:, :, :, GROUP // 2], key.double()
    if chosen_by == "all":
        together = (RANK**-0.5 * (members @ key[:, :, None].mT)).softmax(-1).sum(3)
        held, most = together.gather(-1, chosen).sum(-1), together.topk(keys).values.sum(-1)
        assert (held >= most * (1 - 1e-5)).all()
        return
    scores = RANK**-0.5 * (query @ key.mT)
    slack = 2 * (RANK + 2) * UNIT * (RANK**-0.5 * (query.abs() @ key.abs().mT)).amax(-1)
    least = scores.gather(-1, chosen).amin(-1)
    most = scores.scatter(-1, chosen, -torch.inf).amax(-1)
    assert (most <= least + slack).all()


def dense(query: Tensor, key: Tensor, value: Tensor) -> None:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(query, key, value)
    torch.autograd.grad(out, (query, key, value), out)


def measure(dtype: str, tokens: int, repeats: int, provider: str) -> list[Result]:
    """Check, then time in turns, every share of the keys and method of selection, with one dense pass."""
    q, k, v = qkv(1, HEADS, HEADS, *[tokens] * 2, *[HEAD_DIM] * 2, getattr(torch, dtype))
    query, key, _ = qkv(1, HEADS, HEADS, tokens, tokens, RANK, 1, getattr(torch, dtype))
    functions: dict[str, Callable[[], object]] = {
        "dense": partial(dense, *(t.requires_grad_() for t in (q, k, v)))
    }
    cases = list(itertools.product([int(share * tokens) for share in SHARES], CHOSEN_BY))
    for keys, chosen_by in cases:
        verify(query, key, keys, chosen_by, provider)
        functions[f"unfused {keys} {chosen_by}"] = partial(choose_unfused, query, key, keys, chosen_by)
        functions[f"top-k {keys} {chosen_by}"] = partial(choose, query, key, keys, chosen_by, provider)
    ms = {name: 1e3 * seconds for name, seconds in interleaved_medians(functions, repeats).items()}
    return [
        Result(
            **{"dtype": dtype, "tokens": tokens, "heads": HEADS, "head_dim": HEAD_DIM},
            **{"rank": RANK, "groups": tokens // GROUP, "chosen_by": chosen_by, "keys": keys},
            dense_ms=ms["dense"],
            unfused_ms=ms[f"unfused {keys} {chosen_by}"],
            top_k_ms=ms[f"top-k {keys} {chosen_by}"],
            share_of_dense=ms[f"top-k {keys} {chosen_by}"] / ms["dense"],
        )
        for keys, chosen_by in cases
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    for dtype in options.dtypes:
        for tokens in options.tokens:
            for result in measure(dtype, tokens, options.repeats, options.provider):
                print(result, flush=True)
                results.append(asdict(result))
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
