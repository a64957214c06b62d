"""`apply`: in place, all of a pipeline, and back."""

import copy
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler.errors import GridError, OptionError, SparsifyError
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
regional = pytest.mark.parametrize("regional", [False, True])


def dicts(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of all modules."""
    return [dict(module.__dict__) for module in model.modules()]


@regional
def test_restore_leaves_the_model_as_it_was(regional: bool) -> None:
    model = Video()
    before, expected = dicts(model), steps(model, latents(GRID), 2)
    changed = sparsify_compiler.apply(model, regional=regional, **TILE)
    assert not torch.equal(steps(model, latents(GRID), 1)[0], expected[0])
    changed.restore()
    assert dicts(model) == before
    for one, same in zip(steps(model, latents(GRID), 2), expected, strict=True):
        assert torch.equal(one, same)
    changed.restore()
    again = sparsify_compiler.apply(model, regional=regional, **TILE)
    steps(model, latents(GRID), 1)
    assert again.stats().measurements


class SizesOfATensor(Video):
    """Positions by the sizes of the video, which the model reads from a tensor."""

    def forward(self, hidden_states: Tensor, timestep: Tensor | float, scale: float = 1.0) -> Tensor:
        sizes = torch.stack([torch.tensor(one.shape[1:]) for one in hidden_states])
        tables = torch.linspace(0, 1, 192).view(32, 6).split([2, 2, 2], 1)
        for frames, height, width in sizes.tolist():
            sides = (frames, 1, 1), (1, height, 1), (1, 1, width)
            turned = [
                table[:size].view(*side, -1).expand(frames, height, width, -1)
                for table, side, size in zip(tables, sides, (frames, height, width), strict=True)
            ]
            places = torch.cat(turned, -1).reshape(frames * height * width, 1, -1)
        return super().forward(hidden_states + places.mean(), timestep, scale)


@regional
def test_sizes_that_dynamo_cannot_follow_end_no_call(regional: bool) -> None:
    """Dynamo does not refuse such a graph, but ends in an error about a guard."""
    model, twin = SizesOfATensor(), SizesOfATensor()
    changed = sparsify_compiler.apply(model, regional=regional, **TILE)
    got = steps(model, latents(GRID), 2)
    with TileAttention(5, 2, 63):
        expected = steps(twin, latents(GRID), 2)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
    assert sum(plan.method == "tile" for plan in changed.models[0].plans) == 3


@pytest.mark.parametrize("breaks", ["nowhere", "before", "around"])
def test_by_default_a_model_is_whole_where_it_gives_one_graph(
    breaks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise its blocks are compiled. A call with wrong inputs decides nothing."""
    model = Video(breaks=breaks)
    before, expected = dicts(model), steps(Video(), latents(GRID), 1)[0]
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        changed = sparsify_compiler.apply(model, **TILE)
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3, 5, 14, 18), 900.0)
        assert "one graph" not in caplog.text
        (got,) = steps(model, latents(GRID), 1)
    with TileAttention(5, 2, 63):
        (sparse,) = steps(Video(), latents(GRID), 1)
    assert (got - sparse).norm() < 1e-5 * sparse.norm() < (got - expected).norm()
    (one,) = changed.models
    if breaks == "nowhere":
        assert [len(graph) for graph in one.graphs] == [3]
        assert one.analysis is None, "the graph shows all"
        assert "one graph" not in caplog.text
    else:
        assert [len(graph) for graph in one.graphs if len(graph)] == [1, 1, 1]
        place = r"graph_break\(\)` at testing/videos.py:\d+"
        line = rf"Video does not give one graph \(Call to `torch._dynamo.{place}\): its 3 repeated blocks are"
        assert len(re.findall(line, caplog.text)) == 1
    changed.restore()
    assert dicts(model) == before


