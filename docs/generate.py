"""Write the parts of the documentation that come from code, measurements and runs.

    python docs/generate.py             # docs/options.md, and the tables in README.md and docs/
    python docs/generate.py --outputs   # the printed outputs too: runs every code block that has one, some minutes

A generated part stands between two comments, which name its source:

    <!-- table: whole models -->  ...  <!-- /table -->    a function of `TABLES`
    <!-- options: tile -->  ...  <!-- /options -->        the options of a method, or a name in `OPTIONS`
    <!-- output -->  ...  <!-- /output -->                what the code block before it prints
    <!-- output: COMMAND -->  ...  <!-- /output -->       what a command prints

`tests/test_docs.py` fails where a file differs from what this script writes.
"""

import argparse
import ast
import contextlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from sparsify_compiler import config
from sparsify_compiler.backend import DEFAULT_METHOD
from sparsify_compiler.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"<!-- (table|options|output)(?:: (.+?))? -->\n(.*?)<!-- /\1 -->", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


# options


def attribute_docs(owner: type[Any] | ModuleType) -> dict[str, str]:
    """Name -> docstring of the annotated or assigned attributes of a class or module, as one line.

    The docstring of an attribute is the string that follows its definition. Fields of base classes come first.
    """
    if isinstance(owner, type):
        found = {k: v for base in reversed(owner.__mro__[1:-1]) for k, v in attribute_docs(base).items()}
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
    else:
        found, body = {}, ast.parse(inspect.getsource(owner))
    for defined, said in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(said, ast.Expr) and isinstance(said.value, ast.Constant)):
            continue
        targets = defined.targets if isinstance(defined, ast.Assign) else [getattr(defined, "target", None)]
        if isinstance(targets[0], ast.Name) and isinstance(said.value.value, str):
            found[targets[0].id] = " ".join(said.value.value.split())
    return found


