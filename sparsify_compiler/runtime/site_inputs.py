"""The tensors that a site gets after query, key, value and bias. Only this file knows their order.

| slot          | holds                                              | in a lowered graph               |
| ------------- | -------------------------------------------------- | -------------------------------- |
| `owners`      | the owners of heads, where ranks share them        | on the CPU; an input if heads move |
| `order`       | the order of ops, where ranks share queries        | the result of an op, on the CPU  |
| `constants`   | the table of a method, or other inputs of `select` | a constant, shared by sites      |
| `trained`     | tensors that a trainer writes and `select` reads   | an input                         |
| `observed`    | tensors that `learn` writes, `signal` last         | an input                         |
| `initialised` | whether `state` holds anything yet, 0-d bool       | one input for all sites, on the CPU |
| `state`       | tensors kept from call to call, fp32               | an input that the site writes to |
| `report`      | the site's report on a call, see `REPORT`          | an input that the site writes to |

Graphs that CUDA graphs replay are made for one value of `initialised` each (`warm`), and have no such input.

A lowered graph gets its own inputs first, then `owners` of sites whose heads move, then `trained` and `observed` of
all sites, then `initialised`, then `state` and `report`, site by site. `SiteInputs` names the slots of one site,
`GraphInputs` describes the extra inputs of one graph, and `InputBuilder` adds them to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, fx

from sparsify_compiler import _torch
from sparsify_compiler.kernels.far_field import error_target
from sparsify_compiler.methods import DynamicMethod, LearningMethod
from sparsify_compiler.methods.base import max_error_of
from sparsify_compiler.methods.selection import State
from sparsify_compiler.parallel.shares import Owners, even_owners
from sparsify_compiler.plan import AttentionPlan, SharedHeads
from sparsify_compiler.runtime.state import Spec, Trained, blank

REPORT = ("density", "kept", "recall", "far_field", "estimated_error", "measured_error")
"""The report of a dynamic site on each call, for every batch and head: share of the token pairs computed; mean
attention mass that the method estimates to be kept; mean mass truly kept on sampled rows, NaN without sampled rows;
whether the far field is on, 1 or 0; with `max_error` the relative error of the site's output, by the estimate that
chose the blocks and on sampled rows, else NaN."""

TARGET = "errors"
"""The name of the last tensor of a state that has one: `ErrorTarget.state`."""

_INITIALISED, _BLANK = (torch.tensor(flag, dtype=torch.bool, device="cpu") for flag in (True, False))


class Bound(NamedTuple):
    """The tensors of one call of a site, by slot."""

    owners: Tensor | None
    order: Tensor | None
    read: dict[str, Tensor | None]
    """Constants and trained tensors, by the names that the method gives them."""
    observed: dict[str, Tensor | None]
    initialised: Tensor | None
    state: tuple[Tensor, ...]
    report: Tensor | None


@dataclass(frozen=True, slots=True)
class SiteInputs:
    """The names of a site's tensors, slot by slot."""

    owners: bool = False
    order: bool = False
    constants: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    observed: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    remembers: bool = False
    """Whether the site gets `initialised`, `state` and `report`; otherwise every call starts without state."""
    warm: bool | None = None
    """The value of `initialised` where a graph is for one of the two; then the site gets None in its place."""

    def bind(self, tensors: Sequence[Tensor | None]) -> Bound:
        """Sort the tensors of a call, given in order, by slot."""
        read, rest = self._read(tensors)
        observed = dict(zip(self.observed, rest, strict=False))
        if not self.remembers:
            return Bound(*self._of_ranks(tensors), read, observed, None, (), None)
        initialised, *state, report = rest[len(observed) :]
        kept = tuple(t for t in state if t is not None)
        return Bound(*self._of_ranks(tensors), read, observed, initialised, kept, report)

    def to_select(self, bound: Bound) -> list[Tensor | None]:
        """The tensors for an op that selects or observes: all except `observed` and `report`."""
        state = [bound.initialised, *bound.state] if self.remembers else []
        given = [bound.owners] * self.owners + [bound.order] * self.order
        return [*given, *bound.read.values(), *state]

    def to_learn(self, bound: Bound) -> list[Tensor | None]:
        """The tensors for an op that learns."""
        return [*([bound.owners] if self.owners else []), *bound.read.values(), *bound.observed.values()]

    def owners_in(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """The rank of each head, from the tensors of a call or from the list that `to_select` returned."""
        return self._of_ranks(tensors)[0]

    def _of_ranks(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """(owners, order)."""
        return tensors[0] if self.owners else None, tensors[self.owners] if self.order else None

    def of_heads(self, tensors: Sequence[Tensor | None], heads: int) -> list[Tensor | None]:
        """The list that `to_select` returned, with the state of the first slots only."""
        state = tensors[len(tensors) - len(self.state) :]
        kept = [None if one is None else one[:, :heads] for one in state]
        return [*tensors[: len(tensors) - len(self.state)], *kept]

    def selecting(
        self, tensors: Sequence[Tensor | None], plan: AttentionPlan, batch: int, device: torch.device
    ) -> tuple[dict[str, Tensor | None], State]:
        """The tensors that the method reads, by name, and its state, from the list that `to_select` returned."""
        read, rest = self._read(tensors)
        initialised, *state = rest or [None]
        if initialised is None and self.warm is not None:
            initialised = torch.full((), self.warm, dtype=torch.bool, device="cpu")  # fake under a fake mode
        if initialised is None:
            here = replace(plan, site=replace(plan.site, batch=batch))
            specs = [(name, shape, device) for name, shape in state_shapes(here).items()]
            return read, State(torch.zeros((), dtype=torch.bool, device="cpu"), tuple(blank(specs)))
        return read, State(initialised, tuple(t for t in state if t is not None))

    def _read(
        self, tensors: Sequence[Tensor | None]
    ) -> tuple[dict[str, Tensor | None], Sequence[Tensor | None]]:
        """(constants and trained tensors by name, the tensors after them)."""
        names, tensors = (*self.constants, *self.trained), tensors[self.owners + self.order :]
        return dict(zip(names, tensors, strict=False)), tensors[len(names) :]


def tensor_of(owners: Owners) -> Tensor:
    """Owners of heads as the tensor that a graph gets."""
    return torch.tensor(owners, dtype=torch.int64, device="cpu")


def state_shapes(plan: AttentionPlan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that a site keeps from call to call: of its method, then of its target."""
    method = plan.settings
    if not isinstance(method, DynamicMethod):
        return {}
    of_target = (
        {}
        if max_error_of(method) is None
        else {TARGET: (plan.site.batch, plan.site.heads, error_target.STATE)}
    )
    return {**method.state(plan.site, plan.layout), **of_target}


def trained_tensors(
    plan: AttentionPlan, device: torch.device, *, trains: bool
) -> tuple[dict[str, Trained], dict[str, Trained]]:
    """(tensors that the method reads, tensors that it observes), by name; empty for a method without training.

    Where ranks share the heads of a site, every rank has these tensors of all heads.

    Args:
        trains: whether this graph runs in training. Only there a method observes.
    """
    method, site = plan.settings, plan.whole_site
    if not isinstance(method, LearningMethod):
        return {}, {}
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("cpu"):
        read = method.trained(site, plan.layout)
        written = method.observed(site) if trains and method.learns else {}
        signal = torch.zeros(3, dtype=torch.int64)

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Trained]:
        return {name: Trained(f"{site.name}.{name}", tensor, device) for name, tensor in tensors.items()}

    if not written:
        return named(read), {}
    return named(read), {**named(written), "signal": Trained("signal", signal, torch.device("cpu"))}


@dataclass(frozen=True, kw_only=True, slots=True)
class MovingSite:
    """A site whose heads move between ranks."""

    name: str
    sharing: SharedHeads
    state: tuple[int, ...]
    """Places in `GraphInputs.state` of the tensors that a head takes along, [B, slots, ...]."""
    report: int
    """The place of its report there, which has all heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphInputs:
    """The extra inputs of a lowered graph."""

    moving: tuple[MovingSite, ...] = ()
    """The sites that get `owners` as an input."""
    trained: tuple[Trained, ...] = ()
    """`trained` and `observed` of all sites, each tensor once."""
    initialised: bool = False
    """Whether the graph has this input."""
    keeps: bool = False
    """Whether a site has a state."""
    state: tuple[Spec, ...] = ()
    """`state` and `report` of all sites."""
    reports: Mapping[str, int] = field(default_factory=dict)
    """Site -> place of its report in `state`."""

    def __len__(self) -> int:
        """The number of these inputs."""
        return len(self.moving) + len(self.trained) + self.initialised + len(self.state)

    def bind(
        self,
        trained: Sequence[Tensor],
        state: Sequence[Tensor],
        *,
        initialised: bool,
        owners: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The extra inputs of a call, in order. `owners`: those of the moving sites; None: evenly many heads."""
        flag = [_INITIALISED if initialised else _BLANK] if self.initialised else []
        if owners is None:
            shared = [one.sharing for one in self.moving]
            owners = [tensor_of(even_owners(one.heads, one.ranks.size)) for one in shared]
        return [*owners, *trained, *flag, *state]

    def blank(self) -> list[Tensor]:
        """The extra inputs of a first call: trained tensors with their initial values, and a blank state."""
        trained = [one.initial.to(one.device) for one in self.trained]
        return self.bind(trained, blank(self.state), initialised=False)

    def later(self, first: Sequence[Tensor]) -> list[Tensor]:
        """The extra inputs of a call that continues after the call with the inputs `first`."""
        owners, rest = first[: len(self.moving)], first[len(self.moving) :]
        trained, state = rest[: len(self.trained)], rest[len(rest) - len(self.state) :]
        return self.bind(trained, state, initialised=True, owners=owners)

    def reports_in(self, state: Sequence[Tensor]) -> dict[str, Tensor]:
        """Site -> its report, [len(REPORT), B, H], from the state tensors of a call."""
        return {site: state[place] for site, place in self.reports.items()}


class InputBuilder:
    """Adds the extra inputs of sites to a graph."""

    def __init__(self, graph: fx.Graph, *, warm: bool | None = None) -> None:
        """`warm`: the value of `initialised`, if the graph is for one; then it is no input."""
        self._graph, self._warm = graph, warm
        self._initialised: fx.Node | None = None
        self._keeps = False
        self._state: list[fx.Node] = []
        self._specs: list[Spec] = []
        self._reports: dict[str, int] = {}
        self._trained: list[Trained] = []
        self._moving: list[MovingSite] = []

    def owners(self, plan: AttentionPlan) -> fx.Node:
        """Add an input for the owners of the heads of a site, before all other inputs of sites."""
        assert plan.sharing is not None, "only shared heads move"
        shared = MovingSite(name=plan.site.name, sharing=plan.sharing, state=(), report=0)
        self._moving.append(shared)
        return add_placeholder(self._graph, f"sparsify_owners_of{plan.site.index}")

    def trained(self, name: str, source: Trained) -> fx.Node:
        """Add an input for a tensor that a trainer writes."""
        self._trained.append(source)
        after = [self._initialised] if self._initialised is not None else self._state
        node = add_placeholder(self._graph, name, before=after[0] if after else None)
        _torch.mark_static(node)
        return node

    def kept(self, plan: AttentionPlan, device: torch.device) -> list[fx.Node | None]:
        """Add `initialised`, `state` and `report` of a site; the first is None where a site has no state."""
        site, shapes = plan.site, state_shapes(plan)
        self._keeps |= bool(shapes)
        if shapes and self._initialised is None and self._warm is None:
            first = self._state[0] if self._state else None
            self._initialised = add_placeholder(self._graph, "sparsify_initialised", before=first)
        places = tuple(range(len(self._specs), len(self._specs) + len(shapes)))
        self._reports[site.name] = len(self._specs) + len(shapes)
        self._moving = [
            replace(one, state=places, report=self._reports[site.name]) if one.name == site.name else one
            for one in self._moving
        ]
        tensors = {**shapes, "report": (len(REPORT), site.batch, plan.whole_site.heads)}
        for name, shape in tensors.items():
            self._specs.append((f"{site.name}.{name}", shape, device))
            self._state.append(add_placeholder(self._graph, f"sparsify_{name}{site.index}"))
            _torch.mark_static(self._state[-1])
        return [self._initialised if shapes else None, *self._state[-len(tensors) :]]

    def built(self) -> GraphInputs:
        """The inputs that were added."""
        return GraphInputs(
            moving=tuple(self._moving),
            trained=tuple(self._trained),
            initialised=self._initialised is not None,
            keeps=self._keeps,
            state=tuple(self._specs),
            reports=self._reports,
        )


def add_placeholder(graph: fx.Graph, name: str, *, before: fx.Node | None = None) -> fx.Node:
    """Add an input to a graph: after all others, or directly before a given one."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if before is not None:
        place = graph.inserting_before(before)
    else:
        place = graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before()
    with place:
        node = graph.placeholder(name)
    node._dynamo_source = None
    return node
