"""Whole models through the backend: plans, outputs, and messages to the user."""

import copy
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from marks import fresh_dynamo, needs_diffusers, no_warnings
from recorder import Recorder
from torch import Tensor, fx, nn

from sparsify_compiler import OptionError, SparsifyError, SparsifyWarning, explain, stats
from sparsify_compiler.backend import configure, sparsify
from sparsify_compiler.errors import warn_once
from sparsify_compiler.methods import METHODS
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.fx import modules
from sparsify_compiler.passes.planning import graph_plan
from sparsify_compiler.plan import AttentionPlan, GraphPlan
from sparsify_compiler.runtime.program import Program
from sparsify_compiler.testing.dits import Attend, Recipe, recipes
from sparsify_compiler.testing.models import CASES, GRID, Expected, Grid, Inputs
from sparsify_compiler.testing.oracles import TileAttention, relative_error

SIX = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
"""The families named by the project; the others are there to show that nothing was fitted to these."""

REPEATS = {name: () if name in ("cogvideox", "allegro") else (pytest.mark.nightly,) for name in SIX}
"""Marks of the six models for tests that compute almost the same on all of them: joint attention after text and
with masked tokens are in every run, the other four in the nightly run."""

KINDS = [pytest.param(name, marks=marks) for name, marks in REPEATS.items()]

pytestmark = [fresh_dynamo, no_warnings]

Eager = Callable[..., Any]


def planned(
    model: nn.Module, inputs: Inputs, see: Callable[[fx.GraphModule], None] | None = None
) -> list[GraphPlan]:
    """The plans of every graph of a forward, which itself runs eagerly. `see` is shown each graph before."""
    plans: list[GraphPlan] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Eager:
        if see:
            see(gm)
        plans.append(plan_of(gm))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    return plans


def plan_of(gm: fx.GraphModule) -> GraphPlan:
    return graph_plan(pipeline.analyse(gm, configure({"method": "tile"})))


def layout_of(plan: AttentionPlan) -> tuple[Grid | None, int, int]:
    if plan.method == "dense":
        return None, 0, 0
    return plan.layout.grid, plan.layout.before, plan.layout.after


def expected_layout(site: Expected) -> tuple[Grid | None, int, int]:
    return (site.grid, site.before, site.after) if site.grid else (None, 0, 0)


def oracle_for(sites: list[Expected], reference_frames: int) -> TileAttention:
    video = next(site for site in sites if site.grid)
    frames, height, width = video.grid
    return TileAttention(frames, reference_frames, height * width, before=video.before, after=video.after)


# Plans


WHOLE = (*SIX, "wan_i2v", "hunyuan_video_i2v", "cogvideox_rope", "cogvideox_15", "skyreels_v2", "wan_vace", "ltx2",
         "wan_animate", "chronoedit", "anyflow", "helios", "consisid", "cosmos", "kandinsky5")  # fmt: skip
"""Cases in which every attention is planned right; in the others none is planned wrong."""


@needs_diffusers
@pytest.mark.parametrize("name", CASES)
def test_every_family_is_planned_right_or_dense(name: str) -> None:
    grid = (4, 6, 10) if name in SIX[::2] else GRID
    model, inputs = CASES[name].build(grid, batch=2)
    expected = CASES[name].expect(grid, 2)
    plans = [plan for graph in planned(model, inputs) for plan in graph]
    right = [expected_layout(site) for site in expected]
    if name in WHOLE:
        assert [layout_of(plan) for plan in plans] == right
        kinds = [(plan.site.kind, site.kind) for plan, site in zip(plans, expected, strict=True) if site.grid]
        assert all(kind == wanted for kind, wanted in kinds)
    elif len(plans) == len(right):
        for plan, layout in zip(plans, right, strict=True):
            assert layout_of(plan) in (layout, (None, 0, 0)), plan
    else:  # after a graph break calls share a program or stay outside of every graph: only the set compares
        assert {layout_of(plan) for plan in plans} <= {*right, (None, 0, 0)}
    assert all(plan.reason for plan in plans)


