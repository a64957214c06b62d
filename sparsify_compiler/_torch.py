"""Everything of PyTorch's compiler that is not public API, in one place.

Checked with torch 2.11 and 2.13. `torch._dynamo` is imported where it is used: importing this package must
not cost its import.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import signature
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module

from sparsify_compiler.errors import SparsifyError, unknown_choice


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


def source_name(placeholder: fx.Node) -> str:
    """Where Dynamo reads an input from, e.g. `L['kwargs']['timestep']`; empty if it is not recorded."""
    source = getattr(placeholder, "_dynamo_source", None)
    name = "" if source is None else source.name
    return name() if callable(name) else name


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
    """
    from torch._dynamo import lookup_backend

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
    backend: Any = innermost_backend(model.dynamo_ctx.callback)  # type: ignore[arg-type]
    ours = getattr(backend, "compiler_name", None) == "sparsify"
    return backend.kwargs.get("options") if ours else None


def compiled_like(model: Callable[..., Any], module: Module) -> Callable[..., Any]:
    """`module` compiled as `model` was by torch.compile; itself where `model` was not."""
    from torch._dynamo.eval_frame import OptimizedModule

    return OptimizedModule(module, model.dynamo_ctx) if isinstance(model, OptimizedModule) else module


def hooks_under_checkpointing() -> AbstractContextManager[Any]:
    """Inside, Dynamo traces forward hooks that put an output aside in checkpointed bodies as well, which it else
    leaves to eager. It then leaves such effects out of the recomputed pass."""
    from torch._dynamo import config

    return config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
