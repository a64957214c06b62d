"""Find the layout of the tokens of every captured site, by following them through the graph.

    before   attention(q, k, v, m, scale)     meta["site"]
    after    the same                         meta["site"] with its kind, meta["layout"]: TokenLayout

`following.py` runs the graph on fake tensors whose dimensions carry labels (`axes.py`). At each site the label of
the query's sequence dimension shows the axes of its tokens, their order, and the other tokens of the sequence. No
decision uses a name, and none rests on sizes that happen to match.

Three axes of a sequence are the time, rows and columns of one video if

1. *whole*: each runs over all its positions: it is no window, and nothing is cut off after patches are made;
2. *one input*: all three come from one input of the graph, directly or through convolutions; or a mesh of positions
   divides one axis of an input among them;
3. *order*: they lie in the order in which that input has them;
4. *not the batch*: none is the first dimension of that input, and no weights sum over that dimension;
5. *channels*: weights are multiplied into every other dimension of the input except the first, at every position of
   these three, so none of the three holds channels;

and queries and keys are the same tokens if

6. *same axes*: their sequences run over the same axes in the same order;
7. *same videos*: their batches run over the same videos, and no sequence has tokens of two videos of the batch.

`_not_one_video` checks the first five, `_not_the_same` and `_of_several_videos` the others. Only their order
distinguishes time, rows and columns, since a graph shows nothing else. A graph does not show the history
of tokens before a graph break: a mesh of positions added after the break is believed.
"""

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.errors import GridError
from sparsify_compiler.passes.axes import (
    Atom,
    Axis,
    Cat,
    Label,
    Source,
    atoms,
    fresh,
    is_blank,
    joined,
    length,
)
from sparsify_compiler.passes.axis_tracker import AxisTracker, Embedding
from sparsify_compiler.passes.axis_writes import Known
from sparsify_compiler.passes.capture import attention_nodes
from sparsify_compiler.passes.following import Site, follow
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.passes.meeting import share_axis
from sparsify_compiler.plan import AttentionSite, SiteKind, TokenLayout
from sparsify_compiler.runtime.positions import COORDINATES, may_be_positions

log = logging.getLogger("sparsify_compiler")
Grid = tuple[int, int, int]
Text = tuple[int, int]
Read = tuple[SiteKind, TokenLayout]
_ORDER = "its tokens do not lie in (frame, row, column) order"
_PART = "its tokens run over part of the video grid, or over it in another order"
_BATCH = "its tokens run over the first dimension of an input, which is a batch of videos"
_NO_CHANNELS = (
    "the axes of its tokens may be channels: no weights are multiplied into the other axes of their input"
)
_TEXT_HINT = " Where other tokens come before or after the video, give options={'text': (before, after)}."
_NO_GRID = "no video grid reaches its tokens; give options={'grid': (frames, height, width)}"
_NO_MESH = (
    "the positions of its tokens are no grid in the order of frame, row and column; "
    "give options={'grid': (frames, height, width)}"
)
_MOVED = (
    "an operator moved its tokens, or made them in a way that labels cannot follow; only if they still lie in "
    "(frame, row, column) order, give options={'grid': (frames, height, width)}"
)


def _unseen(site: AttentionSite) -> Site:
    """A site whose tokens could not be followed."""
    query, key = ([(), (), fresh(tokens), ()] for tokens in (site.q_tokens, site.kv_tokens))
    return Site(Known(query), Known(key))


