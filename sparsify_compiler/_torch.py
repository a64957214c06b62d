"""Everything of PyTorch's compiler that is not public API, in one place.

Checked with torch 2.11 and 2.13. `torch._dynamo` is imported where it is used: importing this package must not
cost its import.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from sparsify_compiler.errors import SparsifyError, unknown_choice


def unwrapped(error: SparsifyError) -> SparsifyError:
    """The same error, of a class that Dynamo lets pass through a backend instead of wrapping it."""
    from torch._dynamo.exc import ShortenTraceback

    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    return both(*error.args, first_useful_frame=None)


def check_backend(name: str) -> None:
    """Raise OptionError unless `name` is a backend that the rewritten graph can be given to."""
    from torch._dynamo import list_backends

    known = [backend for backend in list_backends(exclude_tags=()) if backend != "sparsify"]
    if name not in known:
        raise unknown_choice("inner_backend", name, known)


def compile_with(
    backend: str, gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None
) -> Callable[..., Any]:
    """Compile a graph with a registered backend; `mode` goes to Inductor as torch.compile passes it."""
    from torch._dynamo import lookup_backend

    if backend != "inductor":
        return lookup_backend(backend)(gm, example_inputs)
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode not in (None, "default") else None
    return compile_fx(gm, example_inputs, config_patches=patches)
