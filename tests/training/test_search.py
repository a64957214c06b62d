"""The layer-wise search: choices against brute force, losses against eager models under masks, files, errors."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import sparsify_compiler
from sparsify_compiler import OptionError, Policy, PolicyError, SparsifyError, SparsifyWarning, cli, explain
from sparsify_compiler.backend import configure
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods.predictor import Trained, initial_weights, save_predictor
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.policy import DENSE, Mark, PolicySite, Trial, entry_of
from sparsify_compiler.runtime import site as runtime_site
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.dits import Recipe
from sparsify_compiler.testing.models import CASES, GRID, Inputs
from sparsify_compiler.testing.oracles import masked_attention, tile_mask
from sparsify_compiler.testing.strategies import site_of
from sparsify_compiler.training import search
from sparsify_compiler.training.search import MENU, PARTS, _Attention, choose, label_of, read_menu

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers"),
]

SVG2 = {
    "method": "svg2",
    "q_clusters": 6,
    "kv_clusters": 12,
    "kmeans_iters": (4, 2),
    "far_field": "drop",
    "top_p": 0.5,
}
CUBES = {"method": "cubes", "cube": (2, 3, 4), "query_cube": (3, 4, 4)}
SPARSE = [{"method": "tile", "reference_frames": 2}, {"method": "tile", "reference_frames": 1}, SVG2]
TILE2, TILE1, CLUSTERS = list(read_menu(SPARSE))[1:]
SECONDS = {DENSE: 8e-3, TILE2: 4e-3, TILE1: 2e-3, CLUSTERS: 6e-3}
TOKENS = math.prod(GRID)


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attentions take the times of `SECONDS`, whatever the machine does."""

    def seconds(attention: _Attention, *tensors: Any) -> float:
        settings = attention.plan.settings
        for label, entry in read_menu(SPARSE).items():
            if settings is None or entry.method.fit(attention.plan.site, attention.plan.layout) == settings:
                return SECONDS[label]
        raise AssertionError(settings)

    monkeypatch.setattr(_Attention, "seconds", seconds)


@pytest.fixture(scope="module")
def wan() -> tuple[nn.Module, Inputs]:
    return CASES["wan"].build(batch=1)


@pytest.fixture(scope="module")
def found(wan: tuple[nn.Module, Inputs]) -> Policy:
    """A policy searched with real times."""
    torch._dynamo.reset()
    return search(wan[0], calls(wan[1]), menu=SPARSE, r=math.inf, total=math.inf)


