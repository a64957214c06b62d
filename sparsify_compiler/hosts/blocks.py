"""The repeated blocks of a model, each compiled by itself."""

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsify_compiler import _torch
from sparsify_compiler.names import COMPILED_CALL
from sparsify_compiler.passes.run_time_sizes import NotKnownBefore
from sparsify_compiler.runtime.call import AppliedModel, open_call

log = logging.getLogger("sparsify_compiler")


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


@dataclass(slots=True, eq=False)
class Changes:
    """The hooks in the modules of one `apply`, and the compiled functions that they run. No module is kept."""

    backend: Callable[..., Any]
    hooks: list[tuple["weakref.ref[nn.Module]", Any]] = field(default_factory=list)
    """(module, the object in its `_compiled_call_impl`)."""
    programs: dict[tuple[object, bool], Callable[..., Any]] = field(default_factory=dict)
    """(class of modules, or one module; whether it must be one graph) -> the function that calls it."""

    def put(self, module: nn.Module, hook: Any) -> None:
        """Let a module be called through a hook."""
        module.__dict__[COMPILED_CALL] = hook
        self.hooks.append((weakref.ref(module), hook))

    def compiled(self, what: type | nn.Module, *, one_graph: bool = False) -> Callable[..., Any]:
        """A function that calls the modules of a class, or one module; modules of a class share programs."""
        key = (what if isinstance(what, type) else weakref.ref(what), one_graph)
        if key not in self.programs:
            self.programs[key] = _torch.compiled_apart(call_of, self.backend, one_graph=one_graph)
        return self.programs[key]

    def compile_apart(self, module: nn.Module) -> None:
        """Compile a module by itself."""
        self.put(module, Block(weakref.ref(module), self.compiled(type(module))))

    def take_out(self, modules: Iterable[nn.Module]) -> None:
        """Let calls of these modules run their own code, if their hooks are still there."""
        gone = {id(module) for module in modules}
        kept = []
        for of, hook in self.hooks:
            module = of()
            if module is not None and id(module) not in gone:
                kept.append((of, hook))
            elif module is not None and module.__dict__.get(COMPILED_CALL) is hook:
                del module.__dict__[COMPILED_CALL]
        self.hooks = kept

    def undo(self) -> None:
        """Take out all hooks, and drop the programs."""
        self.take_out([module for of, _ in self.hooks if (module := of()) is not None])
        for program in self.programs.values():
            _torch.forget(program)
        self.programs = {}


class WholeOrBlocks:
    """The call of a model as one graph. After the first call that gives no single graph, the call of its blocks.

    Dynamo finds out before any code of the model runs, so such a call begins anew.
    """

    def __init__(self, model: AppliedModel, changes: Changes, *, by_blocks: bool = True) -> None:
        """Compile nothing yet.

        Args:
            by_blocks: whether blocks are compiled where there is no single graph. Otherwise all graphs are that
                Dynamo makes of the whole model.
        """
        self._model, self._changes, self._by_blocks = model, changes, by_blocks
        self._run = self._as_one_graph

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the model."""
        return self._run(module, args, kwargs)

    def _as_one_graph(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = open_call()
        assert call is not None, "the hook of the model runs this"
        call.as_one_graph = True
        try:
            return self._changes.compiled(module, one_graph=True)(module, args, kwargs)
        except NotKnownBefore as error:
            why: str | None = f"its sizes are known only at run time: {str(error).partition(chr(10))[0]}"
        except Exception as error:
            why = _torch.why_not_one_graph(error)
            if why is None:
                raise
        finally:
            call.as_one_graph = False
        analysis = self._model.analysed(call)
        by_blocks = self._by_blocks and not analysis.failure
        self._model.parts_only = by_blocks
        blocks = repeated_blocks(module) if by_blocks else []
        if by_blocks:
            for block in blocks:
                self._changes.compile_apart(block)
        run = call_of if by_blocks else self._changes.compiled(module)
        try:
            with _torch.run_time_sizes(self._model.captures_sizes):
                result = run(module, args, kwargs)
        except BaseException:  # perhaps the error ended the graph
            self._model.parts_only = False
            if by_blocks:
                self._changes.take_out(blocks)
            raise
        self._run = run
        what = f"{len(blocks)} repeated blocks" if by_blocks else "parts"
        log.info("%s does not give one graph (%s): its %s are compiled", type(module).__name__, why, what)
        return result


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module by its own code."""
    return module._call_impl(*args, **kwargs)