@pytest.mark.parametrize("examples", [25, pytest.param(200, marks=pytest.mark.nightly)])
def test_random_dits_never_get_a_wrong_grid(examples: int) -> None:
    given(recipes())(
        settings(max_examples=examples, suppress_health_check=list(HealthCheck))(has_no_wrong_grid)
    )()


def has_no_wrong_grid(recipe: Recipe) -> None:
    torch._dynamo.reset()
    model, inputs = recipe.build(0)
    recorder = Recorder(reference_frames=0.5)
    compiled = torch.compile(model, backend=recorder)(**inputs)
    expected = recipe.expect()
    assert len(recorder.plans) == len(expected)
    for plan, site in zip(recorder.plans, expected, strict=True):
        assert layout_of(plan) in (expected_layout(site), (None, 0, 0)), plan
    if not recorder.programs[0].plan.sparse and recipe.trap != "dropout":
        assert torch.equal(compiled, model(**inputs))


@needs_diffusers
@pytest.mark.parametrize("name", SIX)
def test_names_do_not_matter(name: str) -> None:
    """Every name a graph carries over from the model is replaced: inputs, attributes, modules, values."""

    nameless: list[GraphPlan] = []

    def without_names(original: fx.GraphModule) -> None:
        gm = copy.deepcopy(original)
        for module in modules(gm):
            for i, node in enumerate(module.graph.nodes):
                node.name = f"n{i}"
                for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "tensor_dict", "grapharg"):
                    node.meta.pop(key, None)
                if node.op == "placeholder":
                    node.target, node._dynamo_source = f"n{i}", None
            module.recompile()
        nameless.append(plan_of(gm))

    def content(graphs: list[GraphPlan]) -> list[Any]:
        return [
            (plan.site.index, plan.site.kind, plan.layout, plan.layout.reason, plan.settings, plan.density)
            for graph in graphs
            for plan in graph
        ]

    model, inputs = CASES[name].build()
    known = planned(model, inputs, see=without_names)
    assert content(nameless) == content(known)


@needs_diffusers
def test_grid_from_options_where_the_graph_does_not_show_it() -> None:
    """Blocks compiled one by one see packed tokens and ready rotary tables: no grid, until the user gives it."""
    model, inputs = CASES["wan"].build()
    block_inputs: list[Any] = []
    block: Any = model.blocks[0]
    block.register_forward_pre_hook(
        lambda _, args, kwargs: block_inputs.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        block._forward_pre_hooks.clear()
        args, kwargs = block_inputs[0]
        for grid, layout in ((None, (None, 0, 0)), (GRID, (GRID, 0, 0))):
            torch._dynamo.reset()
            recorder = Recorder(**({} if grid is None else {"grid": grid}))
            torch.compile(block, backend=recorder)(*args, **kwargs)
            assert layout_of(recorder.plans[0]) == layout
    assert "options={'grid'" in recorder.plans[0].layout.reason or recorder.plans[0].layout.grid == GRID


# What comes out


@needs_diffusers
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param(name, batch, marks=REPEATS[name] if batch == 1 else ())
        for batch in (1, 2)
        for name in SIX
    ],
)
@torch.no_grad()
def test_output_equals_the_masked_model(name: str, batch: int) -> None:
    model, inputs = CASES[name].build(batch=batch)
    sites = CASES[name].expect(batch=batch)
    with oracle_for(sites, 2):
        exact = model(**inputs)[0]
    recorder = Recorder()
    out = torch.compile(model, backend=recorder, fullgraph=True)(**inputs)[0]
    assert relative_error(out, exact) < 1e-5
    assert relative_error(model(**inputs)[0], exact) > 1e-3  # the mask matters
    assert len(recorder.programs) == 1
    assert sum(plan.method == "tile" for plan in recorder.plans) == sum(
        site.grid is not None for site in sites
    )


