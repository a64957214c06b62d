"""CPU time of `apply` and the first call of a Wan, whole and by blocks: `python -m benchmarks.regional`.

The time covers the analysis, Dynamo, Inductor with its child processes, and the call itself. Each way runs in a
process of its own, with an empty folder for Inductor. The outputs of both ways must be equal within rounding, and
differ from those without the compiler.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import write_json

WAYS = {"whole": False, "regional": True, "plain": None}
"""Way -> `regional`; `plain` runs without the compiler."""
ROUNDING = 1e-5
LAYERS = 30
LIMIT = 1 / 3
"""The largest share of the time of the whole that the blocks of LAYERS layers may take."""


def run(way: str, layers: int, folder: Path) -> dict[str, Any]:
    """Make a first call in this process. Its output goes to a file in `folder`."""
    import torch._inductor.config
    from diffusers import WanTransformer3DModel

    import sparsify_compiler

    torch._inductor.config.force_disable_caches = True
    torch.manual_seed(0)
    model: Any = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, ffn_dim=128, num_layers=layers, text_dim=32, freq_dim=64
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 5, 16, 24),
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32),
        "return_dict": False,
    }
    before = _cpu_seconds()
    changed = None
    if way != "plain":
        changed = sparsify_compiler.apply(model, regional=WAYS[way], method="tile", reference_frames=1)
    with torch.no_grad():
        torch.save(model(**inputs)[0], folder / f"{way}.pt")
    seconds = _cpu_seconds() - before
    sparse = len({one.site for one in changed.stats().measurements}) if changed else 0
    return {"way": way, "layers": layers, "cpu_seconds": round(seconds, 1), "sparse": sparse}


def _cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    used = [resource.getrusage(one) for one in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(way: str, layers: int, folder: Path) -> dict[str, Any]:
    """Make a first call in a process of its own. Inductor compiles in that process and has no caches."""
    with tempfile.TemporaryDirectory() as cache:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.regional", "--layers", str(layers), "--way", way]
        text = subprocess.check_output([*command, "--out", folder], env={**os.environ, **fresh}, text=True)
    return json.loads(text.splitlines()[-1])


def compare(layers: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a case for each way, what the ways have in common).

    Raises:
        SystemExit: outputs differ, or an attention is dense.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [measure(way, layers, folder) for way in WAYS]
        outputs = {way: torch.load(folder / f"{way}.pt") for way in WAYS}
    error = _error(outputs["regional"], outputs["whole"])
    effect = _error(outputs["whole"], outputs["plain"])
    whole, regional, _ = cases
    ratio = regional["cpu_seconds"] / whole["cpu_seconds"]
    faults = [
        *([f"outputs differ by {error:.1e}"] if not error < ROUNDING else []),
        *([f"the compiler changes outputs by {effect:.1e} only"] if not effect > 10 * ROUNDING else []),
        *(
            [
                f"{one['way']}: {one['sparse']} of {layers} sites"
                for one in cases[:2]
                if one["sparse"] != layers
            ]
        ),
        *([f"regional takes {ratio:.2f} of the whole"] if layers == LAYERS and ratio > LIMIT else []),
    ]
    if faults:
        raise SystemExit("; ".join(faults))
    return cases, {"ratio": round(ratio, 3), "error": error, "effect": effect}


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/regional-cpu.json"))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--way", choices=WAYS, help="one way, with its output in the folder --out")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.layers, given.out)))
        return
    cases, about = compare(given.layers)
    write_json(given.out, cases, **about)
    print(*cases, about, sep="\n")


if __name__ == "__main__":
    main()
