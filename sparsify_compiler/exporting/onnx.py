"""Write ONNX: standard operators, and one node for each sparse attention whose body is standard operators too.

    sparsify::BlockSparseAttention(query, key, value, q_bounds, kv_bounds, kv_num_blocks, kv_indices,
                                   q_order, kv_order, key_bias; scale) -> (out, lse)

A runtime inlines the body, or runs a kernel of this name. Bodies of different sites have different overloads.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from sparsify_compiler import _torch, _torch_export
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.exporting.capture import Captured, first_line
from sparsify_compiler.exporting.files import Exported, check_path, onnx_path, plan_of, scratch
from sparsify_compiler.exporting.standard import (
    INPUTS,
    OPERATOR,
    Bodies,
    Body,
    Kind,
    body_of,
    check,
    standard_site,
)
from sparsify_compiler.exporting.state import functional, phases
from sparsify_compiler.kernels import cpu
from sparsify_compiler.passes.fx import modules, node_of
from sparsify_compiler.passes.reports import site_nodes
from sparsify_compiler.plan import AttentionPlan

if TYPE_CHECKING:
    import onnx_ir as ir

OPSETS = (20, 23)
"""Versions of the standard operators. TensorRT reads the first."""

LARGEST = 2_000_000_000
"""Largest size in bytes of the tensors in one file; more go into a file of their own."""


def onnx_file(captured: Captured, path: Path, *, opset: int) -> Exported:
    """Write the sparse phase to `path`, and the dense phase next to it where steps of a generation stay dense.

    Raises:
        OptionError: a method has no form with constant sizes.
        SparsifyError: a library is missing, or an operator has no form in ONNX.
    """
    check_methods(captured)
    own = phases(captured)
    files = [onnx_path(path, phase, own) for phase in own]
    for file in files:
        check_path(file)
        check_path(_data_of(file))
    names: list[str] = []
    with scratch(path) as folder:
        for phase, file in zip(own, files, strict=True):
            names += write_model(captured, phase, folder / file.name, opset)
        _move(folder, path.parent, names)
    return Exported(
        path=path,
        format="onnx",
        plan=captured.plan,
        phases=own,
        size=sum(path.with_name(name).stat().st_size for name in names),
        captured=captured,
    )


def check_methods(captured: Captured) -> None:
    """Raise OptionError unless ONNX has every method, and SparsifyError where a library is missing."""
    for plan in captured.plan.sparse:
        check(plan)
    library()


def write_model(captured: Captured, phase: Any, file: Path, opset: int) -> list[str]:
    """Write the model of a phase, and return the names of its files.

    Raises:
        SparsifyError: the exporter refuses an operator, or makes no valid file.
    """
    ir = library()
    model = _model(captured, phase, opset)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    data = _data_of(file).name if size > LARGEST else None
    ir.save(model, file, external_data=data)
    _check_file(file)
    return [file.name] if data is None else [data, file.name]


def _data_of(file: Path) -> Path:
    """The file of the tensors that have no place in `file`."""
    return file.with_name(f"{file.name}.data")


def _move(folder: Path, target: Path, names: Sequence[str]) -> None:
    """Move files of a folder to another folder, in this order; after an error none is moved.

    Raises:
        OptionError: one exists there.
    """
    files = [check_path(target / name) for name in names]
    moved = []
    try:
        for file in files:
            (folder / file.name).rename(file)
            moved.append(file)
    except BaseException:
        for file in moved:
            file.unlink()
        raise


def onnx_custom_ops() -> Path:
    """The library with which ONNX Runtime runs our C++ kernel in place of the nodes' bodies.

        session_options.register_custom_ops_library(str(sparsify_compiler.onnx_custom_ops()))

    It has nodes of fp32 and fp16 on the CPU, and uses as many threads as OpenMP. A table that does not fit its
    tensors gives NaN. It is built at its first use, as the CPU kernel is.

    Raises:
        SparsifyError: it cannot be built here.
    """
    built = cpu.library.build_info()
    if built.library is None:
        raise SparsifyError(
            f"the library needs a C++ compiler: {first_line(OSError(built.reason))} Install g++; without the "
            "library, ONNX Runtime runs the bodies of the nodes"
        )
    return built.library


def library() -> Any:
    """`onnx_ir`. Raises SparsifyError where a library of the extra `onnx` is missing."""
    try:
        *_, found = map(importlib.import_module, ("onnx", "onnxscript", "onnx_ir"))
    except ImportError as error:
        raise SparsifyError(
            f"format 'onnx' needs the package {error.name}: pip install 'sparsify-compiler[onnx]'"
        ) from error
    return found


def _check_file(file: Path) -> None:
    """Raise SparsifyError unless a file is valid."""
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SparsifyError(
            f"PyTorch's exporter made no valid ONNX of this model: {first_line(error)}"
        ) from error


def _model(captured: Captured, phase: Any, opset: int) -> "ir.Model":
    """The ONNX model of a phase."""
    module = functional(captured, phase)
    bodies = Bodies()
    _standard_sites(module.model, bodies)
    leaves, form = tree_flatten(captured.tensors)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        filled = [given.get(place, leaf) for place, leaf in enumerate(leaves)]
        output, _ = module((), **tree_unflatten(filled, form))
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    model = _exported(
        _Call(module, run),
        [leaves[place] for place in places],
        captured.of_batch,
        captured.input_names,
        captured.output_names,
        opset,
    )
    _spell_out(model)
    _distinguish(model)
    _name_batch(model)
    for number, (plan, kinds) in enumerate(bodies.found.values()):
        function = _function(body_of(plan), kinds, number, opset)
        model.functions[function.identifier()] = function
    model.opset_imports.setdefault(OPERATOR.partition("::")[0], 1)
    model.metadata_props["sparsify-compiler"] = json.dumps(
        plan_of(captured, "onnx", module) | {"phase": phase}
    )
    model.graph.name = type(captured.model).__name__
    return model


def _standard_sites(gm: fx.GraphModule, bodies: Bodies) -> None:
    """Replace the sites of a lowered graph by their form in standard operators."""
    for node in site_nodes(gm):
        plan: AttentionPlan = node.meta["plan"]
        owner = node.graph.owning_module
        setattr(owner, str(node.target), standard_site(plan, bodies))
        node.args = node.args[:4]
    for module in modules(gm):
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.sparsify.lay_out.default):
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.call_method("contiguous", node.args[:1]))
            module.graph.erase_node(node)
        module.recompile()


class _Call(nn.Module):
    """A function of tensors that calls a module."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, *tensors: Tensor) -> Any:
        return self.run(*tensors)