@needs_diffusers
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_all_frames_as_reference_equal_eager(name: str) -> None:
    model, inputs = CASES[name].build()
    recorder = Recorder(reference_frames=GRID[0])
    out = torch.compile(model, backend=recorder)(**inputs)[0]
    assert all(plan.density == 1.0 for plan in recorder.plans)
    assert any(plan.method == "tile" for plan in recorder.plans)
    assert relative_error(out, model(**inputs)[0]) < 1e-5


@needs_diffusers
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_inductor_equals_the_masked_model(name: str) -> None:
    model, inputs = CASES[name].build()
    with oracle_for(CASES[name].expect(), 2):
        exact = model(**inputs)[0]
    options = {"method": "tile", "reference_frames": 2}
    out = torch.compile(model, backend="sparsify", options=options, fullgraph=True)(**inputs)[0]
    assert relative_error(out, exact) < 2e-5


@needs_diffusers
def test_training_through_gradient_checkpointing() -> None:
    """The attention sits in the bodies of higher-order operators, and its tables reach it there."""
    gradients = []
    for compiled in (False, True):
        model, inputs = CASES["wan"].build()
        model.train()
        model.enable_gradient_checkpointing()
        recorder = Recorder(inner_backend="aot_eager")
        if compiled:
            torch.compile(model, backend=recorder)(**inputs)[0].square().mean().backward()
            assert [plan.method for plan in recorder.plans] == ["tile", "dense"] * 2
        else:
            model.disable_gradient_checkpointing()
            with oracle_for(CASES["wan"].expect(), 2):
                model(**inputs)[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    exact, got = gradients
    assert got.keys() == exact.keys()
    for name, gradient in exact.items():
        assert relative_error(got[name], gradient) < 1e-3 or gradient.abs().max() < 1e-8, name


@needs_diffusers
@torch.no_grad()
def test_autocast_computes_attention_in_its_type() -> None:
    model, inputs = CASES["wan"].build()
    with oracle_for(CASES["wan"].expect(), 2):
        exact = model(**inputs)[0]
        with torch.autocast("cpu", torch.bfloat16):
            eager = model(**inputs)[0].float()
    recorder = Recorder(inner_backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(model, backend=recorder)(**inputs)[0].float()
    assert recorder.plans[0].site.dtype == "bfloat16"
    assert relative_error(out, exact) <= 2 * relative_error(eager, exact)


@needs_diffusers
@pytest.mark.parametrize("name", ["wan", "ltx"])
@torch.no_grad()
def test_each_resolution_has_its_own_tables(name: str) -> None:
    """Two grids of one product: Dynamo would share a program with symbolic sizes, a layout must not."""
    grids: list[Grid] = [(5, 7, 9), (7, 5, 9), (5, 7, 9)]
    recorder = Recorder(reference_frames=3)
    model, _ = CASES[name].build()
    compiled = torch.compile(model, backend=recorder)
    for grid in grids:
        _, inputs = CASES[name].build(grid)
        with oracle_for(CASES[name].expect(grid), 3):
            exact = model(**inputs)[0]
        assert relative_error(compiled(**inputs)[0], exact) < 1e-5
    assert len(recorder.programs) == 2
    assert [program.plan.plans[0].layout.grid for program in recorder.programs] == grids[:2]


# Messages to the user


VIDEO = torch.randn(1, 4, 4, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refernce_frames": 2}, ["option 'refernce_frames'", "Did you mean 'reference_frames'?", "grid"]),
        (
            {"method": "tiles"},
            ["method 'tiles'", ", ".join(sorted(METHODS)), "Did you mean 'tile'?"],
        ),
        (
            {"method": "dense", "reference_frames": 2},
            ["'reference_frames' belongs to method 'tile'", "dense"],
        ),
        ({"method": "tile", "reference_frames": 9}, ["reference_frames must be in 1..4", "got 9"]),
        ({"method": "tile", "reference_frames": 0}, ["reference_frames", "at least 1", "got 0"]),
        ({"method": "tile", "reference_frames": 2.5}, ["reference_frames", "integer", "2.5"]),
        ({"method": "tile", "reference_frames": "2"}, ["reference_frames", "integer", "'2'"]),
        ({"grid": (4, 4, 7)}, ["grid must multiply", "(4, 4, 7) = 112 tokens", "96 tokens", "(4, 4, 6)"]),
        ({"grid": (4, 24)}, ["grid must be three positive integers", "(4, 24)"]),
        ({"grid": 96}, ["grid must be three positive integers", "96"]),
        ({"grid": (4, 0, 6)}, ["grid must be three positive integers", "(4, 0, 6)"]),
        ({"provider": "cuda"}, ["provider 'cuda'", "auto, cpu, reference, triton"]),
        ({"provider": "triton"}, ["provider 'triton' cannot run here"]),
        ({"inner_backend": "induktor"}, ["inner_backend 'induktor'", "Did you mean 'inductor'?"]),
        ({3: 4}, ["option names must be strings", "got 3"]),
        ({"method": ["tile"]}, ["unknown method ['tile']"]),
        ({"provider": None}, ["unknown provider None"]),
        ({"inner_backend": 5}, ["unknown inner_backend 5"]),
        ({"offload_indices": 1}, ["offload_indices must be True or False, got 1"]),
        (
            {"offload_indices": True, "inner_backend": "eager"},
            ["offload_indices needs", "'inductor'", "'eager'"],
        ),
        ({"dump": ""}, ["dump must be the path of a folder"]),
        ({"dump": __file__}, ["dump must be a folder that can be written to"]),
    ],
)
def test_bad_options_reach_the_user_as_themselves(options: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(SparsifyError) as error:
        torch.compile(Attend(), backend="sparsify", options=options)(VIDEO)
    assert isinstance(error.value, ValueError)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("provider", ["cpu", "triton", "auto"])
def test_a_dtype_no_provider_takes_is_an_error_or_the_reference(provider: str) -> None:
    compiled = torch.compile(
        Attend().double(),
        backend="sparsify",
        options={"method": "tile", "provider": provider, "inner_backend": "eager"},
    )
    if provider == "auto":
        assert compiled(VIDEO.double()).dtype == torch.float64
        return
    with pytest.raises(SparsifyError, match=f"provider '{provider}' cannot run here"):
        compiled(VIDEO.double())


def _warnings_of(call: Callable[[], Any]) -> list[str]:
    warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in seen if issubclass(w.category, SparsifyWarning)]


def test_nothing_to_rewrite_compiles_and_warns_once() -> None:
    def run() -> None:
        for _ in range(2):
            torch._dynamo.reset()
            model = nn.Linear(4, 4)
            x = torch.randn(2, 4)
            out = torch.compile(model, backend="sparsify", options={"inner_backend": "eager"})(x)
            assert torch.equal(out, model(x))

    (message,) = _warnings_of(run)
    assert "no attention to rewrite" in message


SVG2 = {"kv_clusters": 16, "min_kv_ratio": 0.0}
"""Options that `keys` does not have."""


@pytest.mark.parametrize(
    ("options", "names", "other"),
    [
        ({}, "kv_budget", "min_gain"),
        ({"far_field": "drop"}, "kv_budget", "top_p"),
        (SVG2, "min_gain", "top_p"),
        (SVG2 | {"far_field": "drop"}, "top_p", "min_gain"),
        (SVG2 | {"far_field": "mean"}, "top_p", "min_gain"),
    ],
)
def test_the_default_says_that_it_is_lossy(options: dict[str, Any], names: str, other: str) -> None:
    """Options that only `svg2` has make it the default."""
    asked = {"inner_backend": "eager", **options}
    torch.manual_seed(0)  # gains of clusters are those of these weights
    model = Attend()
    (message,) = _warnings_of(partial(torch.compile(model, backend="sparsify", options=asked), VIDEO))
    hints = explain(model, VIDEO, options=asked).hints
    for text in (message, *(hints[-1:] if "kv_clusters" not in options else ())):
        assert names in text
        assert other not in text
    assert "lossy" in message
    densities = []
    for value in (0.9, 1e-9):
        torch._dynamo.reset()
        others = {"q_clusters": 4, "dense_steps": 0, "dense_layers": 0}
        fast = torch.compile(model, backend="sparsify", options={**asked, **others, names: value})
        with torch.no_grad():
            fast(VIDEO)
        densities.append(stats(fast).density)
    assert (densities[0] < densities[1]) == (names == "min_gain")  # as the message says
    torch._dynamo.reset()
    asked = {"method": "tile", "inner_backend": "eager"}
    assert not _warnings_of(partial(torch.compile(model, backend="sparsify", options=asked), VIDEO))


def test_attention_that_stays_is_told_with_its_cause() -> None:
    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: F.scaled_dot_product_attention(x, x, x), torch.cos, (x,))

    def outside(x: Tensor) -> Tensor:
        return torch.compiler.disable(F.scaled_dot_product_attention)(x.sin(), x, x)

    class Returned(Attend):
        def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
            out = super().forward(video)
            weights = (out @ out.mT).softmax(-1)
            return weights @ out, weights

    def told(model: Any, x: Tensor, **options: Any) -> list[str]:
        torch._dynamo.reset()
        fast = torch.compile(model, backend="sparsify", options={"inner_backend": "eager", **options})
        return _warnings_of(partial(fast, x))

    x = torch.randn(1, 2, 8, 16)
    (message,) = told(branch, x)
    assert "inside cond" in message
    message, *_ = told(outside, x)
    assert re.search(r"ends a graph at models/test_compiled.py:\d+ \(Skip", message)
    (message,) = told(Returned(), VIDEO, method="tile")
    assert "leaves 1 of 2 attention calls" in message
    assert "its weights are used elsewhere too (1)" in message
    assert not told(branch, x, method="dense")


