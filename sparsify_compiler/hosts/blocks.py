"""The repeated blocks of a model, each compiled by itself."""

import logging
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from sparsify_compiler import _torch
from sparsify_compiler.runtime.call import AppliedModel, open_call

log = logging.getLogger("sparsify_compiler")
CALL = "_compiled_call_impl"
"""The attribute of a module that PyTorch calls in place of the module's own call."""


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The modules of all lists in which a class occurs, outermost lists only."""
    found: list[nn.Module] = []

    def walk(one: nn.Module) -> None:
        for child in one.children():
            if isinstance(child, nn.ModuleList) and len(child) and any(True for _ in child[0].children()):
                found.extend(child)
            else:
                walk(child)

    walk(module)
    return found


class Block:
    """The call of a block that is compiled by itself."""

    def __init__(self, module: "weakref.ref[nn.Module]", run: Callable[..., Any]) -> None:
        self.module, self.run = module, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block."""
        return self.run(self.module(), args, kwargs)


class Blocks:
    """The repeated blocks of a model. Blocks of one class share their programs."""

    def __init__(self, blocks: list[nn.Module], backend: Callable[..., Any]) -> None:
        compiled = {kind: _torch.compiled_apart(call_of, backend) for kind in map(type, blocks)}
        self.hooks = [(block, Block(weakref.ref(block), compiled[type(block)])) for block in blocks]
        self.programs = list(compiled.values())

    def put_in(self) -> None:
        """Let calls of the blocks run what is compiled."""
        for block, hook in self.hooks:
            block.__dict__[CALL] = hook

    def take_out(self) -> None:
        """Let calls of the blocks run their own code."""
        for block, hook in self.hooks:
            if block.__dict__.get(CALL) is hook:
                del block.__dict__[CALL]


class WholeOrBlocks:
    """The call of a model as one graph. After the first call that gives no single graph, the call of its blocks.

    Dynamo finds out before any code of the model runs, so such a call begins anew.
    """

    def __init__(self, model: AppliedModel, blocks: Blocks, backend: Callable[..., Any]) -> None:
        self._model, self._blocks = model, blocks
        self._whole = _torch.compiled_apart(call_of, backend, one_graph=True)
        self._in_parts = _torch.compiled_apart(call_of, backend)
        self._run = self._as_one_graph
        self.programs = [self._whole, self._in_parts, *blocks.programs]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        return self._run(module, args, kwargs)

    def _as_one_graph(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._whole(module, args, kwargs)
        except Exception as error:
            why = _torch.why_not_one_graph(error)
            if why is None:
                raise
        call = open_call()
        assert call is not None, "the hook of the model runs this"
        by_blocks = not self._model.analysed(call).failure
        self._model.parts_only = by_blocks
        if by_blocks:
            self._blocks.put_in()
        run = call_of if by_blocks else self._in_parts
        try:
            result = run(module, args, kwargs)
        except BaseException:  # perhaps the error ended the graph
            self._model.parts_only = False
            self._blocks.take_out()
            raise
        self._run = run
        what = f"{len(self._blocks.hooks)} repeated blocks" if by_blocks else "parts"
        log.info("%s does not give one graph (%s): its %s are compiled", type(module).__name__, why, what)
        return result


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module by its own code."""
    return module._call_impl(*args, **kwargs)
