"""sparsify-compiler: block-sparse attention for video diffusion transformers, by torch.compile.

torch.compile(model, backend="sparsify", options={"method": "tile", "reference_frames": 2})
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
from sparsify_compiler.table import BlockTable

if TYPE_CHECKING:
    from sparsify_compiler.explanation import Explanation, explain
    from sparsify_compiler.measured import RunStats, stats
    from sparsify_compiler.policy import Policy
    from sparsify_compiler.runtime.clock import generation
    from sparsify_compiler.training.consistency import (
        ConsistencyConfig,
        ConsistencyTrainer,
        sample_few_steps,
    )
    from sparsify_compiler.training.distillation import Distillation, DistillationLoss
    from sparsify_compiler.training.dsv import DSVTrainer

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "AttentionSite",
    "BlockTable",
    "ConsistencyConfig",
    "ConsistencyTrainer",
    "DSVTrainer",
    "Distillation",
    "DistillationLoss",
    "Explanation",
    "GraphPlan",
    "GridError",
    "OptionError",
    "Policy",
    "PolicyError",
    "ProviderError",
    "RunStats",
    "SparsifyError",
    "SparsifyWarning",
    "TokenLayout",
    "explain",
    "generation",
    "sample_few_steps",
    "stats",
]


_LAZY = {
    "ConsistencyConfig": "training.consistency",
    "ConsistencyTrainer": "training.consistency",
    "DSVTrainer": "training.dsv",
    "Distillation": "training.distillation",
    "DistillationLoss": "training.distillation",
    "Explanation": "explanation",
    "Policy": "policy",
    "RunStats": "measured",
    "explain": "explanation",
    "generation": "runtime.clock",
    "sample_few_steps": "training.consistency",
    "stats": "measured",
}


def __getattr__(name: str) -> Any:
    """What needs Dynamo or a kernel's module, on first use: `import sparsify_compiler` takes no time."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"sparsify_compiler.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