def test_dynamos_graph_is_left_alone() -> None:
    before: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Program:
        before.append(str(gm.graph))
        program = sparsify(gm, inputs, options={"method": "tile", "inner_backend": "eager"})
        assert str(gm.graph) == before[-1]
        assert not any("site" in node.meta or "plan" in node.meta for node in gm.graph.nodes)
        assert program.plan.sparse
        return program

    torch.compile(Attend(), backend=backend)(VIDEO)
    assert before


def test_dump_writes_the_graph_after_every_pass(tmp_path: Any) -> None:
    options = {"method": "tile", "inner_backend": "eager", "dump": str(tmp_path)}
    torch.compile(Attend(), backend="sparsify", options=options)(VIDEO)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [
        "000_capture.py",
        "001_infer_layouts.py",
        "002_plan_sites.py",
        "003_fix_sizes.py",
        "004_lower.py",
    ]
    assert "sparsify_site0" in (tmp_path / "004_lower.py").read_text()
    with pytest.raises(OptionError, match="dump"):
        configure({"dump": 3})


@torch.no_grad()
def test_a_non_finite_key_reaches_the_rows_that_read_it() -> None:
    """Frame 3 of 4 is no reference frame under k = 1: only frame 0 (the reference) and itself see it."""
    model = Attend()
    video = VIDEO.clone()
    video[:, :, 3] = torch.nan
    options = {"method": "tile", "reference_frames": 1, "inner_backend": "eager"}
    out = torch.compile(model, backend="sparsify", options=options)(video)
    finite = out.isfinite().all(-1).all(1)[0].unflatten(0, (4, 24)).all(-1)
    assert finite.tolist() == [False, True, True, False]
