"""Find the rewritten attention whose recorded strides must be restored.

A rewritten call lies in memory as [B, S, H, D], whatever the model's own call would do, since models continue in
that order: `out.transpose(1, 2).flatten(2)` then copies nothing. Dynamo may have recorded other strides, and the
graph may depend on them: a `view` that exists for those strides alone, `as_strided`, a kernel of the model's own, a
write through a tensor that was a copy, the caller of the graph.

So the nodes after a rewritten call run on fake tensors with the new strides, until no tensor lies otherwise than
recorded. Where that fails, or where an operator could see the difference, the strides are restored.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sparsify_compiler import _torch
from sparsify_compiler.passes.capture import attention, attention_nodes
from sparsify_compiler.passes.fx import run_call, sizes_of, tensor_of, value_of

AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
"""Functions that a graph calls to enter and to leave autocast."""
_SEES_MEMORY = ("as_strided", "set_", "resize")
"""Prefixes of the names of ATen operators that see memory and not elements."""


def strides_to_restore(gm: fx.GraphModule) -> dict[fx.Node, tuple[int, ...]]:
    """`attention` node of one graph, planned sparse -> strides that must be restored after it."""
    recorded = {
        node: value
        for node in attention_nodes(gm)
        if _is_rewritten(node) and (value := tensor_of(node.meta["original"])) is not None
    }
    if all(_lies_as(_ours(node, "meta"), value) for node, value in recorded.items()):
        return {}
    replay = _Replay(attention_nodes(gm))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for node in gm.graph.nodes:
            replay.run(node)
    return {node: tuple(map(int, recorded[node].stride())) for node in recorded if node in replay.seen}


def lay_out(node: fx.Node, strides: tuple[int, ...]) -> None:
    """Give all users of a node a copy of it with these strides."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        copy = node.graph.call_function(torch.ops.sparsify.lay_out.default, (node, strides))
    for user in users:
        user.replace_input_with(node, copy)


def _is_rewritten(node: fx.Node) -> bool:
    return node.meta["plan"].method != "dense"


def _ours(node: fx.Node, device: torch.device | str) -> Tensor:
    """A tensor with the strides of a rewritten call's output, [B, H, S, Dv]."""
    site = node.meta["plan"].site
    shape = site.batch, site.q_tokens, site.heads, site.value_dim
    return torch.empty(shape, dtype=getattr(torch, site.dtype), device=device).transpose(1, 2)


def _lies_as(value: Tensor, recorded: Tensor) -> bool:
    """Whether a tensor lies as one that Dynamo recorded. The stride of a dimension of size 1 does not matter."""
    sizes = sizes_of(recorded)
    return (
        sizes == tuple(value.shape)
        and _torch.hint(recorded.storage_offset()) == value.storage_offset()
        and all(
            size == 1 or _torch.hint(wanted) == stride
            for size, wanted, stride in zip(value.shape, recorded.stride(), value.stride(), strict=True)
        )
    )


class _SeenError(Exception):
    """An operator could see how a tensor lies in memory."""