def test_a_model_without_repeated_blocks_stays_whole() -> None:
    class Single(Video):
        """Its one block is in no list."""

        def __init__(self) -> None:
            super().__init__(1, breaks="before")
            self.blocks = nn.Sequential(*self.blocks)

    model = Single()
    changed = sparsify_compiler.apply(model, **TILE)
    steps(model, latents(GRID), 1)
    assert {one.site for one in changed.stats().measurements} == {"blocks.0"}


def test_restore_after_an_error() -> None:
    model = Video()
    before = dicts(model)
    changed = sparsify_compiler.apply(model, **TILE)
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 3, 5, 14, 18), 900.0)
    changed.restore()
    assert dicts(model) == before


@regional
def test_a_hook_that_is_set_after_the_first_call_runs(regional: bool) -> None:
    model, twin = Video(), Video()
    sparsify_compiler.apply(model, regional=regional, **TILE)
    steps(model, latents(GRID), 1)
    for one in (model, twin):
        one.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
        one.blocks[1].register_forward_hook(lambda _, args, out: out - args[0])
    with TileAttention(5, 2, 63):
        (expected,) = steps(twin, latents(GRID), 1)
    (got,) = steps(model, latents(GRID), 1)
    assert (got - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("regional", [None, False, True])
def test_a_float_that_changes_from_call_to_call_leaves_the_model_whole(regional: bool | None) -> None:
    """Dynamo makes it a tensor from the second value on."""
    model = Video()
    changed = sparsify_compiler.apply(model, regional=regional, **TILE)
    for time in (900.0, 750.5, 600.25):
        with torch.no_grad(), TileAttention(5, 2, 63):
            expected = Video()(latents(GRID), time, scale=time)
        with torch.no_grad():
            got = model(latents(GRID), time, scale=time)
        assert (got - expected).norm() < 1e-5 * expected.norm()
    assert {one.call for one in changed.stats().measurements} == {0, 1, 2}


@regional
def test_a_grid_that_fits_nothing_is_refused(regional: bool) -> None:
    model = Video()
    changed = sparsify_compiler.apply(model, regional=regional, grid=(5, 8, 9), **TILE)
    with pytest.raises(GridError, match=r"got \(5, 8, 9\) = 360 tokens"):
        steps(model, latents(GRID), 1)
    changed.restore()


def test_an_export_of_an_applied_model_is_the_plain_model() -> None:
    model, inputs = Video(), (latents(GRID), torch.tensor([900.0]))
    expected = steps(model, latents(GRID), 1)[0]
    sparsify_compiler.apply(model, **TILE)
    assert not torch.equal(steps(model, latents(GRID), 1)[0], expected)
    exported = torch.export.export(model, inputs)
    assert (exported.module()(*inputs) - expected).norm() < 1e-5 * expected.norm()


def test_a_copy_of_an_applied_model_is_the_plain_model() -> None:
    model = Video()
    expected = steps(model, latents(GRID), 1)
    sparsify_compiler.apply(model, **TILE)
    twin = copy.deepcopy(model)
    assert torch.equal(steps(twin, latents(GRID), 1)[0], expected[0])
    assert not states_of([twin])


@regional
def test_a_second_apply_is_refused(regional: bool) -> None:
    model = Video()
    sparsify_compiler.apply(model, regional=regional, **TILE)
    with pytest.raises(SparsifyError, match=r"^apply has changed Video already: call restore\(\)"):
        sparsify_compiler.apply(model, **TILE)


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.blocks[1]], ids=["model", "block"])
def test_a_compiled_model_is_refused(part: Any) -> None:
    model = Video()
    part(model).compile(backend="eager")
    with pytest.raises(SparsifyError, match=r"Video\S* is compiled already: apply compiles the model itself"):
        sparsify_compiler.apply(model, **TILE)


