"""All uses of PyTorch's private compiler API.

Checked with torch 2.11 and 2.13. Functions import `torch._dynamo` themselves, so that importing this package does
not import it.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import timedelta
from functools import partial, wraps
from inspect import signature
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from sparsify_compiler._torch_lock import compile_lock
from sparsify_compiler.errors import SparsifyError, unknown_choice

log = logging.getLogger(__name__)
DIRECTORY = str(Path(torch.__file__).parent)
"""The folder of PyTorch's own files."""


def unwrapped(error: SparsifyError) -> SparsifyError:
    """The same error, in a class that Dynamo does not wrap when a backend raises it."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    through = both(*error.args)
    through.first_useful_frame = None
    return through


def custom_op(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """`torch.library.custom_op` for an op that changes no argument.

    The op of this name in our C++ library (`kernels/cpu/csrc/torch_op.cpp`) gives way, where that is loaded.
    """
    namespace, _, op = name.partition("::")
    ops = getattr(torch.ops, namespace)
    if hasattr(ops, "give_way"):
        ops.give_way(op)
        vars(ops).pop(op, None)  # PyTorch keeps what it has found
    return torch.library.custom_op(name, mutates_args=())


@contextmanager
def running_on(
    device: str, namespace: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Run the custom ops of a namespace by their own functions on a type of device that has none, such as meta.

    wrap: makes the function to run from the function of an op.
    """
    from torch._library.custom_ops import OPDEFS

    key = {"meta": "Meta"}[device]
    library = torch.library.Library(namespace, "IMPL")
    try:
        for name, op in list(OPDEFS.items()):
            space, _, short = name.partition("::")
            if space == namespace:
                library.impl(short, wrap(op._init_fn), key, allow_override=True)
        yield
    finally:
        library._destroy()


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices at least as fast as float32 matrices.

    PyTorch uses oneDNN for them if the CPU has AVX-512 or bfloat16 instructions. Otherwise they run in a plain loop
    and take fifty times as long.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hint(size: Any) -> int | None:
    """The value of a size in this compilation, without a guard on it; None if it is known only at run time."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def known(size: Any) -> int | None:
    """A size that is fixed in this compilation; None if it is free."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def free_sizes(values: Iterable[Any]) -> dict[Any, Any]:
    """Symbol -> size, for every free size of an input and every free input that is a number."""
    found = {}
    for value in values:
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and known(size) is None and size.node.expr.is_Symbol:
                found[size.node.expr] = size
    return found


def resized(value: Any, sizes: Mapping[Any, int]) -> Any:
    """A tensor or number that Dynamo recorded, with these sizes for its symbols; unchanged if it has no symbols."""

    def number(size: Any) -> Any:
        plain = size if isinstance(size, int) else size.node.expr.subs(sizes)
        return int(plain) if isinstance(plain, int) or plain.is_number else size

    if isinstance(value, torch.SymInt):
        return number(value)
    if not isinstance(value, Tensor) or not _is_symbolic(value):
        return value
    numbers = [number(size) for size in (*value.shape, *value.stride())]
    if not all(isinstance(one, int) and one >= 0 for one in numbers):
        return value
    shape, strides = numbers[: value.dim()], numbers[value.dim() :]
    with torch._subclasses.fake_tensor.FakeTensorMode():
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def run_time_symbols(values: Any) -> set[Any]:
    """The symbols of sizes and strides that are known only at run time, for tensors that Dynamo recorded."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    leaves = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and _is_symbolic(leaf)]
    strided = [leaf for leaf in leaves if leaf.layout is torch.strided]
    sizes = [*(leaf.shape for leaf in leaves), *(leaf.stride() for leaf in strided)]
    return set(free_unbacked_symbols([size for some in sizes for size in some]))


def binds(node: fx.Node, symbols: Iterable[Any]) -> bool:
    """Whether a node of Dynamo's graph makes one of these symbols that are known only at run time."""
    bindings = node.meta.get("unbacked_bindings") or {}
    environments = (_environment(leaf) for leaf in tree_leaves(node.meta.get("example_value")))
    known = next((one for one in environments if one is not None), None)
    own = {free for one in bindings for free in (one if known is None else known.replace(one)).free_symbols}
    return not own.isdisjoint(symbols)


