"""The methods: how a site decides what each query block reads.

A method is a frozen dataclass in a file of its own. Its fields are its options; the rest is three functions:

    fit(layout) -> Method     the same settings with every default filled in for this layout; raises OptionError
    refusal(layout) -> str    why this layout must stay dense, or ""
    table(layout) -> BlockTable     on the CPU

To add a method, write the file and name it here.
"""

from typing import ClassVar, Protocol, Self

from sparsify_compiler.methods.dense import Dense
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.table import BlockTable


class Method(Protocol):
    """What planning and lowering ask of a method."""

    name: ClassVar[str]

    def refusal(self, layout: TokenLayout) -> str:
        """Why sites of this layout must stay dense; empty if they need not."""

    def fit(self, layout: TokenLayout) -> Self:
        """The same method with every default filled in for this layout."""

    def table(self, layout: TokenLayout) -> BlockTable:
        """Which keys each query block reads; on the CPU, shared by batches and heads."""


METHODS: dict[str, type[Method]] = {method.name: method for method in (Dense, Tile)}
