"""The computation of a rewritten attention call, and its form in the graph.

Where gradients are needed the call is traced, op by op. Otherwise it is one opaque op, `sparsify::site`: the many
small operations around the kernels take little time to run and much to compile.

The output of a site lies in memory as [B, S, H, D], the layout that the next operators of a model read. A site
checks the sizes that its plan needs at every call, and puts its name in front of the errors of its ops.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify_compiler import _torch
from sparsify_compiler._torch import custom_op
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import attention, far_field, providers
from sparsify_compiler.kernels.far_field import attention_with_far_field, exact_rows
from sparsify_compiler.kernels.far_field.error_target import ErrorTarget
from sparsify_compiler.methods import DynamicMethod, LearningMethod, StaticMethod
from sparsify_compiler.methods.base import max_error_of
from sparsify_compiler.methods.selection import Blocks, State, Tokens
from sparsify_compiler.methods.shared_tokens import SharedTokens
from sparsify_compiler.methods.single_keys import SingleKeyMethod
from sparsify_compiler.parallel.ops import numbers_of_all_heads
from sparsify_compiler.parallel.sequence import of_key_heads, queries_of
from sparsify_compiler.parallel.shares import alike, heads_of, parts_of
from sparsify_compiler.plan import AttentionPlan, AttentionSite, FittedMethod
from sparsify_compiler.runtime.call import open_call
from sparsify_compiler.runtime.site_inputs import Bound, SiteInputs
from sparsify_compiler.table import BlockTable

LISTS = 0.8
"""Most memory that the lists of single keys take at one time, as a share of query, key and value."""
SHORT_LISTS = 2**26
"""Bytes of lists that may always be in memory, 64 MiB."""
MOST_PARTS = 8
"""Most parts into which the heads of a site are cut for this."""
JUDGED_ROWS = 16
"""Rows of each head that are computed exactly, to decide whether the far field is used."""
TARGET_ROWS = 32
"""The same where they also measure the error, for `max_error`."""


def is_table_alone(plan: AttentionPlan) -> bool:
    """Whether a site is a table and one op: it decides nothing at run time, and approximates nothing."""
    takes_heads = plan.sharing is not None and plan.sharing.own_tables
    asks = plan.sequence is not None and plan.sequence.asks
    alone = not takes_heads and not asks
    return isinstance(plan.settings, StaticMethod) and plan.far_field == "drop" and alone


class TableSite(nn.Module):
    """An attention call whose only extra input is the table of a static method."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self.plan = plan

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, *table: Tensor | None
    ) -> Tensor:
        """Attend, as `kernels.attention.block_sparse_attention` does; `table`: the fields of the table in order."""
        site = self.plan.site
        with _named(site.name):
            _check_sizes(site, query, key, value)
            out, _ = torch.ops.sparsify.block_sparse_attention(
                query, key, value, *table, key_bias, site.scale, self.plan.provider
            )
        return out


class SparseSite(nn.Module):
    """An attention call that follows its plan."""

    def __init__(
        self, plan: AttentionPlan, inputs: SiteInputs, *, choice: Any = None, sampled_rows: int = 0
    ) -> None:
        """Args:
        inputs: names of the tensors that `forward` gets.
        choice: the choice of training for the site, if its method learns.
        sampled_rows: number of rows of each head on which the recall is measured.
        """
        super().__init__()
        self.site = plan.site
        self.function = _function(plan, inputs, choice, sampled_rows)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        """Select, attend, update the state, learn.

        Args:
            query, key, value, key_bias: as in `kernels.attention.block_sparse_attention`.
            tensors: the tensors that `inputs` names; `observed`, `state` and `report` are written.
        """
        function = self.function
        query, key, value = attention.cast(query, key, value)
        with _named(self.site.name), providers.without_autocast(query.device.type):
            _check_sizes(self.site, query, key, value, batch=function.inputs.remembers)
            bound = function.inputs.bind(tensors)
            out, report, *state = function.attend(query, key, value, key_bias, bound, self.site.name)
            if bound.observed:
                function.learn(query, key, key_bias, bound, self.site.name)
        if bound.report is not None:
            _write((*bound.state, bound.report), (*state, report))
        return out


