"""The computation of a rewritten attention call, and its form in the graph.

Where gradients are needed the call is traced, op by op. Otherwise it is one opaque op, `sparsify::site`: the many
small operations around the kernels take little time to run and much to compile.

The output of a site lies in memory as [B, S, H, D], the layout that the next operators of a model read. A site
checks the sizes that its plan needs at every call, and puts its name in front of the errors of its ops.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparsify_compiler import _torch
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.far_field import attention_with_far_field, exact_rows
from sparsify_compiler.methods import DynamicMethod, LearningMethod
from sparsify_compiler.methods.selection import Tokens
from sparsify_compiler.parallel.ops import numbers_of_all_heads
from sparsify_compiler.parallel.shares import heads_of
from sparsify_compiler.plan import AttentionPlan, AttentionSite, FittedMethod
from sparsify_compiler.runtime.site_inputs import Bound, SiteInputs
from sparsify_compiler.table import BlockTable

GUARD_ROWS = 16
"""Rows of each head that are computed exactly, to decide whether the far field is used."""


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
        with _named(self.site.name), attention.without_autocast(query.device.type):
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
        with _named(self.site.name), attention.without_autocast(query.device.type):
            _check_sizes(self.site, query, key, batch=not bound.observed)
            if bound.observed:
                function.learn(query, key, key_bias, bound, self.site.name)
            else:
                _write(bound.state, function.observe(query, key, bound, self.site.name))
        return out


class SiteFunction:
    """The arithmetic of a site: a function of tensors, shared by all sites with the same plan.

    Ops find it by its name. The program whose graphs call it keeps it alive.
    """

    def __init__(
        self, name: str, plan: AttentionPlan, inputs: SiteInputs, method: FittedMethod, sampled_rows: int
    ) -> None:
        self.name, self.plan, self.inputs = name, plan, inputs
        self.method, self.sampled_rows = method, sampled_rows

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
            return self.trace(query, key, value, key_bias, inputs)
        return torch.ops.sparsify.site(query, key, value, key_bias, inputs, self.name, site)

    def observe(self, query: Tensor, key: Tensor, bound: Bound, site: str) -> list[Tensor]:
        """The state after a dense call."""
        inputs = self.inputs.to_select(bound)
        if torch.compiler.is_exporting():
            return self.trace_observe(query, key, inputs)
        return torch.ops.sparsify.observe_site(query.detach(), key.detach(), inputs, self.name, site)

    def learn(self, query: Tensor, key: Tensor, key_bias: Tensor | None, bound: Bound, site: str) -> None:
        """Update the observed tensors from a call of training."""
        bias = None if key_bias is None else key_bias.detach()
        inputs = self.inputs.to_learn(bound)
        updated = torch.ops.sparsify.learn_site(query.detach(), key.detach(), bias, inputs, self.name, site)
        _write(list(bound.observed.values())[:-1], updated)

    def trace(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, inputs: list[Tensor | None]
    ) -> list[Tensor]:
        """[out, report, *state], op by op."""
        plan, method = self.plan, self.method
        read, before = self.inputs.selecting(inputs, plan, query.shape[0], query.device)
        owners = self.inputs.owners_in(inputs)
        all_heads, read = self._all_heads(owners), read | self._trained_of_rank(read, owners)
        kept = query.new_full((1, 1, 1), torch.nan)
        state: tuple[Tensor, ...] = ()
        whole, min_gain, far_blocks = True, None, None
        if isinstance(method, DynamicMethod):
            with torch.no_grad():
                (table, kept, whole, min_gain, far_blocks), state = method.select(
                    self._tokens(query, key, key_bias), before, **read
                )
        else:
            table = BlockTable(**read)  # type: ignore[arg-type]
        guarded = GUARD_ROWS if plan.far_field != "drop" else 0
        last = plan.layout.tokens - plan.layout.after
        out, _, known = attention_with_far_field(
            query if whole else query[:, :, plan.layout.before : last],
            key,
            value,
            table,
            far_field=plan.far_field,
            min_gain=min_gain,
            far_blocks=far_blocks,
            key_bias=key_bias,
            scale=plan.site.scale,
            provider=plan.provider,
            sampled_rows=max(guarded, self.sampled_rows),
            all_heads=all_heads,
        )
        if not whole and plan.layout.tokens > plan.layout.video_tokens:
            out = self._with_others(out, query, key, value, key_bias)
        with torch.no_grad():
            estimated = kept.mean(-1) if min_gain is None else known.kept
            rows = (known.density, estimated, known.recall, known.gate)
            report = torch.stack([row.float().expand(query.shape[:2]) for row in rows], 2)
            if all_heads is not None and self.inputs.remembers:
                report = all_heads(report)
            report = report.permute(2, 0, 1).contiguous()
        return [out, report, *state]

    def _all_heads(self, owners: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """The function that makes numbers of all heads, [B, H, n], of those of this rank's, [B, slots, n]."""
        sharing = self.plan.sharing
        if owners is None or sharing is None:
            return None
        ranks, name = sharing.ranks, f"{self.plan.site.name}, or one with the same plan"
        return partial(numbers_of_all_heads, owners=owners, ranks=ranks, site=name)

    def _trained_of_rank(
        self, read: dict[str, Tensor | None], owners: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The trained tensors of a rank's heads, and of other heads in slots without a head."""
        sharing = self.plan.sharing
        if owners is None or sharing is None or not self.inputs.trained:
            return {}
        others = (owners != sharing.ranks.rank).int()
        heads = others.argsort(stable=True)[: self.plan.site.heads]
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
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
    ) -> Tensor:
        """`out` of the video's tokens, between the output of the other tokens, which read everything."""
        layout = self.plan.layout
        places = torch.arange(layout.tokens, device=query.device)
        others = torch.cat([places[: layout.before], places[layout.tokens - layout.after :]])
        read, _ = exact_rows(
            query, key, value, others[None, None], key_bias, self.plan.site.scale, provider=self.plan.provider
        )
        parts = read[:, :, : layout.before], out, read[:, :, layout.before :]
        return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)

    def trace_observe(self, query: Tensor, key: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
        """`observe`, op by op."""
        read, before = self.inputs.selecting(inputs, self.plan, query.shape[0], query.device)
        method = cast(DynamicMethod, self.plan.settings)
        return list(method.observe(self._tokens(query, key, None), before, **read))

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

    def _tokens(self, query: Tensor, key: Tensor, key_bias: Tensor | None) -> Tokens:
        plan = self.plan
        return Tokens(
            query=query.detach(),
            key=key.detach(),
            layout=plan.layout,
            scale=plan.site.scale,
            provider=plan.provider,
            key_bias=None if key_bias is None else key_bias.detach(),
            far_field=plan.far_field,
        )


_functions: WeakValueDictionary[str, SiteFunction] = WeakValueDictionary()
"""Name -> function: an op takes no object."""


def _function(plan: AttentionPlan, inputs: SiteInputs, choice: Any, sampled_rows: int) -> SiteFunction:
    """The arithmetic of a site, one object for all sites with the same plan."""
    site, method = plan.site, settled(plan, choice)
    shape = site.heads, site.kv_heads, site.head_dim, site.scale, plan.sharing
    text = repr((plan.settings, method, plan.layout, plan.far_field, shape, plan.provider, inputs))
    name = hashlib.sha256(f"{text} {sampled_rows}".encode()).hexdigest()[:16]
    function = _functions.get(name)
    if function is None:
        function = _functions[name] = SiteFunction(name, plan, inputs, method, sampled_rows)
    return function


def functions_of(module: nn.Module) -> set[SiteFunction]:
    """The functions that the sites of a lowered graph, and of its bodies, call by name."""
    return {part.function for part in module.modules() if isinstance(part, (SparseSite, Observer))}


@torch.library.custom_op("sparsify::site", mutates_args=())
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
        return _functions[function].trace(query, key, value, key_bias, inputs)


@torch.library.custom_op("sparsify::observe_site", mutates_args=())
def _observe_site(
    query: Tensor, key: Tensor, inputs: list[Tensor | None], function: str, site: str
) -> list[Tensor]:
    with _named(site):
        return _functions[function].trace_observe(query, key, inputs)


@torch.library.custom_op("sparsify::learn_site", mutates_args=())
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


_site.register_fake(lambda *args: _functions[args[-2]].trace(*args[:-2]))
_observe_site.register_fake(lambda *args: _functions[args[-2]].trace_observe(*args[:-2]))
_learn_site.register_fake(lambda *args: _functions[args[-2]].fake_learn(args[-3]))


@torch.library.custom_op("sparsify::lay_out", mutates_args=())
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


def _write(held: Sequence[Tensor | None], new: Sequence[Tensor]) -> None:
    """Write new values into tensors that are kept from call to call."""
    for old, value in zip(held, new, strict=True):
        assert old is not None
        # Hidden from autograd, which saves these tensors: they are operands of bodies that run again in backward.
        # Export has no autograd, and would not see the write.
        hidden = old if torch.compiler.is_exporting() else old.data
        hidden.copy_(value)