@regional
def test_compile_after_apply_does_nothing_and_says_so(
    regional: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = Video()
    changed = sparsify_compiler.apply(model, regional=regional, **TILE)
    (model.blocks[0] if regional else model).compile(backend="eager", fullgraph=True)
    assert "compile() does nothing: apply compiles it already" in caplog.text
    steps(model, latents(GRID), 1)
    assert len(changed.stats().measurements) == 3
    changed.restore()
    model.compile(backend="eager")
    assert "_compiled_call_impl" in model.__dict__


def test_torch_compile_around_an_applied_model_leaves_it_sparse() -> None:
    model = Video()
    changed = sparsify_compiler.apply(model, regional=True, **TILE)
    steps(torch.compile(model, backend="eager"), latents(GRID), 1)
    assert len(changed.stats().measurements) == 3


def test_the_result_of_torch_compile_is_refused() -> None:
    with pytest.raises(SparsifyError, match="is compiled already"):
        sparsify_compiler.apply(torch.compile(Video(), backend="eager"), **TILE)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"method": "tle"}, "Did you mean 'tile'"),
        ({"method": "tile", "top_p": 0.5}, "top_p"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"regional": "yes"}, "regional must be True, False or None, got 'yes'"),
    ],
)
def test_options_are_checked_at_once(named: dict[str, Any], message: str) -> None:
    model = Video()
    before = dicts(model)
    with pytest.raises(OptionError, match=message):
        sparsify_compiler.apply(model, **named)
    assert dicts(model) == before


def test_targets_without_a_video_transformer_are_refused() -> None:
    with pytest.raises(
        OptionError, match="apply needs a module or a pipeline with a dict of components, got list"
    ):
        sparsify_compiler.apply([Video()], **TILE)
    with pytest.raises(OptionError, match="apply needs an instance, got the class Video"):
        sparsify_compiler.apply(Video, **TILE)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    image_model = type("UNet2DConditionModel", (Video,), {})()
    pipeline = SimpleNamespace(
        components={"text_encoder": encoder, "unet": image_model, "scheduler": object(), "vae": None}
    )
    with pytest.raises(
        OptionError,
        match="no video transformer among the components of SimpleNamespace "
        r"\(text_encoder: TransformerEncoder, unet: UNet2DConditionModel\)",
    ):
        sparsify_compiler.apply(pipeline, **TILE)
    with pytest.raises(OptionError, match="regional=True needs repeated blocks, and Linear has no list"):
        sparsify_compiler.apply(nn.Linear(2, 2), regional=True, **TILE)


def test_before_the_first_call() -> None:
    changed = sparsify_compiler.apply(Video(), **TILE)
    with pytest.raises(SparsifyError, match="no call of this model was recorded"):
        changed.stats()
    with pytest.raises(SparsifyError, match="explain shows the last call, and no model was called yet"):
        changed.explain()