class Observer(nn.Module):
    """A dense attention call that its site observes."""

    def __init__(self, plan: AttentionPlan, inputs: SiteInputs) -> None:
        super().__init__()
        self.site = plan.site
        self.function = _function(plan, inputs, None, 0)

    def forward(
        self, out: Tensor, query: Tensor, key: Tensor, key_bias: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        """Return `out`, the call's output, unchanged; `tensors` as in `SparseSite`."""
        function = self.function
        bound = function.inputs.bind(tensors)
        query, key, _ = attention.cast(query, key, key)
        with _named(self.site.name), providers.without_autocast(query.device.type):
            _check_sizes(self.site, query, key, batch=not bound.observed)
            if bound.observed:
                function.learn(query, key, key_bias, bound, self.site.name)
            else:
                state = function.observe(query, key, bound, self.site.name)
                _write(bound.state, state)
                if function.plan.sequence is not None and state:
                    out = torch.ops.sparsify.after(out, state)
        return out


class _Part(NamedTuple):
    """A part of the heads of a site."""

    heads: slice
    """The query heads of the site."""
    given: dict[str, Tensor]
    """The results of `SingleKeyMethod.of_all_heads` for them."""
    known: far_field.Known | None


class SiteFunction:
    """The arithmetic of a site: a function of tensors, shared by all sites with the same plan.

    Ops find it by its name. The program whose graphs call it keeps it alive.
    """

    def __init__(
        self, name: str, plan: AttentionPlan, inputs: SiteInputs, method: FittedMethod, sampled_rows: int
    ) -> None:
        self.name, self.plan, self.inputs = name, plan, inputs
        self.method, self.sampled_rows = method, sampled_rows
        # To ask whether an object has a protocol takes longer than a launch.
        self._selects = method if isinstance(method, DynamicMethod) else None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        bound: Bound,
        site: str,
    ) -> list[Tensor]:
        """[out, report, *state], as one opaque op where no gradients are needed. `site`: its name."""
        inputs = self.inputs.to_select(bound)
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        if learns or torch.compiler.is_exporting():  # a file has no functions of this process
            return self.trace(query, key, value, key_bias, inputs, site)
        return torch.ops.sparsify.site(query, key, value, key_bias, inputs, self.name, site)

    def observe(self, query: Tensor, key: Tensor, bound: Bound, site: str) -> list[Tensor]:
        """The state after a dense call."""
        inputs = self.inputs.to_select(bound)
        if torch.compiler.is_exporting():
            return self.trace_observe(query, key, inputs, site)
        return torch.ops.sparsify.observe_site(query.detach(), key.detach(), inputs, self.name, site)

    def learn(self, query: Tensor, key: Tensor, key_bias: Tensor | None, bound: Bound, site: str) -> None:
        """Update the observed tensors from a call of training."""
        bias = None if key_bias is None else key_bias.detach()
        inputs = self.inputs.to_learn(bound)
        updated = torch.ops.sparsify.learn_site(query.detach(), key.detach(), bias, inputs, self.name, site)
        _write(list(bound.observed.values())[:-1], updated)

    def run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        inputs: list[Tensor | None],
        site: str,
    ) -> list[Tensor]:
        """`trace` of the slots that hold a head, and of this rank's rows of shared heads; the rest is zero.

        Args:
            site: its name in the graph.
        """
        used, slots = self._used(inputs), query.shape[1]
        computed = self._computed(inputs)
        if used == slots:
            look = self._look(site)
            if (parts := self._parts(query, key, value, computed)) > 1:
                return self._in_parts(parts, query, key, value, key_bias, inputs, site, look)
            return self.trace(query, key, value, key_bias, inputs, site, computed, look)
        bias = key_bias if key_bias is None or key_bias.shape[1] == 1 else key_bias[:, :used]
        q, k, v = (one[:, :used] for one in (query, key, value))
        out, report, *state = self.trace(q, k, v, bias, self.inputs.of_heads(inputs, used), site, computed)
        of_all = query.new_zeros(out.shape[0], out.shape[2], slots, out.shape[3]).transpose(1, 2)
        of_all[:, :used] = out
        if report.shape[2] == used and not self.inputs.remembers:
            report = _filled_up(report, 2, slots)
        return [of_all, report, *(_filled_up(one, 1, slots) for one in state)]

    def _parts(self, query: Tensor, key: Tensor, value: Tensor, computed: object) -> int:
        """The number of parts in which the heads are computed one after another, so that lists fit `LISTS`."""
        plan, method = self.plan, self.method
        shared = computed is not None or plan.sharing is not None or plan.sequence is not None
        if shared or not isinstance(method, SingleKeyMethod):
            return 1
        if isinstance(method, LearningMethod) and key.shape[1] != query.shape[1]:
            return 1  # `rows_of` has a row of the key head for every query head
        lists = method.list_bytes(plan.layout, plan.far_field) * query.shape[0] * query.shape[1]
        if plan.far_field != "drop":  # a virtual key for each key
            lists += key.nbytes + value.nbytes
        if lists <= SHORT_LISTS:
            return 1
        wanted = math.ceil(lists / (LISTS * (query.nbytes + key.nbytes + value.nbytes)))
        return min(wanted, MOST_PARTS, key.shape[1])

    def _in_parts(
        self,
        parts: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        inputs: list[Tensor | None],
        site: str,
        look: Callable[..., None] | None,
    ) -> list[Tensor]:
        """`trace` of the heads, part by part; `look` gets the table of the first part."""
        read, before = self.inputs.selecting(inputs, self.plan, query.shape[0], query.device)
        method = cast(SingleKeyMethod, self.method)
        with torch.no_grad():
            shared = method.of_all_heads(self._tokens(query, key, key_bias), self._target(before)[0], read)
            known = self._before_parts(query, key, value, key_bias, {**read, **shared})
        count, group = key.shape[1], query.shape[1] // key.shape[1]
        edges = [count * part // parts for part in range(parts + 1)]
        out, _ = attention.empty_outputs(query, value)
        rest = []
        for first, last in pairwise(edges):
            heads, of_keys = slice(first * group, last * group), slice(first, last)
            bias = key_bias if key_bias is None or key_bias.shape[1] == 1 else key_bias[:, heads]
            some = query[:, heads], key[:, of_keys], value[:, of_keys]
            part = _Part(
                heads,
                {name: one[:, heads] for name, one in shared.items()},
                None if known is None else known.of_heads(heads, of_keys),
            )
            out[:, heads], report, *state = self.trace(*some, bias, inputs, site, None, look, part)
            look = None
            rest.append((report, *state))
        reports, *states = zip(*rest, strict=True)
        return [out, torch.cat(reports, 2), *(torch.cat(one, 1) for one in states)]

    def _before_parts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        read: Mapping[str, Tensor | None],
    ) -> far_field.Known | None:
        """The results for the far field of all heads that no list changes; None where parts launch that work."""
        plan, order, bounds = self.plan, read["far_order"], read["far_bounds"]
        if plan.far_field != "mean" or not providers.fuses(plan.provider):
            return None
        assert order is not None
        assert bounds is not None
        layout = plan.layout
        blocks = Blocks(order, bounds).among(layout, query.shape[1])
        return far_field.before_parts(
            query[:, :, layout.before : query.shape[2] - layout.after],
            key,
            value,
            read["q_order"],
            blocks.bounds,
            blocks.order,
            key_bias=key_bias,
            scale=plan.site.scale,
            provider=plan.provider,
            count=min(max(JUDGED_ROWS, self.sampled_rows), layout.video_tokens),
        )

    def run_observe(self, query: Tensor, key: Tensor, inputs: list[Tensor | None], site: str) -> list[Tensor]:
        """`trace_observe` of the slots that hold a head."""
        used, slots = self._used(inputs), query.shape[1]
        if used == slots:
            return self.trace_observe(query, key, inputs, site)
        of_heads = self.inputs.of_heads(inputs, used)
        state = self.trace_observe(query[:, :used], key[:, :used], of_heads, site)
        return [_filled_up(one, 1, slots) for one in state]

    def _used(self, inputs: list[Tensor | None]) -> int:
        """The number of slots to compute: those that hold a head, and one where none does."""
        owners, sharing = self.inputs.owners_in(inputs), self.plan.sharing
        if owners is None or sharing is None:
            return self.plan.site.heads
        return max(1, len(heads_of(owners.tolist(), sharing.ranks.rank)))

    def _computed(self, inputs: list[Tensor | None]) -> list[tuple[slice, slice]] | None:
        """(slots, queries) that this rank computes; None where it computes all queries of its heads."""
        owners, sharing = self.inputs.owners_in(inputs), self.plan.sharing
        if owners is None or sharing is None:
            return None
        tokens = self.plan.layout.tokens
        found = alike(owners.tolist(), sharing.ranks.rank, tokens)
        return None if all(rows == slice(0, tokens) for _, rows in found) else found

    def trace(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        inputs: list[Tensor | None],
        site: str,
        computed: Sequence[tuple[slice, slice]] | None = None,
        look: Callable[..., None] | None = None,
        part: "_Part | None" = None,
    ) -> list[Tensor]:
        """[out, report, *state], op by op.

        Args:
            site: name of the site, for errors of ranks.
            computed: as in `attention_with_far_field`, of all tokens.
            look: gets the table that was read, and `before`, the number of tokens before its queries.
            part: the part of the site that `query` has; None: all. `inputs` are those of all heads.
        """
        plan = self.plan
        read, before = self.inputs.selecting(inputs, plan, query.shape[0], query.device)
        owners = self.inputs.owners_in(inputs)
        read = read | self._trained_of_rank(read, owners, query.shape[1])
        if part is not None:
            of_site = part.heads
            heads = torch.arange(of_site.start, of_site.stop, device=query.device)
            read = {**read, **self._rows(read, self.inputs.trained, heads)}
            before = before._replace(tensors=tuple(one[:, of_site] for one in before.tensors))
        all_heads = self._all_heads(owners, site)
        shared = self._shared_tokens(site)
        unknown = query.new_full((1, 1, 1), torch.nan)
        kept = unknown
        state: tuple[Tensor, ...] = ()
        before, target = self._target(before)
        whole, min_gain, far_blocks, best, density = True, None, None, 0, None
        if self._selects is not None:
            with torch.no_grad():
                given = {} if part is None else part.given
                (table, kept, whole, min_gain, far_blocks, best, density), state = self._selects.select(
                    self._tokens(query, key, key_bias, shared), before, **read, **given
                )
        else:
            table = BlockTable(**read)  # type: ignore[arg-type]
            if plan.sharing is not None and plan.sharing.own_tables:
                heads = torch.ops.sparsify.heads_in_slots(owners, plan.sharing.ranks.rank, query.shape[1])
                table = table.of_heads(heads.to(query.device))
        of_all_ranks = table
        if shared is not None:
            table, key, value = self._fetched(table, key, value, site)
            whole = False
        judged = 0 if plan.far_field == "drop" else JUDGED_ROWS if target is None else TARGET_ROWS
        last = query.shape[2] - plan.layout.after
        if computed is not None and not whole:
            computed = [(heads, _within(rows, plan.layout.before, last)) for heads, rows in computed]
        out, _, known = attention_with_far_field(
            query if whole else query[:, :, plan.layout.before : last],
            key,
            value,
            table,
            far_field=plan.far_field,
            min_gain=min_gain,
            best=best,
            target=target,
            far_blocks=far_blocks,
            density=density,
            known=None if part is None else part.known,
            key_bias=key_bias,
            scale=plan.site.scale,
            provider=plan.provider,
            sampled_rows=max(judged, self.sampled_rows),
            all_heads=all_heads,
            computed=computed,
            look=None if look is None else partial(look, before=0 if whole else plan.layout.before),
        )
        if not whole and plan.layout.tokens > plan.layout.video_tokens:
            out = self._with_others(out, query, key, value, key_bias, shared)
        with torch.no_grad():
            estimated = kept.mean(-1) if min_gain is None and target is None else known.kept
            density = known.density if shared is None else of_all_ranks.densities()
            errors = [unknown[..., 0]] * 2
            if known.target is not None:
                errors = [known.target.estimated[:, None], known.target.measured[:, None]]
                state = (*state, known.target.state)
            rows = (density, estimated, known.recall, known.gate, *errors)
            report = torch.stack([row.float().expand(query.shape[:2]) for row in rows], 2)
            if all_heads is not None and self.inputs.remembers:
                report = all_heads(report)
            report = report.permute(2, 0, 1).contiguous()
        return [out, report, *state]

    def _look(self, site: str) -> Callable[..., None] | None:
        """The function of the open call that keeps an example; None where it keeps none, or on several ranks."""
        call = open_call()
        on_ranks = self.plan.sharing is not None or self.plan.sequence is not None
        if on_ranks or self._selects is None:
            return None
        if call is None or not call.looks(self.plan.layout):
            return None
        return partial(call.look, site, self.plan.layout)

    def _target(self, state: State) -> tuple[State, ErrorTarget | None]:
        """(the state of the method, the target with its own state)."""
        most = max_error_of(self.method)
        if most is None:
            return state, None
        *own, errors = state.tensors
        # State that is not initialised is finite, but may be that of an earlier video.
        return state._replace(tensors=tuple(own)), ErrorTarget(most, errors * state.initialised)

    def _shared_tokens(self, site: str) -> SharedTokens | None:
        """The video's tokens, where ranks share the queries of a site."""
        plan, sequence = self.plan, self.plan.sequence
        if sequence is None:
            return None
        part = next(one for one in parts_of(sequence.parts) if one.tokens)
        return SharedTokens(part.whole, sequence.ranks, part, sequence.each, site, plan.provider)

    def _fetched(
        self, table: BlockTable, key: Tensor, value: Tensor, site: str
    ) -> tuple[BlockTable, Tensor, Tensor]:
        """(the table of the video's queries of this rank, the keys and values that they read)."""
        sequence = self.plan.sequence
        assert sequence is not None
        ranks = sequence.ranks
        place = *ranks.fields, site
        table = table.of_queries(queries_of(sequence, ranks.rank))
        read = of_key_heads(table.keys_read(), key.shape[1])
        asked = torch.ops.sparsify.ask_keys(read, sequence.parts, sequence.each, *place)
        given = [key, value, torch.zeros((), dtype=torch.float32, device="cpu")]
        key, value, _ = torch.ops.sparsify.fetch_keys(
            given, read, asked, sequence.parts, sequence.each, *place
        )
        return table, key, value

    def _all_heads(self, owners: Tensor | None, site: str) -> Callable[[Tensor], Tensor] | None:
        """The function that makes numbers of all heads, [B, H, n], of those of this rank's, [B, slots, n]."""
        sharing = self.plan.sharing
        if owners is None or sharing is None:
            return None
        return partial(numbers_of_all_heads, owners=owners, ranks=sharing.ranks, site=site)

    def _trained_of_rank(
        self, read: dict[str, Tensor | None], owners: Tensor | None, slots: int
    ) -> dict[str, Tensor | None]:
        """The trained tensors of a rank's heads, and of other heads in slots without a head."""
        sharing = self.plan.sharing
        if owners is None or sharing is None or not self.inputs.trained:
            return {}
        heads = torch.ops.sparsify.heads_in_slots(owners, sharing.ranks.rank, slots)
        return {**self._rows(read, self.inputs.trained, heads)}

    def _rows(
        self, tensors: dict[str, Tensor | None], names: Iterable[str], heads: Tensor
    ) -> dict[str, Tensor]:
        """The numbers of some heads in trained or observed tensors of all heads."""
        method, found = cast(LearningMethod, self.plan.settings), dict[str, Tensor]()
        for name in names:
            tensor = tensors[name]
            assert tensor is not None
            dim, rows = method.rows_of(name, heads.to(tensor.device), self.plan.whole_site)
            found[name] = tensor.index_select(dim, rows)
        return found

    def _with_others(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        shared: SharedTokens | None,
    ) -> Tensor:
        """`out` of the video's tokens, between the output of the other tokens, which read everything."""
        layout, scale, tokens = self.plan.layout, self.plan.site.scale, query.shape[2]
        if shared is None:
            places = torch.arange(tokens, device=query.device)
            others = torch.cat([places[: layout.before], places[tokens - layout.after :]])[None, None]
            read, _ = exact_rows(query, key, value, others, key_bias, scale, provider=self.plan.provider)
        else:
            rows = torch.cat([query[:, :, : layout.before], query[:, :, tokens - layout.after :]], 2)
            read = shared.attend(rows, key, value, key_bias, scale, layout.before)
        parts = read[:, :, : layout.before], out, read[:, :, layout.before :]
        return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)

    def trace_observe(
        self, query: Tensor, key: Tensor, inputs: list[Tensor | None], site: str
    ) -> list[Tensor]:
        """`observe`, op by op."""
        read, before = self.inputs.selecting(inputs, self.plan, query.shape[0], query.device)
        method = cast(DynamicMethod, self.plan.settings)
        tokens = self._tokens(query, key, None, self._shared_tokens(site))
        before, target = self._target(before)
        of_target = [] if target is None else [target.state.clone()]
        return [*method.observe(tokens, before, **read), *of_target]

    def trace_learn(
        self, query: Tensor, key: Tensor, key_bias: Tensor | None, inputs: list[Tensor | None]
    ) -> list[Tensor]:
        """`learn`, op by op."""
        bound = self.inputs.bind(inputs)
        named: dict[str, Any] = bound.read | bound.observed
        method, sharing = cast(LearningMethod, self.plan.settings), self.plan.sharing
        if bound.owners is None or sharing is None:
            return list(method.learn(self._tokens(query, key, key_bias), **named))
        mine, written = heads_of(bound.owners.tolist(), sharing.ranks.rank), list(bound.observed)[:-1]
        heads = torch.tensor(mine, dtype=torch.int64, device="cpu")
        results = [named[name].clone() for name in written]
        if not mine:
            return results
        of_rank = self._rows(named, (*self.inputs.trained, *written), heads)
        blank = {name: torch.zeros_like(of_rank[name]) for name in written}
        tokens = self._tokens(query[:, : len(mine)], key[:, : len(mine)], key_bias)
        for name, whole, new in zip(
            written, results, method.learn(tokens, **(named | of_rank | blank)), strict=True
        ):
            dim, rows = method.rows_of(name, heads.to(whole.device), self.plan.whole_site)
            # A trainer takes the mean over ranks, and each head has one rank that learns.
            whole.index_add_(dim, rows, new, alpha=sharing.ranks.size)
        return results

    def fake_learn(self, inputs: list[Tensor | None]) -> list[Tensor]:
        """Uninitialised results of `trace_learn`: one for every observed tensor except the signal."""
        *written, _ = self.inputs.bind(inputs).observed.values()
        return [t.new_empty(t.shape) for t in written if t is not None]

    def _tokens(
        self, query: Tensor, key: Tensor, key_bias: Tensor | None, shared: SharedTokens | None = None
    ) -> Tokens:
        plan = self.plan
        return Tokens(
            query=query.detach(),
            key=key.detach(),
            layout=plan.layout,
            scale=plan.site.scale,
            provider=plan.provider,
            key_bias=None if key_bias is None else key_bias.detach(),
            far_field=plan.far_field,
            shared=shared,
        )


