"""Establish what the tokens of every captured site are, by following them through the graph.

    before   attention(q, k, v, m, scale)     meta["site"]
    after    the same                         meta["site"] with its kind, meta["layout"]: TokenLayout

The graph runs on fake tensors whose dimensions carry axis labels (`axes.py`, `axis_rules.py`). At each site the
label of the query's sequence dimension says which axes its tokens run over, in which order, and what else is
in the sequence. No decision looks at a name, and none rests on sizes that happen to match.
"""

import itertools
import logging
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsify_compiler import _torch
from sparsify_compiler.errors import GridError
from sparsify_compiler.passes.axes import Atom, Cat, Label, Source, atoms, axis, length, share_axis
from sparsify_compiler.passes.axis_rules import AxisTracker
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.fx import body_of, modules, sizes_of
from sparsify_compiler.plan import SiteKind, TokenLayout

log = logging.getLogger(__name__)
Grid = tuple[int, int, int]


def infer_layouts(gm: fx.GraphModule, *, grid: Grid | None = None) -> fx.GraphModule:
    """Give every captured site its kind and layout; see the module's picture.

    Args:
        grid: (frames, height, width) from the user: it replaces what is inferred, for every self- or
            joint-attention whose sequence has a part of that many tokens.

    Raises:
        GridError: no attention of the graph has a part of as many tokens as `grid` has.
    """
    sites = [node for module in modules(gm) for node in attention_nodes(module)]
    if not sites:
        return gm
    found, inputs = _follow(gm)
    for node in sites:
        site = node.meta["site"]
        labels = found.get(node)
        if labels is None:
            node.meta["layout"] = TokenLayout(tokens=site.q_tokens, reason="its tokens could not be followed")
            continue
        query, key = labels
        kind, layout = read_layout(query, key)
        if grid is not None and query == key:
            kind, layout = place_grid(query, grid) or (kind, layout)
        node.meta["site"] = replace(site, kind=kind)
        node.meta["layout"] = layout
    if grid is not None:
        _check_grid(grid, sites)
    used = [found[node][0] for node in sites if node in found and node.meta["layout"].grid is not None]
    if used:
        gm.meta["specialise"] = partial(_specialise, gm, inputs, used)
    return gm


def read_layout(query: Label, key: Label) -> tuple[SiteKind, TokenLayout]:
    """Kind and layout of a site, from the labels of its query and key sequence."""
    tokens = length(query)
    if query != key:
        kind: SiteKind = "cross" if tokens != length(key) or _known(key) else "unknown"
        return kind, TokenLayout(tokens=tokens, reason="keys are not the tokens of the queries")
    parts = query[0].parts if len(query) == 1 and isinstance(query[0], Cat) else (query,)
    grids = [_grid_of(part) for part in parts]
    clips = [i for i, (grid, _) in enumerate(grids) if grid is not None and grid[0] > 1]
    candidates = clips or [i for i, (grid, _) in enumerate(grids) if grid is not None]
    largest = max((length(parts[i]) for i in candidates), default=0)
    candidates = [i for i in candidates if length(parts[i]) == largest]
    if len(candidates) != 1:
        reason = (
            "several video grids of one size in its sequence" if candidates else grids[_largest(parts)][1]
        )
        return "self", TokenLayout(tokens=tokens, reason=reason)
    at = candidates[0]
    if any(share_axis(parts[at], part) for i, part in enumerate(parts) if i != at):
        return "self", TokenLayout(
            tokens=tokens, reason="its video is cut into pieces that lie in another order"
        )
    return _placed(parts, at, *grids[at])


def place_grid(label: Label, grid: Grid) -> tuple[SiteKind, TokenLayout] | None:
    """Kind and layout with the user's grid in the one part of the sequence it fits, or None."""
    tokens = math.prod(grid)
    parts = label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)
    at = [i for i, part in enumerate(parts) if length(part) == tokens]
    return _placed(parts, at[0], grid, "grid given by options") if len(at) == 1 else None


def _placed(
    parts: tuple[Label, ...], at: int, grid: Grid | None, reason: str
) -> tuple[SiteKind, TokenLayout]:
    before, after = (sum(map(length, some)) for some in (parts[:at], parts[at + 1 :]))
    layout = TokenLayout(tokens=sum(map(length, parts)), grid=grid, before=before, after=after, reason=reason)
    return ("joint" if before or after else "self"), layout


