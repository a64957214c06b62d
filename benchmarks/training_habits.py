"""Habits of training around a model, with `apply`: `python -m benchmarks.habits --training --out FILE`.

A row is a model, a habit (DDP with several buckets, FSDP2, checkpointing, LoRA, EMA, accelerate), whether the habit
is set before or after `apply`, and whether the model is compiled whole or by block. Its twin has the same weights
and the same habit, without `apply`, uncompiled. The options select every key. A row is right if

- every attention over the video that the twin ran is sparse, or the compiler warned why not, and
- the gradient of every parameter is the twin's within rounding, in two steps.

`ddp` and `fsdp2` run on two ranks, each with a video of its own.
"""

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparsify_compiler
from benchmarks.attentions import Attentions
from sparsify_compiler.plan import Ranks
from sparsify_compiler.testing.models import CASES, GRID
from sparsify_compiler.testing.ranks import Pool, RankFailedError

MODELS = ("wan", "hunyuan_video")
HABITS = ("nothing", "checkpointing", "lora", "ema", "accelerate", "ddp", "ddp+checkpointing", "fsdp2")
ON_RANKS = ("ddp", "ddp+checkpointing", "fsdp2")
SPARSE = "sparsify::block_sparse_attention"
"""The op of a sparse attention."""
_ROUNDING = 1e-4
"""The largest relative error of a gradient in float32."""


@dataclass(kw_only=True, slots=True)
class TrainingRow:
    """A result."""

    model: str
    habit: str
    order: str
    """Whether the habit is set `before` or `after` apply; `compile`: `torch.compile` of the result of the habit."""
    compiled: str
    video_attentions: int = 0
    """Attentions over the video that the twin ran in a step."""
    sparse: int = 0
    parameters: int = 0
    """Parameters with a gradient."""
    error: float = 0.0
    """The largest relative error of the gradient of a parameter."""
    buckets: int = 0
    """Buckets of DDP, in the second step."""
    seconds: float = 0.0
    reason: str = ""
    """Why attention is dense, by the compiler's warning."""
    fault: str = ""
    not_available: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """The identity of a row."""
        return self.model, self.habit, self.order, self.compiled


def rows() -> Iterator[TrainingRow]:
    """All rows, without results."""
    for model in MODELS:
        for habit in HABITS:
            orders = ("before",) if habit in ("nothing", "ema") else ("before", "after")
            for order in orders:
                for compiled in ("whole", "regional"):
                    if not (habit in ("ddp", "ddp+checkpointing") and order == "before"):
                        yield TrainingRow(model=model, habit=habit, order=order, compiled=compiled)
            if habit in ("nothing", "checkpointing", *ON_RANKS):
                yield TrainingRow(model=model, habit=habit, order="compile", compiled="whole")


def measure(row: TrainingRow, options: dict[str, Any]) -> TrainingRow:
    """The row with its results."""
    start = time.perf_counter()
    try:
        if row.habit in ON_RANKS:
            with Pool(2, timeout=240) as pool:
                row = pool.run(2, _on_rank, row, options)[0]
        else:
            row = _compare(row, options, 0)
    except RankFailedError as error:
        row.fault = str(error).strip().splitlines()[-1][:400]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.fault = f"{type(error).__name__}: {str(error).strip()[:300]} ({place.name}, line {place.lineno})"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _on_rank(ranks: Ranks, row: TrainingRow, options: dict[str, Any]) -> TrainingRow:
    return _compare(row, options, ranks.rank)


