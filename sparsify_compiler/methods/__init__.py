"""The methods: how a site decides what each query block reads.

A method is a file with two frozen dataclasses. The first has the options (`plan.Method`). Its `fit` returns the
second, with the numbers that hold for one site: a `StaticMethod` or a `DynamicMethod`. Where `fit` has nothing to
fill in, one class is both. CONTRIBUTING.md has the steps to add a method.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dense import Dense
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.selection import Selection, State, Tokens
from sparsify_compiler.methods.sta import Sta
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import AttentionSite, FittedMethod, Method, TokenLayout
from sparsify_compiler.table import BlockTable

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Dense, Tile, Sta, Svg2, Cubes, Keys, Dsv)
}


@runtime_checkable
class StaticMethod(FittedMethod, Protocol):
    """A method that looks at the layout alone."""

    def table(self, layout: TokenLayout) -> BlockTable:
        """The keys that each query block reads; on the CPU, shared by batches."""


@runtime_checkable
class DynamicMethod(FittedMethod, Protocol):
    """A method that looks at the queries and keys of every call. Its functions are traced into the graph."""

    def constants(self, layout: TokenLayout) -> dict[str, Tensor]:
        """Tensors that every call needs, on the CPU; `observe` and `select` get them by name on the device."""

    def state(self, site: AttentionSite, layout: TokenLayout) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the fp32 tensors that a site keeps from call to call."""

    def observe(self, tokens: Tokens, state: State, **constants: Any) -> tuple[Tensor, ...]:
        """The new state after a step that runs dense."""

    def select(self, tokens: Tokens, state: State, **constants: Any) -> tuple[Selection, tuple[Tensor, ...]]:
        """The selection of this call, and the new state."""


@runtime_checkable
class TrainedMethod(Method, Protocol):
    """The options of a method whose sites read tensors that training writes."""

    @property
    def learns(self) -> bool:
        """Whether training still writes these tensors. If not, a file has their values."""

    def known_as(self, names: Sequence[str]) -> Mapping[str, str]:
        """Site -> its name in the file of trained tensors, for all sites of a graph; raises OptionError."""


@runtime_checkable
class LearningMethod(DynamicMethod, Protocol):
    """A `TrainedMethod`, fitted. All its functions get the trained tensors by name."""

    @property
    def learns(self) -> bool:
        """As in `TrainedMethod`. If false, only `trained` and `rows_of` of the functions below are called."""

    def settle(self, choice: Any) -> Self:
        """The method with the choice of training for a site; None before training chose."""

    def trained(self, site: AttentionSite, layout: TokenLayout) -> dict[str, Tensor]:
        """Name -> first value, on the CPU, of the tensors that `select` reads."""

    def observed(self, site: AttentionSite) -> dict[str, Tensor]:
        """Name -> first value, on the CPU, of the tensors that `learn` writes."""

    def rows_of(self, name: str, heads: Tensor, site: AttentionSite) -> tuple[int, Tensor]:
        """(dimension of a trained or observed tensor, places there) of the numbers of some query heads.

        Args:
            heads: [n] int64. Each gets the numbers of its key head for itself, as in a site with n key heads.
            site: the site with all heads.
        """

    def learn(self, tokens: Tokens, *, signal: Tensor, **tensors: Any) -> tuple[Tensor, ...]:
        """New values of these tensors after a call in training. Runs as one opaque op, so it may read `signal`:
        int64 on the CPU, the trainer's numbers for this call."""


def constants_of(method: FittedMethod, layout: TokenLayout) -> Mapping[str, Tensor | None]:
    """The tensors that all calls of a site read: its table, or the constants of a dynamic method; on the CPU."""
    if isinstance(method, StaticMethod):
        return method.table(layout).tensors()
    assert isinstance(method, DynamicMethod)
    return method.constants(layout)
