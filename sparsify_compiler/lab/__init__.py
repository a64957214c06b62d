"""The laboratory: a small video world, a Wan trained on it, and experiments with sparse attention on that model.

    demo/                                       `sparsify demo`
    benchmark, configurations, calibration      `sparsify bench quality`, and the calls that `sparsify search` uses
    check, sparsity                             `sparsify bench sparsity`, and the figures of MODEL_CARD.md
    pipeline, students, comparison, resumable   `sparsify distill`
    world, model, sampling, training, train     the world, the model, its videos, and its own training
    classifier, quality                         measures of a video
    predictor                                   a predictor for method `dsv`
    files, machine, pictures, report            the folder of a run, the machine, drawings and tables

In the package only `cli` imports this room. Benchmarks, examples and `tests/lab` use it too.
"""

from importlib.util import find_spec

from sparsify_compiler.errors import SparsifyError

PACKAGES = {
    "diffusers": "diffusers",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "skimage": "scikit-image",
}
"""Module -> package: all that the laboratory needs and the compiler does not. The extra `demo` installs them."""


def require() -> None:
    """Check that the packages of the laboratory are installed.

    Raises:
        SparsifyError: a package is missing.
    """
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SparsifyError(
            f"the laboratory needs {', '.join(PACKAGES.values())}; {', '.join(missing)} not found: "
            "try pip install 'sparsify-compiler[demo]'"
        )
