"""Attention that runs outside every graph that Dynamo captures, found while it runs, by its operators."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sparsify_compiler import _torch
from sparsify_compiler.names import ROOT, without_wrappers
from sparsify_compiler.passes.capture import is_attention_kernel
from sparsify_compiler.plan import AttentionPlan, AttentionSite, TokenLayout

_PRODUCTS = (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
_SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_DOORS = tuple(str(Path(__file__).parent / name) for name in ("explanation.py", "hosts/whole.py"))
"""The files that call the model."""
_PASSES = str(Path(__file__).with_name("passes"))
_NOT_THE_MODEL = (__file__, *_DOORS, _PASSES, _torch.DIRECTORY, "<")
"""Beginnings of the files whose frames are not the model's."""


class BetweenGraphs(TorchDispatchMode):
    """A mode that sees the operators outside of graphs. Dynamo compiles as without the mode."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._in_graph = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: otherwise Dynamo compiles nothing under a mode."""
        return True

    @contextmanager
    def in_graph(self) -> Iterator[None]:
        """Mark the code inside as part of a graph that Dynamo captured."""
        self._in_graph += 1
        try:
            yield
        finally:
            self._in_graph -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._in_graph or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **(kwargs or {}))
        return self.seen(func, types, args, kwargs or {})

    def seen(self, func: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that is in no graph."""
        raise NotImplementedError


class Uncompiled(BetweenGraphs):
    """A mode that records every attention that runs outside of graphs."""

    def __init__(self, model: object) -> None:
        super().__init__()
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        self._modules = {id(module): without_wrappers(name) for name, module in modules}
        self._breaks = len(_torch.graph_breaks())
        self._names: dict[str, int] = {}
        self._known: Any = WeakIdKeyDictionary()
        """Tensor -> `scores` or `weights`."""
        self.plans: list[AttentionPlan] = []

    def seen(self, func: torch._ops.OpOverload, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator, and record it if it is, or completes, attention."""
        out = func(*args, **kwargs)
        self._note(func, [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], out)
        return out

    def _note(self, func: torch._ops.OpOverload, tensors: Sequence[Tensor], out: Any) -> None:
        """Record a call of an operator: a product computes scores, and a softmax turns them into weights."""
        if is_attention_kernel(str(func)) and tensors:
            sizes = [tuple(tensor.shape) for tensor in tensors[:3]]
            known = "_scaled_dot_product" in str(func) and all(len(one) == 4 for one in sizes)
            self._add(tensors[0], sizes if known else [])
            return
        if not isinstance(out, Tensor):
            return
        kinds = [self._known[one] for one in tensors if one in self._known and one.numel() == out.numel()]
        kind = kinds[0] if kinds else ""
        if func in _PRODUCTS:
            weights, value = tensors[-2:]
            if self._known.get(weights) == "weights":
                heads, queries, keys = weights.shape
                channels = value.shape[-1]
                self._add(value, [(1, heads, queries, channels), *[(1, heads, keys, channels)] * 2])
            kind = "scores"
        elif func in _SOFTMAXES:
            kind = "weights" if kind == "scores" else ""
        if kind:
            self._known[out] = kind

    def _add(self, tensor: Tensor, sizes: Sequence[tuple[int, ...]]) -> None:
        frames = list(_frames(sys._getframe(1)))
        owners = (
            id(one.f_locals.get(argument))
            for one in frames
            for argument in one.f_code.co_varnames[: one.f_code.co_argcount]
        )
        name = next((self._modules[owner] for owner in owners if owner in self._modules), "") or ROOT
        self._names[name] = self._names.get(name, 0) + 1
        (batch, heads, queries, channels), (_, kv_heads, keys, _), (*_, value_channels) = (
            sizes or [(0,) * 4] * 3
        )
        site = AttentionSite(
            name=name if self._names[name] == 1 else f"{name}#{self._names[name]}",
            index=len(self.plans),
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_tokens=queries,
            kv_tokens=keys,
            head_dim=channels,
            value_dim=value_channels,
            dtype=str(tensor.dtype).removeprefix("torch."),
            device=tensor.device.type,
            scale=0.0,
            refusal=self._why(frames),
        )
        layout = TokenLayout(tokens=queries)
        self.plans.append(AttentionPlan(site=site, layout=layout, method="dense", reason=site.refusal))

    def _why(self, frames: Sequence[FrameType]) -> str:
        """Args:
        frames: the frames that lead to the attention, innermost first.
        """
        breaks = _torch.graph_breaks()[self._breaks :]
        places = [(one.f_code.co_filename, one.f_code.co_name, one.f_lineno) for one in frames]
        causes = [
            *(str(one) for file, _, line in places for one in breaks if (one.file, one.line) == (file, line)),
            # Dynamo does not compile a function at all if it cannot continue after a break in the middle.
            *(
                str(one)
                for file, name, _ in places
                for one in breaks
                if one.file == file and one.function in name
            ),
            *(f"the model is not compiled ({one.why})" for one in breaks if one.file in _DOORS),
        ]
        file, _, line = places[0]
        return ": ".join([f"outside every graph, at {_torch.place_text(file, line)}", *causes[:1]])


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of the model that lead to a frame, innermost first."""
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            yield frame
        frame = frame.f_back
