"""Settings of a user's process, and unusual graphs: results are right, or the package raises its own error."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import fresh_dynamo, no_warnings
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop

import sparsify_compiler
from sparsify_compiler import DSVTrainer, methods
from sparsify_compiler.errors import OperandError

pytestmark = [fresh_dynamo, no_warnings]

SMALL: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 2},
    "sta": {"tile": (1, 1, 2), "window": (1, 1, 3)},
    "svg2": {"q_clusters": 4, "kv_clusters": 6},
    "cubes": {"cube": (2, 2, 2), "query_cube": (2, 2, 2)},
    "keys": {"kv_budget": 0.5},
}
"""Options for 3 x 2 x 5 tokens, of methods whose defaults are for more."""

METHODS: dict[str, dict[str, Any]] = {
    name: {"method": name, "dense_layers": 0, "dense_steps": 0, **SMALL.get(name, {})}
    for name in methods.METHODS
    if name not in ("dense", "dsv")
}
"""Every method that is sparse without training."""

VIDEO = torch.randn(2, 4, 3, 4, 10, generator=torch.Generator().manual_seed(0))
NUMBERS = torch.tensor([0, 1, 2])


class Model(nn.Module):
    """Two layers of attention, checkpointed or not."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.conv = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def layer(self, i: int, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = self.layers[i](x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)

    def forward(self, video: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.conv(video).flatten(2).transpose(1, 2)
        for i in range(2):
            if self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(self.layer, i, x, mask, use_reentrant=False)
            else:
                x = self.layer(i, x, mask)
        return x


def compiled(model: Callable[..., Any], inner_backend: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="sparsify", options={"inner_backend": inner_backend} | options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_sparse_here(method: str) -> None:
    """The tests below need it."""
    found = sparsify_compiler.explain(Model(), VIDEO, options=METHODS[method]).plans
    assert [plan.method for plan in found] == [method] * 2, (
        f"give {method} options in SMALL: {found[0].reason}"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_does_not_matter(method: str, dtype: torch.dtype) -> None:
    model = Model()
    wanted = compiled(model, **METHODS[method])(VIDEO)
    torch._dynamo.reset()
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(compiled(model, **METHODS[method])(VIDEO), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


FACTORIES = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace", "logspace"}
"""Functions that make tensors of the default dtype unless a dtype is given."""


@pytest.mark.parametrize("room", ["kernels", "methods", "runtime", "passes", "training"])
def test_no_tensor_is_made_of_the_default_dtype(room: str) -> None:
    for path in (Path(sparsify_compiler.__file__).parent / room).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            made = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
            if made and call.func.attr in FACTORIES and not any(k.arg == "dtype" for k in call.keywords):
                integers = call.func.attr == "full" and path.name in ("tile.py",)  # of a number of tokens
                assert integers, f"{path.name}:{call.lineno} must say its dtype"


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_masks_of_every_dtype(method: str, dtype: torch.dtype, inner_backend: str) -> None:
    """The least number of half precision, which hides a key as far as a row sees another."""
    model, mask = Model().to(dtype), torch.zeros(2, 1, 1, 30, dtype=dtype)
    mask[..., 20:] = torch.finfo(dtype).min
    with torch.no_grad():
        got = compiled(model, inner_backend, **METHODS[method])(VIDEO.to(dtype), mask)
    assert got.dtype == dtype
    assert got.isfinite().all()


@pytest.mark.parametrize("far_field", ["drop", "mean", "linear"])
@pytest.mark.parametrize("method", ["tile", "svg2"])
def test_checkpointing_changes_no_gradient(method: str, far_field: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model = Model(checkpointed=checkpointed)
        compiled(model, **METHODS[method], far_field=far_field)(VIDEO).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_what_is_learnt_under_checkpointing_is_learnt_once() -> None:
    seen = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        model = compiled(Model(checkpointed=checkpointed).train(), method="dsv", rank=4)
        trainer = DSVTrainer(model, break_even=0.9, threshold=1e-6, profile_every=(2, 2))
        for _ in range(2):
            model(VIDEO).square().mean().backward()
            trainer.step()
        seen.append([site.observed.clone() for site in trainer._sites.values()])
    assert seen[0][0].any()
    torch.testing.assert_close(*seen)


def attend(video: Tensor) -> Tensor:
    query, key, value = (
        F.avg_pool3d(video * factor, (1, 2, 2)).flatten(2).transpose(1, 2)[:, None] for factor in (1, 2, 3)
    )
    return F.scaled_dot_product_attention(query, key, value)


GRAPHS: dict[str, Callable[[Tensor], Tensor]] = {
    "while_loop": lambda video: attend(video) * while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.zeros((), dtype=torch.int64), torch.ones(3))
    )[1].sum(),
    "cond": lambda video: torch.cond(video.sum() > 0, torch.sin, torch.cos, (attend(video),)),
    "item": lambda video: attend(video) * NUMBERS.sum().item(),
    "nonzero": lambda video: attend(video) + NUMBERS.nonzero().sum(),
    "mask": lambda video: attend(video)[video.flatten(1).sum(1) > -1e9],
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("options", [{"method": "dense"}, METHODS["tile"]])
def test_graphs_with_sizes_that_only_the_run_knows(name: str, options: dict[str, Any]) -> None:
    """A phase is compiled at the first call, when Dynamo and its symbols are gone."""
    captures = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
    with torch._dynamo.config.patch(captures), torch.no_grad():
        got = compiled(GRAPHS[name], "aot_eager", **options)(VIDEO)
        torch.testing.assert_close(got, GRAPHS[name](VIDEO), rtol=1e-4, atol=1e-5)


def test_derivatives_that_there_are_not() -> None:
    model, video = compiled(Model(), **METHODS["tile"]), VIDEO.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(video).sum(), video, create_graph=True)
    with pytest.raises(OperandError, match="no second derivative"):
        gradient.square().sum().backward()
