"""Video pipelines of diffusers with `apply`: `python -m benchmarks.pipelines --out FILE`.

Each pipeline of `benchmarks/small_pipelines.py` is saved and loaded twice. One runs with `apply`, before its twin
runs without it, uncompiled. The options select every key, so that both give the same latents. A row is right if

- in every model, the sparse attentions are those over the video that the twin ran, by name;
- latents are the twin's within rounding, at one resolution, then at another one, then for two videos at once.

Every row runs in a process of its own. Rows that the file has already are kept. Needs the extra `pipelines`.
"""

import argparse
import inspect
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsify_compiler
from benchmarks.attentions import EXACT, AtLeast, Attentions
from benchmarks.harness import row_in_a_process, write_json
from benchmarks.small_pipelines import PIPELINES, Pipeline

ROUNDING = 2e-5
"""The largest relative error of latents in float32."""
DENSE = {
    "MotifVideoPipeline": "several video grids",
    "MotifVideoImage2VideoPipeline": "several video grids",
}
"""Models whose attention stays dense -> a part of the reason. A decoder of Motif attends over one video twice."""
STEPS = 3


@dataclass(kw_only=True, slots=True)
class Row:
    """A result."""

    pipeline: str
    video_attentions: int = 0
    """Attentions over the video that the twin ran, in all models, at the first resolution."""
    sparse: int = 0
    graphs: int = 0
    """Graphs of a call of the first model."""
    errors: list[float] = field(default_factory=list)
    """Relative errors of latents: first resolution, another prompt, another resolution, two videos."""
    compiled_again: int = 0
    """Graphs that Dynamo compiled in the second call, with another prompt of another length."""
    seconds: float = 0.0
    fault: str = ""


def measure(name: str, inner: str) -> Row:
    """One row."""
    row, start = Row(pipeline=name), time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _measure(row, PIPELINES[name], Path(folder), inner)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = str(error).strip().splitlines()[:1]
        row.fault = (
            f"{type(error).__name__}: {''.join(message)[:300]} ({Path(place.filename).name}:{place.lineno})"
        )
        traceback.print_exc()
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _load(kind: Any, folder: Path, parts: dict[str, Any]) -> Any:
    """The saved pipeline. Components that cannot be saved, such as None, have to be given again."""
    named = {name: part for name, part in parts.items() if not hasattr(part, "save_pretrained")}
    pipe = kind.from_pretrained(folder, **named)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: Any, given: dict[str, Any], count: int = 1) -> Tensor:
    """The latents that a pipeline makes."""
    names = inspect.signature(type(pipe).__call__).parameters
    common = {
        "num_inference_steps": STEPS,
        "num_videos_per_prompt": count,
        "num_images_per_prompt": count,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "latent",
    }
    known = {name: value for name, value in (given | common).items() if name in names}
    result = pipe(**known, return_dict=False)[0]
    if isinstance(result, list):  # HunyuanVideo Framepack has one tensor for each section
        result = torch.cat([one.flatten() for one in result])
    assert isinstance(result, Tensor), type(result)
    return result.clone()


def _measure(row: Row, what: Pipeline, folder: Path, inner: str) -> None:
    import diffusers

    torch.manual_seed(0)
    kind, parts = getattr(diffusers, row.pipeline.partition(",")[0]), what.make()
    kind(**parts).save_pretrained(folder)
    pipe, twin = (_load(kind, folder, parts) for _ in range(2))
    models = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]
    (height, width), *others = what.sizes
    calls = [(0, height, width, 1), (1, height, width, 1), *((1, *size, 1) for size in others)]
    if what.several:
        calls.append((0, height, width, 2))
    changed = sparsify_compiler.apply(pipe, **EXACT, inner_backend=inner)
    got, plans, before = [], [], 0
    for number, (prompt, h, w, count) in enumerate(calls):
        got.append(_latents(pipe, what.call(prompt, h, w), count))
        if number == 0:
            plans = [[*model.plans, *model.outside] for model in changed.models]
            row.graphs = len(changed.models[0].graphs)
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if number == 1:
            row.compiled_again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    for number, (prompt, h, w, count) in enumerate(calls):
        seen = [Attentions(getattr(twin, name), AtLeast(what.tokens(h, w))) for name in models]
        with seen[0], seen[-1]:
            expected = _latents(twin, what.call(prompt, h, w), count)
        row.errors.append(float((got[number] - expected).norm() / expected.norm()))
        if number == 0:
            ran = [one.found for one in seen]
    row.video_attentions = sum(map(len, ran))
    for model, found in zip(plans, ran, strict=True):
        sparse = {plan.site.name.partition("#")[0] for plan in model if plan.method != "dense"}
        row.sparse += len(sparse & found)
        told = {plan.site.name for plan in model if DENSE.get(row.pipeline, "?") in plan.reason}
        if sparse != found - told:
            reasons = {plan.site.name: plan.reason for plan in model if plan.site.name in found - sparse}
            row.fault = f"ran {sorted(found)}, sparse {sorted(sparse)}: {reasons}"
    if not max(row.errors) <= ROUNDING:
        row.fault = f"errors {row.errors}; {row.fault}"
    elif not row.video_attentions:
        row.fault = "the twin ran no attention over the video"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows that are missing. Returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*PIPELINES], metavar="PIPELINE")
    parser.add_argument("--out", type=Path, help="JSON file for the result; rows in it are kept")
    parser.add_argument("--again", action="store_true", help="repeat rows of the file that are wrong")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no row begins after this time")
    parser.add_argument("--inner-backend", default="eager")
    parser.add_argument("--here", action="store_true", help="run one row in this process, and print it")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if args.here:
        print(json.dumps(asdict(measure(args.only[0], args.inner_backend))))
        return 0
    done: dict[str, Row] = {}
    if args.out is not None and args.out.exists():
        found = (Row(**case) for case in json.loads(args.out.read_text())["cases"])
        done = {row.pipeline: row for row in found if not (args.again and row.fault)}
    begin = time.monotonic()
    for name in args.only:
        if name in done or time.monotonic() - begin > args.seconds:
            continue
        command = ["benchmarks.pipelines", "--here", "--only", name, "--inner-backend", args.inner_backend]
        done[name] = row = Row(**{"pipeline": name, **row_in_a_process(command)})
        print(
            f"{name}: {row.sparse} of {row.video_attentions} sparse, {row.graphs} graphs, errors "
            f"{', '.join(f'{one:.1e}' for one in row.errors)}, {row.seconds} s: {row.fault or 'right'}",
            flush=True,
        )
        if args.out is not None:
            write_json(args.out, [asdict(one) for one in done.values()], lines=True)
    wrong = [row for row in done.values() if row.fault]
    print(f"{len(done)} pipelines, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
