"""The call of an applied model: one clock, one state and one analysis for all graphs that run in it."""

import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler import backend
from sparsify_compiler.runtime.call import open_call
from sparsify_compiler.runtime.program import Program
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.oracles import TileAttention
from sparsify_compiler.testing.videos import Video, latents, steps

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

GRID = (5, 7, 9)
TILE: dict[str, Any] = {"method": "tile", "reference_frames": 2, "inner_backend": "eager"}
SVG2: dict[str, Any] = {
    "method": "svg2", "q_clusters": 6, "kv_clusters": 12, "kmeans_iters": (4, 2), "dense_layers": 0,
    "dense_steps": 0, "inner_backend": "eager",
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "regional": {"regional": True},
    "broken": {"breaks": "before", "regional": False},
    "alone": {"breaks": "around", "regional": False},
    "broken by default": {"breaks": "before"},
    "regional and alone": {"regional": True, "breaks": "around"},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that the backend makes, in order."""
    made: list[Program] = []
    original = backend._program

    def recorded(*args: Any) -> Program:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(backend, "_program", recorded)
    return made


def applied(options: dict[str, Any], *, breaks: Any = "nowhere", **named: Any) -> tuple[Video, Any]:
    model = Video(breaks=breaks)
    return model, sparsify_compiler.apply(model, **options, **named)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def sites(stats: sparsify_compiler.RunStats) -> set[str]:
    return {one.site for one in stats.measurements}


@ways
def test_every_graph_of_a_call_is_sparse(way: dict[str, Any]) -> None:
    """The grid comes from the analysis of the whole model, and every layer is known."""
    model, changed = applied(TILE, **way)
    (got,) = steps(model, latents(GRID), 1)
    found = changed.stats()
    with TileAttention(5, 2, 63):
        (expected,) = steps(Video(), latents(GRID), 1)
    assert error(got, expected) < 1e-5 < error(steps(Video(), latents(GRID), 1)[0], expected)
    assert len(sites(found)) == 3
    assert found.density == pytest.approx(0.76)
    if "around" not in way.values():
        assert sites(found) == {f"blocks.{i}" for i in range(3)}


@cache
def as_one_graph() -> list[Tensor]:
    """Four steps of the whole model in one graph."""
    torch._dynamo.reset()
    return steps(torch.compile(Video(), backend="sparsify", options=SVG2), latents(GRID), 4)


@ways
def test_every_layer_has_a_state_of_its_own(way: dict[str, Any]) -> None:
    """Centroids of one step start those of the next: the outputs are those of the whole model in one graph."""
    model, _ = applied(SVG2, **way)
    got = steps(model, latents(GRID), 4)
    for one, expected in zip(got, as_one_graph(), strict=True):
        assert error(one, expected) < 1e-6


def test_one_program_serves_all_blocks(programs: list[Program]) -> None:
    model, changed = applied(SVG2, regional=True)
    steps(model, latents(GRID), 2)
    assert len(programs) == 1
    assert len(programs[0]._planned) == 1, "alike blocks share a plan"
    assert sites(changed.stats()) == {"blocks.0", "blocks.1", "blocks.2"}


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("wan", SVG2 | {"far_field": "drop", "top_p": 0.6}, 1),
        pytest.param(
            "hunyuan_video",
            {"method": "keys", "kv_budget": 0.3, "dense_layers": 0, "inner_backend": "eager"},
            5,
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_blocks_are_the_whole_model(
    family: str, options: dict[str, Any], count: int, programs: list[Program]
) -> None:
    """Outputs and measurements of several calls. Blocks of one kind whose inputs have the same strides share a
    program."""
    outputs, measured = [], []
    for regional in (True, False):
        model, inputs = CASES[family].build(batch=1)
        changed = sparsify_compiler.apply(model, regional=regional, **options)
        with torch.no_grad(), sparsify_compiler.generation(3, streams=1):
            outputs.append([model(**inputs | {"timestep": inputs["timestep"] - 10 * i})[0] for i in range(3)])
            measured.append(changed.stats().measurements)
        assert len(programs) == (count if regional else count + 1)
    for one, other in zip(*outputs, strict=True):
        assert error(one, other) < 1e-5
    for one, other in zip(*measured, strict=True):
        assert (one.site, one.call) == (other.site, other.call)
        assert one.density == pytest.approx(other.density, rel=1e-4)


def test_dense_layers_count_in_the_model() -> None:
    model, changed = applied(TILE | {"dense_layers": 1}, regional=True)
    steps(model, latents(GRID), 1)
    assert sites(changed.stats()) == {"blocks.1", "blocks.2"}


@pytest.mark.parametrize("way", [WAYS["regional"], WAYS["alone"]], ids=["regional", "alone"])
def test_another_grid_of_as_many_tokens_has_a_plan_of_its_own(way: dict[str, Any]) -> None:
    """Dynamo calls the same program, since no guard sees the grid."""
    model, _ = applied(TILE, **way)
    for frames, height, width in ((4, 6, 8), (6, 8, 4), (4, 6, 8)):
        (got,) = steps(model, latents((frames, height, width)), 1)
        with TileAttention(frames, 2, height * width):
            (expected,) = steps(Video(), latents((frames, height, width)), 1)
        assert error(got, expected) < 1e-5


@pytest.mark.parametrize("provider", ["cpu", "reference"])
def test_a_provider_is_chosen_for_the_device_of_the_model(provider: str) -> None:
    """The analysis runs on the meta device, for which no provider is."""
    model, changed = applied(TILE | {"provider": provider}, regional=True)
    steps(model, latents(GRID), 1)
    assert {plan.provider for plan in changed.explain().plans} == {provider}


def test_other_batches_and_grids_have_programs_of_their_own() -> None:
    """Dynamo makes a size that changed a symbol; the sizes of video attention stay fixed."""
    model, changed = applied(SVG2, regional=True)
    for batch, grid in ((1, GRID), (2, GRID), (3, GRID), (3, (4, 6, 8)), (3, (6, 6, 8))):
        first, *_ = steps(model, latents(grid, batch), 2)
        assert len(changed.stats().measurements) == 6
        assert len(first) == batch


@pytest.mark.parametrize("as_time", [int, float, lambda t: torch.tensor([t]), lambda t: torch.tensor(t)])
@pytest.mark.parametrize("by_name", [False, True])
def test_the_time_step_is_an_argument_of_the_model(as_time: Any, by_name: bool) -> None:
    model, changed = applied(TILE | {"dense_steps": 2}, regional=True)
    with torch.no_grad():
        for video in range(2):
            for step in range(5):
                time = as_time(900 - 100 * step)
                video_now = latents(GRID) + step
                model(video_now, timestep=time) if by_name else model(video_now, time)
            (state,) = states_of([model])
            assert "".join(record.phase[0] for record in state.history) == "ddsss", f"in video {video}"
    assert changed.stats().dense_calls == 2


def test_models_of_one_pipeline_share_a_clock() -> None:
    """Two experts, one after the other, without `generation`: 3 of 8 steps are dense, in both of two videos."""

    class Pipeline:
        def __init__(self) -> None:
            self.components = {"transformer": Video(1), "transformer_2": Video(1, seed=1), "vae": None}

    pipeline = Pipeline()
    first, second = pipeline.components["transformer"], pipeline.components["transformer_2"]
    assert first is not None
    assert second is not None
    changed = sparsify_compiler.apply(pipeline, **TILE | {"dense_steps": 3})
    for _ in range(2):
        steps(first, latents(GRID), 2)
        steps(second, latents(GRID) + 2, 6, first=700.0)
        stats = changed.stats()
        assert stats.dense_calls == 3
        assert sites(stats) == {"transformer_2.blocks.0"}
        assert len(stats.measurements) == 5


def test_a_new_video_forgets_the_last_in_all_models() -> None:
    model, _ = applied(SVG2, breaks="around")
    once = steps(model, latents(GRID), 4, first=300.0)
    steps(model, latents(GRID) * torch.nan, 4, first=300.0)
    for one, again in zip(once, steps(model, latents(GRID), 4, first=300.0), strict=True):
        assert torch.equal(one, again)


def test_replaced_parameters_are_found_again() -> None:
    """Offloading puts other Parameters into the modules between calls, and objects may get old addresses."""
    model, changed = applied(SVG2, breaks="before")
    twin, _ = applied(SVG2, breaks="before")
    for i in range(3):
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        (got,), (expected,) = (steps(one, latents(GRID), 1, first=900.0 - 100 * i) for one in (model, twin))
        assert error(got, expected) < 1e-6
    assert sites(changed.stats()) == {f"blocks.{i}" for i in range(3)}


def test_attention_that_a_call_skips_is_not_taken_for_another(caplog: pytest.LogCaptureFixture) -> None:
    """Without weights near it, only its order shows the layer of an attention."""
    model, changed = applied(SVG2, breaks="around")
    steps(model, latents(GRID), 1)
    model.blocks[1].skipped = True
    steps(model, latents(GRID), 2, first=800.0)
    reasons = {plan.reason for plan in changed.explain().plans if plan.method == "dense"}
    assert any("its layer is not known" in reason for reason in reasons)
    got, expected = steps(model, latents(GRID), 1, first=500.0), Video()
    expected.blocks[1].skipped = True
    assert error(got[0], steps(expected, latents(GRID), 1, first=500.0)[0]) < 1e-5, "it is dense"


def test_a_skipped_block_with_weights_is_no_matter() -> None:
    model, changed = applied(SVG2, regional=True)
    steps(model, latents(GRID), 1)
    model.blocks[1].skipped = True
    steps(model, latents(GRID), 2, first=800.0)
    last = [one for one in changed.stats().measurements if one.call == 2]
    assert {one.site for one in last} == {"blocks.0", "blocks.2"}


def test_an_error_closes_the_call() -> None:
    model, changed = applied(TILE, breaks="before")
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 5, 14, 18), 900.0)
    assert open_call() is None
    steps(model, latents(GRID), 1)
    assert len(sites(changed.stats())) == 3


@pytest.mark.parametrize("way", [WAYS["whole"], WAYS["regional"]], ids=["whole", "regional"])
def test_training_keeps_no_state_and_has_the_gradients_of_its_masks(way: dict[str, Any]) -> None:
    model, _ = applied(TILE, **way)
    reference = Video()
    model(latents(GRID), torch.tensor([900.0])).square().sum().backward()
    with TileAttention(5, 2, 63):
        reference(latents(GRID), torch.tensor([900.0])).square().sum().backward()
    for one, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert one.grad is not None
        assert expected.grad is not None
        assert error(one.grad, expected.grad) < 1e-4
    (state,) = states_of([model])
    assert not state.history


def test_a_compiled_caller_gets_the_model_without_its_call() -> None:
    """There is no open call in a graph of the caller, also with fullgraph: the model is the caller's."""
    model, _ = applied(TILE)
    seen = []

    def caller_backend(gm: Any, inputs: Any) -> Any:
        seen.append(open_call())
        return gm.forward

    fast = torch.compile(lambda x, t: model(x, t) + 1, backend=caller_backend, fullgraph=True)
    with torch.no_grad():
        got = fast(latents(GRID), torch.tensor([900.0]))
    assert seen == [None]
    assert error(got, steps(Video(), latents(GRID), 1)[0] + 1) < 1e-6


def test_a_model_that_cannot_be_analysed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(Video):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            if args[0].is_meta:
                raise RuntimeError("no meta tensors here")
            return super().forward(*args, **kwargs)

    model = Picky(breaks="around")
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        sparsify_compiler.apply(model, **TILE)
        steps(model, latents(GRID), 1)
    assert "cannot analyse Picky as a whole (RuntimeError: no meta tensors here)" in caplog.text
    assert "Picky: 0 of 3 video attentions sparse, 3 dense" in caplog.text
