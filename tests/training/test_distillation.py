"""Knowledge distillation: what is compared, where, and what learns from it."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import fresh_dynamo, needs_diffusers, no_warnings
from torch import Tensor, nn

from sparsify_compiler import Distillation, DistillationLoss, OptionError, SparsifyError
from sparsify_compiler.testing.models import CASES, GRID, Inputs, take_gradients
from sparsify_compiler.testing.oracles import TileAttention
from sparsify_compiler.training.distillation import attentions

pytestmark = [fresh_dynamo, no_warnings]
TILE = {"method": "tile", "reference_frames": 2, "inner_backend": "eager"}
HELD = {
    "wan": [f"blocks.{i}.attn{j}" for i in range(2) for j in (1, 2)],
    "cogvideox": [f"transformer_blocks.{i}.attn1" for i in range(2)],
    "hunyuan_video": [
        *(f"context_embedder.token_refiner.refiner_blocks.{i}.attn" for i in range(2)),
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ],
}
"""The submodules that hold attention, as one reads them in diffusers."""


def pair(family: str = "wan", *, moved: float = 0.0) -> tuple[nn.Module, nn.Module, Inputs]:
    """(student, teacher, inputs), the student's weights moved at random."""
    teacher, inputs = CASES[family].build(GRID, batch=2)
    student = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=moved)
    return student, teacher, inputs


def oracle_mode(family: str) -> TileAttention:
    video = next(site for site in CASES[family].expect(GRID, 2) if site.grid)
    frames, height, width = GRID
    return TileAttention(frames, 2, height * width, before=video.before, after=video.after)


def brute_force(
    student: nn.Module, teacher: nn.Module, inputs: Inputs, family: str, *, sparse: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Both models run eagerly, with hooks of their own, under the mask's definition."""
    seen: list[dict[str, Any]] = []
    for model, mode in (
        (student, oracle_mode(family) if sparse else nullcontext()),
        (teacher, nullcontext()),
    ):
        outputs: dict[str, Any] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name, outputs=outputs: outputs.update({name: output})
            )
            for name in HELD[family]
        ]
        with mode:
            outputs["out"] = model(**inputs)[0]
        for handle in handles:
            handle.remove()
        seen.append(outputs)
    found, expected = seen
    losses = {}
    for name in HELD[family]:
        parts = [
            [
                part.flatten()
                for part in (output if isinstance(output, tuple) else (output,))
                if part is not None
            ]
            for output in (found[name], expected[name])
        ]
        ours, theirs = (torch.cat(part) for part in parts)
        losses[name] = (ours - theirs.detach()).norm() ** 2 / theirs.detach().norm() ** 2
    return F.mse_loss(found["out"], expected["out"].detach()), losses


