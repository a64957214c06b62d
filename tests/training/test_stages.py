"""Two-stage training: what the model computes, when it turns sparse, that it resumes exactly, that ranks agree."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._activation_offloading import activation_offloading

import sparsify_compiler
from sparsify_compiler import DSVTrainer, OptionError, SparsifyError
from sparsify_compiler.kernels import providers
from sparsify_compiler.methods.dsv import GROUPS, Choice, Dsv
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.methods.predictor import SHARES, load_predictor
from sparsify_compiler.passes import offload
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.state import state_of
from sparsify_compiler.testing.dits import Attend
from sparsify_compiler.testing.models import CASES, GRID, Inputs
from sparsify_compiler.testing.strategies import site_of
from sparsify_compiler.training.cost import Cost
from sparsify_compiler.training.dsv import Profile, _Site

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers"),
]
OPTIONS = {"method": "dsv", "rank": 8, "inner_backend": "eager"}


def made(family: str = "wan", batch: int = 1) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model, inputs = CASES[family].make(GRID, batch)
    return model.train(), inputs


def step(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """The loss of a call, after its backward pass."""
    out = model(**inputs, return_dict=False)[0]
    loss = out.square().mean()
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_learning_leaves_the_models_gradients_alone_bit_for_bit(inner: str) -> None:
    model, inputs = made()
    dense = torch.compile(model, backend="sparsify", options={"method": "dense", "inner_backend": inner})
    step(dense, inputs)
    expected = gradients(model)
    assert expected
    fast = torch.compile(model, backend="sparsify", options=OPTIONS | {"inner_backend": inner})
    dsv = DSVTrainer(fast)
    for _ in range(2):  # the second call learns
        step(fast, inputs)
        found = gradients(model)
        dsv.step()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lists_that_wait_on_the_host_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of keys is moved out of forward and back in backward."""
    moved: list[tuple[int, int]] = []
    move = activation_offloading.offload_chosen_sets

    def counted(forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        move(forward, backward)
        out = sum(node.name.startswith("cpu_offload") for node in forward.graph.nodes)
        back = sum(node.name.startswith("gpu_reload") for node in backward.graph.nodes)
        moved.append((out, back))

    monkeypatch.setattr(activation_offloading, "offload_chosen_sets", counted)
    monkeypatch.setattr(offload, "LEAST", 2**12)
    torch.manual_seed(0)
    model, video = Attend(), torch.randn(1, 4, 4, 8, 12)

    def train(options: dict[str, Any]) -> None:
        torch.compile(model, backend="sparsify", options=options)(video).square().mean().backward()

    dsv = DSVTrainer(model, threshold=10.0, profile_every=(2, 2), break_even=1.0)
    for _ in range(3):
        train(OPTIONS)
        dsv.step()
    assert dsv.stage == 2
    found = []
    for offloads in (False, True):
        torch._dynamo.reset()
        model.zero_grad()
        train(OPTIONS | {"inner_backend": "inductor", "offload_indices": offloads})
        found.append(gradients(model))
        assert moved == ([(1, 1)] if offloads else [])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_recomputed_forward_pass_reuses_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With activation checkpointing every choice is made once, and training is the same as without."""
    chosen: list[str] = []
    load = providers.load

    def counted(provider: str, family: str) -> Any:
        chosen.append(family)
        return load(provider, family)

    seen = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model, inputs = made()
        if checkpointing:
            model.enable_gradient_checkpointing()
        fast = torch.compile(model, backend="sparsify", options=OPTIONS | {"inner_backend": "aot_eager"})
        dsv = DSVTrainer(fast, threshold=10.0, profile_every=(2, 2), break_even=1.0)
        for _ in range(4):
            step(fast, inputs)
            dsv.step()
        assert dsv.stage == 2
        model.zero_grad()
        chosen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(providers, "load", counted)
            loss = step(fast, inputs)
        assert chosen.count("prediction") == 2, "one for each of the two sites"
        assert chosen.count("attention") == (6 if checkpointing else 4), "forward, again, backward"
        dsv.step()
        learned = {
            name: tensor.clone() for name, tensor in state_of(next(model.parameters())).trained.items()
        }
        seen.append((loss, gradients(model), learned))
    (loss, grads, learned), (other_loss, other_grads, other_learned) = seen
    assert torch.equal(loss, other_loss)
    for found, expected in ((other_grads, grads), (other_learned, learned)):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)


def test_the_predictor_learns_and_stage_2_begins_by_its_loss():
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS, fullgraph=True)
    dsv = DSVTrainer(fast, learning_rate=3e-3, threshold=1e-9, profile_every=(4, 4), break_even=1.0)
    losses: list[float] = []
    for _ in range(80):
        step(fast, inputs)
        model.zero_grad()
        if (progress := dsv.step()) is None:
            continue
        losses.append(progress.loss)
        assert (progress.stage == 2) == (progress.loss < dsv.threshold)
        if progress.stage == 2:
            break
        dsv.threshold = 0.8 * losses[0]
    assert dsv.stage == 2, f"its loss never fell by a fifth: {losses}"
    assert progress is not None
    assert progress.sparse_heads > 0
    shares = [state_of(next(model.parameters())).trained[f"blocks.{i}.attn1.shares"] for i in range(2)]
    assert ((torch.cat(shares) > 0) & (torch.cat(shares) <= 1)).all()


@pytest.mark.parametrize("far_field", ["drop", "linear"])
def test_stage_2_reads_what_it_says_and_inference_with_its_file_is_the_same(
    far_field: str, tmp_path: Path
) -> None:
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS | {"far_field": far_field})
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(2, 2), break_even=1.0)
    for _ in range(4):
        step(fast, inputs)
        dsv.step()
    assert dsv.stage == 2
    trained = fast(**inputs, return_dict=False)[0].detach()
    with torch.no_grad():
        evaluated = fast(**inputs, return_dict=False)[0]
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=0)
    path = tmp_path / "predictor.safetensors"
    dsv.save_predictor(path)
    other = CASES["wan"].make(GRID, 1)[0]
    other.load_state_dict(model.state_dict())
    options = {
        "method": "dsv",
        "predictor": str(path),
        "inner_backend": "eager",
        "far_field": far_field,
    }
    loaded = torch.compile(other.eval(), backend="sparsify", options=options)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs, return_dict=False)[0], trained, atol=1e-5, rtol=0)
    density = sparsify_compiler.stats(other).density
    assert 0 < density < 1
    eager = other(**inputs, return_dict=False)[0]
    assert (eager - trained).abs().max() > 1e-4, "sparse is not dense"


@pytest.mark.parametrize(
    "family", ["hunyuan_video", "cogvideox", pytest.param("allegro", marks=pytest.mark.nightly)]
)
def test_joint_attention_and_masks(family: str) -> None:
    """Text before, text and padding after, hidden keys: at K = all it is eager; below, gradients are finite."""
    model, inputs = made(family, batch=2)
    with torch.no_grad():
        eager = model(**inputs, return_dict=False)[0]
    whole = torch.compile(
        model, backend="sparsify", options=OPTIONS | {"kv_budget": 315, "query_group": (2, 2, 2)}
    )
    dsv = DSVTrainer(whole, threshold=10.0, profile_every=(1, 1), break_even=1.0)
    for _ in range(3):
        step(whole, inputs)
        model.zero_grad()
        dsv.step()
    assert dsv.stage == 2
    torch.testing.assert_close(whole(**inputs, return_dict=False)[0], eager, atol=2e-5, rtol=0)
    model, inputs = made(family, batch=2)
    fewer = torch.compile(
        model, backend="sparsify", options=OPTIONS | {"kv_budget": 40, "far_field": "linear"}
    )
    dsv = DSVTrainer(fewer, threshold=10.0, profile_every=(1, 1), break_even=1.0)
    for _ in range(3):
        step(fewer, inputs)
        found = gradients(model)
        dsv.step()
    assert all(grad.isfinite().all() for grad in found.values())
    assert (fewer(**inputs, return_dict=False)[0] - eager).abs().max() > 1e-4


def run(steps: int, resume: dict[str, Any] | None = None) -> tuple[list[float], dict[str, Any]]:
    """Losses of a training, and what it needs to go on; through the switch of stages at its second profile."""
    torch._dynamo.reset()
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(3, 3), break_even=1.0, learning_rate=1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        dsv.load_state_dict(resume["dsv"])
    losses = []
    for _ in range(steps):
        losses.append(float(step(fast, inputs)))
        optimizer.step()
        optimizer.zero_grad()
        dsv.step()
    parts = {"model": model, "optimizer": optimizer, "dsv": dsv}
    return losses, {name: part.state_dict() for name, part in parts.items()}


@pytest.mark.parametrize("cut", [2, 5])
def test_resumes_exactly(cut: int, tmp_path: Path) -> None:
    """Before and after the switch of stages, through a file."""
    straight, end = run(9)
    first, state = run(cut)
    torch.save(state, tmp_path / "checkpoint.pt")
    rest, again = run(9 - cut, torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert first + rest == straight
    assert end["dsv"]["sparse"]
    for name, tensor in end["dsv"]["learned"].items():
        assert torch.equal(tensor, again["dsv"]["learned"][name]), name


def one_attention(batch: int = 1) -> tuple[nn.Module, Inputs]:
    """The least of models, called as the families are."""

    class Model(Attend):
        def forward(self, video: Tensor, return_dict: bool) -> tuple[Tensor]:  # type: ignore[override]
            return (super().forward(video),)

    torch.manual_seed(0)
    return Model().train(), {"video": torch.randn(batch, 4, 4, 8, 12)}


@pytest.mark.parametrize(
    ("made", "inner"),
    [
        (one_attention, "aot_eager"),
        pytest.param(partial(made, "wan"), "aot_eager", marks=pytest.mark.nightly),
        pytest.param(partial(made, "wan"), "inductor", marks=pytest.mark.nightly),
    ],
    ids=["one attention-aot_eager", "wan-aot_eager", "wan-inductor"],
)
def test_batches_may_differ_in_stage_2(made: Callable[..., tuple[nn.Module, Inputs]], inner: str) -> None:
    """What turns sparse is compiled after Dynamo is done, when a batch that it left free is a number."""
    losses: dict[str, list[float]] = {}
    for backend in ("eager", inner):
        torch._dynamo.reset()
        model, inputs = made()
        fast = torch.compile(
            model, backend="sparsify", options=OPTIONS | {"inner_backend": backend, "kv_budget": 0.2}
        )
        dsv = DSVTrainer(fast, threshold=10.0, profile_every=(1, 1), break_even=1.0)
        for _ in range(3):
            step(fast, inputs)
            dsv.step()
        assert dsv.stage == 2
        batches = [made(batch=batch)[1] for batch in (1, 2, 3, 2)]
        losses[backend] = [float(step(fast, batch)) for batch in batches]
    assert losses[inner] == pytest.approx(losses["eager"], rel=1e-4)
    assert len(set(losses["eager"])) == 3


def test_states_of_others_are_refused():
    _, state = run(4)
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast)
    with pytest.raises(SparsifyError, match=r"state must be a result of DSVTrainer\.state_dict"):
        dsv.load_state_dict({"weights": 3})
    with pytest.raises(SparsifyError, match="the state is from 4 ranks, this run has 1"):
        dsv.load_state_dict(state["dsv"] | {"world_size": 4})
    profiles = dict(list(state["dsv"]["profiles"].items())[:1])
    dsv.load_state_dict(state["dsv"] | {"profiles": profiles})
    step(fast, inputs)
    with pytest.raises(
        SparsifyError, match=r"the state belongs to another model: it has 1 sites .* this model has 2"
    ):
        dsv.step()
    learned = {name: tensor[..., :1] for name, tensor in state["dsv"]["learned"].items()}
    dsv.load_state_dict(state["dsv"] | {"learned": learned})
    with pytest.raises(
        SparsifyError, match="the trained tensors belong to another model or to other options"
    ):
        step(fast, inputs)


def test_another_rank_on_a_model_that_learnt_says_what_to_do():
    model, inputs = made()
    for rank, works in ((8, True), (4, False), (8, True)):
        fast = torch.compile(model, backend="sparsify", options=OPTIONS | {"rank": rank})
        if works:
            dsv = DSVTrainer(fast)
            step(fast, inputs)
            dsv.step()
        else:
            with pytest.raises(
                SparsifyError, match=r"Compile with the options .* such as the rank, or train a new"
            ):
                step(fast, inputs)


def test_wrong_use_is_told():
    model, inputs = made()
    with pytest.raises(SparsifyError, match="DSVTrainer needs a module"):
        DSVTrainer(lambda x: x)
    for wrong in (
        {"threshold": "a"},
        {"profile_every": 2},
        {"profile_every": (2.5, 1)},
        {"early_steps": -1},
        {"threshold": 0},
        {"learning_rate": -1.0},
        {"profile_every": (0, 5)},
        {"break_even": 2.0},
    ):
        with pytest.raises(SparsifyError, match=next(iter(wrong))):
            DSVTrainer(model, **wrong)
    dsv = DSVTrainer(model)
    with pytest.raises(SparsifyError, match="no attention of this model learns yet"):
        dsv.step()
    with pytest.raises(SparsifyError, match="no predictor to save before stage 2"):
        dsv.save_predictor("nowhere.safetensors")
    for options, message in (
        ({"rank": 17}, "rank must be at most the head dim 16, got 17"),
        ({"kv_budget": 316}, "kv_budget must be at most the 315 tokens"),
        ({"far_field": "median"}, "unknown far_field 'median': must be one of drop, linear, mean"),
        ({"predictor": "nowhere"}, "predictor must be a safetensors file"),
    ):
        torch._dynamo.reset()
        fast = torch.compile(model, backend="sparsify", options=OPTIONS | options)
        with pytest.raises(OptionError, match=message):
            fast(**inputs)


def test_steps_without_a_call_learn_nothing_and_decide_nothing():
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(2, 2), break_even=1.0)
    with torch.no_grad():
        fast(**inputs)
    with pytest.raises(SparsifyError, match="no attention of this model learns yet"):
        dsv.step()
    step(fast, inputs)
    assert [dsv.step() for _ in range(5)] == [None] * 5
    assert dsv.stage == 1
    step(fast, inputs)
    progress = dsv.step()  # the profile that was put off
    assert progress is not None
    assert progress.critical > 0
    assert progress.loss > 0
    with torch.no_grad():
        fast(**inputs)
    shares = [head.share for head in dsv.heads]
    assert [dsv.step() for _ in range(5)] == [None] * 5
    assert [head.share for head in dsv.heads] == shares
    DSVTrainer(fast)
    with pytest.raises(SparsifyError, match="another DSVTrainer was made for this model"):
        dsv.step()


def test_a_loaded_state_gives_its_predictor_at_once(tmp_path: Path) -> None:
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(2, 2), break_even=1.0)
    for _ in range(4):
        step(fast, inputs)
        dsv.step()
    dsv.save_predictor(tmp_path / "first.safetensors")
    other = torch.compile(made()[0], backend="sparsify", options=OPTIONS)
    resumed = DSVTrainer(other)
    resumed.load_state_dict(dsv.state_dict())
    resumed.save_predictor(tmp_path / "second.safetensors")
    for name, (plan, _) in state_of(next(model.parameters())).sites.items():
        site = replace(plan.site, name=name)
        first, second = (load_predictor(tmp_path / f"{n}.safetensors", site) for n in ("first", "second"))
        assert torch.equal(first.weights, second.weights)
        assert torch.equal(first.shares, second.shares)
        assert first.group == second.group


def test_without_a_trainer_it_stays_dense():
    model, inputs = made()
    fast = torch.compile(model.eval(), backend="sparsify", options=OPTIONS)
    with torch.no_grad():
        assert torch.equal(fast(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0])


def a_site(shares: int = 2, **options: Any) -> _Site:
    layout = TokenLayout(tokens=400, grid=(4, 10, 10))
    site = site_of(torch.empty(1, shares, 400, 16))
    plan = AttentionPlan(
        site=site, layout=layout, method="dsv", settings=Dsv(**options), provider="cpu", reason=""
    )
    empty = torch.zeros(0)
    return _Site(plan, empty, torch.ones(shares), empty, empty)


def missed_with(needed: Tensor) -> Tensor:
    """Squares of straight lines that reach 0.1 at the share needed."""
    return (0.1 - 0.1 * (torch.tensor(SHARES) - needed[..., None])).square()


def a_profile(needed: list[float], overlaps: list[float]) -> Profile:
    return Profile(
        torch.tensor(needed),
        missed_with(torch.tensor(needed)).expand(len(overlaps), -1, -1),
        torch.tensor(overlaps)[:, None].expand(-1, len(needed)),
        torch.ones(len(overlaps), len(needed)),
    )


def no_cost(group: Cube) -> Cost:
    raise AssertionError("a fixed budget is not weighed")


def test_heads_turn_sparse_below_the_break_even_and_back():
    site = a_site()
    site.profile = a_profile([0.1, 0.5], [0.9, 0.9, 0.9, 1.0])
    site.choose(lambda group: Cost(0.0, 1 / 0.4))
    assert site.choice == Choice(GROUPS[0], 0.125, "all")
    torch.testing.assert_close(site.shares, torch.tensor([0.1, 1.0]))
    site.profile = a_profile([0.45, 0.3], [0.9, 0.9, 0.9, 1.0])
    site.choose(lambda group: Cost(0.0, 1 / 0.4))
    assert site.choice == Choice(GROUPS[0], 0.5, "all")
    torch.testing.assert_close(site.shares, torch.tensor([1.0, 0.3]))


def test_with_a_budget_groups_shrink_until_they_overlap_and_do_not_grow():
    site = a_site(kv_budget=0.25)
    site.profile = a_profile([0.1, 0.1], [0.5, 0.81, 0.9, 1.0])
    site.choose(no_cost)
    assert site.choice == Choice(GROUPS[1], 0.25, "all")
    assert site.shares.tolist() == [0.25, 0.25]
    site.profile = a_profile([0.1, 0.1], [0.95, 0.7, 0.75, 1.0])
    site.choose(no_cost)
    assert site.choice.group == GROUPS[3]
    site.profile = a_profile([0.1, 0.1], [0.95, 0.95, 0.95, 1.0])
    site.choose(no_cost)
    assert site.choice.group == GROUPS[3]


def test_the_group_is_the_one_that_costs_least_and_does_not_change_for_little():
    """Small groups need fewer keys, which cost more each. A dense head costs 1, whatever the group."""
    site = a_site()
    costs = dict(zip(GROUPS, (Cost(0.1, 1.0), Cost(0.1, 2.0), Cost(0.1, 4.0), Cost(0.1, 30.0)), strict=True))
    needed = torch.tensor([[0.9, 0.5], [0.9, 0.2], [0.9, 0.11], [0.8, 0.02]])
    site.profile = Profile(torch.zeros(2), missed_with(needed), torch.zeros(4, 2), torch.ones(4, 2))
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[1]  # costs of the second head: 0.6, 0.5, 0.54, 0.7
    assert site.shares.tolist() == [1.0, pytest.approx(0.2)]
    site.profile.missed[2, 1] = missed_with(torch.tensor(0.08))  # 0.42, and 1 of the first: not a tenth less
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[1]
    site.profile.missed[2, 1] = missed_with(torch.tensor(0.05))  # 0.3: a tenth less
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[2]
    site.profile.missed[1, 1] = missed_with(torch.tensor(0.01))  # larger groups are not gone back to
    site.choose(costs.__getitem__)
    assert site.choice.group == GROUPS[2]


def test_a_profile_moves_a_tenth_of_the_way():
    profile = a_profile([0.5], [0.6])
    profile.update(a_profile([0.1], [0.9]))
    assert float(profile.critical) == pytest.approx(0.46)
    assert float(profile.overlap) == pytest.approx(0.63)


def test_a_fixed_budget_is_read_whatever_the_profile_says():
    site = a_site(kv_budget=100)
    site.profile = a_profile([0.9, 0.01], [0.9, 0.9, 0.9, 1.0])
    site.choose(no_cost)
    assert site.shares.tolist() == [0.25, 0.25]


def _train_on_a_rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    model, inputs = made()
    torch.manual_seed(rank)
    inputs = {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in inputs.items()}
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast, threshold=10.0, profile_every=(2, 2))
    for _ in range(5):
        step(fast, inputs)
        model.zero_grad()
        dsv.step()
    torch.save(dsv.state_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_decide_alike(tmp_path: Path) -> None:
    """Different data and a measured break-even; predictors, shares, groups and stage are the same bits."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        _train_on_a_rank, (port, str(tmp_path)), nprocs=2, start_method="spawn"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["sparse"]
    assert second["sparse"]
    assert first["choices"] == second["choices"]
    for name, tensor in first["learned"].items():
        if name.endswith(("weights", "shares")):
            assert torch.equal(tensor, second["learned"][name]), name
