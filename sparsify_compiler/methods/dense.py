"""Method `dense`: every attention stays the model's own call. The baseline, and what refusal falls back to."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.table import BlockTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """No options."""

    name: ClassVar[str] = "dense"
    dense_steps: ClassVar[int] = 0
    dense_layers: ClassVar[int] = 0
    far_field: ClassVar[str] = "drop"
    otherwise: ClassVar[dict[str, dict[str, Any]]] = {}

    def refusal(self, layout: TokenLayout) -> str:
        """Always: nothing is rewritten."""
        return "method='dense'"

    def fit(self, site: AttentionSite, layout: TokenLayout) -> Self:
        """Itself: there is nothing to fill in."""
        return self

    def table(self, layout: TokenLayout) -> BlockTable:
        """Never asked for: `refusal` keeps every site dense."""
        raise AssertionError("a dense site has no table")
