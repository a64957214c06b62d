"""What a rewritten attention call computes, and how it gets into the graph.

Where gradients are needed the call is traced, op by op. Else it is one opaque op, `sparsify::site`: the many small
operations round the kernels cost little to run and much to compile.

Whatever a site computes lies in memory as [B, S, H, D], which models go on with. It checks the sizes that its plan
rests on at every call, and puts its name before what its ops object to.
"""

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from sparsify_compiler import _torch
from sparsify_compiler.errors import OperandError
from sparsify_compiler.kernels import attention
from sparsify_compiler.kernels.far_field import attention_with_far_field, exact_rows
from sparsify_compiler.methods import DynamicMethod, LearningMethod
from sparsify_compiler.methods.selection import Memory, Tokens
from sparsify_compiler.plan import AttentionPlan, AttentionSite
from sparsify_compiler.runtime.state import blank
from sparsify_compiler.table import BlockTable

GUARD_ROWS = 16
"""Rows of each head that are computed exactly, to see whether the far field helps."""

REPORT = ("density", "kept", "recall", "far_field")
"""What a dynamic site reports of each call, for every batch and head: share of the token pairs computed; mean
attention mass that the method estimates to be kept; mean mass truly kept on sampled rows, NaN without; whether
the far field is on, 1 or 0."""


class TableSite(nn.Module):
    """One attention call that reads the table of a static method, and nothing else."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self.plan = plan

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, *table: Tensor | None
    ) -> Tensor:
        """Attend: as `kernels.attention.block_sparse_attention`, with the fields of the table in order."""
        site = self.plan.site
        with _named(site.name):
            _check_sizes(site, query, key, value)
            out, _ = torch.ops.sparsify.block_sparse_attention(
                query, key, value, *table, key_bias, site.scale, self.plan.provider
            )
        return out


class SparseSite(nn.Module):
    """One attention call, as its plan has it."""

    def __init__(
        self,
        plan: AttentionPlan,
        operands: tuple[str, ...],
        *,
        remembers: bool,
        observed: tuple[str, ...] = (),
        choice: Any = None,
        sampled_rows: int = 0,
    ) -> None:
        """Args:
        operands: names of the method's constant and learned tensors, in the order in which `forward` gets them.
        remembers: whether the calls share a memory; else every call starts anew and reports nothing.
        observed: names of what the method learns from this call, `signal` last; none where it does not learn.
        choice: what training chose for the site, of a method that learns.
        sampled_rows: rows of each head to measure the recall on.
        """
        super().__init__()
        self.remembers = remembers
        self.site = plan.site
        self.work = _work(plan, operands, observed, choice, sampled_rows)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        """Select, attend, remember, learn.

        Args:
            query, key, value, key_bias: as in `kernels.attention.block_sparse_attention`.
            tensors: the operands; what is observed; then, if calls share a memory, `warm` (None where nothing but a
                report is kept), the memory's tensors and the report [4, B, H], which are written to.
        """
        name, work = self.site.name, self.work
        query, key, value = attention.cast(query, key, value)
        operands, observed, held = work.split(tensors)
        with _named(name), torch.autocast(query.device.type, enabled=False):
            _check_sizes(self.site, query, key, value, batch=self.remembers)
            out, reported, *learnt = work.attend(query, key, value, key_bias, [*operands, *held[:-1]], name)
            if observed:
                work.learn(query, key, key_bias, operands, observed, name)
        if self.remembers:
            _remember(held[1:], (*learnt, reported))
        return out


class Observer(nn.Module):
    """A dense attention call that its site looks at."""

    def __init__(
        self, plan: AttentionPlan, operands: tuple[str, ...], *, observed: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.site = plan.site
        self.work = _work(plan, operands, observed, None, 0)

    def forward(
        self, out: Tensor, query: Tensor, key: Tensor, key_bias: Tensor | None, *tensors: Tensor | None
    ) -> Tensor:
        """`out`, the call's output, as it is; the tensors are those of `SparseSite`."""
        name, work = self.site.name, self.work
        query, key, _ = attention.cast(query, key, key)
        operands, observed, held = work.split(tensors)
        with _named(name), torch.autocast(query.device.type, enabled=False):
            _check_sizes(self.site, query, key, batch=not observed)
            if observed:
                work.learn(query, key, key_bias, operands, observed, name)
            else:
                _remember(held[1:-1], work.observe(query, key, [*operands, *held[:-1]], name))
        return out