def infer_layouts(
    gm: fx.GraphModule,
    *,
    grid: Grid | None = None,
    text: Text | None = None,
    part: bool = False,
    within: tuple[AxisTracker, Sequence[Any]] | None = None,
    ends: bool = False,
) -> fx.GraphModule:
    """Give every captured site its kind and layout; see the module's picture.

    Args:
        grid: (frames, height, width) from the user. It replaces the inferred grid of every attention whose queries
            and keys are that many tokens, or have a part of that many, unless the graph shows that they are not
            the same tokens in that order.
        text: (before, after), only with `grid`: numbers of other tokens that a sequence may have before and after
            the video.
        part: whether the graph may be a part of a model, which need not have the grid.
        within: the tracker of a call of a whole model, and the tensors that the graph gets there.
        ends: whether `meta["ends"]` is needed, the `Ends` of the graph, where it has no attention either.

    Raises:
        GridError: no attention of the graph can have the grid.
    """
    nodes = [node for module in modules(gm) for node in attention_nodes(module)]
    if not nodes and within is None and not ends:
        return gm
    small: list[tuple[fx.Node, int, list[Label]]] = []

    def see(node: fx.Node, tracker: AxisTracker, value: Any) -> None:
        if isinstance(value, Tensor) and node.op != "output":
            dims = [dim for dim in range(value.dim()) if may_be_positions(value.shape, value.dtype, dim)]
            small.extend((node, dim, tracker.of(value)) for dim in dims)

    tracker = AxisTracker()
    followed = follow(gm, within, tracker=tracker, see=lambda node, value: see(node, tracker, value))
    gm.meta["ends"] = followed.ends
    found: dict[fx.Node, int] = {}
    for node in nodes:
        site = node.meta["site"]
        seen = followed.sites.get(node) or _unseen(site)
        given = None if grid is None else place_grid(seen, followed.embeddings, grid, text)
        inferred = read_layout(seen, followed.embeddings)
        kind, layout = given or inferred
        if given is not None and inferred[1].grid not in (None, grid):
            _say_replaced(grid, inferred[1].grid)
        rows = tuple((piece.size, piece.differs) for piece in seen.rows) if site.mask == "query" else ()
        positions = (
            _positions(seen, small, followed.embeddings) if layout.grid is None and kind == "self" else {}
        )
        read = any(dim in one.meta.get("meshes", {}) for one, dim in positions.items())
        if read and layout.reason in (_NO_GRID, _MOVED):
            layout = replace(layout, reason=_NO_MESH)
        node.meta["site"] = replace(site, kind=kind, rows=rows)
        node.meta["layout"] = layout
        found |= positions
    if grid is not None and not part:
        check_grid(grid, text, [(node.meta["site"], node.meta["layout"]) for node in nodes])
    is_known = any(node.meta["layout"].grid for node in nodes)  # then other tokens are no video
    gm.meta["positions"] = () if is_known else tuple((node.name, dim) for node, dim in found.items())
    sparse = [followed.sites[node] for node in nodes if node.meta["layout"].grid and node in followed.sites]
    if sparse:
        used = [known.labels[2] for site in sparse for known in (site.query, site.key)]
        gm.meta["specialise"] = partial(_specialise, gm, followed.inputs, used)
    return gm


def _positions(
    site: Site, small: Sequence[tuple[fx.Node, int, Sequence[Label]]], embeddings: Iterable[Embedding]
) -> dict[fx.Node, int]:
    """Tensors that may be positions of the tokens of a site -> the dimension of the tokens in them.

    They meet the tokens element by element. Tensors that the graph computes of such ones do not count, nor do
    tensors into which weights are multiplied, such as latents, unless they have three numbers for each token.

    Args:
        small: (tensor, dimension, labels) for all tensors with few numbers along a dimension.
    """
    summed = {run.axis for embedding in embeddings for run in embedding.summed}
    videos, tokens = _claimed(site.query.labels[0]), _claimed(site.query.labels[2])
    found = {
        node: dim
        for node, dim, labels in small
        if len(label := labels[dim]) == 1 and isinstance(run := label[0], Atom) and run.whole
        if any(claim.axis in tokens for claim in run.claims)
        if all(length(one) == 3 or not _claimed(one) & summed for one in labels)
        if math.prod(length(one) for one in labels if one != label and not _claimed(one) & videos)
        in COORDINATES
    }
    later: set[fx.Node] = set()
    for node in next(iter(found)).graph.nodes if found else ():
        if any(one in found or one in later for one in node.all_input_nodes):
            later.add(node)
    return {node: dim for node, dim in found.items() if node not in later}


def _claimed(label: Label) -> set[Axis]:
    """All axes that a label claims."""
    return {claim.axis for run in atoms(label) for claim in run.claims}


@functools.cache
def _say_replaced(grid: Grid | None, inferred: Grid | None) -> None:
    log.warning("sparsify uses the given grid %s in place of %s, which the graph shows", grid, inferred)


