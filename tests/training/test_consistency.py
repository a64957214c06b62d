"""Consistency distillation: by trajectories known in closed form, and by the formulas, video by video."""

import copy
import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler import ConsistencyConfig, ConsistencyTrainer, SparsifyError, sample_few_steps
from sparsify_compiler.testing.models import CASES, GRID
from sparsify_compiler.training import consistency
from sparsify_compiler.training.consistency import consistency_loss

SHAPE = (4, 2, 3, 2, 2)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> ConsistencyConfig:
    segments, length = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    shift = draw(st.floats(0.5, 8))
    return ConsistencyConfig(segments=segments, solver_steps=segments * length, shift=shift, **fixed)


def schedule(config: ConsistencyConfig) -> list[float]:
    """The times, by themselves: even ones, shifted as Wan's sampler does."""
    even = [1 - step / config.solver_steps for step in range(config.solver_steps + 1)]
    return [config.shift * t / (1 + (config.shift - 1) * t) for t in even]


def segment_end(config: ConsistencyConfig, step: int) -> float:
    """The highest of the times that bound segments, below that at which a solver step begins."""
    times = schedule(config)
    bounds = times[:: config.solver_steps // config.segments]
    return max(bound for bound in bounds if bound < times[step] - 1e-9)


class Flow(nn.Module):
    """Answers the mean velocity of dx/dt = rate x, per element, from a time to the one that `until` gives."""

    def __init__(self, rate: Tensor, times: list[float], until: list[float]) -> None:
        super().__init__()
        self.rate, self.times, self.until = rate.double(), torch.tensor(times).double(), until
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict
        self.calls += 1
        answers = []
        for state, told in zip(hidden_states.double(), timestep.double(), strict=True):
            place = int((self.times - told / 1000).abs().argmin())
            gap = self.until[place] - float(self.times[place])
            answers.append(state * (torch.expm1(self.rate * gap) / gap if gap else self.rate))
        return (torch.stack(answers).to(hidden_states.dtype),)


def flows(config: ConsistencyConfig, rate: Tensor) -> tuple[Flow, Flow]:
    """(solves every solver step exactly, goes to the end of every segment exactly)"""
    times, steps = schedule(config), range(config.solver_steps)
    ends = [segment_end(config, step) for step in steps]
    return Flow(rate, times, [*times[1:], 0.0]), Flow(rate, times, [*ends, 0.0])


class Net(nn.Module):
    """Some function of everything a model is called with."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(2, 2, generator=generator))
        self.time = nn.Parameter(torch.randn(2, generator=generator))
        self.register_buffer("seen", torch.zeros(()))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor | float = 0.0, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert not return_dict
        moved = torch.einsum("bc...,cd->bd...", hidden_states, self.mix)
        when = torch.outer(timestep / 1000, self.time).view(-1, 2, 1, 1, 1)
        return ((moved + when).tanh() + prompt * hidden_states,)


def batch(config: ConsistencyConfig, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video, noise = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return video, noise, torch.randint(config.solver_steps, SHAPE[:1], generator=generator)


# The loss


@given(configs(), st.integers(0, 99))
def test_both_ends_of_a_solver_step_map_to_the_same_segment_end_of_a_linear_flow(
    config: ConsistencyConfig, seed: int
) -> None:
    rate = 2 * torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(seed))
    teacher, student = flows(config, rate)
    loss = consistency_loss(student, student, teacher, config, *batch(config, seed), {})
    assert (loss < 1e-5).all(), "exact, but for float32"
    off, _ = flows(config, rate + 0.5)
    assert (consistency_loss(student, student, off, config, *batch(config, seed), {}) > 1e-4).all()


def brute_force(
    student: nn.Module,
    target: nn.Module,
    teacher: nn.Module,
    config: ConsistencyConfig,
    tensors: tuple[Tensor, Tensor, Tensor],
    prompt: float,
) -> Tensor:
    """The definition, video by video: ends of segments, and their difference as one of predicted videos."""
    losses, times = [], schedule(config)
    for video, noise, step in zip(*tensors, strict=True):
        t, s, e = times[int(step)], times[int(step) + 1], segment_end(config, int(step))

        def ask(model: nn.Module, state: Tensor, time: float, prompt: float) -> Tensor:
            return model(state[None], torch.tensor([1000 * time]), prompt, return_dict=False)[0][0]

        x = (1 - t) * video + t * noise
        with torch.no_grad():
            with_prompt, without = ask(teacher, x, t, prompt), ask(teacher, x, t, 0.0)
            further = x + (s - t) * (without + config.guidance * (with_prompt - without))
            end = further if s == e else further + (e - s) * ask(target, further, s, prompt)
        found = x + (e - t) * ask(student, x, t, prompt)
        difference = (found - end) * t / (t - e)
        losses.append(((difference**2 + config.huber**2) ** 0.5 - config.huber).mean())
    return torch.stack(losses)


@given(configs(guidance=3.0), st.sampled_from(["as drawn", "one", "all"]), st.integers(0, 99))
def test_loss_and_gradient_are_those_of_the_definition(
    config: ConsistencyConfig, segments: str, seed: int
) -> None:
    """Also with one segment, which is consistency all the way, and with as many as there are solver steps."""
    if segments != "as drawn":
        count = 1 if segments == "one" else config.solver_steps
        config = ConsistencyConfig(
            segments=count, solver_steps=config.solver_steps, shift=config.shift, guidance=3.0
        )
    student, target, teacher = (Net(seed + number).double() for number in range(3))
    video, noise, steps = batch(config, seed)
    tensors = video.double(), noise.double(), steps
    expected = brute_force(student, target, teacher, config, tensors, 0.3)
    wanted = torch.autograd.grad(expected.mean(), list(student.parameters()))
    loss = consistency_loss(student, target, teacher, config, *tensors, {"prompt": 0.3}, {"prompt": 0.0})
    torch.testing.assert_close(loss, expected.float(), atol=1e-4, rtol=1e-4)
    loss.mean().backward()
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is None for model in (target, teacher) for parameter in model.parameters())


@given(configs(), st.integers(0, 99))
def test_the_end_of_a_segment_is_itself_whatever_the_target_says(
    config: ConsistencyConfig, seed: int
) -> None:
    """The last solver step of every segment regresses onto the teacher."""
    video, noise, steps = batch(config, seed)
    length = config.solver_steps // config.segments
    last = steps // length * length + length - 1
    student, teacher = Net(0), Net(1)
    losses = [
        consistency_loss(student, Net(other), teacher, config, video, noise, last, {}) for other in (2, 3)
    ]
    assert torch.equal(*losses)
    t = torch.tensor(schedule(config))[last].view(-1, 1, 1, 1, 1)
    state = (1 - t) * video + t * noise
    told = 1000 * t.flatten()
    difference = t * (student(state, told, return_dict=False)[0] - teacher(state, told, return_dict=False)[0])
    expected = ((difference.square() + config.huber**2).sqrt() - config.huber).flatten(1).mean(1)
    torch.testing.assert_close(losses[0], expected, atol=1e-5, rtol=1e-4)


def test_a_teacher_of_the_same_weights_without_guidance_costs_nothing_on_one_solver_step_each():
    config = ConsistencyConfig(segments=6, solver_steps=6, shift=2.0)
    net = Net(0)
    loss = consistency_loss(net, net, copy.deepcopy(net), config, *batch(config), {})
    assert torch.equal(loss, torch.zeros_like(loss))


def test_latents_reach_the_models_in_their_own_dtype():
    config = ConsistencyConfig(segments=2, solver_steps=4)
    student, teacher = Net(0).bfloat16(), Net(1).bfloat16()
    video, noise, steps = batch(config)
    loss = consistency_loss(student, student, teacher, config, video.bfloat16(), noise, steps, {})
    assert loss.dtype == torch.float32
    sampled = sample_few_steps(student, noise.bfloat16(), {}, config)
    assert sampled.dtype == torch.bfloat16


# Sampling


@given(configs(), st.integers(0, 99))
def test_few_steps_of_the_exact_flow_reach_the_exact_end(config: ConsistencyConfig, seed: int) -> None:
    rate = 2 * torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(seed))
    _, student = flows(config, rate)
    noise = batch(config, seed)[1]
    end = sample_few_steps(student, noise, {}, config)
    torch.testing.assert_close(
        end, (noise.double() * torch.exp(-rate.double())).float(), atol=1e-5, rtol=1e-4
    )
    assert student.calls == config.segments


# Training


class Table(nn.Module):
    """A velocity linear in the state, with numbers of its own for every time at which it is asked."""

    def __init__(self, config: ConsistencyConfig, deviation: float) -> None:
        super().__init__()
        self.register_buffer("times", torch.tensor(schedule(config)))
        t = torch.tensor(schedule(config))
        # Of videos from a Gaussian of this deviation: E[noise - video | x_t] = gain x_t.
        gain = (t - (1 - t) * deviation**2) / (t**2 + (1 - t) ** 2 * deviation**2)
        self.gain = nn.Parameter(gain)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        place = (self.times - timestep[:, None] / 1000).abs().argmin(1)
        return (self.gain[place].view(-1, 1, 1, 1, 1) * hidden_states,)


def test_few_steps_of_the_student_come_near_many_of_the_teacher():
    """On Gaussian videos, where the trajectory is known: from x_1 to deviation x_1."""
    config = ConsistencyConfig(segments=3, solver_steps=48)
    teacher = Table(config, deviation=0.3)
    student = copy.deepcopy(teacher)
    trainer = ConsistencyTrainer(student, teacher, config)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        optimizer.zero_grad()
        trainer.loss(0.3 * torch.randn(64, 1, 1, 2, 2, generator=generator), {}).backward()
        optimizer.step()
        trainer.step()
    start = torch.randn(8, 1, 1, 2, 2, generator=generator)
    before, after = (
        (sample_few_steps(model, start, {}, config) - 0.3 * start).square().mean()
        for model in (teacher, trainer.target)
    )
    assert after < before / 4


@given(st.floats(0, 0.999), st.integers(1, 4))
def test_the_target_is_the_moving_average(ema: float, steps: int) -> None:
    config = ConsistencyConfig(segments=1, ema=ema)
    student = Net(0)
    trainer = ConsistencyTrainer(student, Net(1), config)
    history = [copy.deepcopy(student.state_dict())]
    for step in range(steps):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn(parameter.shape))
            student.seen.fill_(step)
        trainer.step()
        history.append(copy.deepcopy(student.state_dict()))
    for name, average in trainer.target.named_parameters():
        expected = ema**steps * history[0][name].double()
        for ago, state in enumerate(reversed(history[1:])):
            expected = expected + (1 - ema) * ema**ago * state[name].double()
        torch.testing.assert_close(average.double(), expected, atol=1e-5, rtol=1e-5)
        assert not average.requires_grad
    assert torch.equal(trainer.target.seen, student.seen)


def train(trainer: ConsistencyTrainer, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        video = torch.randn(SHAPE, generator=torch.Generator().manual_seed(step))
        loss = trainer.loss(video, {"prompt": 0.3}, {"prompt": 0.0})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trainer.step()
        losses.append(loss.detach())
    return losses


def test_a_loaded_state_goes_on_with_the_same_losses():
    def made() -> tuple[Net, ConsistencyTrainer, torch.optim.Optimizer]:
        student = Net(0)
        config = ConsistencyConfig(segments=2, solver_steps=8, guidance=2.0)
        return student, ConsistencyTrainer(student, Net(1), config), torch.optim.Adam(student.parameters())

    student, trainer, optimizer = made()
    train(trainer, optimizer, range(3))
    parts = student, trainer, optimizer
    saved = [copy.deepcopy(part.state_dict()) for part in parts]
    expected = train(trainer, optimizer, range(3, 6))
    others = made()
    for part, state in zip(others, saved, strict=True):
        part.load_state_dict(state)
    assert train(*others[1:], range(3, 6)) == expected


def test_every_draw_and_every_seed_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(student: Any, target: Any, teacher: Any, config: Any, video: Any, *rest: Any) -> Tensor:
        drawn.append(rest[:2])
        return torch.zeros(len(video))

    def draw(seed: int) -> list[tuple[Tensor, Tensor]]:
        trainer = ConsistencyTrainer(Net(0), Net(1), ConsistencyConfig(segments=5, seed=seed))
        for _ in range(2):
            trainer.loss(torch.zeros(64, 2, 1, 1, 1), {})
        return [drawn.pop(0) for _ in range(2)]

    drawn: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(consistency, "consistency_loss", noted)
    one, again, other = draw(0), draw(0), draw(2**32)
    for (noise, steps), (same_noise, same_steps) in zip(one, again, strict=True):
        assert torch.equal(noise, same_noise)
        assert torch.equal(steps, same_steps)
    noises = [noise for noise, _ in one + other]
    assert not any(torch.equal(noises[i], noises[j]) for i in range(4) for j in range(i))
    steps = torch.cat([steps for _, steps in one + other])
    assert steps.min() == 0
    assert steps.max() == 49
    assert len(steps.unique()) > 40


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
def test_a_sparse_student_is_distilled_as_it_is_compiled():
    """The target is compiled as the student is; a gradient reaches all the student's parameters, and them alone."""
    torch._dynamo.reset()
    teacher, inputs = CASES["wan"].build(GRID, batch=2)
    student = copy.deepcopy(teacher)
    options = {"method": "tile", "reference_frames": 2, "inner_backend": "eager"}
    fast = torch.compile(student, backend="sparsify", options=options, fullgraph=True)
    config = ConsistencyConfig(segments=4, solver_steps=8, guidance=2.0)
    trainer = ConsistencyTrainer(fast, teacher, config)
    text = inputs["encoder_hidden_states"]
    arguments = {"encoder_hidden_states": text}, {"encoder_hidden_states": torch.zeros_like(text)}
    video, noise = inputs["hidden_states"], torch.randn_like(inputs["hidden_states"])
    steps = torch.tensor([0, 5])
    assert trainer.target is not fast
    state, told = (
        torch.lerp(video, noise, torch.tensor([1.0, 0.375]).view(-1, 1, 1, 1, 1)),
        torch.tensor([1000.0, 375]),
    )
    with torch.no_grad():
        own, target, dense = (
            model(state, told, text, return_dict=False)[0] for model in (fast, trainer.target, teacher)
        )
    assert torch.equal(own, target)
    assert not torch.allclose(own, dense)
    consistency_loss(fast, trainer.target, teacher, config, video, noise, steps, *arguments).mean().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters()
    )
    others = [*teacher.parameters(), *trainer.target.parameters()]
    assert all(parameter.grad is None for parameter in others)