def _environment(value: Any) -> Any:
    """The environment of the symbols of a value; None for a value without symbols."""
    if isinstance(value, Tensor):
        sizes = [size for size in value.shape if isinstance(size, torch.SymInt)]
        return _environment(sizes[0]) if sizes else None
    return value.node.shape_env if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) else None


def copy_sources(old: fx.GraphModule, new: fx.GraphModule, inputs: Iterable[tuple[fx.Node, fx.Node]]) -> None:
    """Give a copy of Dynamo's graph what Dynamo says about the sources of its inputs, and about the break after it.

    Args:
        inputs: pairs of an old and a new input.
    """
    for one, other in inputs:
        if (source := getattr(one, "_dynamo_source", None)) is not None:
            other._dynamo_source = source
    if (reason := getattr(old, "compile_subgraph_reason", None)) is not None:
        new.compile_subgraph_reason = reason


@contextmanager
def static_fakes() -> Iterator[Callable[[Tensor], Tensor]]:
    """A mode in which operators run on fake tensors; yields a function that makes them, without free sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with mode:
        yield partial(mode.from_tensor, static_shapes=True)


@contextmanager
def quiet(logger: str, least: int = logging.CRITICAL) -> Iterator[None]:
    """Suppress the records of a logger of PyTorch below a level."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(least)
    try:
        yield
    finally:
        log.setLevel(level)


def quiet_fakes() -> AbstractContextManager[None]:
    """Suppress the log of operators that refuse fake tensors."""
    return quiet("torch._subclasses.fake_tensor")


