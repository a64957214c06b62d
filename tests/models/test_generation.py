"""Dynamic methods over whole generations: phases, streams, videos, and at every step what the tables say."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from marks import fresh_dynamo, needs_diffusers, no_warnings
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler
from sparsify_compiler import OptionError, SparsifyError
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.models import CASES, GRID, Inputs, output_of
from sparsify_compiler.testing.oracles import MaskedAttention, relative_error

SIX = ("wan", "hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
SVG2 = {"method": "svg2", "q_clusters": 6, "kv_clusters": 12, "kmeans_iters": (4, 2), "top_p": 0.5}
CUBES = {"method": "cubes", "cube": (2, 3, 4), "query_cube": (3, 4, 4), "top_p": 0.5}
USUAL = {"inner_backend": "eager", "far_field": "drop", "dense_steps": 2, "dense_layers": 0}

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]


Tables = list[BlockTable]


def under(tables: Tables) -> MaskedAttention:
    """Eager attention under the masks of these tables wherever a table has as many tokens."""
    return MaskedAttention([table.mask() for table in tables], math.prod(GRID))


def conditioning(inputs: Inputs) -> str:
    return next(name for name in inputs if name.startswith("encoder_hidden_states"))


Loop = Callable[[Inputs, int], Iterator[tuple[int, int, Inputs]]]


def batched(inputs: Inputs, steps: int) -> Iterator[tuple[int, int, Inputs]]:
    """(step, stream, inputs): guidance in one call of both streams, time steps that fall to the end."""
    for step in range(steps):
        latents = inputs["hidden_states"] + 0.1 * step
        time = torch.full_like(inputs["timestep"], 900 - 800 * step / max(steps - 1, 1))
        yield step, 0, inputs | {"hidden_states": latents, "timestep": time}


def two_calls(inputs: Inputs, steps: int) -> Iterator[tuple[int, int, Inputs]]:
    """Guidance in two calls a step."""
    text = conditioning(inputs)
    for step, _, now in batched(inputs, steps):
        yield step, 0, now
        yield step, 1, now | {text: 0.5 * now[text]}


def second_order(inputs: Inputs, steps: int) -> Iterator[tuple[int, int, Inputs]]:
    """A solver that asks twice at every time step but the first."""
    for step, _, now in batched(inputs, steps):
        yield step, 0, now
        if step:
            yield step, 0, now | {"hidden_states": now["hidden_states"] + 0.05}


def rising(inputs: Inputs, steps: int) -> Iterator[tuple[int, int, Inputs]]:
    """A schedule that rises, as in inversion."""
    for step, _, now in batched(inputs, steps):
        yield step, 0, now | {"timestep": 1000 - now["timestep"]}


def check_generation(
    compiled: nn.Module, model: nn.Module, loop: Loop, inputs: Inputs, tables: Tables, steps: int = 10
) -> None:
    """Run a loop and hold every call to what it must be: dense, then what its tables say."""
    for step, stream, now in loop(inputs, steps):
        tables.clear()
        with torch.no_grad():
            got = output_of(compiled(**now))
            if step < USUAL["dense_steps"]:
                assert not tables
                assert torch.equal(got, output_of(model(**now)))
            else:
                assert tables
                with under(tables):
                    exact = output_of(model(**now))
                assert relative_error(got, exact) < 1e-5
        record = sparsify_compiler.runtime.state.states_of(model.parameters())[0].history[-1]
        assert (record.tick.step, record.tick.stream) == (step, stream)


@contextmanager
def at_most_compilations(count: int) -> Iterator[None]:
    """Dynamo compiles no more than `count` frames in the block."""
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= count


GENERATIONS = [
    *((name, loop, SVG2) for name in SIX for loop in (batched, two_calls)),
    *((name, two_calls, CUBES) for name in ("wan", "hunyuan_video", "cogvideox")),
]
USUALLY = [(name, (batched, two_calls)[place % 2], SVG2) for place, name in enumerate(SIX)]
USUALLY += [("hunyuan_video", two_calls, CUBES)]
"""Every family, way to call and method; all of `GENERATIONS` nightly."""


@pytest.mark.parametrize(
    ("name", "loop", "method"),
    [pytest.param(*one, marks=() if one in USUALLY else pytest.mark.nightly) for one in GENERATIONS],
    ids=lambda value: (
        getattr(value, "__name__", None) or value if not isinstance(value, dict) else value["method"]
    ),
)
def test_a_generation_is_dense_then_sparse(name: str, loop: Loop, method: dict, tables: Tables) -> None:
    model, inputs = CASES[name].build(GRID, batch=2 if loop is batched else 1)
    compiled = torch.compile(model, backend="sparsify", fullgraph=True, options=USUAL | method)
    with at_most_compilations(1):
        check_generation(compiled, model, loop, inputs, tables)
    stats = sparsify_compiler.stats(compiled)
    assert stats.dense_calls == 2 * (1 if loop is batched else 2)
    assert {one.step for one in stats.measurements} == set(range(2, 10))
    assert 0.05 < stats.density < 0.9
    for one in stats.measurements:
        assert bool((one.kept >= 0.5 - 1e-5).all())


@pytest.mark.parametrize("loop", [second_order, rising])
def test_other_schedules(loop: Loop, tables: Tables) -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    check_generation(
        torch.compile(model, backend="sparsify", options=USUAL | SVG2), model, loop, inputs, tables
    )


def test_time_steps_for_each_token(tables: Tables) -> None:
    """The first frame is given, at time step 0, as in image-to-video: the largest time step counts."""
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | SVG2)
    tokens = GRID[0] * GRID[1] * GRID[2]

    def per_token(inputs: Inputs, steps: int) -> Iterator[tuple[int, int, Inputs]]:
        for step, stream, now in batched(inputs, steps):
            times = now["timestep"].float()[:, None].repeat(1, tokens)
            times[:, : GRID[1] * GRID[2]] = 0
            yield step, stream, now | {"timestep": times}

    check_generation(compiled, model, per_token, inputs, tables, steps=4)


def centroids(model: nn.Module) -> list[Tensor]:
    (state,) = states_of(model.parameters())
    return [
        tensor.nan_to_num()
        for stream in state._timelines.current.streams.values()
        for tensor in stream.tensors
    ]


def test_a_second_video_starts_cold_and_gives_what_the_first_gave(tables: Tables) -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | SVG2)
    runs = []
    for text_scale in (1.0, 0.3, 1.0):
        scaled = inputs | {conditioning(inputs): text_scale * inputs[conditioning(inputs)]}
        check_generation(compiled, model, two_calls, scaled, tables, steps=5)
        runs.append([tensor.clone() for tensor in centroids(model)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))


def test_streams_do_not_mix() -> None:
    """A stream's state is that of a generation in which it is alone."""
    states = []
    for streams in ((0,), (1,), (0, 1)):
        torch._dynamo.reset()
        model, inputs = CASES["wan"].build(GRID, batch=1)
        compiled = torch.compile(model, backend="sparsify", options=USUAL | SVG2)
        with torch.no_grad():
            for _, stream, now in two_calls(inputs, 5):
                if stream in streams:
                    compiled(**now)
        states.append(centroids(model))
    alone = [*states[0], *states[1]]
    assert all(torch.equal(a, b) for a, b in zip(states[2], alone, strict=True))