# Messages to the user


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"segments": 3},
            r"segments must divide the 50 solver steps, got 3: try one of 1, 2, 5, 10, 25, 50",
        ),
        ({"segments": 100}, "segments must divide"),
        ({"segments": 0}, "segments must be an integer of at least 1, got 0"),
        ({"segments": 2.0}, "segments must be an integer"),
        ({"segments": 1, "solver_steps": 0}, "solver_steps must be an integer of at least 1"),
        ({"segments": 1, "ema": 1}, r"ema must be a number in \[0, 1\), got 1"),
        ({"segments": 1, "ema": -0.1}, "ema must"),
        ({"segments": 1, "ema": math.nan}, "ema must"),
        ({"segments": 1, "guidance": -1.0}, "guidance must be a finite number of at least 0, got -1.0"),
        ({"segments": 1, "guidance": math.nan}, "guidance must"),
        ({"segments": 1, "guidance": "3"}, "guidance must"),
        ({"segments": 1, "shift": 0.0}, "shift must be a finite number above 0"),
        ({"segments": 1, "huber": math.inf}, "huber must be a finite number above 0"),
        ({"segments": 1, "seed": -1}, "seed must be an integer of at least 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        ConsistencyConfig(**options)


def wider() -> nn.Module:
    net = Net(0)
    net.mix = nn.Parameter(torch.zeros(3, 3))
    return net


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (wider, "1 differ in name or shape, 'mix' first, 2x2 in the student and 3x3 in the teacher"),
        (lambda: nn.Linear(2, 2), "'bias' first, absent in the student and 2 in the teacher"),
        (lambda: lambda **_: None, "teacher must be a module, got function"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(teacher: Callable[[], Any], said: str) -> None:
    with pytest.raises(SparsifyError, match=said):
        ConsistencyTrainer(Net(0), teacher(), ConsistencyConfig(segments=1))


def test_a_student_that_is_its_own_teacher_is_refused():
    net = Net(0)
    with pytest.raises(SparsifyError, match="share 2 parameters, 'mix' first: give a copy"):
        ConsistencyTrainer(net, net, ConsistencyConfig(segments=1))


def test_guidance_needs_the_arguments_without_a_prompt():
    trainer = ConsistencyTrainer(Net(0), Net(1), ConsistencyConfig(segments=1, guidance=2.0))
    with pytest.raises(SparsifyError, match=r"guidance 2.0 needs the arguments without a prompt"):
        trainer.loss(torch.zeros(SHAPE), {"prompt": 1.0})


def test_a_state_of_something_else_is_refused():
    trainer = ConsistencyTrainer(Net(0), Net(1), ConsistencyConfig(segments=1))
    with pytest.raises(SparsifyError, match=r"must be a result of ConsistencyTrainer\.state_dict"):
        trainer.load_state_dict({"target": {}})
    state = trainer.state_dict()
    state["target"].pop("mix")
    with pytest.raises(SparsifyError, match=r"the state belongs to another model: (.|\n)*\"mix\""):
        trainer.load_state_dict(state)