def _is_symbolic(value: Any) -> bool:
    """Whether a value that Dynamo recorded is a symbol, or a tensor with a symbol as a size or stride."""
    if isinstance(value, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def marked_dynamic(example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Dynamo's name -> size, for input sizes that the user marked dynamic and that are still free."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(list(example_inputs))
    tracked = mode.shape_env.tracked_fakes if mode is not None and mode.shape_env is not None else None
    found = {}
    for one in tracked or ():
        for dim, constraint in enumerate(getattr(one.symbolic_context, "constraint_sizes", None) or ()):
            # If Dynamo itself made a size dynamic, its constraint only warns.
            insists = constraint is not None and not constraint.warn_only
            if insists and known(size := one.fake.shape[dim]) is None:
                found[f"{_name(one.source)}.size({dim})"] = size
    return found


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of these tensors takes part in forward-mode differentiation."""
    forward_ad = torch.autograd.forward_ad
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(one).tangent is not None for one in tensors)


def storage_of(tensor: Tensor) -> int | None:
    """An identifier of the memory of a living tensor, real or fake; None for a tensor without memory."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers of functorch
        return None


def is_transformed(tensor: Tensor | None) -> bool:
    """Whether a tensor belongs to a transform of `torch.func`. Outside of the transform it has other sizes."""
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def weak_storage(tensor: Tensor) -> Any:
    """A reference to the memory of a tensor that does not keep it; None for a tensor without memory.

    Its `expired()` says whether the memory is gone. As long as the reference lives, no other memory gets the
    identifier that `storage_of` returns.
    """
    from torch.multiprocessing.reductions import StorageWeakRef

    return None if storage_of(tensor) is None else StorageWeakRef(tensor.untyped_storage())


def in_backward() -> bool:
    """Whether this thread runs a backward pass."""
    return torch._C._current_graph_task_id() != -1


def source_name(placeholder: fx.Node) -> str:
    """The expression from which Dynamo reads an input, e.g. `L['kwargs']['timestep']`; empty if not recorded."""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else _name(source)


def _name(source: Any) -> str:
    return source.name() if callable(source.name) else source.name


def constant_numbers(chosen: Callable[[str], bool]) -> dict[str, int | float]:
    """Numbers from the caller that Dynamo made constants of the graph that it compiles now.

    Guards fix their values, so another value gets another graph.

    Args:
        chosen: whether the number that this expression reads, e.g. `L['timestep']`, is looked at.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # Dynamo compiles nothing
        return {}
    scope = {"L": output.local_scope, "G": output.global_scope}
    found = {}
    for guard in output.guards:
        name = _name(guard.originating_source)
        if guard.create_fn_name() in ("CONSTANT_MATCH", "EQUALS_MATCH") and chosen(name):
            try:
                value = eval(name, scope)  # as the guard itself reads it
            except Exception as error:  # the guard reads a name that only its own scope has
                log.debug("the value of %s is not known: %s: %s", name, type(error).__name__, error)
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = value
    return found


def is_allowed_in_graph(function: object) -> bool:
    """Whether `torch.compiler.allow_in_graph` makes Dynamo keep a function as one call."""
    from torch._dynamo.trace_rules import is_callable_allowed

    return callable(function) and is_callable_allowed(function)


def is_model_tensor(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def mark_static(placeholder: fx.Node) -> None:
    """Mark an input of a graph whose memory stays where it is, so that CUDA graphs write to it and copy nothing."""
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def _name_sources(gm: fx.GraphModule) -> None:
    """Give a graph the names of sources that Dynamo's own graphs have.

    Without them PyTorch does not read which inputs are static: CUDA graphs would copy all weights at every call,
    and refuse a graph that keeps state.
    """
    from torch._dynamo.source import LocalSource

    tensors = [*gm.named_parameters(), *gm.named_buffers()]
    sources: Any = {name: LocalSource(f"sparsify {name}") for name, _ in tensors}
    gm._param_name_to_source = sources
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = getattr(node, "_dynamo_source", None)


def is_python_number(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a tensor for a float of Python, which changes."""
    return bool(getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False))


def example_like(example_inputs: Sequence[Any], tensor: Tensor) -> Tensor:
    """The tensor as an example input for compilation: fake if the other example inputs are fake."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(list(example_inputs))
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def keep_results(body: fx.GraphModule, ops: Sequence[torch._ops.OpOverload]) -> None:
    """Keep the results of `ops` where backward recomputes `body` (activation checkpointing).

    A policy that the model itself sets for its checkpoints decides about all other operators.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def recompute(*_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    key = "_checkpoint_context_fn"
    given = body.meta.get(key) or partial(create_selective_checkpoint_contexts, recompute)

    def contexts() -> tuple[Any, ...]:
        found: tuple[Any, ...] = given()
        for one in found:
            if hasattr(one, "policy_fn"):
                one.policy_fn = partial(policy, one.policy_fn)
        return found

    def policy(others: Callable[..., Any], context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        return CheckpointPolicy.MUST_SAVE if op in ops else others(context, op, *args, **kwargs)

    body.meta[key] = contexts


class GraphBreak(NamedTuple):
    """The place where Dynamo ended a graph before the end of the code; inside PyTorch, the call into it."""

    file: str
    function: str
    line: int
    why: str
    """Dynamo's reason, on one line."""

    def __str__(self) -> str:
        return f"Dynamo ends a graph at {place_text(self.file, self.line)} ({self.why})"


def place_text(file: str, line: int) -> str:
    """`models/attention.py:57`"""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def graph_breaks() -> list[GraphBreak]:
    """All graph breaks since the process began, or since `torch.compiler.reset`."""
    from torch._dynamo.utils import graph_break_reasons

    return [found for one in graph_break_reasons if (found := _graph_break(one)) is not None]


def graph_break(gm: fx.GraphModule) -> GraphBreak | None:
    """The graph break that ended Dynamo's graph; None if the graph ends with the code."""
    return _graph_break(getattr(gm, "compile_subgraph_reason", None))


def _graph_break(reason: Any) -> GraphBreak | None:
    if reason is None or not reason.graph_break or not reason.user_stack:
        return None
    ours = [place for place in reason.user_stack if not place.filename.startswith(DIRECTORY)]
    place = (ours or reason.user_stack)[-1]
    return GraphBreak(place.filename, place.name, place.lineno, reason.reason.partition("\n")[0].rstrip("."))


def name_body(call: fx.Node, name: str) -> None:
    """Name the body that a call of a nested compile region calls: bodies with the same name are compiled once."""
    if call.target is torch.ops.higher_order.invoke_subgraph:
        call.update_arg(1, name)


def is_last_program() -> bool:
    """Whether the program that is being compiled now reaches Dynamo's recompile limit."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    number = None if compile_id is None else compile_id.frame_compile_id
    return number is not None and number + 1 >= config.recompile_limit


def check_backend(name: str) -> None:
    """Raise OptionError unless `name` is a backend that can compile the rewritten graph."""
    if name in ("inductor", "eager", "aot_eager"):  # without the import of Dynamo, which takes a second
        return
    from torch._dynamo import list_backends

    known = [backend for backend in list_backends(exclude_tags=()) if backend != "sparsify"]
    if not isinstance(name, str) or name not in known:
        raise unknown_choice("inner_backend", name, known)


def compile_with(
    backend: str,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    *,
    offload: Callable[[fx.Graph], Iterable[fx.Node]] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with a registered backend.

    Args:
        mode: for Inductor, as torch.compile passes it.
        offload: for Inductor. It selects the nodes of the joint graph that wait on the host between forward and
            backward.

    When Dynamo has finished, a graph with symbols, or with operators whose bodies may have symbols, gets its own
    environment for them. One thread compiles at a time: PyTorch keeps in globals what it traces.
    """
    with compile_lock():
        return _compile_with(backend, gm, example_inputs, mode, offload)


def _compile_with(
    backend: str,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None,
    offload: Callable[[fx.Graph], Iterable[fx.Node]] | None,
) -> Callable[..., Any]:
    from torch._dynamo import lookup_backend
    from torch._guards import detect_fake_mode

    if detect_fake_mode(list(example_inputs)) is None and _has_symbols(gm):
        with _own_environment(gm, example_inputs) as fakes:
            return _compile_with(backend, gm, fakes, mode, offload)
    if backend != "inductor":
        return lookup_backend(backend)(gm, list(example_inputs))
    from torch._functorch import config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if (
        getattr(gm, "_param_name_to_source", {}) is None
    ):  # left by the cache when it compiled this graph before
        del gm._param_name_to_source
    patches: dict[str, Any] = list_mode_options(mode) if mode not in (None, "default") else {}
    if patches.get("triton.cudagraphs"):
        _name_sources(gm)
    offloading: dict[str, Any] = {}
    if offload is not None:
        patches["joint_custom_post_pass"] = _offloading_pass(offload)
        offloading["enable_activation_offloading"] = True
    with config.patch(offloading):
        compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
    assert callable(compiled)
    return compiled


def _has_symbols(gm: fx.GraphModule) -> bool:
    return any(
        isinstance(node.target, torch._ops.HigherOrderOperator)
        or any(map(_is_symbolic, tree_leaves(node.meta.get("example_value"))))
        for node in gm.graph.nodes
    )


@contextmanager
def _own_environment(gm: fx.GraphModule, inputs: Sequence[Any]) -> Iterator[list[Any]]:
    """Provide a new environment for symbols; yield the inputs as fake tensors of the same sizes."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("unbacked_bindings", None)  # symbols of Dynamo's environment
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield [
            mode.from_tensor(one, static_shapes=True) if isinstance(one, Tensor) else one for one in inputs
        ]


def _offloading_pass(chosen: Callable[[fx.Graph], Iterable[fx.Node]]) -> Callable[[fx.Graph], None]:
    """A pass over Inductor's joint graph that marks the chosen nodes, after the passes that are set already."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch.utils.checkpoint import CheckpointPolicy

    set_already = config.joint_custom_post_pass or ()
    before = set_already if isinstance(set_already, (list, tuple)) else (set_already,)

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for one in before:
                one(graph)
            for node in chosen(graph):
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
                node.meta["should_offload"] = True

        def uuid(self) -> Any:
            return None  # None keeps programs with this pass out of Inductor's cache on disk

    return Pass()


@contextmanager
def tracing(
    backend: Callable[..., Any], function: Callable[..., Any], *, strict: bool = True
) -> Iterator[Callable[..., Any]]:
    """Yield `function` compiled by Dynamo with `backend`, independent of programs compiled before, which stay.

    The calls start from a new code object, which has no programs and no history of recompiles. Dynamo compiles
    the model's own code objects only where a graph breaks. Code objects without other programs are reset at the
    end. The others keep an entry: in a separate region in torch 2.13, next to their own entries in earlier
    versions.

    Args:
        strict: whether an error of Dynamo is raised. Otherwise the code that it is about runs uncompiled, silently.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
    from torch._dynamo import config
    from torch._dynamo.convert_frame import register_bytecode_hook

    def ours(entry: Any) -> bool:
        return getattr(entry.backend, "compiler_fn", entry.backend) is backend

    region = "isolate_recompiles"
    apart: dict[str, Any] = {region: True} if region in signature(torch.compile).parameters else {}
    codes: list[CodeType] = []
    hook = register_bytecode_hook(lambda code, _: codes.append(code))
    fresh = FunctionType(function.__code__.replace(), function.__globals__)
    unlimited = sys.maxsize
    errors = nullcontext() if strict else quiet("torch._dynamo.convert_frame")
    settings = config.patch(
        recompile_limit=unlimited,
        accumulated_recompile_limit=unlimited,
        suppress_errors=not strict,
        allow_empty_graphs=True,
        optimize_ddp=False,  # otherwise a call inside DDP is split at the buckets of gradients
    )
    try:
        with errors, settings:
            yield torch.compile(fresh, backend=backend, dynamic=False, **apart)
    finally:
        hook.remove()
        for code in codes:
            if all(map(ours, _debug_get_cache_entry_list(code))):
                reset_code(code)


@contextmanager
def autocast_on_meta(device_type: str) -> Iterator[None]:
    """Let code ask for autocast on the meta device, which has none: it gets that of `device_type`.

    One thread at a time, with the lock of compilation: of two, the first to leave would put back the change of the
    other.
    """
    from torch.amp.autocast_mode import autocast

    with compile_lock():
        usual = autocast.__init__

        @wraps(usual)  # Dynamo reads the signature
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            asked = signature(usual).bind(self, *args, **kwargs)
            if asked.arguments["device_type"] == "meta":
                asked.arguments["device_type"] = device_type
            usual(*asked.args, **asked.kwargs)

        autocast.__init__ = init  # type: ignore[method-assign]
        try:
            yield
        finally:
            autocast.__init__ = usual  # type: ignore[method-assign]


def compiled_apart(
    function: Callable[..., Any], backend: Callable[..., Any], *, one_graph: bool = False
) -> Callable[..., Any]:
    """`function` compiled from a code object of its own, so that it shares neither programs nor the limit of
    recompiles.

    Args:
        one_graph: whether a call that does not give one graph raises an error, before any of its code runs.
    """
    assert isinstance(function, FunctionType)
    fresh = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(fresh, backend=backend, fullgraph=one_graph)


def why_not_one_graph(error: Exception) -> str | None:
    """The reason why a call did not give one graph; None for an error that says something else."""
    from torch._dynamo import exc

    if isinstance(error, exc.FailOnRecompileLimitHit):
        return "it has as many programs as Dynamo's recompile limit allows"
    # A size that depends on values may be the user's error, in Dynamo's view, and an error of Dynamo ends no call.
    if not isinstance(error, exc.Unsupported | exc.UserError | exc.InternalTorchDynamoError):
        return None
    stack = getattr(error, "real_stack", ())
    ours = [place for place in stack if not place.filename.startswith(DIRECTORY)]
    why = str(getattr(error, "msg", error)).strip().partition("\n")[0].rstrip(".")
    return f"{why} at {place_text(ours[-1].filename, ours[-1].lineno or 0)}" if ours else why


def forget(compiled: Callable[..., Any]) -> None:
    """Drop the programs of what `compiled_apart` returned."""
    from torch._C._dynamo.eval_frame import reset_code

    function: Any = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    reset_code(function.__code__)


class _Settings:
    """Settings of Dynamo that hold during calls.

    Several threads may be in such calls at once. Newer versions of PyTorch have settings for each context; in older
    ones all threads share them, so the last thread to leave puts them back.
    """

    def __init__(self, **settings: Any) -> None:
        self._own = settings
        self._lock = threading.Lock()
        self._changed: list[Callable[[], None]] = []
        """One function for each open call; the first of them puts back the settings of the process."""

    @contextmanager
    def during_call(self, **more: Any) -> Iterator[None]:
        """Set them. `more`: further settings."""
        from torch._dynamo import config

        # `config.patch` would leave a context variable behind at every call.
        settings: Any = config
        change: Callable[[], Callable[[], None]] = settings._make_closure_patcher(**self._own, **more)
        if isinstance(settings._config["recompile_limit"].user_override, ContextVar):
            put_back = change()
            try:
                yield
            finally:
                put_back()
            return
        with self._lock:
            self._changed.append(self._changed[0] if self._changed else change())
        try:
            yield
        finally:
            with self._lock:
                put_back = self._changed.pop()
                if not self._changed:
                    put_back()


_MANY_PROGRAMS = _Settings(allow_empty_graphs=True, skip_nnmodule_hook_guards=False)
_RUN_TIME_SIZES = _Settings(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)


def many_programs() -> AbstractContextManager[None]:
    """Let Dynamo make a program for each of many blocks, and also one that computes nothing.

    Otherwise a call in which a cache skips a block ends the compilation of all blocks. A hook that a script sets on
    a compiled module makes a new program too; Dynamo would ignore it.
    """
    from torch._dynamo import config

    return _MANY_PROGRAMS.during_call(recompile_limit=max(config.recompile_limit, 64))


def run_time_sizes(captured: bool = True) -> AbstractContextManager[None]:
    """Let Dynamo capture operators whose results have sizes that depend on values, instead of ending a graph."""
    return _RUN_TIME_SIZES.during_call() if captured else nullcontext()


def never_compile(function: Callable[..., Any]) -> None:
    """Let Dynamo skip the frames of a function where they are called by others."""
    from torch._dynamo.eval_frame import skip_code

    assert isinstance(function, FunctionType)
    skip_code(function.__code__)


def outside_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` called without Dynamo, also where a compiled caller calls it. Functions that are compiled
    themselves still are where it calls them."""
    import torch._dynamo

    outside: Callable[..., Any] = torch._dynamo.disable(function)
    return outside


def on_compile(ignored: Callable[[Module], bool]) -> None:
    """Let `module.compile()` do nothing where `ignored(module)` is true. Further calls add further conditions."""
    usual = Module.compile

    @wraps(usual)
    def compile(self: Module, *args: Any, **kwargs: Any) -> None:
        if not ignored(self):
            usual(self, *args, **kwargs)

    Module.compile = compile  # type: ignore[method-assign]


def never_compiles(function: Any) -> bool:
    """Whether `torch.compiler.disable` keeps Dynamo from a function and all that it calls."""
    return bool(getattr(function, "_torchdynamo_disable", False))


def check_mode(mode: str | None) -> None:
    """Raise OptionError unless `mode` is a mode of torch.compile."""
    from torch._inductor import list_mode_options

    if mode is not None and mode not in (known := list_mode_options()):
        raise unknown_choice("mode", mode, known)


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that torch.compile got, if `model` is its result; else `model`."""
    return getattr(model, "_orig_mod", model)


class _CompilesNothing:
    """A context of Dynamo, as an `OptimizedModule` needs it, that leaves functions as they are."""

    callback = None

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function


def wrapped(module: Module) -> Module:
    """A module in the wrapper that torch.compile returns, uncompiled: a call of it is a call of the module."""
    from torch._dynamo.eval_frame import OptimizedModule

    nothing: Any = _CompilesNothing()
    return OptimizedModule(module, nothing)


def options_of(model: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The options that torch.compile got, if `model` is the result of it with this backend; else None."""
    from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend

    if isinstance(model, OptimizedModule):
        context: Any = model.dynamo_ctx
    else:  # a function holds its context in a closure only
        cells = getattr(getattr(model, "get_compiler_config", None), "__closure__", None) or ()
        found = (cell.cell_contents for cell in cells)
        context = next((one for one in found if isinstance(one, _TorchDynamoContext)), None)
        if context is None:
            return None
    callback: Any = context.callback
    backend: Any = innermost_backend(callback)
    ours = getattr(backend, "compiler_name", None) == "sparsify"
    return backend.kwargs.get("options") or {} if ours else None


def compiled_like(model: Callable[..., Any], module: Module) -> Callable[..., Any]:
    """`module`, compiled like `model`; unchanged if `model` is not compiled."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule(module, model.dynamo_ctx) if isinstance(model, OptimizedModule) else module


def hooks_under_checkpointing() -> AbstractContextManager[Any]:
    """Let Dynamo trace forward hooks that store an output, also in checkpointed bodies, which otherwise run
    eagerly.

    Dynamo then skips these side effects in the recomputed pass.
    """
    from torch._dynamo import config

    return config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)


def parameters_in_calls(module: Module) -> list[Tensor]:
    """The Parameters of a module, and those that its calls read instead where FSDP2 shards them.

    All ranks call this together where FSDP2 shards.
    """
    found = list(module.parameters())
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule

        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                found += module.parameters()
                part.reshard()
    return list({id(one): one for one in found}.values())


def process_group(name: str) -> Any:
    """The process group with a name."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def all_to_all(
    received: Tensor, sent: Tensor, to_receive: list[int], to_send: list[int], group: str, timeout: float
) -> None:
    """`torch.distributed.all_to_all_single` in the process group with this name, with a timeout of its own.

    Args:
        to_receive, to_send: numbers of elements from and to each rank.
        timeout: in seconds.
    """
    import torch.distributed as dist

    options = dist.AllToAllOptions()
    options.timeout = timedelta(seconds=timeout)
    process_group(group).alltoall_base(received, sent, to_receive, to_send, options).wait()


def copy_to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """(a copy on the CPU, the event after which it is there): nothing waits. On the CPU the event is None."""
    if tensor.device.type == "cpu":
        return tensor.clone(), None
    copy = tensor.to("cpu", non_blocking=True)
    event = torch.Event(tensor.device)
    event.record()
    return copy, event


def wait_for_copy(event: Any) -> None:
    """Wait until the event of `copy_to_host` has come."""
    if event is not None:
        event.synchronize()


def device_of_group(name: str) -> torch.device:
    """A device whose tensors the process group with this name exchanges, the CPU if possible."""
    kinds = [device.type for device in process_group(name)._device_types]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])


def store_of_group(name: str) -> Any:
    """The key-value store of the process group with this name."""
    from torch.distributed.distributed_c10d import _world

    return _world.pg_map[process_group(name)][1]