def _compare(row: TrainingRow, options: dict[str, Any], rank: int) -> TrainingRow:
    """Train a model and its twin for two steps."""
    torch._dynamo.reset()
    (model, inputs), (twin, _) = (CASES[row.model].build(GRID) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        inputs = {
            name: value + 0.1 * torch.randn_like(value)
            if value.is_floating_point() and value.dim() > 2
            else value
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        } | {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    for one in (model, twin):
        one.train()
    tokens = {one.tokens for one in CASES[row.model].expect(GRID, 1) if one.grid is not None}
    called_twin, _ = _set(row.habit, twin)
    regional = row.compiled == "regional"
    if row.order == "after":
        sparsify_compiler.apply(model, regional=regional, **options)
    called, average = _set(row.habit, model)
    if row.order == "before":
        sparsify_compiler.apply(model, regional=regional, **options)
    elif row.order == "compile":
        called = torch.compile(called, backend="sparsify", options=options)
    for _ in range(2):
        with Attentions(twin, tokens) as ran:
            expected = _gradients(called_twin, twin, inputs)
        row.video_attentions = len(ran.found)
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with (
            warnings.catch_warnings(record=True) as warned,
            torch.profiler.profile(activities=cpu) as profiled,
        ):
            warnings.simplefilter("always")
            out = called(**inputs)[0]
        dense = [str(one.message) for one in warned if "no video grid" in str(one.message)]
        row.reason = row.reason or next(iter(dense), "")
        calls = [one for one in profiled.events() if one.name == SPARSE]
        # A dispatch mode, such as that of checkpointing, calls an op inside of its own call.
        row.sparse = sum(SPARSE not in _callers(one) for one in calls)
        found = _gradients(called, model, inputs, out)
        if expected.keys() != found.keys() or not found:
            row.fault = f"gradients of {len(found)} parameters, must be {len(expected)}"
            return row
        row.parameters = len(found)
        # A parameter whose gradient is rounding alone, such as the bias of keys, counts by the mean of the others.
        least = 1e-3 * torch.stack([one.norm() for one in expected.values()]).mean()
        errors = [
            float((found[name] - one).norm() / one.norm().clamp(min=least)) for name, one in expected.items()
        ]
        row.error = max(row.error, *errors)
    if isinstance(called, DistributedDataParallel):
        row.buckets = len(called._get_ddp_logging_data()["bucket_sizes"].split(","))
    if average is not None:
        _check_average(average, model, inputs)
    if row.sparse != row.video_attentions and not row.reason:
        row.fault = f"{row.sparse} sparse calls, must be {row.video_attentions}"
    elif not row.error <= _ROUNDING:
        row.fault = f"error {row.error:.1e}"
    return row


def _set(habit: str, model: Any) -> tuple[Callable[..., Any], Any]:
    """Set a habit. Return (the function that calls the model, the average of its weights, if there is one)."""
    if "checkpointing" in habit:
        model.enable_gradient_checkpointing()
    if habit == "lora":
        from peft import LoraConfig

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False))
        model.train()
    elif habit == "ema":
        return model, torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    elif habit == "accelerate":
        from accelerate import Accelerator

        prepared, _ = Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
        return prepared, None
    elif habit.startswith("ddp"):
        # Buckets of 10 kB, the first one too, so that a small model has several.
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 10_000
        return DistributedDataParallel(model, bucket_cap_mb=0.01, find_unused_parameters=True), None
    elif habit == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        from sparsify_compiler.hosts.blocks import repeated_blocks

        for block in repeated_blocks(model):
            fully_shard(block)
        fully_shard(model)
    return model, None


def _gradients(
    called: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], out: Any = None
) -> dict[str, Tensor]:
    """Name -> gradient, whole, of one step."""
    out = called(**inputs)[0] if out is None else out
    model.zero_grad()
    out.square().mean().backward()
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {
        name: one.full_tensor() if hasattr(one, "full_tensor") else one.clone() for name, one in found.items()
    }


def _callers(event: Any) -> Iterator[str]:
    """The names of the events that an event of the profiler lies in."""
    while (event := event.cpu_parent) is not None:
        yield event.name


def _check_average(average: Any, model: nn.Module, inputs: dict[str, Any]) -> None:
    """The average of equal weights gives the output of the plain model, before and after it is updated."""
    plain = copy.deepcopy(model)
    average.update_parameters(model)
    with torch.no_grad():
        assert torch.equal(average(**inputs)[0], plain(**inputs)[0]), "the average is not the plain model"
