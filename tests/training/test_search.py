"""The layer-wise search: choices against brute force, losses against eager models under masks, errors."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from marks import fresh_dynamo, needs_diffusers, no_warnings
from safetensors.torch import save_file
from searching import CLUSTERS, CUBES, SECONDS, SPARSE, SVG2, TILE1, TILE2, TOKENS, answer, calls, loss, mixed
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import sparsify_compiler
from sparsify_compiler import OptionError, Policy, SparsifyError, cli
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods.predictor import Trained, initial_weights, save_predictor
from sparsify_compiler.policy import DENSE, Trial, entry_of
from sparsify_compiler.testing.dits import Recipe
from sparsify_compiler.testing.models import CASES, GRID, Inputs, Made
from sparsify_compiler.testing.oracles import MaskedAttention, tile_mask
from sparsify_compiler.training import search
from sparsify_compiler.training.search import MENU, PARTS, choose, label_of, read_menu

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]


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


def test_losses_are_those_of_the_eager_model_under_the_mask_of_one_layer(wan: Made, found: Policy) -> None:
    model, inputs = wan
    frames, tokens_per_frame = GRID[0], GRID[1] * GRID[2]
    for place, layer in enumerate(found.layers):
        for label, references in ((TILE2, 2), (TILE1, 1)):
            masks: list[Tensor | None] = [None] * len(found.layers)
            masks[place] = tile_mask(frames, references, tokens_per_frame)
            expected = []
            for one in calls(inputs):
                with MaskedAttention(masks, TOKENS):
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
def test_the_search_follows_r(wan: Made, found: Policy) -> None:
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


def test_a_trained_predictor_on_the_menu(wan: Made, tmp_path: Path) -> None:
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
    with MaskedAttention([mask, mask], TOKENS), torch.no_grad():
        expected = model(**inputs)
    with torch.no_grad():
        assert loss(fast(**inputs), expected) < 1e-9


@pytest.mark.parametrize(("spelling", "mask", "kv_heads"), [("gqa", "bool", 1), ("matmul", "additive", 2)])
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


@pytest.mark.parametrize("value", [-1, -1e-9, math.nan, True, "0.1", None])
@pytest.mark.parametrize("name", ["r", "total"])
def test_limits_must_be_numbers_of_at_least_0(wan: Made, name: str, value: Any) -> None:
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
def test_a_menu_must_make_sense(wan: Made, menu: Any, says: str) -> None:
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


@pytest.mark.usefixtures("clockless")
def test_the_command_searches_a_checkpoint(tmp_path: Path) -> None:
    model, inputs = CASES["cogvideox"].build(batch=1)  # diffusers loads Made with accelerate alone
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