def test_two_models_of_one_class_share_programs_and_no_state(tables: Tables) -> None:
    made = [CASES["wan"].build(GRID, batch=1, seed=seed) for seed in (0, 1)]
    compiled = [torch.compile(model, backend="sparsify", options=USUAL | SVG2) for model, _ in made]
    loops = [list(batched(inputs, 5)) for _, inputs in made]
    with torch.no_grad():
        for step in range(5):
            for fast, loop in zip(compiled, loops, strict=True):
                fast(**loop[step][2])
    together = [centroids(model) for model, _ in made]
    for (model, inputs), expected in zip(made, together, strict=True):
        torch._dynamo.reset()
        check_generation(
            torch.compile(model, backend="sparsify", options=USUAL | SVG2), model, batched, inputs, tables, 5
        )
        assert all(torch.equal(a, b) for a, b in zip(centroids(model), expected, strict=True))


def test_training_then_generating() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | SVG2 | {"inner_backend": "aot_eager"})
    model.train()
    for _, _, now in batched(inputs, 2):
        output_of(compiled(**now)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    assert not states_of(model.parameters()), "training neither counts steps nor remembers"
    model.eval()
    with torch.no_grad():
        for _, _, now in batched(inputs, 4):
            compiled(**now)
    assert sparsify_compiler.stats(compiled).dense_calls == 2


def test_blocks_compiled_one_by_one(tables: Tables) -> None:
    """Each block has a state of its own; steps and streams come from `generation`."""
    model, inputs = CASES["wan"].build(GRID, batch=1)
    twin, _ = CASES["wan"].build(GRID, batch=1)
    for block in model.blocks:
        block.compile(backend="sparsify", options=USUAL | SVG2 | {"grid": GRID})
    with torch.no_grad(), sparsify_compiler.generation(steps=5, streams=2):
        for step, stream, now in two_calls(inputs, 5):
            tables.clear()
            got = output_of(model(**now))
            assert len(tables) == (0 if step < 2 else len(model.blocks))
            with under(tables) if tables else nullcontext():
                exact = output_of(twin(**now))
            assert relative_error(got, exact) < 1e-5
            for block in model.blocks:
                (state,) = states_of(block.parameters())
                assert (state.history[-1].tick.step, state.history[-1].tick.stream) == (step, stream)
    stats = sparsify_compiler.stats(model)
    assert (stats.dense_calls, len({one.call for one in stats.measurements})) == (4, 6)


def test_without_a_time_step_it_is_sparse_from_the_first_call(tables: Tables) -> None:
    model, _ = CASES["wan"].build(GRID, batch=1)
    block = model.blocks[0]
    hidden = torch.randn(1, 315, block.norm1.normalized_shape[0])

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1 = block.attn1

        def forward(self, x: Tensor) -> Tensor:
            return self.attn1(x, None, None, None)

    compiled = torch.compile(Alone(), backend="sparsify", options=USUAL | SVG2 | {"grid": GRID})
    with torch.no_grad():
        compiled(hidden)
    assert tables
    assert sparsify_compiler.stats(compiled).measurements[0].step is None


def test_a_share_of_dense_steps_is_of_the_generation() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | CUBES | {"dense_steps": 0.5})
    with torch.no_grad(), sparsify_compiler.generation(steps=6):
        for _, _, now in batched(inputs, 6):
            compiled(**now)
    assert sparsify_compiler.stats(compiled).dense_calls == 3