_functions: WeakValueDictionary[str, SiteFunction] = WeakValueDictionary()
"""Name -> function: an op takes no object."""


def _function(plan: AttentionPlan, inputs: SiteInputs, choice: Any, sampled_rows: int) -> SiteFunction:
    """The arithmetic of a site, one object for all sites with the same plan."""
    site, method = plan.site, settled(plan, choice)
    shape = site.heads, site.kv_heads, site.head_dim, site.scale, plan.sharing, plan.sequence
    text = repr((plan.settings, method, plan.layout, plan.far_field, shape, plan.provider, inputs))
    name = hashlib.sha256(f"{text} {sampled_rows}".encode()).hexdigest()[:16]
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = SiteFunction(name, plan, inputs, method, sampled_rows)
    return function


def functions_of(module: nn.Module) -> set[SiteFunction]:
    """The functions that the sites of a lowered graph, and of its bodies, call by name."""
    return {part.function for part in module.modules() if isinstance(part, (SparseSite, Observer))}


@custom_op("sparsify::site")
def _site(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    inputs: list[Tensor | None],
    function: str,
    site: str,
) -> list[Tensor]:
    with _named(site):
        return _functions[function].run(query, key, value, key_bias, inputs, site)


@custom_op("sparsify::observe_site")
def _observe_site(
    query: Tensor, key: Tensor, inputs: list[Tensor | None], function: str, site: str
) -> list[Tensor]:
    with _named(site):
        return _functions[function].run_observe(query, key, inputs, site)


