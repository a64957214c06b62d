"""The labels that the rule of each ATen operator gives, against what the operator does with moved tokens.

Every size is 3, so that a rule that goes by sizes is found out.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsify_compiler.passes.axes import Cat, Label, Source, axis
from sparsify_compiler.passes.axis_rules import RULES
from sparsify_compiler.passes.axis_tracker import AxisTracker
from sparsify_compiler.passes.axis_writes import Known

aten = torch.ops.aten
NUMBERS = torch.Generator().manual_seed(0)
X, WEIGHT = torch.randn(3, 3, 3, generator=NUMBERS), torch.randn(3, 3, generator=NUMBERS)
KERNEL = torch.randn(3, 3, 1, 1, 1, generator=NUMBERS)

Case = tuple[Callable[[Tensor], object], str]
"""(function of an input, axes of the input that the dimensions of every output run along)

An axis is named by its letter, the first is `a`, a part of it by `A`, one with others before or after it by `[a]`;
`p` is a mesh of positions, `v` an axis of a convolution, `r` a repeat, `_` a blank or one position, `.` something
else. Spaces separate outputs.
"""
CASES: dict[str, Case] = {
    "complex": (lambda x: aten.complex(torch.zeros(3), x), "abc"),
    "where": (lambda x: aten.where(x[0, 0] > 0, x, x), "abc"),
    "copy": (lambda x: aten.copy(torch.zeros(3, 3, 3), aten.permute(x, [2, 0, 1])), "cab"),
    "view": (lambda x: aten.view(aten.permute(x, [2, 0, 1]), [3, 1, 3, 3]), "c_ab"),
    "permute": (lambda x: aten.permute(x, [1, 2, 0]), "bca"),
    "transpose": (lambda x: aten.transpose(x, 0, 2), "cba"),
    "expand": (lambda x: aten.expand(aten.permute(x, [2, 0, 1]), [3, 3, 3, 3]), "rcab"),
    "repeat": (lambda x: aten.repeat(aten.permute(x, [2, 0, 1]), [3, 1, 1, 1]), "rcab"),
    "repeat_interleave": (
        lambda x: aten.view(aten.repeat_interleave(aten.permute(x, [1, 2, 0]), 3, 0), [3, 3, 3, 3]),
        "brca",
    ),
    "slice": (lambda x: (aten.slice(x, 1, 0, 3), aten.slice(x, 0, 0, 3, 2)), "abc .bc"),
    "upsample_nearest1d": (lambda x: aten.upsample_nearest1d(aten.permute(x, [2, 1, 0]), [3]), "cba"),
    "select": (lambda x: aten.select(x, 0, 1), "bc"),
    "unbind": (lambda x: aten.unbind(x, 1), "ac ac ac"),
    "split": (lambda x: aten.split_with_sizes(aten.permute(x, [2, 0, 1]), [1, 2], 1), "cAb cAb"),
    "cat": (lambda x: aten.cat([x.new_zeros(3, 2, 3), aten.permute(x, [2, 0, 1])], 1), "c[a]b"),
    "stack": (lambda x: aten.stack([x, x, x], 1), "a.bc"),
    "constant_pad_nd": (lambda x: aten.constant_pad_nd(aten.permute(x, [2, 0, 1]), [2, 1]), "ca[b]"),
    "replication_pad1d": (lambda x: aten.replication_pad1d(aten.permute(x, [2, 0, 1]), [2, 1]), "ca[b]"),
    "arange": (lambda x: aten.arange(3), "p"),
    "zeros_like": (lambda x: aten.zeros_like(x), "___"),
    "sum": (lambda x: aten.sum(x, [1]), "ac"),
    "amax": (lambda x: aten.amax(x, [0], True), "_bc"),
    "linalg_vector_norm": (lambda x: aten.linalg_vector_norm(x, 2.0, [1]), "ac"),
    "norm": (lambda x: aten.norm.ScalarOpt_dim(x, 2, [0], True), "_bc"),
    "native_group_norm": (lambda x: aten.native_group_norm(x, None, None, 3, 3, 3, 3, 1e-5), "abc .. .."),
    "bmm": (lambda x: aten.bmm(x, aten.transpose(x, 1, 2)), "abb"),
    "addmm": (lambda x: aten.addmm(torch.zeros(3, 3), aten.mean(x, [0]), WEIGHT), "b."),
    "linear": (lambda x: aten.linear(x, WEIGHT), "ab."),
    "embedding": (lambda x: aten.embedding(WEIGHT, (x > 0).long()), "abc."),
    "index": (lambda x: aten.index(WEIGHT, [(x > 0).long()]), "abc."),
    "index of one dimension": (lambda x: aten.index(x, [None, torch.tensor([2, 0])]), "a.c"),
    "index_select": (lambda x: aten.index_select(x, 0, torch.tensor([2, 0])), ".bc"),
    "convolution": (
        lambda x: aten.convolution(
            aten.expand(x, [3, 3, 3, 3, 3]), KERNEL, None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1
        ),
        "r.vvv",
    ),
    "view_as_real": (lambda x: aten.view_as_real(aten.complex(x, x)), "abc."),
    "view_as_complex": (lambda x: aten.view_as_complex(aten.stack([x, x], 3)), "abc"),
    "scaled_dot_product_attention": (
        lambda x: aten._scaled_dot_product_flash_attention_for_cpu(
            x[None], *[aten.expand(WEIGHT, [1, 3, 3, 3])] * 2
        )[0],
        "_ab.",
    ),
}


def named(label: Label, source: Source) -> str:
    """The letter of a dimension."""
    if label == ():
        return "_"
    (factor,) = label
    if isinstance(factor, Cat):
        (inside,) = [part for part in factor.parts if named(part, source) in "abc"]
        return f"[{named(inside, source)}]"
    if factor.source is source:
        letter = "abc"[factor.dim]
        return letter if label == axis(source, factor.dim) else letter.upper()
    kinds = {"position": "p", "conv": "v", "repeat": "r", "blank": "_"}
    return kinds.get(factor.source.kind, ".")


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_rule_names_the_axes_of_its_output(name: str, inference: bool) -> None:
    """In inference mode composite operators such as `linear` reach the rules whole."""
    function, expected = CASES[name]
    tracker, source = AxisTracker(), Source("input", tuple(X.shape))
    for tensor, origin in ((X, source), (WEIGHT, Source("weight", tuple(WEIGHT.shape)))):
        tracker.put(tensor, Known([axis(origin, dim) for dim in range(tensor.dim())]))
    with torch.inference_mode(inference), tracker:
        outputs = tree_leaves(function(X))
    found = ["".join(named(label, source) for label in tracker.of(output)) for output in outputs]
    assert found == expected.split()


@pytest.mark.parametrize("name", CASES)
def test_an_output_moves_with_the_axes_that_are_expected_of_it(name: str) -> None:
    function, expected = CASES[name]
    order = torch.tensor([1, 2, 0])
    for dim, letter in enumerate("abc"):
        moved = tree_leaves(function(X.index_select(dim, order)))
        for axes, output, after in zip(expected.split(), tree_leaves(function(X)), moved, strict=True):
            for at in (at for at, one in enumerate(axes) if one == letter and "[" not in axes):
                output = output.index_select(at, order)
            if letter in axes and "[" not in axes:
                torch.testing.assert_close(after, output)


def test_every_rule_has_a_case() -> None:
    assert {RULES[name] for name in CASES if name in RULES} == set(RULES.values())
