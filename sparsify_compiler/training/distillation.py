"""Knowledge distillation of a sparse student from its dense teacher, after Efficient-vDiT (arXiv 2502.06155).

    student = torch.compile(copy.deepcopy(transformer), backend="sparsify", options={"method": "tile"})
    distillation = Distillation(student, transformer)
    for inputs in data:
        loss = distillation(hidden_states=..., timestep=..., encoder_hidden_states=...)
        (loss.output + loss.attention).backward()
        optimizer.step(); optimizer.zero_grad()

Both models get the same inputs. One loss compares the student's output with the teacher's; the other compares the
output of each attention with that of the same attention in the teacher. Forward hooks take these outputs. Dynamo
traces the hooks, so the outputs are further results of the compiled graph, without a graph break, and gradients
flow through them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sparsify_compiler import _torch
from sparsify_compiler.errors import SparsifyError, unknown_choice
from sparsify_compiler.training.pairs import Model, modules_of


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationLoss:
    """The difference between student and teacher: float32 scalars with gradients."""

    output: Tensor
    """Mean squared difference of the outputs."""
    modules: dict[str, Tensor]
    """Name of an attention -> squared difference of its outputs, relative to the square of the teacher's. So all
    layers have the same weight, whatever the size of their outputs."""

    @property
    def attention(self) -> Tensor:
        """The mean over the modules."""
        return torch.stack(list(self.modules.values())).mean()


class Distillation:
    """Calls a student and its teacher on the same inputs and compares them. It has no state to save."""

    def __init__(self, student: Model, teacher: Model, modules: Sequence[str] | None = None) -> None:
        """Args:
            student: the result of torch.compile, not called in training before: programs compiled before do not
                have the hooks.
            teacher: a model with the same parameters; called without gradients.
            modules: names of the submodules whose outputs are compared. If None, all submodules that call
                scaled_dot_product_attention, found at the first call.

        Raises:
            SparsifyError: one is not a module, their parameters differ or are shared, or a name is unknown.
        """
        self.student, self.teacher = student, teacher
        self._modules = modules_of(student, teacher)
        self._taps = (_Taps(), _Taps())
        self._handles: list[Any] = []
        self.modules: tuple[str, ...] = ()
        """Names of the submodules that are compared."""
        if modules is not None:
            self._compare(modules)

    def __call__(self, **inputs: Any) -> DistillationLoss:
        """Call both models with the same inputs and `return_dict=False`, and compare the first of their results.

        Raises:
            SparsifyError: no attention was found, or the student was compiled too early.
        """
        inputs["return_dict"] = False
        if not self.modules:
            self._compare(attentions(self._modules[1], inputs))
        ours, theirs = self._taps
        with torch.no_grad(), theirs.listening(), _torch.hooks_under_checkpointing():
            expected = self.teacher(**inputs)[0]
        with ours.listening(), _torch.hooks_under_checkpointing():
            found = self.student(**inputs)[0]
        pairs = {name: (ours.outputs.pop(name, []), theirs.outputs.pop(name, [])) for name in self.modules}
        for name, (own, exact) in pairs.items():
            if not exact or len(own) != len(exact):
                raise SparsifyError(
                    f"{name!r} must return the same number of tensors in student and teacher, at least one: "
                    f"got {len(own)} and {len(exact)}. Programs compiled before do not have the hooks: call "
                    "torch.compiler.reset() after making a Distillation of models that ran already"
                )
        return DistillationLoss(
            output=(found.float() - expected.float()).square().mean(),
            modules={name: _relative(own, exact) for name, (own, exact) in pairs.items()},
        )

    def close(self) -> None:
        """Remove the hooks from both models."""
        for handle in self._handles:
            handle.remove()

    def _compare(self, modules: Sequence[str]) -> None:
        names = tuple(dict.fromkeys(modules))
        known = [name for name, _ in self._modules[0].named_modules() if name]
        for name in names:
            if name not in known:
                raise unknown_choice("module", name, known)
        if not names:
            raise SparsifyError(
                "no submodule of the teacher calls scaled_dot_product_attention: name the modules to compare, "
                "e.g. Distillation(student, teacher, modules=['blocks.0.attn1'])"
            )
        for module, taps in zip(self._modules, self._taps, strict=True):
            for name in names:
                hook = partial(taps.take, name)
                self._handles.append(module.get_submodule(name).register_forward_hook(hook))
        self.modules = names


def attentions(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Names of the submodules that directly call scaled_dot_product_attention, found in a call of the model."""
    finder, handles = _Finder(), []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(partial(finder.enter, name)))
            handles.append(module.register_forward_hook(finder.leave))
    try:
        with torch.no_grad(), finder:
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(finder.found)


class _Finder(TorchFunctionMode):
    """Finds the modules that call attention."""

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[str] = []
        self.found: dict[str, None] = {}

    def enter(self, name: str, *_: Any) -> None:
        self.entered.append(name)

    def leave(self, *_: Any) -> None:
        self.entered.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and self.entered:
            self.found[self.entered[-1]] = None
        return func(*args, **kwargs or {})


@dataclass(slots=True)
class _Taps:
    """Takes the outputs of modules while `listens` is set; outputs of a recomputed forward pass are not taken."""

    listens: bool = False
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[None]:
        self.outputs.clear()
        self.listens = True
        try:
            yield
        finally:
            self.listens = False

    def take(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Take the output of a module; a forward hook."""
        if self.listens:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self.outputs.setdefault(name, []).extend(tensors)


def _relative(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Squared difference relative to the square of the expected tensors, over all tensors: float32 scalar."""
    pairs = [(own.float(), exact.float()) for own, exact in zip(found, expected, strict=True)]
    error = torch.stack([(own - exact).square().sum() for own, exact in pairs]).sum()
    size = torch.stack([exact.square().sum() for _, exact in pairs]).sum()
    return error / size.clamp(min=torch.finfo(torch.float32).tiny)
