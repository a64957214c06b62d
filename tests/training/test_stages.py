"""Two-stage training: what the model computes, when it turns sparse, wrong use."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import fresh_dynamo, needs_diffusers, no_warnings
from torch import Tensor, fx, nn
from torch._functorch._activation_offloading import activation_offloading
from torch._library.custom_ops import CustomOpDef
from two_stages import OPTIONS, in_stage_2, made, step

import sparsify_compiler
from sparsify_compiler import DSVTrainer, OptionError, SparsifyError
from sparsify_compiler.kernels import clustering, prediction, providers
from sparsify_compiler.passes import lowering, offload
from sparsify_compiler.runtime.state import state_of
from sparsify_compiler.testing.dits import Attend
from sparsify_compiler.testing.models import CASES, GRID, Inputs, take_gradients

pytestmark = [fresh_dynamo, no_warnings, needs_diffusers]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_learning_leaves_the_models_gradients_alone_bit_for_bit(inner: str) -> None:
    model, inputs = made()
    dense = torch.compile(model, backend="sparsify", options={"method": "dense", "inner_backend": inner})
    step(dense, inputs)
    expected = take_gradients(model)
    assert expected
    fast = torch.compile(model, backend="sparsify", options=OPTIONS | {"inner_backend": inner})
    dsv = DSVTrainer(fast)
    for _ in range(2):  # the second call learns
        step(fast, inputs)
        found = take_gradients(model)
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
        found.append(take_gradients(model))
        assert moved == ([(1, 1)] if offloads else [])
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_every_op_that_chooses_is_kept_where_forward_runs_again() -> None:
    kept = {op.name() for op in lowering._CHOICES}
    for family in (clustering, prediction):
        ops = [op._qualname for op in vars(family).values() if isinstance(op, CustomOpDef)]
        assert ops
        assert kept.issuperset(ops)


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
        fast, dsv = in_stage_2(model, inputs, steps=4, every=2, inner_backend="aot_eager")
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
        seen.append((loss, take_gradients(model), learned))
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
    fast, dsv = in_stage_2(model, inputs, steps=4, every=2, far_field=far_field)
    trained = fast(**inputs, return_dict=False)[0].detach()
    with torch.no_grad():
        evaluated = fast(**inputs, return_dict=False)[0]
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=0)
    path = tmp_path / "predictor.safetensors"
    dsv.save_predictor(path)
    other = CASES["wan"].make(GRID, 1)[0]
    other.load_state_dict(model.state_dict())
    options = {"method": "dsv", "predictor": str(path), "inner_backend": "eager", "far_field": far_field}
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
        found = take_gradients(model)
        dsv.step()
    assert all(grad.isfinite().all() for grad in found.values())
    assert (fewer(**inputs, return_dict=False)[0] - eager).abs().max() > 1e-4


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
        fast, _ = in_stage_2(model, inputs, steps=3, every=1, inner_backend=backend, kv_budget=0.2)
        batches = [made(batch=batch)[1] for batch in (1, 2, 3, 2)]
        losses[backend] = [float(step(fast, batch)) for batch in batches]
    assert losses[inner] == pytest.approx(losses["eager"], rel=1e-4)
    assert len(set(losses["eager"])) == 3


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


def test_without_a_trainer_it_stays_dense():
    model, inputs = made()
    fast = torch.compile(model.eval(), backend="sparsify", options=OPTIONS)
    with torch.no_grad():
        assert torch.equal(fast(**inputs, return_dict=False)[0], model(**inputs, return_dict=False)[0])