def _exported(
    call: _Call,
    tensors: Sequence[Tensor],
    of_batch: Sequence[bool],
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int,
) -> "ir.Model":
    """The ONNX model of a call.

    Args:
        tensors: examples of the inputs.
        of_batch: whether the first size of each input is that of the batch, and free.
        inputs, outputs: their names.
    """
    with torch.no_grad(), _torch_export.quiet_onnx():
        program = _torch_export.export_of_batch(call, tensors, of_batch)
        if any(map(_is_mistaken, program.graph.nodes)):
            program = program.run_decompositions(_RESPELLED)
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise SparsifyError(
                f"PyTorch's exporter cannot write this model: {first_line(_cause(error))}"
            ) from error
    assert written is not None
    return written.model


def _cause(error: BaseException) -> BaseException:
    """The error that began a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _copied(old: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten.copy` in other operators: PyTorch's exporter to ONNX forgets that it broadcasts."""
    return new.to(old.dtype).expand(old.shape).clone()


def _squeezed(tensor: Tensor, dims: int | Sequence[int] | None = None) -> Tensor:
    """`aten.squeeze` of the sizes that are 1: the operator of ONNX refuses others, PyTorch's leaves them."""
    given = _squeezed_dims(tensor, dims)
    ones = [dim for dim in given if _torch.known(tensor.shape[dim]) == 1]
    if dims is not None and ones == given:
        return NotImplemented
    return tensor.squeeze(ones) if ones else tensor.clone()


def _squeezed_dims(tensor: Tensor, dims: int | Sequence[int] | None) -> list[int]:
    """The dimensions that a squeeze names; all if it names none."""
    named = range(tensor.dim()) if dims is None else [dims] if isinstance(dims, int) else dims
    return [dim % tensor.dim() for dim in named] if tensor.dim() else []