class Work:
    """The arithmetic of a site: a function of tensors, the same for all sites that are planned alike.

    Ops know it by its name. It lives as long as somebody holds it: a program does, whose phases call it.
    """

    def __init__(
        self,
        name: str,
        plan: AttentionPlan,
        operands: tuple[str, ...],
        observed: tuple[str, ...],
        method: Hashable,
        sampled_rows: int,
    ) -> None:
        self.name, self.plan, self.method = name, plan, method
        self.operands, self.observed, self.sampled_rows = operands, observed, sampled_rows

    def split(
        self, tensors: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """(operands, what is observed, what is held from call to call)."""
        first, second = len(self.operands), len(self.operands) + len(self.observed)
        return list(tensors[:first]), list(tensors[first:second]), list(tensors[second:])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_bias: Tensor | None,
        inputs: list[Tensor | None],
        site: str,
    ) -> list[Tensor]:
        """[out, report, *learnt], as an op of its own where nobody asks for gradients. `site`: its name."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            return self.trace(query, key, value, key_bias, inputs)
        return torch.ops.sparsify.site(query, key, value, key_bias, inputs, self.name, site)

    def observe(self, query: Tensor, key: Tensor, inputs: list[Tensor | None], site: str) -> list[Tensor]:
        """What the method remembers of a dense call."""
        return torch.ops.sparsify.observe_site(query.detach(), key.detach(), inputs, self.name, site)

    def learn(
        self,
        query: Tensor,
        key: Tensor,
        key_bias: Tensor | None,
        operands: list[Tensor | None],
        observed: list[Tensor | None],
        site: str,
    ) -> None:
        """Write what the method learns from a call of training."""
        bias = None if key_bias is None else key_bias.detach()
        learnt = torch.ops.sparsify.learn_site(
            query.detach(), key.detach(), bias, [*operands, *observed], self.name, site
        )
        _remember(observed[:-1], learnt)

    def trace(
        self, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, inputs: list[Tensor | None]
    ) -> list[Tensor]:
        """[out, report, *learnt], op by op."""
        plan, method = self.plan, self.method
        operands, memory = self._sort(query, inputs)
        kept = query.new_full((1, 1, 1), torch.nan)
        learnt: tuple[Tensor, ...] = ()
        whole, min_gain, far_blocks = True, None, None
        if isinstance(method, DynamicMethod):
            with torch.no_grad():
                (table, kept, whole, min_gain, far_blocks), learnt = method.select(
                    self._tokens(query, key, key_bias), memory, **operands
                )
        else:
            table = BlockTable(**operands)
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
        )
        if not whole and plan.layout.tokens > plan.layout.video_tokens:
            out = self._with_others(out, query, key, value, key_bias)
        with torch.no_grad():
            estimated = kept.mean(-1) if min_gain is None else known.kept
            rows = (known.density, estimated, known.recall, known.gate)
            report = torch.stack([row.float().expand(query.shape[:2]) for row in rows])
        return [out, report, *learnt]

    def _with_others(
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None
    ) -> Tensor:
        """`out` of the video's tokens between that of the others, who read everything."""
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
        operands, memory = self._sort(query, inputs)
        method = cast(DynamicMethod, self.plan.settings)
        return list(method.observe(self._tokens(query, key, None), memory, **operands))

    def trace_learn(
        self, query: Tensor, key: Tensor, key_bias: Tensor | None, inputs: list[Tensor | None]
    ) -> list[Tensor]:
        """`learn`, op by op."""
        named: dict[str, Any] = dict(zip((*self.operands, *self.observed), inputs, strict=True))
        method = cast(LearningMethod, self.plan.settings)
        return list(method.learn(self._tokens(query, key, key_bias), **named))

    def fake_learn(self, inputs: list[Tensor | None]) -> list[Tensor]:
        """Uninitialised results of `trace_learn`: new values of all that is observed but the signal."""
        written = inputs[len(self.operands) : -1]
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

    def _sort(self, query: Tensor, inputs: list[Tensor | None]) -> tuple[dict[str, Any], Memory]:
        """(operands by name, memory); a blank memory where no call came before."""
        count = len(self.operands)
        operands = dict(zip(self.operands, inputs[:count], strict=True))
        warm, *held = inputs[count:] or [None]
        if warm is None:
            warm = torch.zeros((), dtype=torch.bool, device="cpu")
            site = replace(self.plan.site, batch=query.shape[0])
            shapes = shapes_of(replace(self.plan, site=site)).items()
            held = [*blank((name, shape, query.device) for name, shape in shapes)]
        return operands, Memory(warm, tuple(t for t in held if t is not None))


