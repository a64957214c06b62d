"""Find the inputs of a graph that identify a call: the model, the time step, and all others."""

import re
from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.names import TIME_STEP
from sparsify_compiler.passes.fx import recorded, tensor_of, value_of
from sparsify_compiler.runtime.program import Inputs

_SIZE = re.compile(r"time|t")
"""Names of a time step that are names of a number of frames too."""


def find_inputs(gm: fx.GraphModule) -> Inputs:
    """Sort the inputs of a Dynamo graph.

    The time step is the tensor with such a name, or else the number with such a name. No other decision looks at a
    name: nothing else distinguishes a time step from a frame rate or a guidance strength. Dynamo makes a number of
    Python a constant of the first graph and an input of the later ones. Captured positional arguments have no name;
    there the time step is the only input that is a number, or one number for each video of the batch.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    owner, given, numbers = None, [], []
    for i, node in enumerate(placeholders):
        if not isinstance(tensor_of(node), Tensor):
            if isinstance(value_of(node), (torch.SymInt, torch.SymFloat)):
                numbers.append(i)
        elif not _torch.is_model_tensor(node):
            given.append(i)
        elif owner is None and isinstance(node.meta["example_value"], nn.Parameter):
            owner = i
    sizes = {_torch.hint(size) for i in given for size in recorded(placeholders[i]).shape}
    names = {i: _last_name(_torch.source_name(placeholders[i])) for i in (*given, *numbers)}
    time = next((i for i in given if TIME_STEP.fullmatch(names[i])), None)
    constant = None
    if time is None:
        time = next((i for i in numbers if _is_time(names[i], _number(placeholders[i]), sizes)), None)
    if time is None:
        constants = _torch.constant_numbers(lambda name: TIME_STEP.fullmatch(_last_name(name)) is not None)
        constant = next(
            (float(one) for name, one in constants.items() if _is_time(_last_name(name), one, sizes)), None
        )
    if time is None and constant is None:
        alone = [i for i in given if recorded(placeholders[i]).dim() <= 1]
        time = alone[0] if len(alone) == 1 else None
    others = {placeholders[i].name: i for i in given if i != time}
    of_python = frozenset(i for i in given if _torch.is_python_number(placeholders[i]))
    return Inputs(owner=owner, time=time, others=others, constant_time=constant, numbers=of_python)


def _is_time(name: str, value: float | None, sizes: Collection[int | None]) -> bool:
    """Whether a number of this name is a time step, and no number of frames."""
    if not TIME_STEP.fullmatch(name):
        return False
    return not (_SIZE.fullmatch(name) and isinstance(value, int) and value in sizes)


def _number(placeholder: fx.Node) -> int | None:
    """The value of an integer input in this compilation; None for another input."""
    value = value_of(placeholder)
    return _torch.hint(value) if isinstance(value, torch.SymInt) else None


def _last_name(source: str) -> str:
    """`timestep` for `L['kwargs']['timestep']` and `L['self'].timestep`; empty for other endings."""
    match = re.search(r"(?:\['(\w+)'\]|\.(\w+))$", source)
    return (match[1] or match[2]).lower() if match else ""