def _largest(parts: tuple[Label, ...]) -> int:
    return max(range(len(parts)), key=lambda i: length(parts[i]))


def _known(label: Label) -> bool:
    """Whether a label comes from the graph's inputs rather than from an operator we do not know."""
    return all(
        isinstance(factor, Cat) or factor.source.kind in ("input", "conv", "position") for factor in label
    )


def _grid_of(part: Label) -> tuple[Grid | None, str]:
    """((frames, height, width), how it is known) of a part of a sequence, or (None, why not)."""
    unknown = "no video grid reaches its tokens; give options={'grid': (frames, height, width)}"
    if any(isinstance(factor, Cat) for factor in part):
        return None, "its tokens are laid out in runs of different kinds"
    axes = [factor for factor in part if isinstance(factor, Atom)]
    sources = {atom.source for atom in axes}
    if any(atom.inner for atom in axes) and any(atom.source.kind == "conv" for atom in axes):
        return None, "attends within windows of the grid"
    if len(sources) == 1 and axes[0].source.kind == "conv" and len(axes[0].source.sizes) == 3:
        return _grid_of_conv3d(axes)
    if len(axes) == 2 and len(sources) == 1 and axes[0].source.kind == "conv":
        return None, "attends within one frame"
    if len(axes) == 3:
        images = [atom.source.images for atom in axes if atom.source.kind == "conv"]
        if len(images) == 2 and axes[0].source.kind != "conv":
            return _grid_of_images(axes)
        if not images and not any(
            atom.inner or atom.source.kind in ("opaque", "lost", "blank") for atom in axes
        ):
            return _grid_of_axes(axes)
    if sources and any(atom.source.kind == "conv" for atom in axes):
        return None, "its tokens run over part of the video grid, or over it in another order"
    return None, unknown


def _grid_of_conv3d(axes: list[Atom]) -> tuple[Grid | None, str]:
    source = axes[0].source
    missing = {0, 1, 2} - {atom.dim for atom in axes}
    dims = [atom.dim for atom in axes]
    if any(source.sizes[dim] > 1 for dim in missing):
        return None, "attends within one frame" if 0 in missing else "attends along time, not over the frame"
    if dims != sorted(set(dims)):
        return None, "its tokens do not lie in (frame, row, column) order"
    sizes = {atom.dim: atom.size for atom in axes}
    return (sizes.get(0, 1), sizes.get(1, 1), sizes.get(2, 1)), "patches by a 3-D convolution"


def _grid_of_images(axes: list[Atom]) -> tuple[Grid | None, str]:
    """Frames from the batch of a 2-D convolution, rows and columns from the convolution itself."""
    frames, rows, columns = axes
    batch = [(a.source, a.dim) for a in rows.source.images if isinstance(a, Atom)]
    same = rows.source is columns.source and (rows.dim, columns.dim) == (0, 1)
    if not same or (frames.source, frames.dim) not in batch:
        return None, "its tokens do not lie in (frame, row, column) order"
    return (frames.size, rows.size, columns.size), "patches by a 2-D convolution over frames"


def _grid_of_axes(axes: list[Atom]) -> tuple[Grid | None, str]:
    """Three axes of inputs, in their own order, or of position tables laid out as a mesh, or some of each."""
    cut_out = [(atom.source, atom.dim) for atom in axes if atom.source.kind == "input"]
    for (a, i), (b, j) in itertools.combinations(cut_out, 2):
        if a is b and i >= j:
            return None, "its tokens do not lie in (frame, row, column) order"
    reason = (
        "patches cut out of a graph input" if len(cut_out) == 3 else "a mesh of positions added to the tokens"
    )
    return (axes[0].size, axes[1].size, axes[2].size), reason


def _check_grid(grid: Grid, sites: list[fx.Node]) -> None:
    same = [node.meta for node in sites if node.meta["site"].kind in ("self", "joint")]
    if same and all(meta["layout"].grid != grid for meta in same):
        tokens = ", ".join(str(n) for n in sorted({meta["site"].q_tokens for meta in same}))
        inferred = sorted({meta["layout"].grid for meta in same if meta["layout"].grid})
        hint = f" From the graph: {inferred[0]}." if len(inferred) == 1 else ""
        raise GridError(
            f"grid must multiply to the video tokens of the model: got {grid} = {math.prod(grid)} tokens, but "
            f"its self-attention runs over {tokens} tokens.{hint}"
        )


