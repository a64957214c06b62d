"""Two-stage training resumes exactly, only from states that fit, and alike on every rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import fresh_dynamo, needs_diffusers, no_warnings
from two_stages import OPTIONS, in_stage_2, made, step

from sparsify_compiler import DSVTrainer, SparsifyError
from sparsify_compiler.methods.predictor import load_predictor
from sparsify_compiler.runtime.state import state_of

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]


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


def test_states_of_others_are_refused():
    _, state = run(4)
    model, inputs = made()
    fast = torch.compile(model, backend="sparsify", options=OPTIONS)
    dsv = DSVTrainer(fast)
    with pytest.raises(SparsifyError, match=r"state must be a result of DSVTrainer\.state_dict"):
        dsv.load_state_dict({"weights": 3})
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


def test_a_loaded_state_gives_its_predictor_at_once(tmp_path: Path) -> None:
    model, inputs = made()
    _, dsv = in_stage_2(model, inputs, steps=4, every=2)
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