_works: WeakValueDictionary[str, Work] = WeakValueDictionary()
"""By name: an op takes no object."""


def _work(
    plan: AttentionPlan,
    operands: tuple[str, ...],
    observed: tuple[str, ...],
    choice: Any,
    sampled_rows: int,
) -> Work:
    """The arithmetic of a site, one object for all that are planned alike."""
    site, method = plan.site, settled(plan, choice)
    shape = site.heads, site.kv_heads, site.head_dim, site.scale
    text = repr(
        (plan.settings, method, plan.layout, plan.far_field, shape, plan.provider, operands, observed)
    )
    name = hashlib.sha256(f"{text} {sampled_rows}".encode()).hexdigest()[:16]
    work = _works.get(name)
    if work is None:
        work = _works[name] = Work(name, plan, operands, observed, method, sampled_rows)
    return work


def works_of(module: nn.Module) -> set[Work]:
    """What the sites of a lowered graph, and of its bodies, call by name."""
    return {part.work for part in module.modules() if isinstance(part, (SparseSite, Observer))}


@torch.library.custom_op("sparsify::site", mutates_args=())
def _site(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    inputs: list[Tensor | None],
    work: str,
    site: str,
) -> list[Tensor]:
    with _named(site):
        return _works[work].trace(query, key, value, key_bias, inputs)


@torch.library.custom_op("sparsify::observe_site", mutates_args=())
def _observe_site(
    query: Tensor, key: Tensor, inputs: list[Tensor | None], work: str, site: str
) -> list[Tensor]:
    with _named(site):
        return _works[work].trace_observe(query, key, inputs)


@torch.library.custom_op("sparsify::learn_site", mutates_args=())
def _learn_site(
    query: Tensor,
    key: Tensor,
    key_bias: Tensor | None,
    inputs: list[Tensor | None],
    work: str,
    site: str,
) -> list[Tensor]:
    with _named(site):
        return _works[work].trace_learn(query, key, key_bias, inputs)


_site.register_fake(lambda *args: _works[args[-2]].trace(*args[:-2]))
_observe_site.register_fake(lambda *args: _works[args[-2]].trace_observe(*args[:-2]))
_learn_site.register_fake(lambda *args: _works[args[-2]].fake_learn(args[-3]))


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
    """Put the name of a site before what its ops object to, unless it is there."""
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
    """Raise OperandError unless a call has the sizes that its site was planned for; `batch`: this one too."""
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
                f"{name} must be [{wanted}], as when it was planned, got {list(shape)}: other sizes need a program "
                "of their own, which torch.compile makes unless its guards are skipped"
            )
        if _torch.has_tangent(tensor):
            raise OperandError("sparse attention has no forward-mode derivative: leave this attention dense")


def settled(plan: AttentionPlan, choice: Any) -> Hashable:
    """The method of a site, with what training chose."""
    method = plan.settings
    return method.settle(choice) if isinstance(method, LearningMethod) and method.learns else method


def shapes_of(plan: AttentionPlan) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a site remembers."""
    method = plan.settings
    return method.memory(plan.site, plan.layout) if isinstance(method, DynamicMethod) else {}


def _remember(held: Any, learnt: Any) -> None:
    for old, new in zip(held, learnt, strict=True):
        # Not seen by autograd: where a body runs again in backward, its operands are saved, these among them.
        old.data.copy_(new)
