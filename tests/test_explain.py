"""`explain`: the plans that compiling would follow, whatever was compiled before; as text and as picture."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as map_rows
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler
from sparsify_compiler import GridError, OptionError, ProviderError, SparsifyError
from sparsify_compiler.explanation import Explanation, density_text, fold
from sparsify_compiler.testing.models import CASES, GRID, TEXT
from sparsify_compiler.testing.videos import Video, latents

OPTIONS = {"method": "tile", "reference_frames": 2}


@pytest.fixture(scope="module")
def explained():
    model, inputs = CASES["hunyuan_video"].build()
    return sparsify_compiler.explain(model, **inputs, options=OPTIONS)


def test_a_compiled_model_is_explained_with_its_own_options():
    model, inputs = Video(1), {"hidden_states": latents(GRID), "timestep": torch.tensor([900.0])}
    explained = sparsify_compiler.explain(model, **inputs, options=OPTIONS)
    compiled = torch.compile(model, backend="sparsify", options=OPTIONS)
    assert str(sparsify_compiler.explain(compiled, **inputs)) == str(explained)
    assert {plan.method for plan in explained.plans} == {"tile"}
    other = sparsify_compiler.explain(compiled, **inputs, options={"method": "dsv"})
    assert "dense until a trainer (DSVTrainer) or a predictor's file" in other.plans[-1].reason
    for plain in (torch.compile(model), model):
        assert {plan.method for plan in sparsify_compiler.explain(plain, **inputs).plans} <= {"keys", "dense"}


class Broken(nn.Module):
    """An attention on either side of a graph break."""

    def forward(self, x):
        y = scaled_dot_product_attention(x, x, x)
        torch._dynamo.graph_break()
        return scaled_dot_product_attention(y, y, y)


def test_plans_carry_what_was_decided(explained):
    assert explained.graphs == 1
    sparse = [plan for plan in explained.plans if plan.method == "tile"]
    assert [plan.site.name for plan in sparse] == [
        *(f"transformer_blocks.{i}.attn" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn" for i in range(2)),
    ]
    for plan in sparse:
        assert (plan.site.kind, plan.layout.grid, plan.layout.after) == ("joint", GRID, TEXT)
        assert plan.provider == "cpu"
    tokens = 5 * 63 + TEXT
    kept = (5 * 5 - 6) * 63**2 + tokens**2 - (5 * 63) ** 2  # all pairs of frames but 6, and all of the text
    assert sparse[0].density == pytest.approx(kept / tokens**2)
    refiner = [plan for plan in explained.plans if plan.method == "dense"]
    assert len(refiner) == 2
    dense = 2 * TEXT**2
    assert explained.density == pytest.approx((4 * kept + dense) / (4 * tokens**2 + dense))


class Attention(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x, x)


class ByHand(nn.Module):
    def forward(self, x):
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights


class Uncompiled(Attention):
    forward = torch.compiler.disable(Attention.forward)


class UncompiledByHand(ByHand):
    forward = torch.compiler.disable(ByHand.forward)


class Rows(nn.Module):
    """Breaks where Dynamo cannot continue after the break: in a generator."""

    def rows(self, x):
        torch._dynamo.graph_break()
        yield scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return next(iter(self.rows(x)))


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.library.custom_op("sparsify_tests::flash_attn", mutates_args=())
def flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q + k + v


flash_attn.register_fake(lambda q, k, v: torch.empty_like(q))


def doubled(score, *_):
    return 2 * score


class Hidden(nn.Module):
    """Attention where the compiler does not rewrite it."""

    def __init__(self):
        super().__init__()
        self.branch, self.returned = Attention(), ByHand()
        self.module = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        y = torch.cond(x.sum() > 0, self.branch, torch.cos, (x,))
        y = y + map_rows(lambda row: scaled_dot_product_attention(row, row, row), x)
        _, y = while_loop(
            lambda i, _: i < 2, lambda i, y: (i + 1, self.branch(y).clone()), (torch.tensor(0), y)
        )
        y = y + Passed.apply(x) + flex_attention(*[x.detach()] * 3, score_mod=doubled)
        y = y + torch.ops.sparsify_tests.flash_attn(x, x, x)
        out, weights = self.returned(y)
        return out, weights, self.module(x[0], x[0], x[0], need_weights=True)


def test_attention_that_is_not_rewritten_is_listed():
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    explained = sparsify_compiler.explain(Hidden().train(), x)
    reasons = {
        "branch": "inside cond, which",
        "branch#2": "inside while_loop, which",
        "returned": "its weights are used elsewhere too",
        "module": "inside nn.MultiheadAttention",
    }
    found = {plan.site.name: plan for plan in explained.plans}
    for name, reason in reasons.items():
        assert reason in found.pop(name).reason
    others = sorted(plan.reason for plan in found.values())
    expected = [
        "a call of flex_attention",
        "a call of sparsify_tests.flash_attn",
        "inside autograd",
        "inside map",
    ]
    assert [other.startswith(one) for other, one in zip(others, expected, strict=True)] == [True] * 4, others
    assert [plan.site.index for plan in explained.plans] == list(range(len(explained.plans)))
    assert "1 graph, 0 of 8 attention calls sparse" in str(explained)
    known = [plan for plan in explained.plans if plan.site.heads]
    assert all((plan.site.q_tokens, plan.site.head_dim) == (8, 16) for plan in known)
    assert len(known) == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_outside_every_graph_is_listed(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Attention(), Uncompiled(), Uncompiled(), Rows()])
            self.returned = UncompiledByHand()

        def forward(self, x):
            for block in self.blocks:
                x = block(x) + 1
            return self.returned(x)

    x = torch.randn(1, 2, 8, 16, device=device)
    explained = sparsify_compiler.explain(Model(), x)
    assert [plan.site.name for plan in explained.outside] == ["blocks.1", "blocks.2", "blocks.3", "returned"]
    sites = [plan.site for plan in explained.outside]
    assert all((site.heads, site.q_tokens, site.kv_tokens, site.value_dim) == (2, 8, 8, 16) for site in sites)
    lines = dict(enumerate(Path(__file__).read_text().splitlines(), 1))
    called = ["scaled_dot_product", "scaled_dot_product", "scaled_dot_product", "weights @ x"]
    for plan, words in zip(explained.outside, called, strict=True):
        place, cause = re.findall(r"test_explain.py:(\d+)", plan.reason)
        assert plan.reason.startswith("outside every graph, at tests/test_explain.py:")
        assert words in lines[int(place)]
        assert "Dynamo ends a graph at tests" in plan.reason
        assert "block(x)" in lines[int(cause)]
        assert "torch.compiler.disable" in plan.reason
    assert "0 of 5 attention calls sparse" in str(explained)
    assert "outside every graph" in str(explained)


def test_a_model_that_is_not_compiled_at_all():
    model = Attention()
    model.forward = torch.compiler.disable(model.forward)
    explained = sparsify_compiler.explain(model, torch.randn(1, 2, 8, 16))
    (plan,) = explained.plans
    assert explained.graphs == 0
    assert "torch.compiler.disable" in plan.reason
    assert "0 graphs, 0 of 1 attention call sparse" in str(explained)


def test_text_folds_layers_and_gives_the_reasons(explained):
    text = str(explained)
    assert "single_transformer_blocks." in text
    assert "{0..1}.attn" in text
    assert "reference_frames=2" in text
    assert f"5x7x9 + {TEXT}" in text
    assert "its mask depends on the query" in text
    assert "1 graph, 4 of 6 attention calls sparse" in text
    assert "Hint" not in text


def test_a_narrow_console_drops_nothing(explained):
    console = Console(width=80, record=True)
    console.print(explained)
    text = console.export_text()
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for name, plan in fold(explained.plans):
        assert name in text
        assert density_text(plan) in text
    text = " ".join(text.split())
    sparse, dense = (next(p for p in explained.plans if p.method == method) for method in ("tile", "dense"))
    assert f"attn: cpu, {sparse.site.heads} x {sparse.site.head_dim}; {sparse.reason}." in text
    assert f"attn: {dense.site.heads} x {dense.site.head_dim}; {dense.reason}." in text


def test_folding_keeps_rows_that_differ_apart(explained):
    plan = explained.plans[-1]
    names = [*(f"down.{i}.blocks.{j}.attn1" for i in range(2) for j in (0, 1, 2, 5)), "down.9.blocks.0.attn1"]
    plans = [replace(plan, site=replace(plan.site, name=name)) for name in names]
    assert [name for name, _ in fold(plans)] == ["down.{0..1}.blocks.{0..2,5}.attn1", "down.9.blocks.0.attn1"]
    other = replace(plans[0], density=0.5, site=replace(plans[0].site, name="down.0.blocks.7.attn1"))
    assert ("down.0.blocks.7.attn1", other) in fold([*plans, other])


def test_picture_is_drawn_to_scale(explained, tmp_path):
    pytest.importorskip("matplotlib")
    path = explained.save_picture(tmp_path / "new" / "masks.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    for bad, says in {
        "masks.nonsense": "must end in one of",
        "masks": "must end in one of",
        "new": "is a folder",
        "new/masks.png/masks.png": "can be written to",
    }.items():
        with pytest.raises(SparsifyError, match=f"cannot save the picture as .*{bad}: .*{says}"):
            explained.save_picture(tmp_path / bad)
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    with pytest.raises(SparsifyError, match="no mask to draw"):
        Explanation(()).save_picture(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"metod": "tile"}, OptionError, "Did you mean 'method'"),
        ({"method": "tile", "reference_frames": 6}, OptionError, "1..5"),
        ({"grid": (5, 7, 8)}, GridError, "multiply"),
        ({"dump": __file__}, OptionError, "dump must be a folder"),
        ({"provider": "triton"}, ProviderError, "TRITON_INTERPRET"),
    ],
)
def test_errors_reach_the_user_as_themselves(options, error, says):
    with pytest.raises(error, match=says) as raised:
        sparsify_compiler.explain(Video(1), latents(GRID), torch.tensor([900.0]), options=options)
    assert type(raised.value) is error
    assert "TORCHDYNAMO" not in str(raised.value)


def test_many_calls_and_shapes_give_the_same():
    for tokens in [*range(8, 18), 8]:  # more than Dynamo's limit of recompiles
        x = torch.randn(1, 2, tokens, 16)
        (plan,) = sparsify_compiler.explain(lambda x: scaled_dot_product_attention(x, x, x), x).plans
        assert plan.site.q_tokens == tokens


def test_graph_breaks_are_followed_every_time():
    x = torch.randn(1, 2, 8, 16)
    for _ in range(10):
        explained = sparsify_compiler.explain(Broken(), x)
        assert (explained.graphs, len(explained.plans)) == (2, 2)
    assert "breaks into several graphs" in str(explained)


@pytest.mark.parametrize("after", ["nothing", "the user's compilation"])
def test_the_users_programs_stay(after):
    """Compiled before: not compiled again. Compiled afterwards: as if nothing had been."""
    compiled = 0

    def counting(gm, _):
        nonlocal compiled
        compiled += 1
        return gm.forward

    torch._dynamo.reset()
    model, x = Broken(), torch.randn(1, 2, 8, 16)
    program = torch.compile(model, backend=counting)
    if after != "nothing":
        program(x)
        assert compiled == 2
    for tokens in (8, 9, 10):
        sparsify_compiler.explain(model, torch.randn(1, 2, tokens, 16))
        sparsify_compiler.explain(program, torch.randn(1, 2, tokens, 16))
    program(x)
    assert compiled == 2


def test_a_model_on_meta_is_planned_for_a_device():
    with torch.device("meta"):
        model, inputs = CASES["wan"].build()
    here = sparsify_compiler.explain(model, **inputs, options=OPTIONS)
    assert "provider reference is slow" in str(here)
    there = sparsify_compiler.explain(model, **inputs, options=OPTIONS, device="cuda:0")
    assert {plan.site.device for plan in there.plans} == {"cuda"}
    assert {plan.provider for plan in there.plans if plan.method == "tile"} == {"triton"}


@pytest.mark.parametrize("device", ["foo", "cuda:", "cuda:x", "meta"])
def test_a_device_is_checked(device):
    with pytest.raises(OptionError, match="must be one of cpu, cuda"):
        sparsify_compiler.explain(Broken(), torch.randn(1, 2, 8, 16), device=device)


def test_training_mode_and_functions():
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    assert len(sparsify_compiler.explain(lambda x: scaled_dot_product_attention(x, x, x), x).plans) == 1
    assert len(sparsify_compiler.explain(Broken().train(), x).plans) == 2


def test_nothing_compiled_is_told():
    explained = sparsify_compiler.explain(torch.compiler.disable(lambda x: x + 1), torch.randn(3))
    assert explained.graphs == 0
    assert "Dynamo compiled nothing" in str(explained)


@pytest.mark.parametrize("model", [None, "wan"])
def test_something_that_cannot_be_called(model):
    with pytest.raises(sparsify_compiler.SparsifyError, match=f"needs a module or function.*got {model!r}"):
        sparsify_compiler.explain(model)