def _specialise(gm: fx.GraphModule, inputs: dict[fx.Node, Source], used: list[Label]) -> None:
    """Fix the sizes that the layouts rest on, so that Dynamo guards on them: no two grids share a program.

    These are all but the batch of inputs with four dimensions or more (videos, masks), of others the axes that
    are found among the tokens, and where positions tell the grid every number that is an input. A batch, or the
    length of a prompt elsewhere in the model, stays free.
    """
    by_positions = any(atom.source.kind == "position" for label in used for atom in atoms(label))
    axes = {pair for label in used for atom in atoms(label) for pair in ((atom.source, atom.dim), atom.owner)}
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            if by_positions:
                int(value)
        elif node in inputs:
            for dim, size in enumerate(value.shape):
                if (len(value.shape) >= 4 and dim > 0) or (inputs[node], dim) in axes:
                    int(size)


def _follow(gm: fx.GraphModule) -> tuple[dict[fx.Node, tuple[Label, Label]], dict[fx.Node, Source]]:
    """(labels of the query's and key's sequence at every captured site the graph reaches, sources of inputs)."""
    found: dict[fx.Node, tuple[Label, Label]] = {}
    grad_enabled = torch.is_grad_enabled()
    tracker = AxisTracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker, torch.no_grad():
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        values = [_static(node.meta.get("example_value")) for node in placeholders]
        sources: dict[fx.Node, Source] = {}
        for node, value in zip(placeholders, values, strict=True):
            if isinstance(value, Tensor):
                sources[node] = Source("input", tuple(value.shape))
                tracker.put(value, [axis(sources[node], dim) for dim in range(value.dim())])
        _Follower(gm, tracker, found).run(*values)
    torch.set_grad_enabled(grad_enabled)
    return found, sources


def _static(value: Any) -> Any:
    """A value Dynamo recorded, on sizes that are plain integers; `_UNKNOWN` where that can't be had."""
    if isinstance(value, torch.SymInt):
        size = _torch.hint(value)
        return _UNKNOWN if size is None else size
    if isinstance(value, (tuple, list)):
        return type(value)(_static(item) for item in value)
    if not isinstance(value, Tensor):
        return value
    sizes = sizes_of(value)
    return _UNKNOWN if sizes is None else torch.empty(sizes, dtype=value.dtype, device=value.device)


class _Unknown:
    """The value of a node that could not be followed."""


_UNKNOWN = _Unknown()


class _Follower(fx.Interpreter):
    """Runs a graph under an `AxisTracker`, into the bodies of higher-order operators; never raises."""

    def __init__(
        self, gm: fx.GraphModule, tracker: AxisTracker, found: dict[fx.Node, tuple[Label, Label]]
    ) -> None:
        super().__init__(gm)
        self.tracker, self.found = tracker, found

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(leaf is _UNKNOWN for leaf in leaves):
            return self._recorded(n)
        if n.target is attention:
            return self._site(n, *args)
        try:
            if isinstance(self.module, fx.GraphModule) and (body := body_of(self.module, n)):
                operands = args[len(args) - body.arity :]
                return _Follower(body.module, self.tracker, self.found).run(*operands)
            return getattr(self, n.op)(n.target, args, kwargs)
        except Exception as error:  # any operator may refuse fake tensors: then its output is just not known
            log.debug("not followed: %s: %s", n.format_node(), error)
            return self._recorded(n)

    def _recorded(self, n: fx.Node) -> Any:
        """What Dynamo recorded for a node, with nothing known about its axes."""
        return _static(n.meta["example_value"]) if "example_value" in n.meta else _UNKNOWN

    def _site(self, n: fx.Node, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        q, k, v = (self.tracker.of(t) for t in (query, key, value))
        self.found[n] = (q[2], k[2])
        out = query.new_empty(*query.shape[:3], value.shape[3])
        self.tracker.put(out, [*q[:3], v[3]])
        return out