# It reads `signal`, which lies on the host and differs from call to call.
@torch.library.custom_op("sparsify::learn_site", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _learn_site(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    inputs: list[Tensor | None],
    function: str,
    site: str,
) -> list[Tensor]:
    with _named(site):
        return _functions[function].trace_learn(query, key, key_bias, inputs)


_site.register_fake(
    lambda query, key, value, key_bias, inputs, function, site: _functions[function].trace(
        query, key, value, key_bias, inputs, site
    )
)
_observe_site.register_fake(
    lambda query, key, inputs, function, site: _functions[function].trace_observe(query, key, inputs, site)
)
_learn_site.register_fake(lambda *args: _functions[args[-2]].fake_learn(args[-3]))


@custom_op("sparsify::attend_owned")
def _attend_owned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    owners: Tensor,
    rank: int,
    scale: float | None,
) -> Tensor:
    """Dense attention of the slots that hold a head; the result of the others is zero.

    Args:
        query, key, value, mask, scale: those of `scaled_dot_product_attention`.
        owners, rank: as in `to_heads`.
    """
    out, used = _attend_owned_fake(query, key, value).zero_(), len(heads_of(owners.tolist(), rank))
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = mask[..., :used, :, :]
    q, k, v = (one[:, :used] for one in (query, key, value))
    if used:
        out[:, :used] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out