_SQUEEZES = tuple(getattr(torch.ops.aten.squeeze, name) for name in ("default", "dim", "dims"))
_RESPELLED = {torch.ops.aten.copy.default: _copied, **dict.fromkeys(_SQUEEZES, _squeezed)}
"""Operators that PyTorch's exporter to ONNX mistakes, in the form that it does not."""


def _is_mistaken(node: fx.Node) -> bool:
    """Whether PyTorch's exporter to ONNX mistakes a node."""
    if node.target in _SQUEEZES:
        read, *dims = node.args
        before: Tensor = node_of(read).meta["val"]
        named: Any = dims[0] if dims else None
        return before.dim() - node.meta["val"].dim() != len(_squeezed_dims(before, named))
    return node.target in (torch.ops.aten.copy_.default, torch.ops.aten.copy.default)


def _function(body: Body, kinds: Sequence[Kind | None], number: int, opset: int) -> "ir.Function":
    """The body of a node as a function of its inputs. `number`: that of the node."""
    import onnx_ir as ir

    given = {name: kind for name, kind in zip(INPUTS, kinds, strict=True) if kind is not None}

    def run(*tensors: Tensor) -> Any:
        named = dict(zip(given, tensors, strict=True))
        return body(*map(named.get, INPUTS))

    examples = [kind.example() for kind in given.values()]
    free = [None in kind.shape for kind in given.values()]
    graph = _exported(_Call(body, run), examples, free, [*given], ("out", "lse"), opset).graph
    known = {value.name: value for value in graph.inputs}
    graph.inputs[:] = [known.get(name) or ir.Value(name=name) for name in INPUTS]
    for name, value in [*graph.initializers.items()]:  # a function has none
        node = ir.node("Constant", [], {"value": value.const_value}, num_outputs=1)
        node.outputs[0].name = name
        del graph.initializers[name]
        value.replace_all_uses_with(node.outputs[0])
        graph.insert_before(graph[0], node)
    domain, _, name = OPERATOR.partition("::")
    scale = ir.Attr("scale", ir.AttributeType.FLOAT, None)
    function = ir.Function(domain, name, overload_of(number), graph=graph, attributes=[scale])
    function.doc_string = f"{type(body).__name__}: {next(iter((type(body).__doc__ or '').splitlines()), '')}"
    return function


def overload_of(number: int) -> str:
    """The overload of a body: nothing for the first."""
    return str(number) if number else ""


def _spell_out(model: "ir.Model") -> None:
    """Give nodes their overloads, and spell operators that ONNX Runtime lacks by others."""
    import onnx_ir as ir

    domain, _, name = OPERATOR.partition("::")
    for node in [*model.graph]:
        if (node.domain, node.op_type) == (domain, name):
            node.overload = overload_of(node.attributes.pop("body").as_int())
        if node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL:
            _where_of_booleans(node)


def _distinguish(model: "ir.Model") -> None:
    """Rename values inside of a graph that have the name of one of its inputs or outputs."""
    ports = dict.fromkeys((*model.graph.inputs, *model.graph.outputs))
    taken = {value.name for value in ports}
    inside = [*model.graph.initializers.values(), *(one for node in model.graph for one in node.outputs)]
    for value in inside:
        if value not in ports and value.name in taken:
            value.name = f"{value.name}.inside"


def _name_batch(model: "ir.Model") -> None:
    """Name the free size `batch`; PyTorch has names such as `s26`."""
    import onnx_ir as ir

    free = {
        size.value for value in model.graph.inputs for size in value.shape if isinstance(size, ir.SymbolicDim)
    }
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for place, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value in free:
                value.shape[place] = ir.SymbolicDim("batch")


def _where_of_booleans(node: "ir.Node") -> None:
    """Where(c, a, b) of booleans, which ONNX Runtime lacks, as (c and a) or (not c and b)."""
    import onnx_ir as ir

    condition, yes, no = node.inputs
    first = ir.node("And", [condition, yes])
    negated = ir.node("Not", [condition])
    second = ir.node("And", [negated.outputs[0], no])
    either = ir.node("Or", [first.outputs[0], second.outputs[0]])
    graph = node.graph
    graph.insert_before(node, [first, negated, second, either])
    old, new = node.outputs[0], either.outputs[0]
    new.shape, new.type, name = old.shape, old.type, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
