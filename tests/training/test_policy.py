"""Policies: what a model does under one, the file, the sites it recognises, errors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import fresh_dynamo, needs_diffusers, no_warnings
from searching import CLUSTERS, TILE1, TILE2, TOKENS, answer, calls, loss, mixed
from torch import nn

import sparsify_compiler
from sparsify_compiler import OptionError, Policy, PolicyError, SparsifyWarning, explain
from sparsify_compiler.backend import configure
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.policy import DENSE, Mark, PolicySite, Trial
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.models import CASES, GRID, Made
from sparsify_compiler.testing.oracles import MaskedAttention, tile_mask
from sparsify_compiler.testing.strategies import site_of
from sparsify_compiler.training.search import MENU, read_menu

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]


def test_methods_mix_in_one_graph_and_do_what_each_says(
    wan: Made, found: Policy, tmp_path: Path, tables: list[BlockTable]
) -> None:
    model, inputs = wan
    path = mixed(found, TILE1, CLUSTERS).save(tmp_path / "policy.json")
    options = {"policy": path, "inner_backend": "eager", "dense_steps": 0}
    got = answer(torch.compile(model, backend="sparsify", options=options, fullgraph=True), inputs)
    tile = tile_mask(GRID[0], 1, GRID[1] * GRID[2])
    with MaskedAttention([tile, tables[-1].mask()], TOKENS):
        expected = answer(model, inputs)
    assert loss(got, expected) < 1e-9
    assert loss(got, answer(model, inputs)) > 1e-6, "the check must be able to fail"


def test_a_policy_loses_what_the_search_said(wan: Made, found: Policy) -> None:
    model, inputs = wan
    options = {"policy": found, "inner_backend": "eager", "dense_steps": 0}
    fast = torch.compile(model, backend="sparsify", options=options)
    measured = []
    for one in calls(inputs):
        with sparsify_compiler.generation(1, streams=1):  # each is a video of its own
            measured.append(loss(answer(fast, one), answer(model, one)))
    assert sum(measured) / 2 == pytest.approx(found.together, rel=1e-3)


def test_mixed_methods_keep_their_state(wan: Made, found: Policy) -> None:
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


def test_explain_says_what_each_site_does_and_why(wan: Made, found: Policy) -> None:
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
        model="M", r=r, total=total, menu=menu, layers=layers, together=together, inputs=2, machine="here"
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
    wan: Made, found: Policy, r: float, total: float, milliseconds: float, says: str, tmp_path: Path
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
    assert not replace(policy, layers=(replace(layers[0], choice=TILE1), *layers[1:])).advice


@pytest.mark.filterwarnings("error::sparsify_compiler.errors.SparsifyWarning")
def test_a_policy_with_a_sparse_site_gives_no_advice(wan: Made, found: Policy) -> None:
    model, inputs = wan
    first, *others = (replace(layer, choice=DENSE) for layer in found.layers)
    sparse = replace(found, layers=(replace(first, choice=TILE1), *others), r=1.0, total=1.0)
    assert not sparse.advice
    options = {"policy": sparse, "inner_backend": "eager"}
    answer(torch.compile(model, backend="sparsify", options=options), inputs)


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
    wan: Made, found: Policy, tmp_path: Path, name: str, value: Any, says: str
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


def test_a_policy_for_another_grid_is_refused_where_it_is_compiled(wan: Made, found: Policy) -> None:
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


def test_a_policy_of_the_bare_model_does_for_a_wrapped_one(wan: Made, found: Policy) -> None:
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
def test_a_policy_knows_its_sites(wan: Made, found: Policy, change: Mapping[str, Any], says: str) -> None:
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
