"""Everything of PyTorch's compiler that is not public API, in one place.

Checked with torch 2.11 and 2.13. `torch._dynamo` is imported where it is used: importing this package must
not cost its import.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils._pytree import tree_leaves

from sparsify_compiler.errors import SparsifyError, unknown_choice

DIRECTORY = str(Path(torch.__file__).parent)
"""Of PyTorch's own files."""


def unwrapped(error: SparsifyError) -> SparsifyError:
    """The same error, of a class that Dynamo lets pass through a backend instead of wrapping it."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    through = both(*error.args)
    through.first_useful_frame = None
    return through


def multiplies_bfloat16() -> bool:
    """Whether this CPU's products of bfloat16 matrices are as fast as those of float32, at least.

    PyTorch hands them to oneDNN where the CPU has AVX-512 or bfloat16 instructions. Elsewhere they run in a plain
    loop, and take fifty times as long.
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def hint(size: Any) -> int | None:
    """The value a size has in this compilation, without guarding on it; None if it is known only at run time."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None


def known(size: Any) -> int | None:
    """A size that is fixed in this compilation; None if it is free."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def free_sizes(values: Iterable[Any]) -> dict[Any, Any]:
    """Symbol -> size, of all sizes of inputs, and numbers that are inputs, that are free."""
    found = {}
    for value in values:
        for size in value.shape if isinstance(value, Tensor) else (value,):
            if isinstance(size, torch.SymInt) and known(size) is None and size.node.expr.is_Symbol:
                found[size.node.expr] = size
    return found


