"""Find out which inputs of a graph tell what call this is: the model, the time step, and all the rest."""

import re

from torch import Tensor, fx, nn

from sparsify_compiler import _torch
from sparsify_compiler.names import TIME_STEP
from sparsify_compiler.passes.fx import tensor_of
from sparsify_compiler.runtime.program import Inputs


def find_inputs(gm: fx.GraphModule) -> Inputs:
    """Sort the inputs of a Dynamo graph.

    The time step is the tensor of that name: the one decision that looks at a name, since nothing else sets a time
    step apart from a frame rate or a guidance strength. Positional arguments that were captured have no name:
    there it is the only input that is a number, or a number for each video of the batch.
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
    named = [i for i in given if TIME_STEP.fullmatch(_last_name(_torch.source_name(placeholders[i])))]
    numbers = [i for i in given if tensor_of(placeholders[i]).dim() <= 1]  # type: ignore[union-attr]
    time = named[0] if named else numbers[0] if len(numbers) == 1 else None
    return Inputs(owner=owner, time=time, others={placeholders[i].name: i for i in given if i != time})


def _last_name(source: str) -> str:
    """`timestep` of `L['kwargs']['timestep']` and of `L['self'].timestep`; empty if it ends otherwise."""
    match = re.search(r"(?:\['(\w+)'\]|\.(\w+))$", source)
    return (match[1] or match[2]).lower() if match else ""