@_attend_owned.register_fake
def _attend_owned_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, slots, tokens = query.shape[:3]
    return query.new_empty(batch, tokens, slots, value.shape[3]).transpose(1, 2)


@custom_op("sparsify::lay_out")
def _lay_out(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy with these strides."""
    return _lay_out_fake(tensor, strides).copy_(tensor)


@_lay_out.register_fake
def _lay_out_fake(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    return tensor.new_empty_strided(tensor.shape, strides)


_lay_out.register_autograd(lambda ctx, grad: (grad, None))


@contextmanager
def _named(site: str) -> Iterator[None]:
    """Put the name of a site in front of the errors of its ops, unless the error has a name already."""
    try:
        yield
    except OperandError as error:
        if error.site is not None:
            raise
        with_name = OperandError(f"attention {site!r}: {error}")
        with_name.site = site
        raise with_name from None


def _check_sizes(
    site: AttentionSite, query: Tensor, key: Tensor, value: Tensor | None = None, *, batch: bool = False
) -> None:
    """Raise OperandError unless a call has the sizes of its plan. `batch`: whether to check the batch too."""
    expected: list[tuple[str, Tensor, int, int, int]] = [
        ("query", query, site.heads, site.q_tokens, site.head_dim),
        ("key", key, site.kv_heads, site.kv_tokens, site.head_dim),
    ]
    if value is not None:
        expected.append(("value", value, site.kv_heads, site.kv_tokens, site.value_dim))
    for name, tensor, *sizes in expected:
        shape = tensor.shape
        if shape[1:] != tuple(sizes) or (batch and shape[0] != site.batch):
            wanted = ", ".join(map(str, (site.batch if batch else "B", *sizes)))
            raise OperandError(
                f"{name} must be [{wanted}], as in its plan, got {list(shape)}: other sizes need their own "
                "program, which torch.compile makes unless its guards are skipped"
            )
        if _torch.has_tangent(tensor):
            raise OperandError("sparse attention has no forward-mode derivative: leave this attention dense")


def settled(plan: AttentionPlan, choice: Any) -> FittedMethod:
    """The method of a site, with the choice of training."""
    method = plan.settings
    assert method is not None
    return method.settle(choice) if isinstance(method, LearningMethod) and method.learns else method


def _within(rows: slice, first: int, last: int) -> slice:
    """The part of rows from first to last, counted from first."""
    start, stop = (min(max(place, first), last) - first for place in (rows.start, rows.stop))
    return slice(start, stop)


def _filled_up(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A tensor with zeros after the elements of one dimension."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _write(held: Sequence[Tensor | None], new: Sequence[Tensor]) -> None:
    """Write new values into tensors that are kept from call to call."""
    for old, value in zip(held, new, strict=True):
        assert old is not None
        # Hidden from autograd, which saves these tensors: they are operands of bodies that run again in backward.
        # Export has no autograd, and would not see the write.
        hidden = old if torch.compiler.is_exporting() else old.data
        hidden.copy_(value)