def resized(value: Any, sizes: Mapping[Any, int]) -> Any:
    """What Dynamo recorded, a tensor or number, where symbols have these sizes; as it is where it has no such."""

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


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Inside, an operator that refuses fake tensors logs nothing."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _is_symbolic(value: Any) -> bool:
    """Whether a value that Dynamo recorded is a symbol, or a tensor that has one for a size or stride."""
    if isinstance(value, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def marked_dynamic(example_inputs: Sequence[Any]) -> dict[str, Any]:
    """Sizes of inputs that the user marked dynamic and that are free so far, by what Dynamo calls them."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(list(example_inputs))
    tracked = mode.shape_env.tracked_fakes if mode is not None and mode.shape_env is not None else None
    found = {}
    for one in tracked or ():
        for dim, constraint in enumerate(getattr(one.symbolic_context, "constraint_sizes", None) or ()):
            # A size that Dynamo itself made dynamic has a constraint that only warns.
            insists = constraint is not None and not constraint.warn_only
            if insists and known(size := one.fake.shape[dim]) is None:
                found[f"{_name(one.source)}.size({dim})"] = size
    return found


def has_tangent(*tensors: Tensor) -> bool:
    """Whether forward-mode differentiation goes through one of these."""
    forward_ad = torch.autograd.forward_ad
    level = forward_ad._current_level
    return level >= 0 and any(forward_ad.unpack_dual(one).tangent is not None for one in tensors)


def storage_of(tensor: Tensor) -> int | None:
    """What tells the memory of a tensor, real or fake, from others while it lives; None where it has none."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse tensors, wrappers of functorch
        return None


def is_transformed(tensor: Tensor | None) -> bool:
    """Whether a tensor lives in a transform of `torch.func`; outside of it it has other sizes."""
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo reads an input from, e.g. `L['kwargs']['timestep']`; empty if it is not recorded."""
    source = getattr(placeholder, "_dynamo_source", None)
    return "" if source is None else _name(source)


def _name(source: Any) -> str:
    return source.name() if callable(source.name) else source.name


def is_model_tensor(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer of a module."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def example_like(example_inputs: Sequence[Any], tensor: Tensor) -> Tensor:
    """A tensor to compile for, of the kind that the other example inputs are: fake where these are."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode(list(example_inputs))
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def keep_results(body: fx.GraphModule, ops: Sequence[torch._ops.OpOverload]) -> None:
    """Where `body` is recomputed in backward (activation checkpointing), the results of `ops` are kept instead.

    Says nothing where the model already says what is to be kept.
    """
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE

    body.meta.setdefault("_checkpoint_context_fn", partial(create_selective_checkpoint_contexts, policy))


class GraphBreak(NamedTuple):
    """Where Dynamo ended a graph before the end of the code; of calls into PyTorch, where PyTorch is called."""

    file: str
    function: str
    line: int
    why: str
    """In Dynamo's words, on one line."""

    def __str__(self) -> str:
        return f"Dynamo ends a graph at {place_text(self.file, self.line)} ({self.why})"


def place_text(file: str, line: int) -> str:
    """`models/attention.py:57`"""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def graph_breaks() -> list[GraphBreak]:
    """All since the process began, or `torch.compiler.reset`."""
    from torch._dynamo.utils import graph_break_reasons

    return [found for one in graph_break_reasons if (found := _graph_break(one)) is not None]


def graph_break(gm: fx.GraphModule) -> GraphBreak | None:
    """What ended Dynamo's graph; None where that is the end of the code."""
    return _graph_break(getattr(gm, "compile_subgraph_reason", None))


def _graph_break(reason: Any) -> GraphBreak | None:
    if reason is None or not reason.graph_break or not reason.user_stack:
        return None
    ours = [place for place in reason.user_stack if not place.filename.startswith(DIRECTORY)]
    place = (ours or reason.user_stack)[-1]
    return GraphBreak(place.filename, place.name, place.lineno, reason.reason.partition("\n")[0].rstrip("."))


def name_body(call: fx.Node, name: str) -> None:
    """Tell a call of a nested compile region which body it calls: bodies of one name are compiled once."""
    if call.target is torch.ops.higher_order.invoke_subgraph:
        call.update_arg(1, name)


def is_last_program() -> bool:
    """Whether Dynamo's recompile limit is reached with the program that is being compiled now."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    compile_id = CompileContext.current_compile_id()
    number = None if compile_id is None else compile_id.frame_compile_id
    return number is not None and number + 1 >= config.recompile_limit


def check_backend(name: str) -> None:
    """Raise OptionError unless `name` is a backend that the rewritten graph can be given to."""
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
        mode: goes to Inductor as torch.compile passes it.
        offload: of Inductor: which nodes of the joint graph wait on the host between forward and backward.

    After Dynamo is done, a graph that has symbols, or operators whose bodies may have some, gets an environment for
    them of its own.
    """
    from torch._dynamo import lookup_backend
    from torch._guards import detect_fake_mode

    if detect_fake_mode(list(example_inputs)) is None and _has_symbols(gm):
        with _own_environment(gm, example_inputs) as fakes:
            return compile_with(backend, gm, fakes, mode, offload=offload)
    if backend != "inductor":
        return lookup_backend(backend)(gm, list(example_inputs))
    from torch._functorch import config
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches: dict[str, Any] = list_mode_options(mode) if mode not in (None, "default") else {}
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
    """The inputs as fake tensors of the sizes that they have, and inside what Dynamo has for symbols."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            node.meta.pop("unbacked_bindings", None)  # of the environment that Dynamo had
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(mode)):
        yield [
            mode.from_tensor(one, static_shapes=True) if isinstance(one, Tensor) else one for one in inputs
        ]


def _offloading_pass(chosen: Callable[[fx.Graph], Iterable[fx.Node]]) -> Callable[[fx.Graph], None]:
    """What marks the nodes chosen, as Inductor takes a pass over the joint graph, after those that it has."""
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
            return None  # which keeps programs with this pass out of Inductor's cache on disk

    return Pass()


@contextmanager
def tracing(backend: Callable[..., Any], function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Inside, `function` through Dynamo with `backend`, whatever was compiled before and leaving it as it was.

    The calls start from a code object of its own, which has neither programs nor a history of recompiles.
    Only where a graph breaks does Dynamo compile the model's own code objects: those that carry no other
    program are cleaned again, the others keep an entry in a region apart (torch 2.13; before, beside theirs).
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
    try:
        with config.patch(
            recompile_limit=unlimited, accumulated_recompile_limit=unlimited, suppress_errors=False
        ):
            yield torch.compile(fresh, backend=backend, dynamic=False, **apart)
    finally:
        hook.remove()
        for code in codes:
            if all(map(ours, _debug_get_cache_entry_list(code))):
                reset_code(code)


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that torch.compile was given, where `model` is what it gave back."""
    return getattr(model, "_orig_mod", model)


def options_of(model: Callable[..., Any]) -> Mapping[str, Any] | None:
    """The options that torch.compile was given, where `model` is a module that it gave back for this backend."""
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    if not isinstance(model, OptimizedModule):
        return None
    callback: Any = model.dynamo_ctx.callback
    backend: Any = innermost_backend(callback)
    ours = getattr(backend, "compiler_name", None) == "sparsify"
    return backend.kwargs.get("options") or {} if ours else None


def compiled_like(model: Callable[..., Any], module: Module) -> Callable[..., Any]:
    """`module` compiled as `model` was by torch.compile; itself where `model` was not."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule(module, model.dynamo_ctx) if isinstance(model, OptimizedModule) else module


def hooks_under_checkpointing() -> AbstractContextManager[Any]:
    """Inside, Dynamo traces forward hooks that put an output aside in checkpointed bodies as well, which it else
    leaves to eager. It then leaves such effects out of the recomputed pass."""
    from torch._dynamo import config

    return config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