class _Replay:
    """Runs the nodes after rewritten calls, one by one, as long as tensors lie otherwise than recorded."""

    def __init__(self, calls: Iterable[fx.Node]) -> None:
        self.seen: set[fx.Node] = set()
        """The rewritten calls on whose recorded strides a node depends."""
        self._values: dict[fx.Node, Any] = {}
        """Node -> its value, if that lies otherwise than recorded or shares memory with such a value."""
        self._origins: dict[fx.Node, frozenset[fx.Node]] = {}
        """Node -> the rewritten calls from which its value comes."""
        self._otherwise: set[fx.Node] = set()
        """The nodes whose value lies otherwise than recorded, and does not only share memory."""
        self._watch = _Watch()
        self._calls = {node.meta["original"]: node for node in calls}
        self._recorded = {node.meta["result"]: original for original, node in self._calls.items()}

    def run(self, node: fx.Node) -> None:
        """Run a node if it depends on a rewritten call; the nodes come in the order of the graph."""
        if node.target in AUTOCAST:
            args = fx.node.map_arg(node.args, lambda one: self._values.get(one, one))
            self._values[node] = run_call(node, args, {})
        elif node.target is attention:
            if _is_rewritten(node):
                query = tensor_of(node.args[0])
                assert query is not None
                self._keep(node, _ours(node, query.device), frozenset([node]))
        elif (call := self._calls.get(node)) is None or not _is_rewritten(call):
            # Users of a call that stays the model's own still use `result`.
            self._follow(node, node if call is None else call.meta["result"])

    def _follow(self, node: fx.Node, used_as: fx.Node) -> None:
        origins = frozenset().union(*(self._origins.get(one, frozenset()) for one in node.all_input_nodes))
        if not origins:
            return
        try:
            if node.op == "output":
                self._check_output(node)
            else:
                self._keep(used_as, self._result(node), origins)
        except Exception:  # an operator may raise anything where strides differ from those of its trace
            self.seen |= origins

    def _check_output(self, node: fx.Node) -> None:
        """Raise if the caller may see strides, or write into one of two tensors that share memory."""
        given = [one for one in node.all_input_nodes if one in self._values]
        storages = [_storage(one) for value in given for one in tree_leaves(self._values[value])]
        if not self._otherwise.isdisjoint(given) or len(set(storages)) < len(storages):
            raise _SeenError

    def _result(self, node: fx.Node) -> Any:
        if node.op not in ("call_function", "call_method") or isinstance(
            node.target, torch._ops.HigherOrderOperator
        ):
            raise _SeenError
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        self._watch.begin(otherwise=not self._otherwise.isdisjoint(node.all_input_nodes))
        with self._watch:
            return run_call(node, args, kwargs)

    def _value(self, node: fx.Node) -> Any:
        """The kept value of a node, or else the recorded one."""
        return self._values[node] if node in self._values else tree_map(_static, node.meta["example_value"])

    def _keep(self, node: fx.Node, value: Any, origins: frozenset[fx.Node]) -> None:
        """Keep the result of a node if it lies otherwise than recorded, or shares memory with such a value."""
        got, wanted = tree_leaves(value), tree_leaves(value_of(self._recorded.get(node, node)))
        if len(wanted) != len(got):  # nothing is recorded
            wanted = [None] * len(got)
        otherwise = False
        for one, recorded in zip(got, wanted, strict=True):
            if isinstance(one, Tensor):
                otherwise |= not (isinstance(recorded, Tensor) and _lies_as(one, recorded))
            elif recorded is not None and _static(recorded) != one:
                raise _SeenError
        if otherwise or any(map(self._watch.keeps, got)):
            self._values[node], self._origins[node] = value, origins
            self._watch.keep(got)
            if otherwise:
                self._otherwise.add(node)


class _Watch(TorchDispatchMode):
    """Raises where an operator could see how watched tensors lie in memory, or writes to them."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, Tensor] = {}
        """Storage -> a watched tensor in it."""
        self._inside: dict[int, Tensor] = {}
        """Storage -> a tensor made of watched ones within the current node."""
        self._otherwise = False

    def keep(self, values: Iterable[Any]) -> None:
        """Watch these tensors, and all tensors that share memory with them."""
        self._kept |= {_storage(value): value for value in values if isinstance(value, Tensor)}

    def keeps(self, value: Any) -> bool:
        """Whether a value shares memory with a watched tensor."""
        return isinstance(value, Tensor) and _storage(value) in self._kept

    def begin(self, *, otherwise: bool) -> None:
        """Begin a node; `otherwise`: one of its inputs lies otherwise than recorded."""
        self._inside, self._otherwise = {}, otherwise

    def _is_watched(self, value: Any) -> bool:
        return self.keeps(value) or (isinstance(value, Tensor) and _storage(value) in self._inside)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not any(map(self._is_watched, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        namespace, _, name = func._schema.name.partition("::")
        if self._otherwise and (
            namespace not in ("aten", "prim", "prims")
            or name.startswith(_SEES_MEMORY)
            or torch.Tag.nondeterministic_seeded in func.tags  # numbers are drawn in the order of memory
        ):
            raise _SeenError
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(map(self._is_watched, tree_leaves(given.get(argument.name)))):
                raise _SeenError
        result = func(*args, **kwargs)
        self._inside |= {_storage(one): one for one in tree_leaves(result) if isinstance(one, Tensor)}
        return result


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _static(value: Any) -> Any:
    """A value that Dynamo recorded, with plain integers for sizes and strides; raises `_SeenError` without them."""
    if isinstance(value, torch.SymInt):
        if (size := _torch.hint(value)) is None:
            raise _SeenError
        return size
    if not isinstance(value, Tensor):
        return value
    numbers = [_torch.hint(number) for number in (*value.shape, *value.stride(), value.storage_offset())]
    if None in numbers:
        raise _SeenError
    *layout, offset = (number for number in numbers if number is not None)
    sizes, strides = layout[: value.dim()], layout[value.dim() :]
    room = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    return torch.empty(max(room, offset), dtype=value.dtype, device=value.device).as_strided(
        sizes, strides, offset
    )