def option_rows(owner: type[Any], defaults: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(option, default, meaning) of each field of an options dataclass.

    Args:
        defaults: those that the fields themselves do not have.

    Raises:
        KeyError: a field has no docstring.
    """
    said = attribute_docs(owner)
    return [
        (f"`{f.name}`", f"`{defaults.get(f.name, f.default)!r}`", said[f.name].replace("|", r"\|"))
        for f in fields(owner)
    ]


def general_options() -> str:
    """The options of every method."""
    preset = (
        "`preset`",
        "`None`",
        f"The name of a preset: {' or '.join(f'`{name}`' for name in config.PRESETS)}.",
    )
    rows = option_rows(config.SparsifyConfig, {"method": DEFAULT_METHOD})
    return table(("option", "default", "meaning"), [rows[0], preset, *rows[1:]])


def method_options(name: str) -> str:
    """The options of one method, and its defaults of the general ones."""
    kind = METHODS[name]
    general = ", ".join(
        f"`{option}` {getattr(kind, option)!r}" for option in ("far_field", "dense_steps", "dense_layers")
    )
    parts = [table(("option", "default", "meaning"), option_rows(kind, {}))] if fields(kind) else []
    lines = [f"Defaults of the general options: {general}."]
    for far_field, changed in kind.otherwise.items():
        values = ", ".join(f"`{option}` {value!r}" for option, value in changed.items())
        lines.append(f"With `far_field={far_field!r}` the defaults are {values}.")
    return "\n\n".join([*parts, "\n".join(lines)])


def presets() -> str:
    """The presets and the options that each sets."""
    names = list(dict.fromkeys(option for preset in config.PRESETS.values() for option in preset))
    rows = [
        [f"`{option}`", *(f"`{preset[option]!r}`" for preset in config.PRESETS.values())] for option in names
    ]
    said = attribute_docs(config)["PRESETS"]
    return f"{said}\n\n{table(['option', *(f'`{name}`' for name in config.PRESETS)], rows)}"


def environment() -> str:
    """The environment variables that the package reads."""
    return attribute_docs(config)["CHECK_TABLES"]


OPTIONS: Mapping[str, Callable[[], str]] = {
    "general": general_options,
    "presets": presets,
    "environment": environment,
}


# figures


def results(name: str) -> dict[str, Any]:
    """A record of `benchmarks/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def origin(record: Mapping[str, Any]) -> str:
    """The command, machine and date of a record, in one line."""
    machine = record["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    cpu = f"{machine['cpu'].replace('(R)', '')}, {machine['cpu_capability']}"
    cpu += ", AMX" if has_amx(machine) else ""
    return f"`{record['command']}`; {cpu}, {threads}, torch {machine['torch']}, {record['date'][:10]}."


def has_amx(machine: Mapping[str, Any]) -> bool:
    """Whether a machine multiplies bfloat16 matrices in AMX tiles: an Intel whose record says so."""
    return "Intel" in machine["cpu"] and machine.get("fast_products") == "bfloat16"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def whole_models() -> str:
    """Steps of whole models, sparse and by plain torch.compile: one step of sampling, or of training."""
    models = {
        "wan-64": "Wan, 4 heads of 64",
        "wan-128": "Wan, 2 heads of 128",
        "hunyuan-64": "HunyuanVideo, 4 heads of 64",
    }
    rows = []
    for path in sorted(RESULTS.glob("model-*.json")):
        record = results(path.stem)
        for case in record["cases"]:
            model, dtype = case["name"].rsplit("-", 1)
            rows.append(
                (
                    cpu_of(record),
                    models[model],
                    f"{case['tokens']:,}",
                    dtype,
                    "tile",
                    f"{case['density']:.1%}",
                )
                + _times(1e3 * case["dense_s"], 1e3 * case["sparse_s"])
            )
    record = results("dsv-training-cpu")
    dense, sparse = (case["steps"] for case in record["cases"])
    share = [step["share"] for step in sparse if "share" in step][-1]
    seconds = [median(step["seconds"] for step in steps[-50:]) for steps in (dense, sparse)]
    rows.append(
        (
            cpu_of(record),
            "evaluation model, 3 heads of 64, training",
            "2,304",
            "float32",
            "dsv",
            f"{share:.1%}",
        )
        + _times(*(1e3 * second for second in seconds))
    )
    head = ("CPU", "model", "tokens", "type", "method", "kept pairs", "`torch.compile`", "sparse", "speed-up")
    return table(head, rows)


def cpu_of(record: Mapping[str, Any]) -> str:
    """The CPU of a record and its threads, in a few words."""
    machine = record["machine"]
    cpu = "Intel Xeon" if "Intel" in machine["cpu"] else machine["cpu"]
    return f"{cpu}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"


def _times(dense: float, sparse: float) -> tuple[str, str, str]:
    """Two times in milliseconds, and their ratio."""
    return f"{dense:,.0f} ms", f"{sparse:,.0f} ms", f"{dense / sparse:.1f}x"


def model_compilation() -> str:
    """Errors, speed-ups and compile times of whole models."""
    record = results("model-cpu")
    rows = [
        (case["name"], f"{case['error']:.0e}", f"{case['attention_share']:.0%}")
        + (f"{case['allowed']:.2f}x", f"{case['speedup']:.2f}x")
        + (
            (f"{case['compile_dense_s']:.1f} s", f"{case['compile_sparse_s']:.1f} s")
            if case["compile_ratio"]
            else ("-", "-")
        )
        for case in record["cases"]
    ]
    head = ("model", "error", "attention's share", "allowed", "reached", "compile, dense", "compile, sparse")
    return f"{table(head, rows)}\n\n{origin(record)}"


def attention() -> str:
    """The attention op alone, forward."""
    record = results("attention-cpu")
    rows = [
        (case["name"], case["dtype"], f"{case['tokens']:,}", str(case["head_dim"]), f"{case['density']:.3f}")
        + (f"{case['dense_ms']:,.0f} ms", f"{case['ours_ms']:,.1f} ms", f"{case['speedup']:.1f}x")
        + (f"{case['efficiency']:.2f}",)
        for case in record["cases"]
    ]
    head = ("table", "type", "tokens", "head dim", "density", "SDPA", "sparse", "speed-up", "times density")
    return f"{table(head, rows)}\n\n{origin(record)}"


def attention_training() -> str:
    """The attention op alone, forward and backward."""
    record = results("training-cpu")
    rows = [
        (case["kind"], case["dtype"], f"{case['density']:.3f}", f"{case['flash_ms']:,.0f} ms")
        + (f"{case['ours_ms']:,.0f} ms", f"{case['speedup']:.1f}x", f"{case['efficiency']:.2f}")
        for case in record["cases"]
        if "kind" in case
    ]
    head = ("table", "type", "density", "SDPA", "sparse", "speed-up", "times density")
    return f"{table(head, rows)}\n\n{origin(record)}"


def quality() -> str:
    """Videos of the evaluation model: PSNR, loss and speed of each method."""
    record = results("quality-cpu")
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in record["rows"]:
        if row["line"] and row["target"] in (0.1, 0.2):
            method, far_field = row["line"].split()
            density = f"{row['density']:.2f}" if method == "tile" else str(row["target"])
            lines.setdefault((method, density), {})[far_field] = row
    names = {"keys": "keys, by clusters of queries", "dsv": "dsv, keys by prediction",
             "cubes": "cubes of 16 keys"}  # fmt: skip
    order = ("svg2", "cubes", "keys", "dsv", "tile")
    rows = []
    for (method, density), found in sorted(lines.items(), key=lambda item: order.index(item[0][0])):
        three = [found[far_field] for far_field in ("drop", "mean", "linear")]
        rows.append(
            (names.get(method, method), density, *(f"{row['psnr']:.1f} ({row['loss']:.3f})" for row in three))
            + (", ".join(f"{row['dense_seconds'] / row['seconds']:.2f}" for row in three),)
        )
    head = ("method", "density", "drop", "mean", "linear", "times as fast as dense")
    return f"{table(head, rows)}\n\n{origin(record)}"


def method_costs() -> str:
    """The cost of choosing and of the far field, for svg2 and cubes."""
    record = results("methods-cost-cpu")
    rows = []
    for case in record["cases"]:
        share, efficiency = case["far_field_share"], case["efficiency"]
        rows.append(
            (case["method"], "x".join(map(str, case["grid"])), f"{case['density']:.3f}")
            + (f"{case['ms']['dense']:,.0f} ms", f"{case['selection_share']:.1%}")
            + (f"{share['mean']:.1%}", f"{share['linear']:.1%}")
            + tuple(f"{efficiency[far_field]:.2f}" for far_field in ("drop", "mean", "linear"))
        )
    head = ("method", "grid", "density", "SDPA", "selection", "mean", "linear")
    head += ("times density: drop", "mean", "linear")
    return f"{table(head, rows)}\n\n{origin(record)}"


def far_field_costs() -> str:
    """The cost of the far field, by the size of its groups."""
    record = results("far-field-cpu")
    rows = [
        (f"{case['tokens']:,}", case["dtype"], str(case["group"]), f"{case['dense_ms']:,.0f} ms")
        + tuple(f"{case[f'{far_field} added, % of dense']:.1f} %" for far_field in ("mean", "linear"))
        for case in record["cases"]
        if case["case"] == "cost"
    ]
    return f"{table(('tokens', 'type', 'group', 'SDPA', 'mean', 'linear'), rows)}\n\n{origin(record)}"


def prediction() -> str:
    """The cost of choosing single keys."""
    record = results("prediction-cpu")
    rows = [
        (f"{case['tokens']:,}", case["dtype"], case["chosen_by"], f"{case['keys']:,}")
        + (f"{case['top_k_ms']:,.0f} ms", f"{case['share_of_dense']:.1%}")
        for case in record["cases"]
    ]
    head = ("tokens", "type", "`chosen_by`", "keys", "choice", "share of dense")
    return f"{table(head, rows)}\n\n{origin(record)}"


def distillation() -> str:
    """The stages of `sparsify distill`."""
    record = results("distill-cpu")
    rows = [
        (row["videos"], str(row["calls"]), f"{row['psnr']:.1f} dB")
        + tuple("-" if row[key] is None else f"{row[key]:.3f}" for key in ("step_error", "found"))
        for row in record["quality"]
    ]
    head = ("videos", "calls of the model", "PSNR to 100 steps", "error of a step", "found")
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in record["seconds"].items())
    return (
        f"{table(head, rows)}\n\nA video takes: {times}. `sparsify distill --out DIR`; {record['machine']}."
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "whole models": whole_models,
    "model compilation": model_compilation,
    "attention": attention,
    "attention in training": attention_training,
    "quality": quality,
    "method costs": method_costs,
    "far-field costs": far_field_costs,
    "prediction": prediction,
    "distillation": distillation,
}


# outputs


def printed_by_code(code: str) -> str:
    """The output of a code block that runs on its own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<code block>", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def printed_by_command(command: str) -> str:
    """The output of a command that runs in the root of the repository."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    return subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def as_block(output: str) -> str:
    """An output as a block of text, without empty lines around it or spaces at the ends of lines."""
    return "```text\n" + "\n".join(line.rstrip() for line in output.strip("\n").splitlines()) + "\n```"


# files


def rendered(text: str, *, outputs: bool) -> str:
    """The text of a file with its generated parts written anew.

    Args:
        outputs: whether to run code and commands; else their outputs stay.
    """

    def part(found: re.Match[str]) -> str:
        kind, name, old = found.groups()
        if kind == "table":
            new = TABLES[name]()
        elif kind == "options":
            new = OPTIONS[name]() if name in OPTIONS else method_options(name)
        elif not outputs:
            return found[0]
        elif name is None:
            new = as_block(printed_by_code(CODE.findall(text[: found.start()])[-1]))
        else:
            new = as_block(printed_by_command(name))
        opening = f"<!-- {kind}: {name} -->" if name else f"<!-- {kind} -->"
        return f"{opening}\n{new}\n<!-- /{kind} -->"

    return PART.sub(part, text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python docs/generate.py", description="Write generated parts.")
    parser.add_argument("--outputs", action="store_true", help="run code blocks and commands too")
    options = parser.parse_args()
    for path in FILES:
        old = path.read_text()
        if (new := rendered(old, outputs=options.outputs)) != old:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
