"""Predict a model on every mesh of a cluster: times, bytes, memory and balance, as objects and as a table."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsify_compiler.clusters.counting import Counted, count
from sparsify_compiler.config import share
from sparsify_compiler.errors import OptionError
from sparsify_compiler.passes.sharding import Sharding, folded
from sparsify_compiler.runtime.cost import BOUNDS, Cluster, Mesh, Prediction, Work, choose_form, predict

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMS = ("hcp", "scp", "hybrid")
"""Forms that are predicted, whether they can run or not."""
_HEADINGS = (
    "ranks", "form", "mesh", "seconds", "times\nfaster", "sent\nGB", "memory\nGB", "max/\nmean", "bound by",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterPlan:
    """The predictions for a model on a cluster. Nothing in it was measured."""

    work: Work
    cluster: Cluster
    alone: Prediction
    """One process."""
    predictions: Mapping[int, tuple[Prediction, ...]]
    """Number of ranks -> the best mesh of each form, the best form first."""
    sharings: tuple[Sharding, ...]
    """The way in which 2 ranks share each graph; of blocks that are alike, two are traced."""

    @property
    def density(self) -> float:
        """The share of the pairs of shared attention that is computed."""
        attentions = self.work.attentions
        dense = sum(one.heads * one.dense_flops for one in attentions)
        return sum(sum(one.flops) for one in attentions) / dense if dense else 1.0

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=110, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """A row for each number of ranks and form."""
        from rich import box
        from rich.table import Table

        work, table = self.work, Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in _HEADINGS:
            table.add_column(heading, no_wrap=True, justify="left" if heading == "bound by" else "right")
        for size, found in self.predictions.items():
            for place, one in enumerate(found):
                table.add_row(
                    "" if place else str(size),
                    one.mesh.form,
                    str(one.mesh),
                    f"{one.seconds:.4f}",
                    f"{self.alone.seconds / one.seconds:.2f}",
                    f"{one.sent / 1e9:.3g}",
                    f"{one.memory / 1e9:.3g}" + ("" if one.fits else "!"),
                    f"{one.balance:.2f}",
                    BOUNDS[one.bound],
                )
        remote = max((one.remote for one in work.attentions), default=1.0)
        yield (
            f"One call in one process: {work.total / 1e12:.4g} TFLOP, {work.weights / 1e9:.3g} GB of weights. "
            f"Ranks can share {work.tokens} tokens and the heads of {len(work.attentions)} attention calls, which "
            f"compute {self.density:.3g} of their query-key pairs."
        )
        yield table
        yield (
            "Predicted, not measured; the best form comes first. Seconds are those of one call, in which exchanges "
            "wait for products. A rank sends at most so much. max/mean is the largest load of attention, relative "
            "to the mean, where heads are shared evenly. Where ranks share the sequence, they fetch "
            f"{remote:.3g} of the remote keys."
        )
        if not all(one.fits for found in self.predictions.values() for one in found):
            yield f"!: more than the {self.cluster.memory / 1e9:.3g} GB of a GPU."
        for number, sharing in enumerate(self.sharings):
            if sharing.reason:
                yield f"Graph {number}: every rank runs the whole graph: {sharing.reason}."
            for where in folded(sharing.gathered):
                yield f"Graph {number} gathers all tokens for {where}."


def plan_parallel(
    model: nn.Module,
    inputs: Mapping[str, Any],
    cluster: Cluster,
    *,
    sizes: Sequence[int] | None = None,
    densities: Mapping[str, Sequence[float]] | float = 1.0,
    remote: float = 1.0,
) -> ClusterPlan:
    """Predict a call of a model on the meshes of a cluster.

    Args:
        model: on the meta device, in eval mode.
        inputs: the keyword arguments of the call, with tensors on the meta device.
        sizes: numbers of ranks; None takes the powers of two up to all GPUs, and all of them.
        densities: share of the query-key pairs that attention computes: one number, or name of an attention -> one
            for each head, or one for all. Attention that is not named is dense.
        remote: share of the remote keys that a group's tokens read, where the sequence is shared.

    Raises:
        OptionError: a number is wrong, or a name is no attention whose heads ranks share.
    """
    sizes = _sizes(sizes, cluster)
    if share(remote) is None:
        raise OptionError(f"remote must be a share in [0, 1], got {remote!r}")
    if not isinstance(densities, Mapping) and share(densities) is None:
        raise OptionError(f"density must be a share in [0, 1], got {densities!r}")
    counted = count(model, inputs)
    work = with_densities(counted, densities, remote)
    predictions = {
        size: choose_form(work, cluster, size, FORMS).predictions
        if size > 1
        else (predict(work, Mesh(1, 1), cluster),)
        for size in sizes
    }
    return ClusterPlan(
        work=work,
        cluster=cluster,
        alone=predict(work, Mesh(1, 1), cluster),
        predictions=predictions,
        sharings=counted.sharings,
    )


def with_densities(
    counted: Counted, densities: Mapping[str, Sequence[float]] | float, remote: float = 1.0
) -> Work:
    """The work of a model at these densities; arguments as in `plan_parallel`.

    Raises:
        OptionError: a name is no attention whose heads ranks share, or its heads are not as many.
    """
    of_names: Mapping[str, Sequence[float]]
    if isinstance(densities, Mapping):
        of_names = densities
        unknown = [name for name in densities if name not in counted.names]
        if unknown:
            known = ", ".join(counted.names[:3]) or "no attention"
            raise OptionError(
                f"densities must be for attentions whose heads ranks share, got {unknown[0]!r}: this model has "
                f"{len(counted.names)} of them ({known}, ...)"
            )
    else:
        of_names = dict.fromkeys(counted.names, (densities,))
    attentions = []
    for name, one in zip(counted.names, counted.work.attentions, strict=True):
        given = tuple(of_names.get(name, (1.0,)))
        if len(given) not in (1, one.heads):
            raise OptionError(
                f"{name!r} must have a density for each of its {one.heads} heads, or one for all, got {len(given)}"
            )
        of_heads = given if len(given) == one.heads else given * one.heads
        attentions.append(replace(one, densities=of_heads, remote=remote))
    return replace(counted.work, attentions=tuple(attentions))


def _sizes(sizes: Sequence[int] | None, cluster: Cluster) -> Sequence[int]:
    if sizes is None:
        powers = [1 << power for power in range(cluster.size.bit_length())]
        return sorted({*powers, cluster.size})
    for size in sizes:
        if not 1 <= size <= cluster.size:
            raise OptionError(f"ranks must be from 1 to the cluster's {cluster.size} GPUs, got {size}")
    return sorted({*sizes})
