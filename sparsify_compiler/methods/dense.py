"""Method `dense`: every attention stays the model's own call. It is the baseline."""

from dataclasses import dataclass
from typing import ClassVar, Self

from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense(VideoMethod):
    """No options."""

    name: ClassVar[str] = "dense"

    def refusal(self, layout: TokenLayout) -> str:
        """The reason why every site stays dense: the option."""
        return "method='dense'"

    def fit(self, site: AttentionSite, layout: TokenLayout) -> Self:
        """The same: there are no numbers to fill in."""
        return self
