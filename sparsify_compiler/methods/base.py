"""The base class of the options of a method: defaults, the refusal of sites without a grid, and the fitted type."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

from sparsify_compiler.plan import TokenLayout

Fitted = TypeVar("Fitted")


def max_error_of(method: object) -> float | None:
    """The largest relative error of an attention's output that a method promises; None if it promises none."""
    most: float | None = getattr(method, "max_error", None)
    return most


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoMethod:
    """Options of a method that needs the grid of the video. A site without one stays dense."""

    dense_steps: ClassVar[int | float] = 0
    dense_layers: ClassVar[int | float] = 0
    far_field: ClassVar[str] = "drop"
    otherwise: ClassVar[Mapping[str, Mapping[str, object]]] = {}

    def refusal(self, layout: TokenLayout) -> str:
        """The reason why the layout has no grid; empty if it has one."""
        return layout.reason if layout.grid is None else ""

    def filled(self, fitted: type[Fitted], **numbers: object) -> Fitted:
        """These options as the fitted type of the method, with the numbers that hold for a site."""
        return fitted(**{f.name: getattr(self, f.name) for f in fields(self)} | numbers)
