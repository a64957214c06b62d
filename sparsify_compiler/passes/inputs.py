"""Find the inputs of a graph that identify a call: the model, the time step, and all others."""

import re

from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.passes.fx import recorded, tensor_of
from sparsify_compiler.runtime.program import Inputs

_TIME = re.compile(r"timesteps?|time|t|sigmas?|noise_levels?")
"""The names that models use for their time step."""


def find_inputs(gm: fx.GraphModule) -> Inputs:
    """Sort the inputs of a Dynamo graph.

    The time step is the tensor with such a name. No other decision looks at a name: nothing else distinguishes a
    time step from a frame rate or a guidance strength. Captured positional arguments have no name; there the time
    step is the only input that is a number, or one number for each video of the batch.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    owner, given = None, []
    for i, node in enumerate(placeholders):
        if not isinstance(tensor_of(node), Tensor):
            continue
        if not _torch.is_model_tensor(node):
            given.append(i)
        elif owner is None and isinstance(node.meta["example_value"], nn.Parameter):
            owner = i
    named = [i for i in given if _TIME.fullmatch(_last_name(_torch.source_name(placeholders[i])))]
    numbers = [i for i in given if recorded(placeholders[i]).dim() <= 1]
    time = named[0] if named else numbers[0] if len(numbers) == 1 else None
    return Inputs(owner=owner, time=time, others={placeholders[i].name: i for i in given if i != time})


def _last_name(source: str) -> str:
    """`timestep` for `L['kwargs']['timestep']` and `L['self'].timestep`; empty for other endings."""
    match = re.search(r"(?:\['(\w+)'\]|\.(\w+))$", source)
    return (match[1] or match[2]).lower() if match else ""
