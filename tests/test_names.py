"""Names of sites are known again in another wrapper, by policies, predictors and states of training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify_compiler import DSVTrainer, OptionError, PolicyError
from sparsify_compiler.backend import configure
from sparsify_compiler.methods import predictor
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.names import align
from sparsify_compiler.passes.planning import make_plan
from sparsify_compiler.plan import AttentionSite, TokenLayout
from sparsify_compiler.policy import DENSE, Policy, PolicySite, Trial, entry_of, mark
from sparsify_compiler.runtime.state import states_of
from sparsify_compiler.testing.strategies import site_of

LAYOUT = TokenLayout(tokens=20, grid=(1, 4, 5))
BARE = ("blocks.0.attn", "blocks.1.attn")
ALIKE = {
    "bare": BARE,
    "DDP": ("module.blocks.0.attn", "module.blocks.1.attn"),
    "nested": ("pipe.module.blocks.0.attn", "pipe.module.blocks.1.attn"),
    "compiled": ("_orig_mod.blocks.0.attn", "_orig_mod.blocks.1.attn"),
    "FSDP": tuple(f"_fsdp_wrapped_module.blocks.{i}._fsdp_wrapped_module.attn" for i in range(2)),
}
OTHERS = {
    "other blocks": ("blocks.1.attn", "blocks.2.attn"),
    "more blocks": (*BARE, "blocks.2.attn"),
    "fewer blocks": BARE[:1],
    "two models": ("high.blocks.0.attn", "low.blocks.1.attn"),
    "other attention": ("blocks.0.attn2", "blocks.1.attn2"),
    "called twice": ("blocks.0.attn", "blocks.0.attn#2"),
}
"""None of which is `BARE`, in whatever wrapper."""


def sites(names: Sequence[str]) -> list[tuple[AttentionSite, TokenLayout]]:
    site = replace(site_of(torch.empty(1, 2, 20, 8)), kind="self", module="Attention")
    return [(replace(site, name=name, index=index), LAYOUT) for index, name in enumerate(names)]


def policy(*graphs: Sequence[str]) -> Policy:
    """At every site another choice."""
    menu = {DENSE: entry_of({"method": DENSE})}
    menu |= {
        str(cut): entry_of({"method": "cubes", "cube": (1, 1, cut), "min_gain": 0.1}) for cut in range(1, 9)
    }
    labels = iter(menu)
    layers = [
        PolicySite(
            mark=mark(*pair),
            graph=number,
            choice=next(labels),
            trials={label: Trial(0.0, 1.0) for label in menu},
        )
        for number, names in enumerate(graphs)
        for pair in sites(names)
    ]
    return Policy(
        model="Video",
        r=1.0,
        total=1.0,
        menu=menu,
        layers=tuple(layers),
        together=0.0,
        inputs=1,
        machine="here",
    )


def saved_predictor(path: Path, names: Sequence[str]) -> list[torch.Tensor]:
    trained = [
        predictor.Trained(
            weights=torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(i)),
            shares=torch.tensor([0.3, 1.0]),
            group=(1, 2, 2),
            chosen_by="all",
        )
        for i in range(len(names))
    ]
    predictor.save_predictor(path, dict(zip(names, trained, strict=True)))
    return [one.weights for one in trained]


@pytest.mark.parametrize("known", ALIKE)
@pytest.mark.parametrize("asked", ALIKE)
def test_the_same_sites_in_other_wrappers(asked: str, known: str) -> None:
    found = align(ALIKE[asked], ALIKE[known])
    assert found is not None
    assert list(found.names.items()) == list(zip(ALIKE[asked], ALIKE[known], strict=True))


@pytest.mark.parametrize("wrapper", ["", "module."])
@pytest.mark.parametrize("other", OTHERS)
def test_other_sites_in_any_wrapper(other: str, wrapper: str) -> None:
    names = [wrapper + name for name in OTHERS[other]]
    found = align(names, BARE)
    assert found is None or len(names) < len(BARE)
    with pytest.raises(PolicyError, match="is for another model"):
        policy(BARE).of(sites(names))


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (["blocks.0.attn"], ["module.blocks.0.attn"]),
        (["module.blocks.0.attn"], ["blocks.0.attn"]),
        (["module.blocks.0.attn"], ["pipe.blocks.0.attn"]),
        (["attention"], ["module"]),
        (["module", "module#2"], ["attention", "attention#2"]),
        (["attention", "blocks.0"], ["pipe.module", "pipe.module.blocks.0"]),
        (["module.attention", "module.attention2"], ["attention", "attention2"]),
        (["low.0", "low.1"], ["low.0", "low.1"]),
        (["module.low.0", "module.high.0"], ["low.0", "high.0"]),
    ],
)
def test_single_sites_roots_and_several_models(asked: list[str], known: list[str]) -> None:
    found = align(asked, known)
    assert found is not None
    assert [found.names[name] for name in asked] == known


@pytest.mark.parametrize(
    ("asked", "known"),
    [
        (["blocks.1.attn"], ["blocks.0.attn"]),
        (["high.attn"], ["low.attn"]),
        (["stages.1.blocks.0.attn"], ["stages.0.blocks.0.attn"]),
        (["attn"], ["high.attn", "low.attn"]),
        (["refiner.0.attn", "refiner.1.attn"], ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]),
    ],
)
def test_too_little_in_common(asked: list[str], known: list[str]) -> None:
    assert align(asked, known) is None


@pytest.mark.parametrize("known", ALIKE)
@pytest.mark.parametrize("asked", ALIKE)
def test_a_policy_in_another_wrapper(asked: str, known: str) -> None:
    found = policy(ALIKE[known])
    assert [entry for entry, _ in found.of(sites(ALIKE[asked]))] == [
        found.menu[layer.choice] for layer in found.layers
    ]


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_policy_of_two_models_takes_the_nearer_one(wrapper: str) -> None:
    found = policy(*([f"{model}.{name}" for name in BARE] for model in ("high", "low")))
    chosen = [found.menu[layer.choice] for layer in found.layers]
    for model, expected in (("high", chosen[:2]), ("low", chosen[2:])):
        names = [f"{wrapper}{model}.{name}" for name in BARE]
        assert [entry for entry, _ in found.of(sites(names))] == expected
    with pytest.raises(PolicyError, match=r"several models with the attentions blocks\.0\.attn"):
        found.of(sites(BARE))


def test_the_class_of_the_model_itself_is_not_always_known() -> None:
    (pair,) = sites(["attention"])
    bare = replace(pair[0], module=""), LAYOUT
    found = policy(["module"])
    assert len(found.of([bare])) == 1
    with pytest.raises(PolicyError, match="must have module Attention, got Other"):
        found.of([(replace(pair[0], module="Other", name="module"), LAYOUT)])


@pytest.mark.parametrize("known", ALIKE)
@pytest.mark.parametrize("asked", ALIKE)
def test_a_predictor_in_another_wrapper(asked: str, known: str, tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    weights = saved_predictor(path, ALIKE[known])
    plan = make_plan(sites(ALIKE[asked]), configure({"method": "dsv", "predictor": path}))
    for one, expected in zip(plan, weights, strict=True):
        assert isinstance(one.settings, Dsv)
        assert torch.equal(one.settings.trained(one.site, LAYOUT)["weights"], expected)


def test_a_predictor_for_some_of_its_sites_or_of_another_model(tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    weights = saved_predictor(path, BARE)
    config = configure({"method": "dsv", "predictor": path, "dense_layers": 1})
    _, plan = make_plan(sites(ALIKE["DDP"]), config)
    assert isinstance(plan.settings, Dsv)
    assert torch.equal(plan.settings.trained(plan.site, LAYOUT)["weights"], weights[1])
    with pytest.raises(OptionError, match=r"knows no attention 'high.blocks.0.attn' but blocks.0.attn"):
        make_plan(sites(OTHERS["two models"]), configure({"method": "dsv", "predictor": path}))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(1, 1)}) for _ in range(2))


def test_a_state_of_training_in_another_wrapper() -> None:
    bare, wrapped = Blocks(), nn.ModuleDict({"module": Blocks()})
    for model, known, expected in (
        (wrapped, BARE, ALIKE["DDP"]),
        (bare, ALIKE["DDP"], BARE),
        (bare, BARE, BARE),
    ):
        state: dict[str, Any] = DSVTrainer(model).state_dict()
        state["profiles"] = dict.fromkeys(known)
        state["choices"] = {known[1]: ((1, 2, 2), 0.5, "all")}
        state["learned"] = {"signal": torch.zeros(3), **{f"{name}.shares": torch.ones(2) for name in known}}
        DSVTrainer(model).load_state_dict(state)
        (held,) = states_of(model.parameters())
        assert list(held.trained) == ["signal", *(f"{name}.shares" for name in expected)]
        assert held.learning is not None
        assert list(held.learning.choices) == [expected[1]]
