"""sparsify-compiler: block-sparse attention for video diffusion transformers, by torch.compile.

    torch.compile(model, backend="sparsify", options={"method": "tile", "reference_frames": 2})
"""

from sparsify_compiler.errors import GridError, OptionError, ProviderError, SparsifyError, SparsifyWarning
from sparsify_compiler.plan import AttentionPlan, AttentionSite, GraphPlan, TokenLayout
from sparsify_compiler.table import BlockTable

__version__ = "0.1.0"
__all__ = [
    "AttentionPlan",
    "AttentionSite",
    "BlockTable",
    "GraphPlan",
    "GridError",
    "OptionError",
    "ProviderError",
    "SparsifyError",
    "SparsifyWarning",
    "TokenLayout",
]