def read_layout(site: Site, embeddings: Iterable[Embedding]) -> Read:
    """Kind and layout of a site, from its labels."""
    query, key = site.query.labels[2], site.key.labels[2]
    tokens = length(query)
    if why := _not_the_same(site):
        kind: SiteKind = (
            "cross" if tokens != length(key) or query == key or _known(key, embeddings) else "unknown"
        )
        return kind, TokenLayout(tokens=tokens, reason=why)
    if _of_several_videos(site.query):
        return "self", TokenLayout(tokens=tokens, reason="its tokens belong to several videos of the batch")
    parts = _parts(query)
    grids = [_grid_of(part, embeddings) for part in parts]
    clips = [i for i, (grid, _) in enumerate(grids) if grid is not None and grid[0] > 1]
    candidates = clips or [i for i, (grid, _) in enumerate(grids) if grid is not None]
    largest = max((length(parts[i]) for i in candidates), default=0)
    candidates = [i for i in candidates if length(parts[i]) == largest]
    if len(candidates) != 1:
        reason = (
            "its sequence has several video grids of one size" if candidates else grids[_largest(parts)][1]
        )
        return "self", TokenLayout(tokens=tokens, reason=reason)
    at = candidates[0]
    if any(share_axis(parts[at], part) for i, part in enumerate(parts) if i != at):
        return "self", TokenLayout(
            tokens=tokens, reason="its video is cut into pieces that lie in another order"
        )
    before, after = (sum(map(length, some)) for some in (parts[:at], parts[at + 1 :]))
    return _placed(tokens, before, after, *grids[at])


def place_grid(site: Site, embeddings: Iterable[Embedding], grid: Grid, text: Text | None) -> Read | None:
    """Kind and layout with the user's grid; None if it does not fit, or if the graph shows that it is wrong."""
    query, key = site.query.labels[2], site.key.labels[2]
    tokens, video = length(query), math.prod(grid)
    places = []
    if tokens == video:
        places = [(0, 0)]
    elif text is not None and tokens == text[0] + video + text[1]:
        places = [text]
    elif text is None and query == key:
        parts = _parts(query)
        ends = [0, *itertools.accumulate(map(length, parts))]
        places = [(a, tokens - b) for a, b in itertools.pairwise(ends) if b - a == video]
    if len(places) != 1 or tokens != length(key) or _contradicted(site, embeddings, *places[0]):
        return None
    return _placed(tokens, *places[0], grid, "grid given by options")


def _placed(tokens: int, before: int, after: int, grid: Grid | None, reason: str) -> Read:
    layout = TokenLayout(tokens=tokens, grid=grid, before=before, after=after, reason=reason)
    return ("joint" if before or after else "self"), layout


def _parts(label: Label) -> tuple[Label, ...]:
    """The parts of a sequence."""
    return label[0].parts if len(label) == 1 and isinstance(label[0], Cat) else (label,)


def _largest(parts: Sequence[Label]) -> int:
    return max(range(len(parts)), key=lambda i: length(parts[i]))


# Queries and keys


def _not_the_same(site: Site) -> str:
    """The reason why keys are not the tokens of the queries, or ""; conditions 6 and 7 of the module."""
    query, key = site.query, site.key
    if query.labels[2] != key.labels[2]:
        return "keys are not the tokens of the queries"
    if not _same_videos(query, key):
        return "keys belong to other videos of the batch than the queries"
    return ""


def _same_videos(query: Known, key: Known) -> bool:
    """Whether queries and keys belong to the same videos of their batches, where the graph shows videos."""
    told = _inputs(query.labels[2]) | (_batches(query) & _batches(key))
    return _batch(query, told) == _batch(key, told)


def _of_several_videos(known: Known) -> bool:
    """Whether tokens are taken from more positions along the batch of an input than there are sequences."""
    inputs = _inputs(known.labels[2])
    places: dict[Axis, set[int]] = {}
    for claim in itertools.chain.from_iterable(run.claims for run in known.taken):
        if claim.source in inputs and claim.of_batch:
            places.setdefault(claim.axis, set()).add(claim.base)
    return any(len(found) > length(known.labels[0]) for found in places.values())


