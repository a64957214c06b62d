"""Habits of scripts around a model, with `apply`: `python -m benchmarks.habits --out FILE`.

A row is a model, a habit (offloading, storage in 8 bits, caches, LoRA, ...), whether the habit is set before or
after `apply`, and whether the model is compiled whole or by block. Next to every model runs its twin: the same
weights and the same habit, without `apply`, uncompiled. The options select every key, so that both give the same
numbers. A row is right if

- in every call, the sparse attentions are those over the video that the twin ran, by name; models in `DENSE` may
  leave them dense, for the reason there;
- every output is the twin's within rounding;
- after `restore`, and after the habit is undone, in either order, outputs are the twin's, bit for bit.

`--training` runs the habits of training instead, see `benchmarks/training_habits.py`.

Rows that the file has already are kept, so that an interrupted run continues. Needs the extra `habits`.
"""

import argparse
import fnmatch
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

import sparsify_compiler
from benchmarks import training_habits
from benchmarks.attentions import EXACT, Attentions
from benchmarks.harness import write_json
from sparsify_compiler.testing.models import CASES, GRID

OUT = Path("benchmarks/results/habits.json")
CPU = torch.device("cpu")
TIMES = (950, 800, 600, 400)
MODELS = ("wan", "hunyuan_video", "hunyuan_video_15", "mochi", "cogvideox_rope", "ltx")
ALL_HABITS = ("wan", "hunyuan_video")
"""The models that every habit is tried on; the others get the habits of `_SHORT`."""
DENSE: dict[str, str] = {}
"""Models whose video attention stays dense -> a part of the reason that the log must give; none so far."""
_NO_ROUNDING = 2e-5
"""The largest relative error of the outputs of a model in float32."""


class NotAvailable(Exception):
    """The habit does not exist for this model, by diffusers' own words."""


def _nothing(model: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Habit:
    """One thing that scripts do to a model."""

    name: str
    set: Callable[[Any], None]
    undo: Callable[[Any], None] | None = None
    """None: diffusers cannot undo it."""
    again: Callable[[Any], None] | None = None
    """Sets what `undo` undid, where that is not everything."""
    between: tuple[Callable[[Any], None], ...] = ()
    """Further changes, before the second call, the third, ..."""
    batch: int = 1
    rounding: float = _NO_ROUNDING


@dataclass(kw_only=True, slots=True)
class Row:
    """A result."""

    model: str
    habit: str
    order: str
    compiled: str
    video_attentions: int = 0
    """Attentions over the video that the twin ran, in all calls."""
    sparse: int = 0
    dense_for_a_reason: int = 0
    error: float = 0.0
    """The largest relative error of an output against the twin's."""
    restored: bool = False
    """Whether the outputs after `restore` are the twin's bits, in both orders of undoing."""
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)
    """The lines of the log on how much is sparse."""
    fault: str = ""
    not_available: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """The identity of a row."""
        return self.model, self.habit, self.order, self.compiled


def _offload(kind: str, **named: Any) -> Callable[[Any], None]:
    def set_it(model: Any) -> None:
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=kind, **named)

    return set_it


def _remove_hooks(*names: str) -> Callable[[Any], None]:
    def undo(model: Any) -> None:
        for module in model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            for name in names if registry is not None else ():
                registry.remove_hook(name, recurse=False)

    return undo


_NO_OFFLOAD = _remove_hooks("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def _sequential_offload(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def _model_offload(model: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, CPU)


def _no_accelerate(model: Any) -> None:
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


def _fp8(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _cache(made: Callable[[Any], Any]) -> Callable[[Any], None]:
    def set_it(model: Any) -> None:
        if not hasattr(model, "enable_cache"):
            raise NotAvailable(f"{type(model).__name__} has no enable_cache")
        model.enable_cache(made(model))

    return set_it


def _no_cache(model: Any) -> None:
    model.disable_cache()


def _first_block(threshold: float) -> Callable[[Any], Any]:
    def config(model: Any) -> Any:
        from diffusers.hooks import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=threshold)

    return config


def _mag(model: Any) -> Any:
    from diffusers.hooks import MagCacheConfig

    return MagCacheConfig(
        threshold=10.0, max_skip_steps=1, retention_ratio=0.3, num_inference_steps=4, mag_ratios=torch.ones(4)
    )


def _mag_calibrating(model: Any) -> Any:
    from diffusers.hooks import MagCacheConfig

    return MagCacheConfig(num_inference_steps=4, calibrate=True)


def _pab(model: Any) -> Any:
    from diffusers.hooks import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        cross_attention_timestep_skip_range=(100, 900),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: model.__dict__["time_now"],
    )