def assert_same_gradients(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == exact.keys()
    for name, gradient in exact.items():
        error, size = (got[name] - gradient).abs().max(), gradient.abs().max()
        assert error <= 1e-3 * size or size < 1e-8, name


@needs_diffusers
@pytest.mark.parametrize(
    ("family", "inner"),
    [("wan", "aot_eager"), ("cogvideox", "eager"), ("hunyuan_video", "eager")],
)
def test_losses_and_gradients_of_a_sparse_student_are_those_of_eager_hooks(family: str, inner: str) -> None:
    student, teacher, inputs = pair(family, moved=0.02)
    output, modules = brute_force(student, teacher, inputs, family, sparse=True)
    (output + torch.stack(list(modules.values())).mean()).backward()
    expected = take_gradients(student)
    options = TILE | {"inner_backend": inner}
    fast = torch.compile(student, backend="sparsify", options=options, fullgraph=True)
    distillation = Distillation(fast, teacher)
    for _ in range(2):
        loss = distillation(**inputs)
        assert list(distillation.modules) == list(loss.modules)
        assert sorted(distillation.modules) == sorted(HELD[family])
        torch.testing.assert_close(loss.output, output, atol=0, rtol=1e-4)
        for name, exact in modules.items():
            torch.testing.assert_close(loss.modules[name], exact, atol=1e-8, rtol=1e-4)
        (loss.output + loss.attention).backward()
        assert_same_gradients(take_gradients(student), expected)
        assert not take_gradients(teacher)


@needs_diffusers
def test_with_activation_checkpointing_it_is_the_same() -> None:
    """The hooks sit in the bodies of higher-order operators, whose recomputation must not be heard."""
    found = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        student, teacher, inputs = pair(moved=0.02)
        student.train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        fast = torch.compile(student, backend="sparsify", options=TILE, fullgraph=True)
        distillation = Distillation(fast, teacher)
        for _ in range(2):
            loss = distillation(**inputs)
            (loss.output + loss.attention).backward()
            found.append((loss.output, loss.attention, take_gradients(student)))
    output, attention, expected = found[0]
    for other_output, other_attention, got in found[1:]:
        torch.testing.assert_close(other_output, output)
        torch.testing.assert_close(other_attention, attention)
        assert_same_gradients(got, expected)


@needs_diffusers
def test_a_student_that_reads_everything_loses_nothing_and_learns_nothing() -> None:
    """k = F: the kernel of sparse attention, with every block listed; and to the bit where both run the same."""
    student, teacher, inputs = pair()
    options = TILE | {"reference_frames": GRID[0]}
    loss = Distillation(torch.compile(student, backend="sparsify", options=options), teacher)(**inputs)
    (loss.output + loss.attention).backward()
    scale = teacher(**inputs)[0].square().mean()
    assert loss.output < 1e-10 * scale
    assert all(one < 1e-10 for one in loss.modules.values())
    assert all(gradient.abs().max() < 1e-3 for gradient in take_gradients(student).values())

    dense_options = {"method": "dense", "inner_backend": "eager"}
    dense = torch.compile(copy.deepcopy(teacher), backend="sparsify", options=dense_options)
    exact = Distillation(dense, teacher)(**inputs)
    (exact.output + exact.attention).backward()
    assert exact.output == exact.attention == 0
    assert not any(gradient.any() for gradient in take_gradients(dense).values())


@needs_diffusers
def test_the_gradient_reaches_all_of_the_student_and_none_of_the_teacher() -> None:
    student, teacher, inputs = pair()
    loss = Distillation(torch.compile(student, backend="sparsify", options=TILE), teacher)(**inputs)
    loss.output.backward(retain_graph=True)
    from_output = take_gradients(student)
    assert from_output.keys() == {name for name, _ in student.named_parameters()}
    loss.modules["blocks.0.attn1"].backward()
    reached = take_gradients(student)
    assert reached["blocks.0.attn1.to_q.weight"].any()
    assert not any(gradient.any() for name, gradient in reached.items() if "blocks.1." in name)
    assert not take_gradients(teacher)


@needs_diffusers
def test_distilling_brings_the_student_nearer() -> None:
    student, teacher, inputs = pair(moved=0.05)
    distillation = Distillation(torch.compile(student, backend="sparsify", options=TILE), teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    losses: list[DistillationLoss] = []
    for _ in range(30):
        losses.append(distillation(**inputs))
        (losses[-1].output + losses[-1].attention).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1].output < losses[0].output / 2
    assert losses[-1].attention < losses[0].attention / 2


@needs_diffusers
def test_a_resumed_run_has_the_same_losses() -> None:
    """Distillation has no state: the student's and the optimizer's are all."""
    student, teacher, inputs = pair()
    fast = torch.compile(student, backend="sparsify", options=TILE)

    def losses(distillation: Distillation, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        found = []
        for _ in range(2):
            loss = distillation(**inputs)
            (loss.output + loss.attention).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append((loss.output + loss.attention).detach())
        return found

    distillation, optimizer = Distillation(fast, teacher), torch.optim.Adam(student.parameters())
    losses(distillation, optimizer)
    saved = copy.deepcopy([student.state_dict(), optimizer.state_dict()])
    expected = losses(distillation, optimizer)
    student.load_state_dict(saved[0])
    optimizer = torch.optim.Adam(student.parameters())
    optimizer.load_state_dict(saved[1])
    assert losses(distillation, optimizer) == expected


@needs_diffusers
def test_inference_between_steps_neither_sees_nor_keeps_anything() -> None:
    student, teacher, inputs = pair(moved=0.02)
    fast = torch.compile(student, backend="sparsify", options=TILE, fullgraph=True)
    distillation = Distillation(fast, teacher, ["blocks.1.attn1"])
    first = distillation(**inputs)
    with torch.no_grad():
        before = fast(**inputs)[0]
    second = distillation(**inputs)
    assert torch.equal(first.attention, second.attention)
    assert list(second.modules) == ["blocks.1.attn1"]
    assert not any(taps.outputs for taps in distillation._taps)
    distillation.close()
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(fast(**inputs)[0], before)


class Twice(nn.Module):
    """One attention module called twice, inside another; and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()
        self.plain = nn.Linear(4, 4)

    def forward(self, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.plain(self.inner(self.inner(x))),)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(x, x, x))


def test_a_module_that_is_called_twice_is_compared_twice() -> None:
    torch.manual_seed(0)
    teacher, x = Twice(), torch.randn(1, 2, 5, 4)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.inner.out.bias)
    found = Distillation(student, teacher)(x=x)
    assert attentions(teacher, {"x": x}) == ["inner"]
    outputs = []
    for model in (student, teacher):
        first = model.inner(x)
        outputs.append(torch.cat([first, model.inner(first)]))
    error = (outputs[0] - outputs[1]).norm() ** 2 / outputs[1].norm() ** 2
    torch.testing.assert_close(found.modules, {"inner": error})


# Messages to the user


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown module 'iner': .*Did you mean 'inner'\?"):
        Distillation(Twice(), Twice(), ["iner"])


def test_models_without_attention_are_told_to_name_modules() -> None:
    class Plain(Twice):
        def forward(self, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.plain(x),)

    for modules in (None, []):
        with pytest.raises(
            SparsifyError, match="no submodule of the teacher calls scaled_dot_product_attention"
        ):
            Distillation(Plain(), Plain(), modules)(x=torch.zeros(1, 4))


def test_a_module_that_is_never_called_is_told() -> None:
    class Part(Twice):
        def forward(self, x: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (self.inner(x),)

    with pytest.raises(SparsifyError, match=r"'plain' must return the same number .* got 0 and 0"):
        Distillation(Part(), Part(), ["plain"])(x=torch.zeros(1, 2, 5, 4))


def test_a_student_that_was_compiled_before_is_told() -> None:
    teacher, x = Twice(), torch.randn(1, 2, 5, 4)
    student = torch.compile(copy.deepcopy(teacher), backend="eager")
    student(x=x, return_dict=False)[0].sum().backward()
    distillation = Distillation(student, teacher)
    with pytest.raises(SparsifyError, match=r"got 0 and 2\. .* torch.compiler.reset\(\)"):
        distillation(x=x)
    torch.compiler.reset()
    assert distillation(x=x).output == 0


def test_a_teacher_of_other_parameters_is_refused() -> None:
    with pytest.raises(SparsifyError, match="student and teacher must have the same parameters"):
        Distillation(Twice(), Attention())