def _laid(known: Known) -> list[Atom]:
    """The runs of the batch and the heads of a query or key."""
    return [*atoms(known.labels[0]), *atoms(known.labels[1])]


def _batches(known: Known) -> set[Source]:
    """The inputs from whose batches a query or key has any tokens."""
    runs = [*_laid(known), *known.taken]
    return {claim.source for run in runs for claim in run.claims if claim.of_batch}


def _batch(known: Known, inputs: set[Source]) -> tuple[list[frozenset[Atom]], set[frozenset[Atom]]]:
    """(runs of a query or key along batches, in order; positions on batches from which it was taken). Batches of
    other inputs than these do not count."""

    def along(runs: Iterable[Atom]) -> list[frozenset[Atom]]:
        claims = [
            frozenset(
                claim
                for claim in run.claims
                if claim.of_batch and (claim.source.kind != "input" or claim.source in inputs)
            )
            for run in runs
        ]
        return [some for some in claims if some]

    return along(_laid(known)), set(along(known.taken))


def _contradicted(site: Site, embeddings: Iterable[Embedding], before: int, after: int) -> bool:
    """Whether the graph shows that queries and keys are different tokens, or that the tokens between the first
    `before` and the last `after` are no row-major video."""
    query, key = site.query.labels[2], site.key.labels[2]
    if query == key:
        if _not_the_same(site):
            return True
    else:
        known = [_known(label, embeddings) for label in (query, key)]
        if all(known) or (any(known) and _moved(query, key)) or is_blank(query) != is_blank(key):
            return True
    stop = length(query) - after
    return any(not _may_be_a_video(label, before, stop) for label in (query, key))


def _moved(query: Label, key: Label) -> bool:
    """Whether one of two sequences was made of the other's tokens in a way that labels cannot express."""
    sides = [(query, key), (key, query)]
    return any(
        claim.source.roots & {known.axis for known in _claims(other)}
        for label, other in sides
        for claim in _claims(label)
    )


def _may_be_a_video(label: Label, start: int, stop: int) -> bool:
    """Whether nothing contradicts a row-major video at positions `start` to `stop` of a sequence."""
    at = 0
    for part in _parts(label):
        end = at + length(part)
        if start <= at and end <= stop:
            inputs = [_origins(run) for run in part if isinstance(run, Atom)]
            pairs = [
                (a, b) for x, y in itertools.pairwise(inputs) for a in x for b in y if a.source is b.source
            ]
            if not all(_in_order(a, b) for a, b in pairs):
                return False
        elif max(at, start) < min(end, stop) and any(
            run.source.kind in ("conv", "lost") for run in atoms(part)
        ):
            return False  # it begins or ends inside one video
        at = end
    return True


def _known(label: Label, embeddings: Iterable[Embedding]) -> bool:
    """Whether the graph makes all tokens of a sequence from its inputs, and gets none as they are."""
    made = {run.axis for embedding in embeddings for run in embedding.kept}
    return all(
        any(claim.source.kind == "conv" or claim.axis in made for claim in run.claims) for run in atoms(label)
    )


# The grid


def _grid_of(part: Label, embeddings: Iterable[Embedding]) -> tuple[Grid | None, str]:
    """((frames, height, width), source of the grid) of a part of a sequence, or (None, reason)."""
    axes = [run for run in part if isinstance(run, Atom)]
    if len(axes) < len(part):
        return None, "its tokens lie in runs of different kinds"
    convolved = [run for run in axes if run.source.kind == "conv"]
    if convolved and any(run.extent is not None for run in axes):
        return None, "attends within windows of the grid"
    sizes = [run.size for run in axes]
    if convolved and len(convolved[0].source.sizes) == 3 and len({run.source for run in axes}) == 1:
        source, dims = convolved[0].source, [run.dim for run in axes]
        missing = [dim for dim in range(3) if dim not in dims]
        if any(source.sizes[dim] > 1 for dim in missing):
            return (
                None,
                "attends within one frame" if 0 in missing else "attends along time, not over the frame",
            )
        for dim in missing:
            sizes.insert(dim, 1)
    elif len(axes) != 3:
        one_frame = len(axes) == len(convolved) == 2
        return None, "attends within one frame" if one_frame else _PART if convolved else _unknown(axes)
    if why := _not_one_video(axes, embeddings):
        return None, why
    frames, height, width = sizes
    return (frames, height, width), _how(axes)


