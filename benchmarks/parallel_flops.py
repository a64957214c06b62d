"""The share of a model's arithmetic that each rank computes: `python -m benchmarks.parallel_flops --out FILE`.

Wan 2.1 14B with 75,600 tokens (81 frames of 720 x 1280), on the meta device: no weight and no number exists.
Operators are counted in the graphs that ranks run, for one and for two layers. All layers are alike, so the count
of forty follows. The attention of video tokens counts at a density. Another column has the speed-up where only this
attention is shared.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import write_json
from sparsify_compiler.backend import configure
from sparsify_compiler.parallel.shares import share
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.parallel import Graph, graphs_of

LAYERS = 40
DENSITIES = (0.1, 0.2, 1.0)
SIZES = (2, 4, 8)


def wan(layers: int) -> Graph:
    """The graph of Wan 14B with some of its layers."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers).eval()
        inputs = {
            "hidden_states": torch.randn(1, 16, 21, 90, 160),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "return_dict": False,
        }
    with torch.no_grad():
        (graph,) = graphs_of(model, inputs)
    return graph


def flops(gm: fx.GraphModule, args: tuple[Any, ...], size: int) -> tuple[int, int]:
    """(operations outside of the attention of video tokens, those of that attention if it is dense) of a rank."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        gm(*args)
    sites = [plan.site for plan in graph_plan(gm) if plan.site.kind == "self"]
    own = sum(4 * share(one.heads, 0, size) * one.q_tokens**2 * one.head_dim for one in sites)
    return counter.get_total_flops() - own, own


def forty(gm_of: Any) -> tuple[int, int]:
    """The operations of all layers, from graphs of one and of two layers."""
    one, two = (gm_of(layers) for layers in (1, 2))
    others, own = (b + (LAYERS - 2) * (b - a) for a, b in zip(one, two, strict=True))
    return others, own


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_flops", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    config, tokens = configure({"method": "dense"}), 21 * 45 * 80
    graphs = {layers: wan(layers) for layers in (1, 2)}
    analysed = {layers: pipeline.analyse(gm, config) for layers, (gm, _) in graphs.items()}
    alone = forty(lambda n: flops(pipeline.rewrite(analysed[n], config), graphs[n][1], 1))
    cases = []
    for size in SIZES:
        ranks = [
            forty(
                lambda n, rank=rank, size=size: flops(
                    pipeline.rewrite(pipeline.share(analysed[n], config, Ranks(rank, size)), config),
                    graphs[n][1],
                    size,
                )
            )
            for rank in sorted({0, size - 1})
        ]
        for density in DENSITIES:
            total = alone[0] + density * alone[1]
            most = max(others + density * own for others, own in ranks)
            attention_alone = alone[0] + density * alone[1] * max(own for _, own in ranks) / alone[1]
            cases.append(
                {
                    "ranks": size,
                    "density": density,
                    "teraflops": round(total / 1e12, 1),
                    "speedup": round(total / most, 3),
                    "speedup_of_attention_alone": round(total / attention_alone, 3),
                }
            )
            print(cases[-1], flush=True)
    if out:
        write_json(out, cases, lines=True, model="Wan 2.1 14B", tokens=tokens)


if __name__ == "__main__":
    main()
