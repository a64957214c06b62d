"""The methods: how a site decides what each query block reads.

A method is a frozen dataclass in a file of its own. Its fields are its options; the rest is a few functions of a
token layout, and for a dynamic method of the tokens too. To add one, write the file and name it here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from torch import Tensor

from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dense import Dense
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.selection import Selection, State, Tokens
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.table import BlockTable


class Method(Protocol):
    """What planning asks of every method."""

    name: ClassVar[str]
    dense_steps: ClassVar[int | float]
    """Default of the option: steps of a generation that stay dense, a number or a share."""
    dense_layers: ClassVar[int | float]
    """Default of the option: sites of a model that stay dense, a number or a share."""
    far_field: ClassVar[str]
    """Default of the option."""
    otherwise: ClassVar[dict[str, dict[str, Any]]]
    """Other defaults of its options, for far fields other than its own."""

    def refusal(self, layout: TokenLayout) -> str:
        """Why sites of this layout must stay dense; empty if they need not."""

    def fit(self, site: AttentionSite, layout: TokenLayout) -> Self:
        """The same method with every default filled in for this site; raises OptionError."""


@runtime_checkable
class StaticMethod(Method, Protocol):
    """A method that looks at the layout alone."""

    def table(self, layout: TokenLayout) -> BlockTable:
        """Which keys each query block reads; on the CPU, shared by batches and heads."""


@runtime_checkable
class DynamicMethod(Method, Protocol):
    """A method that looks at the queries and keys of every call. Its functions are traced into the graph."""

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """Tensors that every call needs, on the CPU; `observe` and `select` get them by name on the device."""

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the fp32 tensors that a site keeps from call to call."""

    def observe(self, tokens: Tokens, state: State, **constants: Any) -> tuple[Tensor, ...]:
        """The new state after a step that runs dense."""

    def select(self, tokens: Tokens, state: State, **constants: Any) -> tuple[Selection, tuple[Tensor, ...]]:
        """What this call reads, and the new state."""


@runtime_checkable
class LearningMethod(DynamicMethod, Protocol):
    """A dynamic method that also needs tensors which training writes. All its functions get them by name."""

    @property
    def learns(self) -> bool:
        """Whether they are still to be learnt; else `trained` has them, and nothing below is called."""

    def known_as(self, names: Sequence[str]) -> Mapping[str, str]:
        """Site -> its name where what was learnt is kept, of all sites of a graph that read it; raises
        OptionError."""

    def settle(self, choice: Any) -> Self:
        """The method with what training chose for a site; None before it chose."""

    def trained(self, site: AttentionSite, layout: TokenLayout) -> dict[str, Tensor]:
        """Name -> first value, on the CPU, of the tensors that `select` reads."""

    def observed(self, site: AttentionSite) -> dict[str, Tensor]:
        """Name -> first value, on the CPU, of the tensors that `learn` writes."""

    def learn(self, tokens: Tokens, *, signal: Tensor, **tensors: Any) -> tuple[Tensor, ...]:
        """New values of those, after a call in training. Runs as one opaque op, so it may read `signal`: int64 on
        the CPU, what the trainer says of the call."""


METHODS: dict[str, type[Any]] = {method.name: method for method in (Dense, Tile, Svg2, Cubes, Keys, Dsv)}