def _unknown(axes: Sequence[Atom]) -> str:
    """Why nothing is known about the grid of axes."""
    return _MOVED if any(run.source.roots for run in axes) else _NO_GRID


def _how(axes: Sequence[Atom]) -> str:
    """The source of a grid, in words."""
    kinds = [run.source.kind for run in axes]
    if kinds[-1] == "conv":
        volumes = kinds[0] == "conv"
        return "patches by a 3-D convolution" if volumes else "patches by a 2-D convolution over frames"
    return (
        "a mesh of positions added to the tokens"
        if "position" in kinds
        else "patches cut out of a graph input"
    )


def _not_one_video(axes: Sequence[Atom], embeddings: Iterable[Embedding]) -> str:
    """The reason why axes are not the time, rows and columns of one video, or ""; conditions 1 to 5 of the module.

    Axes of length 1 are left out.
    """
    origins = [_origins(run) for run in axes]
    sources = set.intersection(*({run.source for run in runs} for runs in origins))
    if not sources:
        return _PART if any(run.source.kind == "conv" for run in axes) else _unknown(axes)
    reasons = []
    for source in sorted(sources, key=lambda source: source.serial):
        pieces = [next(run for run in runs if run.source is source) for runs in origins]
        reasons.append(_not_of_one_input(pieces, embeddings))
    return min(reasons, key=len)


def _not_of_one_input(pieces: Sequence[Atom], embeddings: Iterable[Embedding]) -> str:
    """The reason for runs along axes of one input, or ""; conditions 3 to 5, and the part of 1 about the input."""
    if not all(itertools.starmap(_in_order, itertools.pairwise(pieces))):
        return _ORDER
    source, runs = pieces[0].source, atoms(joined(pieces))
    dims = {run.dim for run in pieces}
    if 0 in dims and len(source.sizes) > 2:
        return _BATCH
    if len(runs) == 1 and len(pieces) > 1 and _plain(runs[0]):
        return ""  # one axis, divided by positions
    if any(_sums_videos(source, dims, one) for one in embeddings):
        return _BATCH
    return "" if any(_are_patches(pieces, one) for one in embeddings) else _NO_CHANNELS


def _sums_videos(source: Source, dims: set[int], embedding: Embedding) -> bool:
    """Whether weights sum over the batch of an input whose grid has these dimensions."""
    has_batch = len(dims) + 1 < len(source.sizes)  # else the first dimension is channels
    return has_batch and any(run.source is source and run.dim == 0 for run in embedding.summed)


def _are_patches(pieces: Sequence[Atom], embedding: Embedding) -> bool:
    """Whether an embedding sums over channels of an input into patches along these runs of it; condition 5."""
    source = pieces[0].source
    kept, summed = (
        {run for run in runs if run.source is source} for runs in (embedding.kept, embedding.summed)
    )
    for run in atoms(joined(pieces)):
        own, within = ([one for one in runs if one.dim == run.dim] for runs in (kept, summed))
        divided = sum(piece.dim == run.dim for piece in pieces) > 1
        if not own or not (divided or run in _outer_first(own)) or not _plain(*_outer_first([run, *within])):
            return False
    others = set(range(len(source.sizes))) - {piece.dim for piece in pieces}
    channels = others - {0} or others
    told = {run.dim for run in summed}
    single = {dim for dim in (1, len(source.sizes) - 1) if source.sizes[dim] == 1}
    return bool(channels) and channels <= told | single


def _outer_first(runs: Iterable[Atom]) -> list[Atom]:
    """Runs along one axis, the outer first, joined where they are the outer and inner part of one run."""
    ordered = sorted(runs, key=lambda run: -run.stride)
    return atoms(joined(ordered))


def _plain(*runs: Atom) -> bool:
    """Whether there is one run, of neighbouring positions."""
    return len(runs) == 1 and runs[0].stride == 1 and runs[0].extent is None