def test_a_trainer_takes_an_applied_model() -> None:
    model = Video(2)
    sparsify_compiler.apply(model, method="dsv", inner_backend="eager")
    trainer = sparsify_compiler.DSVTrainer(model, threshold=10.0, profile_every=(1, 1), break_even=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model(latents(GRID), torch.tensor([500.0])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.step()
    assert trainer.stage == 2
    assert states_of([model]) == states_of(model.parameters())


def test_only_denoisers_of_a_pipeline_change() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    pipeline = SimpleNamespace(
        components={"denoiser": Video(), "text_encoder": encoder, "vae": nn.Conv3d(1, 1, 1)}
    )
    before = dicts(encoder)
    changed = sparsify_compiler.apply(pipeline, **TILE)
    assert [model.name for model in changed.models] == ["denoiser"]
    assert dicts(encoder) == before


def test_a_model_that_is_two_components_changes_once() -> None:
    model = Video()
    before = dicts(model)
    changed = sparsify_compiler.apply(SimpleNamespace(components={"high": model, "low": model}), **TILE)
    assert [one.name for one in changed.models] == ["high"]
    changed.restore()
    assert dicts(model) == before


def test_the_log_says_once_how_much_is_sparse(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        model = Video()
        changed = sparsify_compiler.apply(model, **TILE | {"dense_layers": 1, "dense_steps": 1})
        steps(model, latents(GRID), 3)
    (line,) = [record.message for record in caplog.records if "video attentions sparse" in record.message]
    why = "1 among the first layers, which stay dense (dense_layers)"
    assert line == f"Video: 2 of 3 video attentions sparse, 1 dense: {why}"
    assert "1 graph, 2 of 3 attention calls sparse" in str(changed.explain())
    again = sparsify_compiler.explain(model, latents(GRID), torch.tensor([1.0]))
    assert [plan.method for plan in again.plans] == [plan.method for plan in changed.explain().plans]


def test_attention_over_few_text_tokens_is_no_video_attention(caplog: pytest.LogCaptureFixture) -> None:
    class WithText(Video):
        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            text = torch.ones(1, 2, 4, 16)
            causal = nn.functional.scaled_dot_product_attention(text, text, text, is_causal=True)
            return super().forward(hidden_states, timestep) + causal.mean()

    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        model = WithText()
        changed = sparsify_compiler.apply(model, **TILE)
        steps(model, latents(GRID), 1)
    assert caplog.messages[-1] == "WithText: 3 of 3 video attentions sparse"
    assert len(changed.explain().plans) == 4


@regional
def test_attention_outside_every_graph_is_told(regional: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Hidden(Video):
        @torch.compiler.disable
        def attend(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            x = self.patch(hidden_states).flatten(2).transpose(1, 2)
            return self.out(self.blocks[0](self.attend(x), self.time(timestep[:, None] / 1000)))

    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        model = Hidden(1)
        changed = sparsify_compiler.apply(model, regional=regional, **TILE)
        steps(model, latents(GRID), 1)
    assert (
        "Hidden: 1 of 2 video attentions sparse, 1 dense: 1 outside every graph, at tests/test_apply.py"
        in caplog.text
    )
    assert any("outside every graph" in plan.reason for plan in changed.explain().plans)


EXACT: dict[str, Any] = {
    "method": "svg2",
    "top_p": 1.0,
    "far_field": "drop",
    "dense_steps": 0,
    "dense_layers": 0,
    "inner_backend": "eager",
}


@pytest.mark.parametrize("before", [pytest.param(True, marks=pytest.mark.nightly), False])
def test_first_block_cache_of_diffusers(before: bool) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    (model, inputs), (twin, _) = (CASES["wan"].build(GRID, batch=1) for _ in range(2))
    for one in (model, twin):
        if one is twin or before:
            apply_first_block_cache(one, FirstBlockCacheConfig(threshold=0.0))
    changed = sparsify_compiler.apply(model, **EXACT)
    if not before:
        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    inputs["return_dict"] = False
    with torch.no_grad():
        for time in (900, 500):
            inputs["timestep"] = torch.tensor([time])
            with model.cache_context("cond"), twin.cache_context("cond"):
                got, expected = model(**inputs)[0], twin(**inputs)[0]
            assert (got - expected).norm() < 1e-4 * expected.norm()
    assert {one.site for one in changed.stats().measurements} == {"blocks.0.attn1", "blocks.1.attn1"}


class Uncompiled:
    """A hook around the call of a module that Dynamo must not enter, as the caches of diffusers have some."""

    def __init__(self, module: Any) -> None:
        self.inner = module.forward

    @torch.compiler.disable
    def new_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Nested(nn.Module):
    """A block whose attention is a module of its own."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.attend(x, time)


@pytest.mark.parametrize(("regional", "before"), [(False, True), (True, False)])
def test_attention_in_a_hook_that_is_never_compiled(regional: bool, before: bool) -> None:
    def nested() -> Any:
        model: Any = Video(2)
        model.blocks = nn.ModuleList(map(Nested, model.blocks))
        return model

    def hook(model: Any) -> None:
        for block in model.blocks:
            block._diffusers_hook = SimpleNamespace(hooks={"cache": Uncompiled(block)})
            block.forward = block._diffusers_hook.hooks["cache"].new_forward

    model, expected = nested(), steps(nested(), latents(GRID), 1)[0]
    if before:
        hook(model)
    changed = sparsify_compiler.apply(model, regional=regional, **EXACT)
    if not before:
        hook(model)
    got = steps(model, latents(GRID), 1)[0]
    assert (got - expected).norm() < 1e-4 * expected.norm()
    assert {one.site for one in changed.stats().measurements} == {"blocks.0.attend", "blocks.1.attend"}
    changed.restore()
    assert torch.equal(steps(model, latents(GRID), 1)[0], expected)


def test_a_forward_that_is_never_compiled_is_sparse_from_the_second_call() -> None:
    model: Any = Video(2)
    model.blocks = nn.ModuleList(map(Nested, model.blocks))
    before = dicts(model)
    changed = sparsify_compiler.apply(model, **TILE)
    for block in model.blocks:
        block.forward = torch.compiler.disable(block.forward)
    methods = []
    for number in range(2):
        steps(model, latents(GRID), 1, first=900.0 - 100 * number)
        methods.append([plan.method for plan in changed.explain().plans])
    assert methods == [["dense"] * 2, ["tile"] * 2]
    changed.restore()
    for block in model.blocks:
        del block.forward
    assert dicts(model) == before


def test_a_skipped_attention_names_the_hooks_around_it(caplog: pytest.LogCaptureFixture) -> None:
    class Skips(Uncompiled):
        def new_forward(self, x: torch.Tensor, *args: Any) -> Any:
            return x

    model = Video()
    with caplog.at_level(logging.INFO, "sparsify_compiler"):
        changed = sparsify_compiler.apply(model, regional=True, **TILE)
        model.blocks[1]._diffusers_hook = SimpleNamespace(hooks={"skip": Skips(model.blocks[1])})
        model.blocks[1].forward = model.blocks[1]._diffusers_hook.hooks["skip"].new_forward
        steps(model, latents(GRID), 2)
    why = "the call skipped it, or ran it outside every graph (hooks around it: Skips)"
    assert f"Video: 2 of 3 video attentions sparse, 1 dense: 1 {why}" in caplog.text
    assert [plan.reason for plan in changed.explain().plans if plan.method == "dense"] == [why]


def test_a_model_that_asks_for_the_length_of_a_prompt() -> None:
    """Values of arguments decide sizes. The analysis follows them from call to call."""

    class Prompted(Video):
        def forward(  # type: ignore[override]
            self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, mask: torch.Tensor
        ) -> torch.Tensor:
            x = self.patch(hidden_states).flatten(2).transpose(1, 2)
            if mask.any():
                x = torch.cat([x, text[mask.bool()][None]], 1)
            time = self.time(timestep[:, None] / 1000)
            for block in self.blocks:
                x = block(x, time)
            return self.out(x[:, : x.shape[1] - int(mask.sum())])

    model, twin = Prompted(2), Prompted(2)
    changed = sparsify_compiler.apply(model, regional=True, **EXACT)
    text = torch.randn(1, 6, 32)
    for length in (2, 4, 2):
        mask = (torch.arange(6) < length).long()[None]
        with torch.no_grad():
            video, time = latents(GRID), torch.tensor([500.0])
            got, expected = model(video, time, text, mask), twin(video, time, text, mask)
        assert (got - expected).norm() < 1e-4 * expected.norm()
        layouts = [plan.layout for plan in changed.explain().plans if plan.method != "dense"]
        assert [(one.grid, one.after) for one in layouts] == [(GRID, length)] * 2


def test_another_attention_backend_of_diffusers_is_replaced_and_restored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = CASES["wan"].build(GRID, batch=1)
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    for processor in processors:
        processor._attention_backend = "flex"
    changed = sparsify_compiler.apply(model, regional=True, **EXACT)
    assert "its attention backend is now native, not flex" in caplog.text
    with torch.no_grad():
        model(**inputs)
    assert len(changed.stats().measurements) == 2
    for processor in processors:
        processor._attention_backend = "flex"
    with torch.no_grad():
        model(**inputs)
    assert len([plan for plan in changed.explain().plans if plan.method != "dense"]) == 2
    changed.restore()
    assert [processor._attention_backend for processor in processors] == ["flex"] * 4
