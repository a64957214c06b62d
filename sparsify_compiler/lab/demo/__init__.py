"""`sparsify demo`: dense and sparse models, measured, checked and compared.

One step of a larger model with random weights shows the speed, and checks that the model computes its plan. Whole
generations by the small trained model show the effect on videos.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from sparsify_compiler import pictures
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.lab.demo import step, videos
from sparsify_compiler.lab.demo.size import SIZES, Size
from sparsify_compiler.lab.demo.step import BOUND, dense_attention
from sparsify_compiler.outputs import make_folder

__all__ = ["BOUND", "SIZES", "Result", "Size", "dense_attention", "run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """Measurements of the demo."""

    step: step.Result
    videos: videos.Result

    @property
    def passed(self) -> bool:
        """The model computes what its plan says."""
        return self.step.passed


def run(
    device: str = "cpu",
    out: Path = Path("demo_out"),
    *,
    size: Size | None = None,
    console: Console | None = None,
) -> Result:
    """Explain, compile, check, time, draw and generate; prints as it goes.

    Args:
        device: `cpu` or `cuda`.
        out: folder for `masks.png`, `density.png` and `videos.gif`.
        size: sizes of the models and videos; if None, those that take about three minutes.

    Raises:
        SparsifyError: the device is not there, a package of the laboratory is missing, or `out` cannot be
            written to.
    """
    if device not in SIZES:
        raise OptionError(f"device must be one of {', '.join(SIZES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SparsifyError(
            "device must be one that torch finds, got 'cuda' without a CUDA device: try --device cpu"
        )
    make_folder(out, "videos.gif")
    for name in ("masks.png", "density.png"):
        pictures.check(out / name)
    size, console = size or SIZES[device], console or Console()
    measured = step.run(size, device, out, console)
    console.print()
    return Result(step=measured, videos=videos.run(size, device, out, console))