def _in_order(first: Atom, second: Atom) -> bool:
    """Whether one run along an input's axes lies further out than another; on one axis, directly outside it."""
    return first.dim < second.dim or len(joined((first, second))) == 1


def _origins(run: Atom) -> list[Atom]:
    """The runs along axes of inputs from which a run comes, through convolutions and their padding; none if any
    part of it comes from another source."""
    if run.source.kind != "conv":
        return [claim for claim in run.claims if claim.source.kind == "input"]
    parts = [part for part in _parts(run.source.of[2 + run.dim]) if not all(map(_is_padding, atoms(part)))]
    if not run.whole or any(share_axis(a, b) for a, b in itertools.combinations(parts, 2)):
        return []
    found = [_origins(part[0]) if len(part) == 1 and isinstance(part[0], Atom) else [] for part in parts]
    return list(itertools.chain(*found)) if all(found) else []


def _is_padding(run: Atom) -> bool:
    return run.blank or (run.source.kind == "opaque" and not run.source.roots)


def _claims(label: Label) -> Iterator[Atom]:
    """Every claim of a label, and of the labels from which convolutions made it; those of a convolution once."""
    left, seen = [label], set[Source]()
    while left:
        for run in atoms(left.pop()):
            yield from run.claims
            if run.source not in seen:
                seen.add(run.source)
                left += run.source.of


def _lengths(label: Label) -> Iterator[Atom]:
    """Every claim from which a label has its lengths: of a convolution's input only the axis along which the run
    lies, not batch and channels."""
    for run in atoms(label):
        yield from run.claims
        if run.source.of:
            yield from _lengths(run.source.of[2 + run.dim])


def _inputs(label: Label) -> set[Source]:
    """The inputs from which a label's axes come."""
    axes = {pair for claim in _claims(label) for pair in (claim.axis, *claim.source.roots)}
    return {source for source, _ in axes if source.kind == "input"}


def check_grid(grid: Grid, text: Text | None, found: Sequence[tuple[AttentionSite, TokenLayout]]) -> None:
    """Raise GridError if the user's grid may be meant for some attention and no attention gets it."""
    counts = {math.prod(grid), math.prod(grid) + sum(text or ())}
    fitting = [layout for site, layout in found if site.q_tokens == site.kv_tokens in counts]
    meant = [layout for site, layout in found if site.kind != "cross"]
    if any(layout.grid == grid for _, layout in found) or not (meant or fitting):
        return
    inferred = sorted({layout.grid for layout in meant if layout.grid})
    hint = f" From the graph: {inferred[0]}." if len(inferred) == 1 else ""
    if fitting:
        raise GridError(
            f"grid must be that of tokens that attend to themselves, frame by frame and row by row: got {grid}, "
            f"but the graph shows about the attention over that many tokens: {fitting[0].reason}.{hint}"
        )
    tokens = ", ".join(str(n) for n in sorted({layout.tokens for layout in meant}))
    others = "" if text is None else f" and {sum(text)} others"
    raise GridError(
        f"grid must multiply to the video tokens of the model: got {grid} = {math.prod(grid)} tokens{others}, but "
        f"its self-attention runs over {tokens} tokens.{hint or _TEXT_HINT}"
    )


def _specialise(gm: fx.GraphModule, inputs: dict[fx.Node, Source], used: Iterable[Label]) -> None:
    """Fix the sizes on which the layouts rest, so that Dynamo guards on them: no two grids share a program.

    These are all sizes except the batch of inputs with four dimensions or more (videos, masks), and of other inputs
    the axes found among the tokens. Where positions give the grid, every number among the inputs is fixed too. A
    batch, or the length of a prompt elsewhere in the model, stays free.
    """
    claims = {claim for label in used for claim in _lengths(label)}
    by_positions = any(claim.source.kind == "position" for claim in claims)
    axes = {claim.axis for claim in claims}
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op == "placeholder" and isinstance(value, torch.SymInt):
            if by_positions:
                int(value)
        elif node in inputs:
            for dim, size in enumerate(value.shape):
                if (len(value.shape) >= 4 and dim > 0) or (inputs[node], dim) in axes:
                    int(size)
