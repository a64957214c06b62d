"""Private PyTorch API of export, in one place. `_torch.py` has all other private API."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils import _pytree
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map

from sparsify_compiler._torch import quiet


def capture_for_export(
    model: Module, kwargs: Mapping[str, Any], batch: int | None = None
) -> tuple[fx.GraphModule, TreeSpec]:
    """(Dynamo's graph of `model(**kwargs)`, the form of the output whose leaves the graph returns).

    The graph's inputs are the leaves of `kwargs`; the tensors of the model are its attributes. The later capture of
    PyTorch makes them inputs too, which the passes cannot copy. This one is in torch 2.11 and 2.13. It resets
    Dynamo.

    Args:
        batch: the size that stays free where it is the first of a tensor's and the model lets it.
    """
    from torch._dynamo import maybe_mark_dynamic
    from torch._dynamo.functional_export import _dynamo_graph_capture_for_export

    def marked(leaf: Any) -> Any:
        if batch is None or not isinstance(leaf, Tensor) or leaf.shape[:1] != (batch,):
            return leaf
        leaf = leaf.view_as(leaf)  # a mark stays with its tensor
        maybe_mark_dynamic(leaf, 0)
        return leaf

    kwargs = tree_map(marked, dict(kwargs))
    gm = _dynamo_graph_capture_for_export(model)(**kwargs)
    out_spec: Any = gm._out_spec
    for kind in _types_in(out_spec):
        register_class(kind)
    data_of = getattr(torch._C._autograd, "_get_data_attr", None)
    for node in gm.graph.find_nodes(op="call_function", target=data_of):
        node.target = torch.detach  # export sees no operator in `.data`
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.recompile()
    return gm, out_spec


def remove_autocast(gm: fx.GraphModule) -> bool:
    """Remove the parts of a captured graph that turn autocast off, where it is off already. Return whether others
    are left, which turn it on."""
    from torch.amp import autocast_mode

    nodes = gm.graph.find_nodes(op="call_function", target=autocast_mode._enter_autocast)
    for node in nodes:
        enabled = node.args[2] if len(node.args) > 2 else node.kwargs.get("enabled", True)
        if enabled:
            return True
    for node in nodes:
        for end in list(node.users):
            gm.graph.erase_node(end)
        gm.graph.erase_node(node)
    gm.recompile()
    return False


def classes_in(spec: TreeSpec) -> set[str]:
    """The full names of the classes in the form of an output, beyond those that pytrees know."""
    own = {f"{kind.__module__}.{kind.__qualname__}" for kind in _types_in(spec)}
    return {name for name in own if name.split(".")[0] not in ("builtins", "collections", "torch")}


def _types_in(spec: TreeSpec) -> Iterator[type]:
    if spec.type is not None and not spec.is_leaf():
        yield spec.context if _is_named(spec.context) else spec.type
        for child in spec.children():
            yield from _types_in(child)


def _is_named(kind: Any) -> bool:
    """Whether this is a class of named tuples."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def field_names(spec: TreeSpec) -> list[str] | None:
    """The names of the leaves of an output that has a name for each; None if it has not."""
    names = spec.context
    if _is_named(names):
        names = names._fields
    elif dataclasses.is_dataclass(spec.type):
        names = names[0]  # the fields that are not None
    fits = isinstance(names, (list, tuple)) and len(names) == spec.num_leaves
    return list(names) if fits and all(isinstance(name, str) for name in names) else None


def register_class(kind: type) -> bool:
    """Let pytrees save outputs of a dataclass or a class of named tuples, if they cannot yet. Return whether that
    was so."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _is_named(kind) and kind not in _pytree.SUPPORTED_SERIALIZED_TYPES:
        _pytree._register_namedtuple(kind, serialized_type_name=name)
        return True
    if dataclasses.is_dataclass(kind) and kind not in _pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(kind, serialized_type_name=name)
        return True
    return False


def register_classes(output: Any) -> bool:
    """`register_class` for each dataclass in an output."""
    found = {type(leaf) for leaf in tree_leaves(output) if dataclasses.is_dataclass(leaf)}
    registered = [register_class(kind) for kind in found]
    return any(registered)


@contextmanager
def quiet_onnx() -> Iterator[None]:
    """Suppress what the ONNX exporter says about packages that are not installed, outputs that are None, and its
    own use of PyTorch."""
    exporter = "torch.onnx._internal.exporter"
    with (
        quiet(f"{exporter}._registration", logging.ERROR),
        quiet(f"{exporter}._core", logging.ERROR),
        _quiet_copies(),
    ):
        yield


@contextmanager
def _quiet_copies() -> Iterator[None]:
    """Suppress PyTorch's warning of its own use of `LeafSpec`, where it copies a program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        yield


def export_of_batch(
    module: Module, tensors: Sequence[Tensor], of_batch: Sequence[bool]
) -> torch.export.ExportedProgram:
    """A program of torch.export whose batch is free. It is one size for all inputs where the module lets it be.

    Args:
        tensors: examples of the inputs.
        of_batch: whether the first size of each input is that of the batch.
    """
    from torch._dynamo.exc import UserError

    def export(batch: Any) -> torch.export.ExportedProgram:
        shapes = (tuple({0: batch} if free else {} for free in of_batch),)
        return torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=False)

    try:
        return export(torch.export.Dim("batch"))
    except UserError:  # the module fixes the size, or allows a part of the sizes alone
        return export(torch.export.Dim.DYNAMIC)


def save_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Write a program of torch.export whose tensors have memory for one element, without its example inputs."""
    program.example_inputs = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, file)


def load_program(file: Path) -> torch.export.ExportedProgram:
    """Load a program of torch.export. PyTorch logs a traceback before it raises an error, which says enough."""
    with quiet("torch.export"):
        return torch.export.load(file)


def compile_ahead(program: torch.export.ExportedProgram, file: Path) -> set[str]:
    """Write a package of AOTInductor without constants. Return the names of the constants that it needs."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    settings = {"aot_inductor.package_constants_in_so": False}
    with _quiet_copies():
        aoti_compile_and_package(program, package_path=str(file), inductor_configs=settings)
    return set(aoti_load_package(str(file)).get_constant_fqns())


def load_ahead(file: Path, constant: Callable[[str], Tensor]) -> Callable[..., Any]:
    """Load a package that `compile_ahead` wrote. `constant` gives its constants, which are shared, not copied."""
    from torch._inductor import aoti_load_package

    package = aoti_load_package(str(file))
    found = {name: constant(name) for name in package.get_constant_fqns()}
    package.load_constants(found, check_full_update=True, user_managed=True)
    return package


def find_compiler() -> None:
    """Raise Inductor's error if it finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()


def lacks_compiler(error: BaseException) -> bool:
    """Whether Inductor found no C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, (InvalidCxxCompiler, FileNotFoundError)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False