def _faster(model: Any) -> Any:
    from diffusers.hooks import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: model.__dict__["time_now"],
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCFHW",
        is_guidance_distilled=True,
    )


def _taylor(**named: Any) -> Callable[[Any], Any]:
    def config(model: Any) -> Any:
        from diffusers.hooks import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, **named
        )

    return config


def _backend(name: str) -> Callable[[Any], None]:
    def set_it(model: Any) -> None:
        model.set_attention_backend(name)

    return set_it


def _usual_backend(model: Any) -> None:
    model.set_attention_backend("native")  # for all models of the process
    model.reset_attention_backend()


def _fused(model: Any) -> None:
    model.fuse_qkv_projections()


def _unfused(model: Any) -> None:
    model.unfuse_qkv_projections()


def _lora(model: Any) -> None:
    _adapter("default")(model)


def _adapter(name: str) -> Callable[[Any], None]:
    def set_it(model: Any) -> None:
        from peft import LoraConfig

        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            layers = ["to_q", "to_k", "to_v", "to_out.0"]
            model.add_adapter(
                LoraConfig(r=2, lora_alpha=2, target_modules=layers, init_lora_weights=False), name
            )
        model.eval()

    return set_it


def _no_lora(model: Any) -> None:
    model.unload_lora()


def _int8(model: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def _all(*parts: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        for part in parts:
            part(model)

    return run


_BLOCK = _offload("block_level", num_blocks_per_group=1)
_LEAF = _offload("leaf_level")
_FBC = _cache(_first_block(0.0))
HABITS = {
    habit.name: habit
    for habit in (
        Habit("nothing", _nothing, _nothing),
        Habit("block_offload", _BLOCK, _NO_OFFLOAD),
        Habit("two_block_offload", _offload("block_level", num_blocks_per_group=2), _NO_OFFLOAD),
        Habit("leaf_offload", _LEAF, _NO_OFFLOAD),
        Habit("sequential_offload", _sequential_offload, _no_accelerate),
        Habit("model_offload", _model_offload, _no_accelerate),
        Habit("fp8", _fp8, rounding=2e-5),
        Habit("first_block_cache", _FBC, _no_cache),
        Habit("first_block_cache_skipping", _cache(_first_block(1e9)), _no_cache),
        Habit("mag_cache", _cache(_mag), _no_cache),
        Habit("mag_cache_calibrating", _cache(_mag_calibrating), _no_cache),
        Habit("pab", _cache(_pab), _no_cache),
        Habit("faster_cache", _cache(_faster), _no_cache),
        Habit("taylor_seer", _cache(_taylor()), _no_cache),
        Habit("taylor_seer_lite", _cache(_taylor(use_lite_mode=True)), _no_cache),
        Habit("flex", _backend("flex"), _usual_backend),
        Habit("native_math", _backend("_native_math"), _usual_backend),
        Habit("flash", _backend("flash")),
        Habit("sage", _backend("sage")),
        Habit("xformers", _backend("xformers")),
        Habit("fused_qkv", _fused, _unfused),
        Habit("lora", _lora, _no_lora),
        Habit(
            "lora_on_and_off",
            _lora,
            _no_lora,
            between=(
                lambda model: model.disable_lora(),
                lambda model: model.enable_lora(),
                _all(_adapter("second"), lambda model: model.set_adapters(["default", "second"], [1.0, 0.5])),
            ),
        ),
        Habit(
            "lora_fused_and_unfused",
            _lora,
            _no_lora,
            between=(
                lambda model: model.fuse_lora(),
                lambda model: model.unfuse_lora(),
                lambda model: model.unload_lora(),
            ),
        ),
        Habit("int8", _int8, rounding=1e-4),
        Habit("block_offload+first_block_cache", _all(_BLOCK, _FBC), _all(_no_cache, _NO_OFFLOAD)),
        Habit("leaf_offload+pab", _all(_LEAF, _cache(_pab)), _all(_no_cache, _NO_OFFLOAD)),
        Habit("fp8+block_offload", _all(_fp8, _BLOCK), _NO_OFFLOAD, again=_BLOCK),
        Habit("fp8+leaf_offload", _all(_fp8, _LEAF), _NO_OFFLOAD, again=_LEAF),
        Habit("fp8+first_block_cache", _all(_fp8, _FBC), _no_cache, again=_FBC),
        Habit("lora+block_offload", _all(_lora, _BLOCK), _all(_NO_OFFLOAD, _no_lora)),
        Habit("lora+sequential_offload", _all(_lora, _sequential_offload), _all(_no_accelerate, _no_lora)),
        Habit("lora+fp8", _all(_lora, _fp8)),
        Habit("fused_qkv+block_offload", _all(_fused, _BLOCK), _all(_NO_OFFLOAD, _unfused)),
    )
}
_SHORT = ("nothing", "block_offload", "sequential_offload", "fp8", "first_block_cache", "pab", "lora", "int8")


@contextmanager
def _native(model: Any) -> Iterator[None]:
    """Let attention call SDPA inside, so that `Attentions` sees it; other backends give the same numbers."""
    processors = [
        one.processor
        for one in model.modules()
        if hasattr(getattr(one, "processor", None), "_attention_backend")
    ]
    before = [one._attention_backend for one in processors]
    for one in processors:
        one._attention_backend = "native"
    yield
    for one, backend in zip(processors, before, strict=True):
        one._attention_backend = backend


def _call(model: Any, inputs: dict[str, Any], moment: int) -> torch.Tensor:
    model.__dict__["time_now"] = moment
    context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
    with torch.no_grad(), context:
        now = inputs | {"timestep": torch.full_like(inputs["timestep"], moment)}
        result = model(**now)[0]
    assert isinstance(result, torch.Tensor)
    return result.clone()


def _fresh(model: Any) -> None:
    """Forget what caches keep from the last video, as pipelines do."""
    if hasattr(model, "_reset_stateful_cache"):
        model._reset_stateful_cache()


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def measure(name: str, habit: Habit, order: str, compiled: str, inner: str) -> Row:
    """One row."""
    torch._dynamo.reset()
    row = Row(model=name, habit=habit.name, order=order, compiled=compiled)
    start, log = time.perf_counter(), _Lines()
    logging.getLogger("sparsify_compiler").addHandler(log)
    try:
        _measure(row, habit, inner)
    except NotAvailable as reason:
        row.not_available = str(reason)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row.fault = f"{type(error).__name__}: {str(error).strip()[:300]} ({place.filename}:{place.lineno})"
    finally:
        logging.getLogger("sparsify_compiler").removeHandler(log)
    row.log = [line for line in log.lines if "video attentions sparse" in line or "cannot analyse" in line]
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _twins(name: str, habit: Habit) -> tuple[Any, Any, dict[str, Any]]:
    (model, inputs), (twin, _) = (CASES[name].build(GRID, batch=habit.batch) for _ in range(2))
    return model, twin, inputs


def _set(habit: Habit, model: Any) -> None:
    try:
        habit.set(model)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError, ImportError) as error:
        raise NotAvailable(f"{type(error).__name__}: {str(error)[:200]}") from error


def _measure(row: Row, habit: Habit, inner: str) -> None:
    model, twin, inputs = _twins(row.model, habit)
    tokens = {one.tokens for one in CASES[row.model].expect(GRID, habit.batch) if one.grid is not None}
    _set(habit, twin)
    options = {"regional": row.compiled == "regional", **EXACT, "inner_backend": inner}
    if row.order == "before":
        habit.set(model)
    changed = sparsify_compiler.apply(model, **options)
    if row.order == "after":
        habit.set(model)
    wrong = []
    for number, moment in enumerate(TIMES):
        if number and len(habit.between) >= number:
            for one in (model, twin):
                habit.between[number - 1](one)
        with Attentions(twin, tokens) as ran, _native(twin):
            expected = _call(twin, inputs, moment)
        got = _call(model, inputs, moment)
        last = [*changed.models[0].plans, *changed.models[0].outside]
        sparse = {plan.site.name for plan in last if plan.method != "dense"}
        why = DENSE.get(row.model)
        told = {plan.site.name for plan in last if why is not None and why in plan.reason}
        row.video_attentions += len(ran.found)
        row.sparse += len(sparse & ran.found)
        row.error = max(row.error, float((got - expected).norm() / expected.norm()))
        row.dense_for_a_reason += len((told - sparse) & ran.found)
        if sparse != ran.found - told:
            wrong.append(f"call {number}: ran {sorted(ran.found)}, sparse {sorted(sparse)}")
    if wrong:
        row.fault = "; ".join(wrong)
    elif not row.error <= habit.rounding:
        row.fault = f"error {row.error:.1e}"
    elif not row.video_attentions:
        row.fault = "the twin ran no attention over the video"
    row.restored = _restores(habit, model, twin, inputs, changed, restore_first=row.order == "before")
    if row.restored:
        changed = sparsify_compiler.apply(model, **options | {"inner_backend": "eager"})
        if habit.undo is not None:
            for one in (model, twin):
                (habit.again or habit.set)(one)
        for _ in range(2):
            _call(model, inputs, TIMES[0])
        row.restored = _restores(habit, model, twin, inputs, changed, restore_first=row.order != "before")
    if not row.restored:
        row.fault = "; ".join(filter(None, [row.fault, "other bits after restore"]))


def _restores(
    habit: Habit, model: Any, twin: Any, inputs: dict[str, Any], changed: Any, *, restore_first: bool
) -> bool:
    def alike() -> bool:
        found = []
        for one in (model, twin):
            _fresh(one)
            found.append([_call(one, inputs, moment) for moment in TIMES[:2]])
        return all(map(torch.equal, *found))

    def undo() -> None:
        for one in (model, twin) if habit.undo is not None else ():
            habit.undo(one)  # type: ignore[misc]

    if not restore_first:
        undo()
    changed.restore()
    right = alike()
    if restore_first:
        undo()
        right = right and alike()
    return right


def rows() -> Iterator[tuple[str, Habit, str, str]]:
    """All rows."""
    for model in MODELS:
        for habit in HABITS.values():
            if model in ALL_HABITS or habit.name in _SHORT:
                for compiled in ("whole", "regional"):
                    for order in ("before",) if habit.name == "nothing" else ("before", "after"):
                        yield model, habit, order, compiled


def _inference(inner: str) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """(identity, function that measures it) of all rows."""
    for model, habit, order, compiled in rows():
        key = model, habit.name, order, compiled
        yield key, partial(measure, model, habit, order, compiled, inner)


def _training(inner: str) -> Iterator[tuple[tuple[str, ...], Callable[[], Any]]]:
    """The same for habits of training."""
    for row in training_habits.rows():
        yield row.key, partial(training_habits.measure, row, EXACT | {"inner_backend": inner})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows that are missing. Returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="patterns such as 'wan/fp8*/before/*'")
    parser.add_argument("--out", type=Path, help="JSON file for the result; rows in it are kept")
    parser.add_argument(
        "--again", action="store_true", help="repeat rows of the file that are wrong or not available"
    )
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--training", action="store_true", help="habits of training")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after this time")
    args = parser.parse_args(argv)
    kind: Any = training_habits.TrainingRow if args.training else Row
    done: dict[tuple[str, ...], Any] = {}
    if args.out is not None and args.out.exists():
        found = (kind(**case) for case in json.loads(args.out.read_text())["cases"])
        done = {row.key: row for row in found if not (args.again and (row.fault or row.not_available))}
    diffusers_logging.set_verbosity_error()
    start = time.perf_counter()
    for key, run in _training(args.inner_backend) if args.training else _inference(args.inner_backend):
        asked = not args.only or any(fnmatch.fnmatch("/".join(key), pattern) for pattern in args.only)
        if key in done or not asked:
            continue
        if time.perf_counter() - start > args.seconds:
            print("out of time: run the command again", flush=True)
            break
        done[key] = row = run()
        result = row.not_available or row.fault or "right"
        print(
            f"{'/'.join(key)}: {row.sparse} of {row.video_attentions} sparse, error {row.error:.1e}, "
            f"{row.seconds} s: {result}",
            flush=True,
        )
        if args.out is not None:
            write_json(args.out, [asdict(one) for one in done.values()], lines=True)
    wrong = [row for row in done.values() if row.fault]
    print(f"{len(done)} rows, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
