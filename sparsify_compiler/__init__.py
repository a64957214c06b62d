"""sparsify-compiler: block-sparse attention for video diffusion transformers, by torch.compile.

torch.compile(model, backend="sparsify", options={"method": "tile", "reference_frames": 2})
"""

from typing import TYPE_CHECKING, Any

from sparsify_compiler.errors import GridError, OptionError, ProviderError, SparsifyError, SparsifyWarning
from sparsify_compiler.plan import AttentionPlan, AttentionSite, GraphPlan, TokenLayout
from sparsify_compiler.table import BlockTable

if TYPE_CHECKING:
    from sparsify_compiler.explanation import Explanation, explain

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "AttentionSite",
    "BlockTable",
    "Explanation",
    "GraphPlan",
    "GridError",
    "OptionError",
    "ProviderError",
    "SparsifyError",
    "SparsifyWarning",
    "TokenLayout",
    "explain",
]


def __getattr__(name: str) -> Any:
    """`explain` and `Explanation` on first use: they need Dynamo, whose import takes seconds."""
    if name in ("explain", "Explanation"):
        from sparsify_compiler import explanation

        return getattr(explanation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
