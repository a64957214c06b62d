"""The share of a model's arithmetic that each rank computes: `python -m benchmarks.parallel_flops --out FILE`.

Wan 2.1 14B with 75,600 tokens (81 frames of 720 x 1280), on the meta device: no weight and no number exists. The
count is that of `sparsify plan-parallel`, on the graphs that ranks run. The attention of video tokens counts at a
density. Another column has the speed-up where only this attention is shared.
"""

import argparse
import warnings
from pathlib import Path

import torch

from benchmarks.harness import write_json
from benchmarks.simulation import wan
from sparsify_compiler.clusters.counting import count
from sparsify_compiler.clusters.planning import with_densities
from sparsify_compiler.parallel.shares import share
from sparsify_compiler.runtime.cost import Mesh, attention_loads

GRID = (21, 45, 80)
DENSITIES = (0.1, 0.2, 1.0)
SIZES = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel_flops", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    out = parser.parse_args().out
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        model, inputs = wan(GRID)
    counted = count(model, inputs)
    tokens, cases = counted.work.tokens, []
    for size in SIZES:
        for density in DENSITIES:
            work = with_densities(counted, density)
            own = sum(max(attention_loads(one, Mesh(size, 1))) for one in work.attentions)
            most = work.flops.on(share(tokens, 0, size) / tokens) + own
            cases.append(
                {
                    "ranks": size,
                    "density": density,
                    "teraflops": round(work.total / 1e12, 1),
                    "speedup": round(work.total / most, 3),
                    "speedup_of_attention_alone": round(work.total / (work.flops.on(1.0) + own), 3),
                }
            )
            print(cases[-1], flush=True)
    if out:
        write_json(out, cases, lines=True, model="Wan 2.1 14B", tokens=tokens)


if __name__ == "__main__":
    main()
