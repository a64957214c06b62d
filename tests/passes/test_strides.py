"""What follows a rewritten attention finds the strides of the model's own call, and pays only if it looks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sparsify_compiler.backend import sparsify
from sparsify_compiler.runtime.program import Program

pytestmark = pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")

SVG2 = {"method": "svg2", "q_clusters": 4, "kv_clusters": 4, "dense_layers": 0, "dense_steps": 0}
EXACT = {"table": {"method": "tile", "reference_frames": 3}, "selected": SVG2 | {"top_p": 1.0}}
"""Options that read every key."""

torch.manual_seed(0)
CONV = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
LINEAR = nn.Linear(16, 16).requires_grad_(False)
VIDEO = torch.randn(2, 4, 3, 4, 10)


@torch.library.custom_op("sparsify_tests::strides_of", mutates_args=())
def strides_of(x: Tensor) -> Tensor:
    return torch.tensor(x.stride())


@strides_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.dim(), dtype=torch.int64)


def write_to_a_copy(out: Tensor) -> tuple[Tensor, Tensor]:
    copy = out.transpose(1, 2).flatten(2)
    copy.add_(1)
    return out + 0, copy


def write_before_reading_a_copy(out: Tensor) -> Tensor:
    copy = out.transpose(1, 2).reshape(2, 30, 16)
    out.mul_(3)
    return copy * 1


def checkpointed(out: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: y.view(-1) * 2, out, use_reentrant=False)


def in_half(out: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return LINEAR(out.transpose(1, 2).flatten(2)).float()


DEPENDS: dict[str, Callable[[Tensor], Any]] = {
    "output": lambda out: out,
    "two outputs of one memory": lambda out: (out.transpose(1, 2).flatten(2), out.transpose(1, 2).flatten(1)),
    "view": lambda out: out.view(4, 30, 8),
    "view of a sum": lambda out: (out * 2 + 1).view(2, -1),
    "view of a part": lambda out: out[0].view(-1),
    "as_strided": lambda out: out.as_strided((2, 8), (1, 3)),
    "as_strided of a product": lambda out: torch.as_strided(out * 2, (4, 4), (4, 1), 5),
    "a kernel of its own": lambda out: torch.ops.sparsify_tests.strides_of(out.exp()),
    "a write to a copy": write_to_a_copy,
    "a write before a copy is read": write_before_reading_a_copy,
    "a body": checkpointed,
    "the strides themselves": lambda out: out * torch.empty_like(out).stride(1),
}

FREE: dict[str, Callable[[Tensor], Any]] = {
    "flatten": lambda out: LINEAR(out.transpose(1, 2).flatten(2)),
    "reshape": lambda out: LINEAR(out.permute(0, 2, 1, 3).reshape(2, -1, 16)),
    "contiguous": lambda out: LINEAR(out.transpose(1, 2).contiguous().view(2, -1, 16)),
    "gate": lambda out: LINEAR((out * out.sigmoid()).transpose(1, 2).flatten(2)),
    "cast": lambda out: LINEAR(out.transpose(1, 2).flatten(2).to(out.dtype)),
    "heads side by side": lambda out: LINEAR(torch.cat(out.unbind(1), -1)),
    "flat output": lambda out: out.transpose(1, 2).flatten(2),
    "einsum": lambda out: torch.einsum("bhsd,hde->bse", out, LINEAR.weight.view(2, 8, 16)),
    "autocast": in_half,
}


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query * 8**-0.5 @ key.mT).softmax(-1) @ value


ATTENTION: dict[str, Callable[..., Tensor]] = {"sdpa": F.scaled_dot_product_attention, "by hand": by_hand}


def model_of(attention: str, after: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Queries lie as [B, H, S, D], and so does the output of the model's own call."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2).contiguous()

    def model(video: Tensor) -> Any:
        x = CONV(video).flatten(2).transpose(1, 2)
        return after(ATTENTION[attention](heads(x.sin()), heads(x.cos()), heads(x)))

    return model


def laid_out(model: Callable[[Tensor], Any], **options: Any) -> int:
    """Copies in the rewritten graph, whose outputs are held to the model's own, in value and in memory."""
    torch._dynamo.reset()
    programs: list[Program] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Program:
        programs.append(sparsify(gm, inputs, options={"inner_backend": "eager"} | options))
        return programs[-1]

    with torch.no_grad():
        got = tree_leaves(torch.compile(model, backend=backend)(VIDEO))
        wanted = tree_leaves(model(VIDEO))
    assert sum(len(program.plan.sparse) for program in programs) == 1
    for one, own in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, own, rtol=1e-3, atol=1e-4)
        assert one.stride() == own.stride()
    graphs = [phase.__self__ for program in programs for phase in program.own.compiled.values()]
    return sum(
        node.target is torch.ops.sparsify.lay_out.default for graph in graphs for node in graph.graph.nodes
    )


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", DEPENDS)
def test_strides_that_somebody_depends_on_are_restored(name: str, attention: str) -> None:
    assert laid_out(model_of(attention, DEPENDS[name]), **EXACT["table"]) == 1


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", FREE)
def test_what_does_not_see_them_copies_nothing(name: str, attention: str) -> None:
    assert laid_out(model_of(attention, FREE[name]), **EXACT["table"]) == 0


@pytest.mark.parametrize(("name", "copies"), [("view", 1), ("flatten", 0)])
def test_a_dynamic_site_too(name: str, copies: int) -> None:
    assert laid_out(model_of("sdpa", (DEPENDS | FREE)[name]), **EXACT["selected"]) == copies


@pytest.mark.parametrize("name", ["view", "as_strided of a product"])
def test_under_inductor(name: str) -> None:
    model = model_of("sdpa", DEPENDS[name])
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(model, backend="sparsify", options=EXACT["table"])(VIDEO)
    torch.testing.assert_close(got, model(VIDEO), rtol=1e-3, atol=1e-4)