def calls(inputs: Inputs) -> list[Inputs]:
    """Two of different latents and time steps."""
    other = {"hidden_states": inputs["hidden_states"].flip(2), "timestep": inputs["timestep"] // 2}
    return [inputs, {**inputs, **other}]


class Masked(TorchFunctionMode):
    """Eager self-attentions over the video under one mask each, in order; dense where there is none."""

    def __init__(self, masks: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.masks: Iterator[Tensor | None] = iter(masks)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            if query.shape[-2] == key.shape[-2] == TOKENS and (mask := next(self.masks)) is not None:
                return masked_attention(query, key, value, mask, dtype=torch.float32)[0]
        return func(*args, **kwargs)


def answer(model: Any, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out[0] if isinstance(out, tuple) else out.sample


def loss(got: Tensor, exact: Tensor) -> float:
    return float(((got - exact).double().norm() / exact.double().norm()) ** 2)


class Attend(nn.Module):
    """A block that is self-attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.project(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return tokens + scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Tiny(nn.Module):
    """Two attentions, with a graph break between them if asked for."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.patch, self.breaks = nn.Conv3d(3, 8, 1), breaks
        self.first, self.second = Attend(), Attend()

    def forward(self, video: Tensor) -> Tensor:
        tokens = self.first(self.patch(video).flatten(2).mT)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.second(tokens)


class Checkpointed(Tiny):
    """Its second attention lies in the body of a higher-order operator."""

    def forward(self, video: Tensor) -> Tensor:
        tokens = self.first(self.patch(video).flatten(2).mT)
        return checkpoint(self.second, tokens, use_reentrant=False)


JOINT = Recipe(
    grid=GRID,
    batch=2,
    patch="conv3d",
    frames_first=False,
    position="rope pairs",
    text="last",
    text_tokens=7,
    extra_tokens=0,
    streams=False,
    mask="none",
    heads=2,
    kv_heads=2,
    head_dim=8,
    split="linears",
    view="view",
    norm=True,
    spelling="keywords",
    scale=0.25,
    trap="",
    trapped=0,
)


def tiny(**options: bool) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return Tiny(**options).eval(), {"video": torch.randn(1, 3, *GRID)}


# the choice

losses = st.one_of(st.sampled_from([0.0, math.inf, math.nan]), st.floats(0, 10))
trials = st.dictionaries(st.text(max_size=3), st.builds(Trial, losses, st.floats(0, 100)), max_size=6).map(
    lambda others: {DENSE: Trial(0.0, 5.0), **{label: one for label, one in others.items() if label != DENSE}}
)
limits = st.one_of(st.sampled_from([0.0, math.inf]), st.floats(0, 10))


@given(trials, limits)
def test_without_a_total_the_choice_is_the_cheapest_that_is_allowed(
    trials: Mapping[str, Trial], r: float
) -> None:
    chosen = trials[choose({"site": trials}, r, math.inf)["site"]]
    assert chosen.loss <= r
    for other in trials.values():
        assert not other.loss <= r or other.milliseconds >= chosen.milliseconds, "a cheaper one is allowed"
    assert chosen.milliseconds <= trials[DENSE].milliseconds
    if r == 0:
        assert chosen.loss == 0
        if all(one.loss != 0 for label, one in trials.items() if label != DENSE):
            assert chosen is trials[DENSE]
    if r == math.inf:
        comparable = [one.milliseconds for one in trials.values() if not math.isnan(one.loss)]
        assert chosen.milliseconds == min(comparable)


@given(st.lists(trials, min_size=1, max_size=4), limits, limits)
def test_more_loss_never_costs_more_and_the_order_of_the_menu_changes_no_cost(
    layers: list[Mapping[str, Trial]], one: float, other: float
) -> None:
    def chosen(layer: Mapping[str, Trial], r: float) -> str:
        return choose({"site": layer}, r, math.inf)["site"]

    low, high = sorted((one, other))
    for layer in layers:
        assert layer[chosen(layer, high)].milliseconds <= layer[chosen(layer, low)].milliseconds
        backwards = dict(reversed(layer.items()))
        assert layer[chosen(layer, one)] == backwards[chosen(backwards, one)]
        assert chosen(layer, one) == chosen(dict(layer), one)


@given(st.lists(trials, min_size=1, max_size=3), limits, limits)
def test_the_choices_of_all_sites_are_the_cheapest_within_the_total(
    layers: list[Mapping[str, Trial]], r: float, total: float
) -> None:
    """Against every combination; what rounding may miss is a part for each site."""
    sites = {f"site {number}": layer for number, layer in enumerate(layers)}
    choices = choose(sites, r, total)
    assert list(choices) == list(sites)
    chosen = [sites[site][label] for site, label in choices.items()]
    assert all(one.loss <= r for one in chosen)
    assert math.fsum(one.loss for one in chosen) <= total * (1 + 1e-12)
    within = total if math.isinf(total) else total * (1 - len(layers) / PARTS)
    costs = [
        sum(one.milliseconds for one in combination)
        for combination in itertools.product(*(layer.values() for layer in layers))
        if all(one.loss <= r for one in combination) and sum(one.loss for one in combination) <= within
    ]
    assert sum(one.milliseconds for one in chosen) <= min(costs) * (1 + 1e-12)


# what is measured


def test_losses_are_those_of_the_eager_model_under_the_mask_of_one_layer(
    wan: tuple[nn.Module, Inputs], found: Policy
) -> None:
    model, inputs = wan
    frames, tokens_per_frame = GRID[0], GRID[1] * GRID[2]
    for place, layer in enumerate(found.layers):
        for label, references in ((TILE2, 2), (TILE1, 1)):
            masks: list[Tensor | None] = [None] * len(found.layers)
            masks[place] = tile_mask(frames, references, tokens_per_frame)
            expected = []
            for one in calls(inputs):
                with Masked(masks):
                    got = answer(model, one)
                expected.append(loss(got, answer(model, one)))
            assert layer.trials[label].loss == pytest.approx(sum(expected) / 2, rel=1e-2)


def test_every_entry_is_measured_at_every_layer(found: Policy) -> None:
    assert [layer.mark.site for layer in found.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert (found.model, found.inputs) == ("WanTransformer3DModel", 2)
    for layer in found.layers:
        assert (layer.mark.module, layer.mark.kind, layer.mark.grid) == ("WanAttention", "self", GRID)
        assert list(layer.trials) == [DENSE, TILE2, TILE1, CLUSTERS]
        assert all(one.milliseconds > 0 for one in layer.trials.values())
        assert layer.trials[DENSE].loss == 0
        assert all(one.loss > 0 for label, one in layer.trials.items() if label != DENSE)
    first, second = found.layers
    for label in (DENSE, TILE2, TILE1):
        assert first.trials[label].milliseconds == second.trials[label].milliseconds, "one shape, one time"


@pytest.mark.usefixtures("clockless")
def test_the_search_follows_r(wan: tuple[nn.Module, Inputs], found: Policy) -> None:
    model, inputs = wan
    middle = sorted(one.loss for layer in found.layers for one in layer.trials.values())[-3]
    policies = [search(model, calls(inputs), menu=SPARSE, r=r, total=math.inf) for r in (0, middle)]
    assert [layer.choice for layer in policies[0].layers] == [DENSE, DENSE]
    for policy in policies:
        for layer in policy.layers:
            assert {label: one.milliseconds for label, one in layer.trials.items()} == pytest.approx(
                {label: 1e3 * seconds for label, seconds in SECONDS.items()}
            )
            fitting = [label for label, one in layer.trials.items() if one.loss <= policy.r]
            assert layer.choice == min(fitting, key=SECONDS.__getitem__)
    costs = [policy.milliseconds for policy in policies]
    assert costs[0] == policies[0].dense_milliseconds > costs[1]
    assert policies[0].together == 0
    assert (
        replace(policies[0], r=middle, layers=policies[1].layers, together=policies[1].together)
        == policies[1]
    )
    for one, other, third in zip(policies[0].layers, policies[1].layers, found.layers, strict=True):
        assert one.trials == other.trials
        for label in one.trials:
            assert one.trials[label].loss == third.trials[label].loss


# what a policy does


def mixed(found: Policy, *choices: str) -> Policy:
    """The policy with other choices."""
    layers = zip(found.layers, choices, strict=True)
    return replace(found, layers=tuple(replace(layer, choice=choice) for layer, choice in layers))


def test_methods_mix_in_one_graph_and_do_what_each_says(
    wan: tuple[nn.Module, Inputs], found: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = wan
    used: list[BlockTable] = []
    attend = runtime_site.attention_with_far_field

    def spy(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, **others: Any) -> Any:
        used.append(table)
        return attend(query, key, value, table, **others)

    monkeypatch.setattr(runtime_site, "attention_with_far_field", spy)
    path = mixed(found, TILE1, CLUSTERS).save(tmp_path / "policy.json")
    options = {"policy": path, "inner_backend": "eager", "dense_steps": 0}
    got = answer(torch.compile(model, backend="sparsify", options=options, fullgraph=True), inputs)
    tile = tile_mask(GRID[0], 1, GRID[1] * GRID[2])
    with Masked([tile, used[-1].mask()]):
        expected = answer(model, inputs)
    assert loss(got, expected) < 1e-9
    assert loss(got, answer(model, inputs)) > 1e-6, "the check must be able to fail"


def test_a_policy_loses_what_the_search_said(wan: tuple[nn.Module, Inputs], found: Policy) -> None:
    model, inputs = wan
    options = {"policy": found, "inner_backend": "eager", "dense_steps": 0}
    fast = torch.compile(model, backend="sparsify", options=options)
    measured = []
    for one in calls(inputs):
        with sparsify_compiler.generation(1, streams=1):  # each is a video of its own
            measured.append(loss(answer(fast, one), answer(model, one)))
    assert sum(measured) / 2 == pytest.approx(found.together, rel=1e-3)


def test_mixed_methods_keep_their_state(wan: tuple[nn.Module, Inputs], found: Policy) -> None:
    model, inputs = wan
    options = {"policy": mixed(found, CLUSTERS, TILE1), "inner_backend": "eager", "dense_steps": 1}
    fast = torch.compile(model, backend="sparsify", options=options)
    with sparsify_compiler.generation(3, streams=1):
        for step in range(3):
            answer(fast, {**inputs, "timestep": torch.full_like(inputs["timestep"], 900 - 300 * step)})
    stats = sparsify_compiler.stats(fast)
    assert stats.dense_calls == 1
    methods = {(one.site, one.method) for one in stats.measurements}
    assert methods == {("blocks.0.attn1", "svg2"), ("blocks.1.attn1", "tile")}
    assert {one.step for one in stats.measurements} == {1, 2}
    assert "(" not in str(stats), "each site has one method"


def test_explain_says_what_each_site_does_and_why(wan: tuple[nn.Module, Inputs], found: Policy) -> None:
    model, inputs = wan
    policy = replace(mixed(found, CLUSTERS, DENSE), r=1e-12)
    explained = sparsify_compiler.explain(model, **inputs, options={"policy": policy})
    plans = {plan.site.name: plan for plan in explained.plans}
    first, second = plans["blocks.0.attn1"], plans["blocks.1.attn1"]
    assert (first.method, second.method) == ("svg2", "dense")
    trial = found.layers[0].trials[CLUSTERS]
    assert f"{CLUSTERS}, loss {trial.loss:.3g} of at most 1e-12, {trial.milliseconds:.3g} ms" in first.reason
    assert second.reason.startswith("policy: dense, ")
    assert explained.graph_plans[0].dense_steps == 0.2, "that of svg2"
    assert not any("default" in hint for hint in explained.hints)


def test_a_trained_predictor_on_the_menu(wan: tuple[nn.Module, Inputs], tmp_path: Path) -> None:
    model, inputs = wan
    path = tmp_path / "predictor.safetensors"
    weights, shares = initial_weights(4, 16, 4), torch.tensor([0.3, 1.0])
    trained = (
        Trained(weights=weights.clone(), shares=shares.clone(), group=(1, 2, 2), chosen_by="all")
        for _ in range(2)
    )
    save_predictor(path, {f"blocks.{block}.attn1": one for block, one in enumerate(trained)})
    entry = {"method": "dsv", "predictor": str(path)}
    policy = search(model, [inputs], menu=[entry], r=math.inf, total=math.inf)
    label = label_of(entry)
    layers = tuple(replace(layer, choice=label) for layer in policy.layers)
    saved = Policy.load(replace(policy, layers=layers).save(tmp_path / "policy.json"))
    fast = torch.compile(model, backend="sparsify", options={"policy": saved, "inner_backend": "eager"})
    assert 0 < loss(answer(fast, inputs), answer(model, inputs)) < 1
    assert all(0 < layer.trials[label].loss < 1 for layer in policy.layers)


@pytest.mark.parametrize("breaks", [False, True])
def test_models_of_one_graph_and_of_several(breaks: bool) -> None:
    model, inputs = tiny(breaks=breaks)
    options = {"grid": GRID, "provider": "reference"}  # the grid is lost at the break
    policy = search(model, [inputs], menu=SPARSE[:1], r=math.inf, total=math.inf, options=options)
    places = [(layer.mark.site, layer.mark.module, layer.graph) for layer in policy.layers]
    assert places == [("first", "Attend", 0), ("second", "Attend", int(breaks))]
    sparse = mixed(policy, TILE2, TILE2)
    fast = torch.compile(
        model, backend="sparsify", options={"policy": sparse, "inner_backend": "eager", **options}
    )
    mask = tile_mask(GRID[0], 2, GRID[1] * GRID[2])
    with Masked([mask, mask]), torch.no_grad():
        expected = model(**inputs)
    with torch.no_grad():
        assert loss(fast(**inputs), expected) < 1e-9


@pytest.mark.parametrize(
    ("spelling", "mask", "kv_heads"),
    [("gqa", "bool", 1), ("matmul", "additive", 2)],
)
def test_every_spelling_is_measured_as_it_runs(
    spelling: str, mask: Literal["none", "bool", "additive", "per head"], kv_heads: int
) -> None:
    model, inputs = replace(JOINT, spelling=spelling, mask=mask, kv_heads=kv_heads).build()
    policy = search(model, [inputs], menu=[*SPARSE[1:2], CUBES], r=math.inf, total=math.inf)
    for layer, choices in zip(policy.layers, ((TILE1, DENSE), (DENSE, label_of(CUBES))), strict=True):
        torch._dynamo.reset()
        options = {"policy": mixed(policy, *choices), "inner_backend": "eager", "dense_steps": 0}
        fast = torch.compile(model, backend="sparsify", options=options)
        (choice,) = (label for label in choices if label != DENSE)
        with torch.no_grad():
            assert loss(fast(**inputs), model(**inputs)) == pytest.approx(layer.trials[choice].loss, rel=1e-3)


# files

labels = st.text(min_size=1, max_size=8)
marks = st.builds(
    Mark,
    site=labels,
    module=labels,
    kind=st.sampled_from(["self", "joint"]),
    heads=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    grid=st.tuples(*[st.integers(1, 99)] * 3),
)
whole_losses = st.floats(min_value=0, allow_nan=False)


@given(
    st.data(), st.lists(marks, min_size=1, max_size=3), st.floats(min_value=0, allow_nan=False), whole_losses
)
def test_a_policy_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    marks: list[Mark],
    r: float,
    together: float,
) -> None:
    menu, total = read_menu(MENU), data.draw(st.floats(min_value=0, allow_nan=False))
    times = st.integers(0, 10**7).map(lambda n: n / 10**4)
    layers = tuple(
        PolicySite(
            mark=one,
            graph=graph,
            choice=data.draw(st.sampled_from(list(menu))),
            trials={label: data.draw(st.builds(Trial, whole_losses, times)) for label in menu},
        )
        for graph, one in enumerate(marks)
    )
    policy = Policy(
        model="M",
        r=r,
        total=total,
        menu=menu,
        layers=layers,
        together=together,
        inputs=2,
        machine="here",
    )
    path = policy.save(tmp_path_factory.mktemp("policies") / "policy.json")
    assert Policy.load(path) == policy
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_choice_may_be_edited_by_hand(found: Policy, tmp_path: Path) -> None:
    path = mixed(found, TILE1, TILE1).save(tmp_path / "policy.json")
    saved, content = Policy.load(path), json.loads(path.read_text())
    content["layers"][1]["choice"] = CLUSTERS
    path.write_text(json.dumps(content))
    assert Policy.load(path) == mixed(saved, TILE1, CLUSTERS)
    content["layers"][1]["choice"] = TILE2.replace("2", "3")
    path.write_text(json.dumps(content))
    with pytest.raises(
        PolicyError, match=r"unknown choice of blocks.1.attn1.*Did you mean 'tile reference_fr"
    ):
        Policy.load(path)


@pytest.mark.filterwarnings("error::sparsify_compiler.errors.SparsifyWarning")
@pytest.mark.parametrize(
    ("r", "total", "milliseconds", "says"),
    [
        (0.001, 1.0, 4.0, "search with r above 0.02"),
        (1.0, 0.001, 4.0, "search with total above 0.02"),
        (0.001, 0.001, 4.0, "search with r and total above 0.02"),
        (1.0, 1.0, 9.0, "nothing on the menu is faster: search on a video of more tokens"),
        (1.0, 1.0, 4.0, "edit the choices in the file"),
    ],
)
def test_a_policy_that_keeps_everything_dense_says_what_to_try(
    wan: tuple[nn.Module, Inputs],
    found: Policy,
    r: float,
    total: float,
    milliseconds: float,
    says: str,
    tmp_path: Path,
) -> None:
    trials = {DENSE: Trial(0.0, 8.0), TILE1: Trial(0.5, milliseconds), TILE2: Trial(0.02, milliseconds)}
    layers = tuple(replace(layer, choice=DENSE, trials=trials) for layer in found.layers)
    path = replace(found, layers=layers, r=r, total=total).save(tmp_path / "policy.json")
    policy, (model, inputs) = Policy.load(path), wan
    options = {"policy": path, "inner_backend": "eager"}
    assert str(path) in policy.advice
    assert says in policy.advice
    assert says in " ".join(str(policy).split())
    assert any(says in hint for hint in explain(model, **inputs, options=options).hints)
    with pytest.warns(SparsifyWarning, match=says):
        answer(torch.compile(model, backend="sparsify", options=options), inputs)
    sparse = replace(policy, layers=(replace(layers[0], choice=TILE1), *layers[1:]))
    assert not sparse.advice
    torch._dynamo.reset()
    answer(torch.compile(model, backend="sparsify", options={**options, "policy": sparse}), inputs)


# mistakes


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, True, "0.1", None])
@pytest.mark.parametrize("name", ["r", "total"])
def test_limits_must_be_numbers_of_at_least_0(wan: tuple[nn.Module, Inputs], name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a number of at least 0"):
        search(wan[0], [wan[1]], **{name: value})


@pytest.mark.parametrize(
    ("menu", "says"),
    [
        ([], "list of at least one entry"),
        ({"method": "tile"}, "list of at least one entry"),
        (["tile"], "an entry of the menu must be a dict"),
        ([{"method": "tiles"}], "Did you mean 'tile'"),
        ([{"top_p": 0.5}], "unknown method None"),
        ([{"method": "svg2", "top_q": 0.5}], "Did you mean 'top_p'"),
        ([{"method": "tile", "top_p": 0.5}], "belongs to method"),
        ([{"method": "svg2", "top_p": 2}], "top_p must be"),
        ([{"method": "svg2", "far_field": "near"}], "unknown far_field"),
        ([{"method": "svg2", "dense_steps": 2}], "unknown option 'dense_steps'"),
        ([{"method": "dsv"}], "needs a 'predictor'"),
        ([SPARSE[0], SPARSE[0]], "every entry only once"),
        ([{"method": "tile", "reference_frames": 6}], "reference_frames must be in 1..5"),
    ],
)
def test_a_menu_must_make_sense(wan: tuple[nn.Module, Inputs], menu: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        search(wan[0], [wan[1]], menu=menu)


def test_a_search_tells_what_it_cannot_work_with() -> None:
    model, inputs = tiny()
    smaller = {"video": inputs["video"][:, :, :3]}
    with pytest.raises(SparsifyError, match=r"the same attentions and grid, got first of grid \(3, 7, 9\)"):
        search(model, [inputs, smaller], menu=SPARSE[:1])
    for wrong in ([], inputs, [3], None, [{}], "calls.pt"):
        with pytest.raises(OptionError, match="keyword arguments"):
            search(model, wrong)
    for option in ({"method": "tile"}, {"dense_layers": 1}, {"gird": (5, 7, 9)}):
        with pytest.raises(OptionError, match="unknown option of a search"):
            search(model, [inputs], options=option)
    with pytest.raises(SparsifyError, match="eval mode"):
        search(nn.Sequential().train(), [inputs])
    with pytest.raises(SparsifyError, match="no attention to choose for"):
        search(nn.Identity().eval(), [{"input": torch.ones(2)}])
    with pytest.raises(SparsifyError, match=r"^second cannot be searched"):
        search(Checkpointed().eval(), [inputs], menu=SPARSE[:1])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(SparsifyError, match="must be finite and non-zero"):
        search(model, [inputs], menu=SPARSE[:1])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "must be a file that a search wrote"),
        ("{", "must hold JSON"),
        ("[1]", "must have the format 'sparsify-policy-2', got 'list'"),
        ('{"format": "sparsify-policy-1"}', "got 'sparsify-policy-1'"),
        ('{"format": "sparsify-policy-2"}', "damaged .KeyError: 'menu'"),
        ('{"format": "sparsify-policy-2", "menu": {"a": {"method": "svg3"}}}', "Did you mean 'svg2'"),
        ('{"format": "sparsify-policy-2", "menu": {}, "layers": []}', "there are no layers"),
    ],
)
def test_a_file_that_is_no_policy(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "policy.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PolicyError, match=says):
        configure({"policy": str(path)})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("heads", "2", "heads must be an integer, got '2'"),
        ("grid", "5x7x9", "each size of grid must be an integer, got '5'"),
        ("graph", None, "graph must be an integer, got None"),
        ("graph", 7, "or as of several graphs"),
        ("r", "nan", "r must be at least 0, got 'nan'"),
        ("total", -1, "total must be at least 0, got -1"),
        ("calibration inputs", "x", "calibration inputs must be an integer"),
        ("layers", "twice", "lists them twice"),
    ],
)
def test_a_policy_edited_into_nonsense(
    wan: tuple[nn.Module, Inputs], found: Policy, tmp_path: Path, name: str, value: Any, says: str
) -> None:
    path = found.save(tmp_path / "policy.json")
    content = json.loads(path.read_text())
    if value == "twice":
        content["layers"].append(content["layers"][0])
    else:
        (content if name in content else content["layers"][0])[name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(PolicyError, match=says):
        answer(torch.compile(wan[0], backend="sparsify", options={"policy": str(path)}), wan[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "tile"}, "a policy sets option 'method' for every site: leave out one"),
        ({"preset": "svg2"}, "option 'preset'"),
        ({"top_p": 0.5}, "option 'top_p'"),
        ({"far_field": "drop"}, "option 'far_field'"),
        ({"dense_layers": 1}, "option 'dense_layers'"),
        ({"dense_step": 1}, "Did you mean 'dense_steps'"),
    ],
)
def test_a_policy_stands_alone(found: Policy, options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        configure({"policy": found, **options})
    with pytest.raises(OptionError, match="path of a file"):
        configure({"policy": 3})


def test_a_policy_for_another_grid_is_refused_where_it_is_compiled(
    wan: tuple[nn.Module, Inputs], found: Policy
) -> None:
    fast = torch.compile(wan[0], backend="sparsify", options={"policy": found})
    says = r"blocks.0.attn1 of WanTransformer3DModel must have grid 5x7x9, got 3x7x9.*search"
    with pytest.raises(PolicyError, match=says):
        answer(fast, CASES["wan"].build((3, 7, 9), batch=1)[1])


class Wrapper(nn.Module):
    """A trainer's wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_policy_of_the_bare_model_does_for_a_wrapped_one(
    wan: tuple[nn.Module, Inputs], found: Policy
) -> None:
    model, inputs = wan
    policy = mixed(found, TILE1, TILE2)
    bare, wrapped = (explain(one, **inputs, options={"policy": policy}) for one in (model, Wrapper(model)))
    assert sum(plan.method == "tile" for plan in wrapped.plans) == 2
    names = [plan.site.name for plan in wrapped.plans]
    assert names == [f"module.{plan.site.name}" for plan in bare.plans]
    assert [plan.settings for plan in wrapped.plans] == [plan.settings for plan in bare.plans]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"batch": 4, "dtype": "bfloat16", "device": "cuda", "index": 7}, ""),
        ({"heads": 3}, "must have heads 2, got 3"),
        ({"kv_heads": 1}, "must have kv_heads 2, got 1"),
        ({"head_dim": 32}, "must have head_dim 16, got 32"),
        ({"kind": "joint"}, "must have kind self, got joint"),
        ({"module": "Attention"}, "must have module WanAttention, got Attention"),
        (
            {"name": "attn1"},
            "must have the attentions blocks.0.attn1, blocks.1.attn1, got .*compile the model as a whole",
        ),
    ],
)
def test_a_policy_knows_its_sites(
    wan: tuple[nn.Module, Inputs], found: Policy, change: Mapping[str, Any], says: str
) -> None:
    layout = TokenLayout(tokens=TOKENS, grid=GRID)
    marks = [asdict(layer.mark) for layer in found.layers]
    sites = [
        site_of(torch.empty(1, one["heads"], TOKENS, one["head_dim"]), name=one["site"]) for one in marks
    ]
    pairs = [
        (replace(site, module=one["module"], kind=one["kind"]), layout)
        for site, one in zip(sites, marks, strict=True)
    ]
    assert [entry for entry, _ in found.of(pairs)] == [found.menu[layer.choice] for layer in found.layers]
    assert found.of([]) == []
    pairs[1] = replace(pairs[1][0], **change), layout
    if not says:
        found.of(pairs)
        return
    with pytest.raises(PolicyError, match=says):
        found.of(pairs)
    with pytest.raises(PolicyError, match=r"must have the attentions .* got blocks.0.attn1; search for"):
        found.of(pairs[:1])


# the command


@pytest.mark.usefixtures("clockless")
def test_the_command_searches_a_checkpoint(tmp_path: Path) -> None:
    model, inputs = CASES["cogvideox"].build(batch=1)  # diffusers loads Wan with accelerate alone
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save([inputs], tmp_path / "calls.pt")
    save_file(
        {f"0.{name}": x for name, x in inputs.items() if isinstance(x, Tensor)},
        tmp_path / "calls.safetensors",
    )
    (tmp_path / "menu.json").write_text(json.dumps(SPARSE))
    policies = []
    for file in ("calls.pt", "calls.safetensors"):
        out = tmp_path / f"{file}.json"
        words = [
            "search",
            str(tmp_path / "checkpoint"),
            *("--inputs", str(tmp_path / file)),
            *("--menu", str(tmp_path / "menu.json"), "--r", "inf", "--out", str(out)),
        ]
        result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "120"})
        assert result.exit_code == 0, result.exception
        assert TILE1 in result.stdout
        begin, *_, end = result.stderr.splitlines()  # which is no terminal
        total = end.split(",")[0].rpartition(" of ")[2]
        assert begin == f"searching: 0 of {total}"
        assert end.startswith(f"searching: {total} of {total}")
        policies.append(Policy.load(out))
    assert policies[0] == policies[1]
    assert sparsify_compiler.explain(model, **inputs, options={"policy": out}).plans


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--r", "-1"], "r must be a number"),
        (["--inputs", "calls.pt"], "must be given together"),
        (["--out", "nowhere/policy.json"], "a folder that exists"),
        (["--out", "."], "out must be a file in a folder that exists, got '.'"),
        (["nowhere", "--inputs", __file__], "inputs must be torch.save of a list"),
        (["--menu", "nowhere.json"], "the menu must be a JSON file"),
        (["--menu", __file__], "the menu must be a JSON file"),
        (["--option", "method=tile"], "unknown option of a search 'method'"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], says: str) -> None:
    error = CliRunner().invoke(cli.app, ["search", *words]).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert says in str(error)


def test_entries_say_all_that_they_are() -> None:
    nothing = {"min_gain": None, "top_p": None}
    others = [{"method": "svg2", "far_field": far_field, **nothing} for far_field in FAR_FIELDS]
    for entry in read_menu([*MENU, SVG2, *others]).values():
        assert entry_of(json.loads(json.dumps(entry.options))) == entry
