"""The three stages of Efficient-vDiT (arXiv 2502.06155) on the evaluation model, one after the other.

1. Multistep consistency distillation replaces many guided steps by a few steps of one call each.
2. A layer-wise search finds a policy, for the student of the first stage at its own time steps.
3. Knowledge distillation trains the sparse student from the dense one, in the compiled graph.

A run is a folder. `settings.json` has the settings. `consistency.pt` and `distillation.pt` are the
checkpoints of stages 1 and 3. `policy.json` is the policy. `dense.safetensors` and `sparse.safetensors` are
the students in bfloat16, which `lab.model.load` reads. All products of matrices are `fast_products`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError
from sparsify_compiler.lab import files, resumable, world
from sparsify_compiler.lab.calibration import FIRST
from sparsify_compiler.lab.machine import fast_products
from sparsify_compiler.lab.model import check_frames, digest, encode, save, to_model, unconditional
from sparsify_compiler.lab.resumable import Stage
from sparsify_compiler.lab.sampling import GUIDANCE, SHIFT, noise, times, trajectory
from sparsify_compiler.lab.training import WIDEST
from sparsify_compiler.outputs import make_folder
from sparsify_compiler.policy import DENSE, Policy
from sparsify_compiler.runtime.clock import generation
from sparsify_compiler.training.consistency import ConsistencyConfig, ConsistencyTrainer
from sparsify_compiler.training.distillation import Distillation
from sparsify_compiler.training.search import MENU, check_limits, search

FORMAT = "sparsify-distill-2"
FILES = (
    *("settings.json", "consistency.pt", "distillation.pt", "policy.json"),
    *("dense.safetensors", "sparse.safetensors", "report.md", "report.json"),
)
"""Those of a run, and of the report on it."""
BATCH = 4
FEW_STEPS_RATE, BRINGING_BACK_RATE = 6e-4, 2e-4
"""Highest learning rates of AdamW in stages 1 and 3. The rate rises in the first `WARMUP` steps and falls to
0 at the last. A sparse student has less to learn: at the rate of stage 1 it is further from its teacher after
80 steps."""
WARMUP = 10
BETAS = (0.9, 0.98)
INNER = "inductor"
"""Backend that compiles dense models, and the rewritten graphs of sparse ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Settings of a run."""

    consistency_steps: int = 300
    """Training steps of stage 1."""
    distillation_steps: int = 100
    """Training steps of stage 3."""
    segments: int = 5
    """Steps of a generation by the student; must divide the teacher's 50."""
    r: float = 0.015
    """Greatest loss of one sparse attention: relative squared error of the model's output."""
    total: float = 0.035
    """Greatest sum of the losses of all attentions."""
    frames: int = world.FRAMES
    """Frames of all videos."""

    def __post_init__(self) -> None:
        for name in ("consistency_steps", "distillation_steps", "segments"):
            if (integer(got := getattr(self, name)) or 0) < 1:
                raise OptionError(f"{name} must be an integer of at least 1, got {got!r}")
        check_frames(self.frames, least=2)
        check_limits(self.r, self.total)
        _ = self.consistency

    @property
    def record(self) -> dict[str, int | float | str]:
        """Name -> value for JSON. Infinity is a string."""
        return {name: value if math.isfinite(value) else str(value) for name, value in asdict(self).items()}

    @property
    def consistency(self) -> ConsistencyConfig:
        """Settings of stage 1. Its times are the student's times everywhere."""
        return ConsistencyConfig(segments=self.segments, guidance=GUIDANCE, shift=SHIFT)

    @property
    def times(self) -> Tensor:
        """Times of the students' calls, falling from 1: float32 [segments]."""
        return times(self.segments)[:-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Students:
    """Results of the stages."""

    dense: nn.Module
    """Student of stage 1."""
    policy: Policy
    sparse: nn.Module
    """Student of stage 3, for compilation with the policy."""


def students(teacher: nn.Module, out: Path, settings: Settings) -> Students:
    """Run the three stages, or continue the run in the folder `out`.

    Raises:
        SparsifyError: the folder is of another run, or a file in it is damaged.
    """
    _claim(out, teacher, settings)
    dense = _few_steps(teacher, out, settings)
    policy = _searched(dense, out, settings)
    sparse = _brought_back(dense, policy, out, settings)
    for name, model in (("dense", dense), ("sparse", sparse)):
        save(model, out / f"{name}.safetensors", step=settings.consistency_steps)
    return Students(dense=dense, policy=policy, sparse=sparse)


def dense_model(model: nn.Module) -> Callable[..., Any]:
    """Compile a model with full attention."""
    return torch.compile(model, backend=INNER, dynamic=False)


def sparse_model(model: nn.Module, policy: Policy) -> Callable[..., Any]:
    """Compile a model that is sparse at every step, since it has few steps."""
    options: dict[str, Any] = {"policy": policy, "dense_steps": 0, "inner_backend": INNER, "guard": "off"}
    return torch.compile(model, backend="sparsify", options=options, dynamic=False)


def _claim(out: Path, teacher: nn.Module, settings: Settings) -> None:
    """Make the folder of a run with these settings.

    Raises:
        SparsifyError: it is the folder of a run with others.
    """
    path, mine = out / "settings.json", {"format": FORMAT, **settings.record, "weights": digest(teacher)}
    make_folder(out, *FILES)
    if not path.exists():
        files.write_json(path, mine)
    files.refuse_others(out, files.read_json(path), mine)


def _few_steps(teacher: nn.Module, out: Path, settings: Settings) -> nn.Module:
    """Run stage 1; return the moving average of the student."""
    torch.compiler.reset()
    student = copy.deepcopy(teacher)
    trainer = ConsistencyTrainer(dense_model(student), dense_model(teacher), settings.consistency)
    optimizer = torch.optim.AdamW(student.parameters(), betas=BETAS, weight_decay=0.0)

    def advance(step: int) -> float:
        video, text = _videos(_numbers(step), settings.frames)
        nothing = {"encoder_hidden_states": unconditional(BATCH)}
        with fast_products():
            loss = trainer.loss(video, {"encoder_hidden_states": text}, nothing)
        _step(optimizer, loss, FEW_STEPS_RATE * _share(step, settings.consistency_steps))
        trainer.step()
        return loss.item()

    stage = Stage(
        name="stage 1",
        steps=settings.consistency_steps,
        parts={"student": student, "optimizer": optimizer, "trainer": trainer},
        advance=advance,
    )
    resumable.train(stage, out / "consistency.pt")
    result = copy.deepcopy(teacher)
    result.load_state_dict(trainer.state_dict()["target"])
    return result


def _searched(dense: nn.Module, out: Path, settings: Settings) -> Policy:
    """Run stage 2."""
    path = out / "policy.json"
    if not path.exists():
        torch.compiler.reset()
        with fast_products():
            policy = search(dense, _own_calls(dense, settings), menu=MENU, r=settings.r, total=settings.total)
        files.write(path, policy.save)
    return Policy.load(path)


def _own_calls(dense: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Calls of the student on its way to videos, batch 1, each for another validation scene."""
    numbers = range(FIRST, FIRST + settings.segments)
    prompts = [world.scene(world.VALIDATION, number).prompt for number in numbers]
    states = _own_states(dense, prompts, noise(numbers, settings.frames), settings)
    text = encode(prompts)
    return [
        {**_inputs(state[one : one + 1], time, text[one : one + 1]), "return_dict": False}
        for one, (state, time) in enumerate(zip(states, settings.times, strict=True))
    ]


def _own_states(
    model: Callable[..., Any], prompts: Sequence[str], start: Tensor, settings: Settings
) -> list[Tensor]:
    """States of a student on its way to videos: one for each of its times, of the shape of `start`."""
    with fast_products(), generation(settings.segments, streams=1):
        *states, _ = trajectory(model, prompts, start, steps=settings.segments, guidance=1)
    return states


def _inputs(states: Tensor, times: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Arguments of a call.

    Args:
        states: [B, ...].
        times: 0 to 1, one for each state or one for all.
        text: embedded prompts, one for each state or one for all.
    """
    count = len(states)
    return {
        "hidden_states": states,
        "timestep": 1000 * times.expand(count),
        "encoder_hidden_states": text.expand(count, -1, -1),
    }


def _brought_back(dense: nn.Module, policy: Policy, out: Path, settings: Settings) -> nn.Module:
    """Run stage 3; return the sparse student, or the dense one if the policy keeps all attentions dense.

    The student learns on the states where it is called. A step has the states of one video, on the dense
    student's way to it.
    """
    path = out / "distillation.pt"
    if all(layer.choice == DENSE for layer in policy.layers) and not path.exists():
        return dense
    torch.compiler.reset()
    student = copy.deepcopy(dense)
    distillation = Distillation(sparse_model(student, policy), copy.deepcopy(dense))
    guide = dense_model(dense)
    optimizer = torch.optim.AdamW(student.parameters(), betas=BETAS, weight_decay=0.0)

    def advance(step: int) -> float:
        number = _numbers(settings.consistency_steps + step)[0]
        prompts = [world.scene(world.TRAINING, number).prompt]
        states = _own_states(guide, prompts, noise([number], settings.frames), settings)
        with fast_products():
            loss = distillation(**_inputs(torch.cat(states), settings.times, encode(prompts)))
        total = loss.output + loss.attention
        _step(optimizer, total, BRINGING_BACK_RATE * _share(step, settings.distillation_steps))
        return total.item()

    stage = Stage(
        name="stage 3",
        steps=settings.distillation_steps,
        parts={"student": student, "optimizer": optimizer, "policy": _Same(policy)},
        advance=advance,
    )
    resumable.train(stage, path)
    distillation.close()
    return student


@dataclass(frozen=True, slots=True)
class _Same:
    """The policy as a part of a stage. It must not change during the stage."""

    policy: Policy

    def state_dict(self) -> dict[str, str]:
        return {layer.mark.site: layer.choice for layer in self.policy.layers}

    def load_state_dict(self, state: dict[str, str]) -> None:
        if state != self.state_dict():
            raise ValueError("policy.json chooses otherwise than when the stage began")


def _numbers(step: int) -> range:
    """Indices of the scenes of a step. No other step has them."""
    return range(step * WIDEST, step * WIDEST + BATCH)


def _videos(numbers: Sequence[int], frames: int) -> tuple[Tensor, Tensor]:
    """(videos, embedded prompts) of training scenes, as inputs of the model."""
    scenes = [world.scene(world.TRAINING, number) for number in numbers]
    return to_model(world.videos(scenes, frames)), encode([scene.prompt for scene in scenes])


def _share(step: int, steps: int) -> float:
    """Share of the highest rate."""
    return min(1, (step + 1) / WARMUP) * (1 - step / steps)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
