"""sparsify-compiler: block-sparse attention for video diffusion transformers, by torch.compile.

    torch.compile(model, backend="sparsify", options={"method": "tile", "reference_frames": 2})

`print(sparsify_compiler.explain(model, ...))` shows the plan of every attention before a run, and
`print(sparsify_compiler.stats(model))` what a run computed.

Options of every method:

    method           dense, tile, sta, svg2, cubes, keys (the default) or dsv
    preset           svg2 or svg2-turbo: a method with its options; other options override them
    policy           a file that `sparsify search` wrote, or a Policy: a method for each attention
    grid             (frames, height, width) of the video tokens, where the graph does not show them
    text             (before, after): the numbers of other tokens in the same sequence; goes with grid
    provider         auto, reference, cpu or triton: the implementation of the kernels
    far_field        drop, mean or linear: the treatment of keys that are not selected
    dense_steps      first steps of a generation that stay dense: a number, or a share
    dense_layers     first attentions of a graph that stay dense: a number, or a share
    measure_recall   share of the queries on which stats measures the attention mass kept
    offload_indices  in training, keep long lists of keys in host memory between forward and backward
    parallel         several ranks run one model: auto, or a dict of form, mesh, balance and timeout
    guard            measured, cached or off: attention runs dense where dense is faster here
    inner_backend    inductor, eager or aot_eager: the compiler of the rewritten graph
    dump             folder for the graph after each pass, and its time

Options of one method:

    tile             reference_frames
    sta              tile, window
    svg2             top_p, min_kv_ratio, max_error, min_gain, q_clusters, kv_clusters, kmeans_iters, seed
    cubes            top_p, min_kv_ratio, max_error, min_gain, cube, query_cube, kv_budget
    keys             kv_budget, q_clusters, kmeans_iters, seed
    dsv              rank, mass, query_group, chosen_by, kv_budget, predictor
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsify_compiler.errors import (
    GridError,
    OptionError,
    PolicyError,
    ProviderError,
    SparsifyError,
    SparsifyWarning,
)
from sparsify_compiler.plan import AttentionPlan, AttentionSite, GraphPlan, TokenLayout

if TYPE_CHECKING:
    from sparsify_compiler.explanation import Explanation, explain
    from sparsify_compiler.exporting import export
    from sparsify_compiler.exporting.files import Exported
    from sparsify_compiler.exporting.loaded import Loaded, load, torch_custom_ops
    from sparsify_compiler.exporting.onnx import onnx_custom_ops
    from sparsify_compiler.hosts.apply import Applied, apply
    from sparsify_compiler.measured import RunStats, stats
    from sparsify_compiler.policy import Policy
    from sparsify_compiler.runtime.clock import generation
    from sparsify_compiler.table import BlockTable
    from sparsify_compiler.training.consistency import (
        ConsistencyConfig,
        ConsistencyTrainer,
        sample_few_steps,
    )
    from sparsify_compiler.training.distillation import Distillation, DistillationLoss
    from sparsify_compiler.training.dsv import DSVTrainer

__version__ = "0.1.0"
__all__ = [
    "Applied",
    "AttentionPlan",
    "AttentionSite",
    "BlockTable",
    "ConsistencyConfig",
    "ConsistencyTrainer",
    "DSVTrainer",
    "Distillation",
    "DistillationLoss",
    "Explanation",
    "Exported",
    "GraphPlan",
    "GridError",
    "Loaded",
    "OptionError",
    "Policy",
    "PolicyError",
    "ProviderError",
    "RunStats",
    "SparsifyError",
    "SparsifyWarning",
    "TokenLayout",
    "apply",
    "explain",
    "export",
    "generation",
    "load",
    "onnx_custom_ops",
    "sample_few_steps",
    "stats",
    "torch_custom_ops",
]


_LAZY = {
    "Applied": "hosts.apply",
    "BlockTable": "table",
    "ConsistencyConfig": "training.consistency",
    "ConsistencyTrainer": "training.consistency",
    "DSVTrainer": "training.dsv",
    "Distillation": "training.distillation",
    "DistillationLoss": "training.distillation",
    "Explanation": "explanation",
    "Exported": "exporting.files",
    "Loaded": "exporting.loaded",
    "Policy": "policy",
    "RunStats": "measured",
    "apply": "hosts.apply",
    "explain": "explanation",
    "export": "exporting",
    "load": "exporting.loaded",
    "onnx_custom_ops": "exporting.onnx",
    "generation": "runtime.clock",
    "sample_few_steps": "training.consistency",
    "stats": "measured",
    "torch_custom_ops": "exporting.loaded",
}


def __getattr__(name: str) -> Any:
    """Import names that need Dynamo or a kernel's module on first use: so `import sparsify_compiler` is fast."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"sparsify_compiler.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of the module, with the public names that are not imported yet, for completion and help."""
    return sorted({*globals(), *__all__})
