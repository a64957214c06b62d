"""The report of a pass: sites that it matched, changed and refused; operators that it added and removed."""

from collections import Counter
from dataclasses import dataclass

from torch import fx, nn

from sparsify_compiler.passes.capture import all_sites, attention_nodes
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.runtime.site import Observer, SparseSite, TableSite


@dataclass(frozen=True, slots=True)
class PassReport:
    """The effect of one pass on one graph and its bodies."""

    name: str
    """The name of the pass."""
    seconds: float
    matched: int
    """Sites that the pass decided about."""
    changed: int
    """Sites that may still become sparse, or that the pass rewrote."""
    refused: int
    """Sites that stay as they are; their plans give the reason."""
    operators: tuple[tuple[str, int], ...]
    """(operator, change of its count), for each operator whose count changed."""

    def __str__(self) -> str:
        difference = ", ".join(f"{count:+d} {name}" for name, count in self.operators)
        return (
            f"{self.name}: {self.seconds:.3f} s; {self.matched} sites matched, {self.changed} changed, "
            f"{self.refused} refused; operators: {difference or 'as before'}"
        )


def report(
    gm: fx.GraphModule, name: str, seconds: float, before: Counter[str], after: Counter[str]
) -> PassReport:
    """The report of the pass `name`, which returned this graph.

    Args:
        before, after: `operators` of the graph before and after the pass.
    """
    changes = {op: after[op] - before[op] for op in sorted({*before, *after})}
    matched, changed = _sites(gm, name)
    return PassReport(
        name, seconds, matched, changed, matched - changed, tuple((op, n) for op, n in changes.items() if n)
    )


def operators(gm: fx.GraphModule) -> Counter[str]:
    """The number of nodes of each operator in a graph and its bodies."""
    return Counter(
        _operator(module, node)
        for module in modules(gm)
        for node in module.graph.nodes
        if node.op.startswith("call")
    )


def site_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a lowered graph and its bodies that call a site or an observer."""
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
