"""Method `dense`: every attention stays the model's own call. The baseline, and what refusal falls back to."""

from dataclasses import dataclass
from typing import ClassVar, NoReturn

from sparsify_compiler.methods.base import VideoMethod
from sparsify_compiler.plan import AttentionSite, TokenLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense(VideoMethod):
    """No options."""

    name: ClassVar[str] = "dense"

    def refusal(self, layout: TokenLayout) -> str:
        """Always: nothing is rewritten."""
        return "method='dense'"

    def fit(self, site: AttentionSite, layout: TokenLayout) -> NoReturn:
        """Never called: `refusal` keeps every site dense."""
        raise AssertionError("a dense site has no fitted method")
