"""The report of a pass: sites that it matched, changed and refused; operators that it added and removed."""

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from sparsify_compiler.passes.capture import all_sites, attention_nodes
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.runtime.site import Observer, SparseSite, TableSite


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did to one graph and its bodies."""

    name: str
    """Of the pass."""
    seconds: float
    matched: int
    """Sites that the pass had to decide about."""
    changed: int
    """Sites that go on to be sparse, or that were rewritten."""
    refused: int
    """Sites that stay as they are; their plans have the reason."""
    operators: tuple[tuple[str, int], ...]
    """(operator, how many more there are than before), for each operator whose number changed."""

    def __str__(self) -> str:
        difference = ", ".join(f"{count:+d} {name}" for name, count in self.operators)
        return (
            f"{self.name}: {self.seconds:.3f} s; {self.matched} sites matched, {self.changed} changed, "
            f"{self.refused} refused; operators: {difference or 'as before'}"
        )


def report(
    gm: fx.GraphModule, name: str, seconds: float, before: Counter[str], after: Counter[str]
) -> PassReport:
    """The report of the pass `name` that left this graph.

    Args:
        before, after: `operators` of the graph before and after the pass.
    """
    changes = {op: after[op] - before[op] for op in sorted({*before, *after})}
    matched, changed = _sites(gm, name)
    return PassReport(
        name, seconds, matched, changed, matched - changed, tuple((op, n) for op, n in changes.items() if n)
    )


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How many nodes of each operator a graph and its bodies have."""
    return Counter(
        _operator(module, node)
        for module in modules(gm)
        for node in module.graph.nodes
        if node.op.startswith("call")
    )


def site_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a lowered graph and its bodies that call a site, observers among them."""
    return [
        node
        for module in modules(gm)
        for node in module.graph.nodes
        if node.op == "call_module"
        and isinstance(module.get_submodule(str(node.target)), (TableSite, SparseSite, Observer))
    ]


def _operator(module: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))


def _sites(gm: fx.GraphModule, name: str) -> tuple[int, int]:
    """(matched, changed) of a pass, from the graph after it."""
    if name == "lower":
        sites = site_nodes(gm)
        return len(sites), len(sites)
    captured = [node for module in modules(gm) for node in attention_nodes(module)]
    if name == "capture":
        return len(all_sites(gm)), len(captured)
    if name == "infer_layouts":
        return len(captured), sum(node.meta["layout"].grid is not None for node in captured)
    sparse = sum(node.meta["plan"].method != "dense" for node in captured)
    return (len(captured), sparse) if name == "plan_sites" else (sparse, sparse)