def test_a_share_of_one_is_every_step_however_many() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | CUBES | {"dense_steps": 1.0})
    with torch.no_grad():
        for steps in (2, 4):
            for _, _, now in batched(inputs, steps):
                compiled(**now)
    stats = sparsify_compiler.stats(compiled)
    assert (stats.dense_calls, stats.measurements) == (4, ())


def test_streams_with_different_inputs() -> None:
    """The unconditional call has no image, so it runs a program of its own."""
    model, inputs = CASES["wan_i2v"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | CUBES)
    image = "encoder_hidden_states_image"
    with torch.no_grad():
        for step, _, now in batched(inputs, 4):
            for stream, own in enumerate(({image: now[image] + step}, {image: None})):
                compiled(**now | own)
                (state,) = states_of(model.parameters())
                assert (state.history[-1].tick.step, state.history[-1].tick.stream) == (step, stream)


class Attention(nn.Module):
    """One attention without a norm or a position: heads and the like at will."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 8 * n) for n in (heads, kv_heads, kv_heads))
        self.to_out = nn.Linear(8 * heads, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        query, key, value = (
            make(x).unflatten(-1, (-1, 8)).transpose(1, 2) for make in (self.to_q, self.to_k, self.to_v)
        )
        out = scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        return x + timestep[:, None, None] * self.to_out(out.transpose(1, 2).flatten(2))


EXACT = USUAL | SVG2 | {"grid": (2, 4, 5), "top_p": 1.0, "dense_steps": 1}


def test_a_model_without_parameters_of_its_own_is_clocked_too() -> None:
    model = Attention(2, 2)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def function(x: Tensor, timestep: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x, timestep))

    compiled = torch.compile(function, backend="sparsify", options=EXACT)
    with torch.no_grad():
        for time in (3.0, 2.0, 1.0):
            x, timestep = torch.randn(1, 40, 16), torch.tensor([time])
            assert torch.allclose(compiled(x, timestep), model(x, timestep), atol=1e-5)


def test_models_that_differ_in_heads_alone_in_training() -> None:
    """With its projections frozen, an attention is one op that remembers nothing."""
    models = [Attention(heads, kv_heads) for heads, kv_heads in ((2, 2), (4, 4), (4, 2))]
    for model in models:
        for frozen in (model.to_q, model.to_k, model.to_v):
            frozen.requires_grad_(False)
    compiled = [torch.compile(model, backend="sparsify", options=EXACT) for model in models]
    x, timestep = torch.randn(1, 40, 16), torch.ones(1)
    for _ in range(2):
        for fast, model in zip(compiled, models, strict=True):
            assert torch.allclose(fast(x, timestep), model(x, timestep), atol=1e-5)


def test_dense_layers_stay_dense() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    plans = sparsify_compiler.explain(model, **inputs, options=USUAL | CUBES | {"dense_layers": 1}).plans
    attn1 = [plan for plan in plans if plan.site.kind == "self"]
    assert [plan.method for plan in attn1] == ["dense", "cubes"]
    assert "dense_layers" in attn1[0].reason


def test_another_batch_starts_anew() -> None:
    """The state of one batch is no state of another: a documented reset, not silent garbage."""
    model, inputs = CASES["wan"].build(GRID, batch=2)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | SVG2 | {"dense_steps": 0})
    with torch.no_grad():
        compiled(**inputs)
        half = {name: value[:1] if isinstance(value, Tensor) else value for name, value in inputs.items()}
        compiled(**half)
    (state,) = states_of(model.parameters())
    assert sorted(stream.calls for stream in state._timelines.current.streams.values()) == [1, 1]


def test_state_goes_with_the_model() -> None:
    import gc

    from sparsify_compiler.runtime import state

    gc.collect()
    before = len(state._models)
    model, inputs = CASES["wan"].build(GRID, batch=1)
    compiled = torch.compile(model, backend="sparsify", options=USUAL | CUBES)
    with torch.no_grad():
        compiled(**inputs)
    assert len(state._models) == before + 1
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert len(state._models) == before


def test_stats_are_of_the_program_that_was_compiled() -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    tile = {**USUAL, "method": "tile", "reference_frames": 1}
    options = {"svg2": USUAL | SVG2, "tile": tile, "wide": tile | {"reference_frames": 4}}
    by = {name: torch.compile(model, backend="sparsify", options=one) for name, one in options.items()}

    def run(*names: str, steps: int = 4) -> None:
        """A video, every step by the next program in turn."""
        with torch.no_grad(), sparsify_compiler.generation(steps, streams=1):
            for number, (_, _, now) in enumerate(batched(inputs, steps)):
                by[names[number % len(names)]](**now)

    def calls(model: Any) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for one in sparsify_compiler.stats(model).measurements:
            found.setdefault(one.method, set()).add(one.call)
        return found

    run("svg2")
    run("tile", steps=6)
    assert calls(by["svg2"]) == {"svg2": {2, 3}}
    assert calls(by["tile"]) == {"tile": {2, 3, 4, 5}}
    assert calls(model) == calls(by["tile"])
    with pytest.raises(SparsifyError, match="only programs with other options"):
        sparsify_compiler.stats(by["wide"])
    run("tile", "wide", steps=7)
    assert calls(by["svg2"]) == {"svg2": {2, 3}}
    assert calls(by["tile"]) == {"tile": {2, 4, 6}}
    assert calls(by["wide"]) == {"tile": {3, 5}}
    assert calls(model) == {"tile": {2, 3, 4, 5, 6}}
    assert sparsify_compiler.stats(by["tile"]).density < sparsify_compiler.stats(by["wide"]).density
    assert [sparsify_compiler.stats(one).dense_calls for one in (by["tile"], by["wide"], model)] == [1, 1, 2]
    run("svg2", steps=3)
    assert calls(by["svg2"]) == calls(model) == {"svg2": {2}}
    assert calls(by["wide"]) == {"tile": {3, 5}}
    again = torch.compile(model, backend="sparsify", options=dict(options["tile"]))
    assert calls(again) == calls(by["tile"])  # torch.compile runs both by one program


def test_stats_of_a_model_that_did_not_run_says_so() -> None:
    with pytest.raises(SparsifyError, match="no call of this model was recorded"):
        sparsify_compiler.stats(nn.Linear(2, 2))
    with pytest.raises(SparsifyError, match="needs a module"):
        sparsify_compiler.stats(torch.sin)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"top_p": 1.01}, r"top_p must be a number in \(0, 1\]"),
        ({"top_p": "0.9"}, r"top_p must be a number"),
        ({"top_p": float("nan")}, r"top_p must be a number"),
        ({"min_gain": -1}, "min_gain must be a number of at least 0, or None, got -1"),
        ({"min_gain": "much"}, "min_gain must be a number"),
        ({"min_gain": float("inf")}, "min_gain must be a number"),
        ({"min_gain": 1, "far_field": "drop"}, "got far_field='drop': try top_p"),
        ({"method": "tile", "min_gain": 1}, "'min_gain' belongs to method 'svg2' and 'cubes'"),
        ({"min_kv_ratio": -0.1}, r"min_kv_ratio must be a number in \[0, 1\]"),
        ({"q_clusters": 0}, "q_clusters must be an integer of at least 1"),
        ({"q_clusters": 316}, "q_clusters must be at most the 315 tokens of the video, got 316"),
        ({"kv_clusters": 1000}, "kv_clusters must be at most the 315 tokens"),
        ({"kmeans_iters": 3}, r"kmeans_iters must be two integers \(first, later\)"),
        ({"kmeans_iters": (0, 2)}, r"kmeans_iters\[0\] must be an integer of at least 1"),
        ({"dense_steps": -1}, "dense_steps must be an integer of at least 0 or a share"),
        ({"dense_steps": 1.5}, "dense_steps must be an integer of at least 0 or a share"),
        ({"dense_layers": "all"}, "dense_layers must be an integer of at least 0 or a share"),
        ({"far_field": "quadratic"}, "unknown far_field 'quadratic'"),
        ({"measure_recall": 2}, r"measure_recall must be a share in \[0, 1\]"),
        ({"cube": (4, 4)}, "option 'cube' belongs to method 'cubes'"),
        (
            {"method": "tile", "top_p": 0.5},
            "'top_p' belongs to method 'svg2' and 'cubes', got method='tile'",
        ),
        ({"method": "tile", "preset": "svg2"}, "preset 'svg2' has method 'svg2', got method='tile'"),
        ({"method": "cubes", "cube": (4, 4)}, r"cube must be three integers"),
        ({"method": "cubes", "query_cube": (4, 0, 4)}, "query_cube must be an integer of at least 1"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_bad_options_say_what_they_must_be(options: dict, says: str) -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    method = {"method": "svg2"} if options.get("method") != "cubes" else {}
    compiled = torch.compile(model, backend="sparsify", options={"inner_backend": "eager"} | method | options)
    with torch.no_grad(), pytest.raises(OptionError, match=says):
        compiled(**inputs)
