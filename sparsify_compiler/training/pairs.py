"""A student and its teacher: the requirements of every kind of distillation."""

from collections.abc import Callable
from typing import Any

from torch import nn

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError

Model = Callable[..., Any]
"""A module, compiled or not, that is called as diffusers calls its transformers."""


def modules_of(student: Model, teacher: Model) -> tuple[nn.Module, nn.Module]:
    """The modules of the two models, without torch.compile.

    Raises:
        SparsifyError: one is not a module; their parameters differ in name or shape; they share one that learns.
    """
    pair = []
    for role, model in (("student", student), ("teacher", teacher)):
        module = _torch.uncompiled(model)
        if not isinstance(module, nn.Module):
            raise SparsifyError(f"{role} must be a module, got {type(module).__name__}")
        pair.append(module)
    learner, guide = pair
    shapes, expected = ({name: p.shape for name, p in m.named_parameters()} for m in pair)
    if shapes != expected:
        odd = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
        got, there = (_size(found.get(odd[0])) for found in (shapes, expected))
        raise SparsifyError(
            f"student and teacher must have the same parameters: {len(odd)} differ in name or shape, {odd[0]!r} "
            f"first, {got} in the student and {there} in the teacher. Start the student as a copy of the teacher"
        )
    fixed = {id(p) for p in guide.parameters()}
    shared = [name for name, p in learner.named_parameters() if p.requires_grad and id(p) in fixed]
    if shared:
        raise SparsifyError(
            f"the teacher must not change while the student learns, but they share {len(shared)} parameters, "
            f"{shared[0]!r} first: give a copy, e.g. copy.deepcopy(teacher)"
        )
    return learner, guide


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"
