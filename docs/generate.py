"""Write the parts of the documentation that come from code, measurements and runs.

    python docs/generate.py             # docs/options.md, tables of README.md and docs/, help(sparsify_compiler)
    python docs/generate.py --outputs   # the printed outputs too: runs every code block that has one, some minutes

A generated part stands between two comments, which name its source:

    <!-- table: whole models -->  ...  <!-- /table -->    a function of `TABLES`
    <!-- options: tile -->  ...  <!-- /options -->        the options of a method, or a name in `OPTIONS`
    <!-- output -->  ...  <!-- /output -->                what the code block before it prints
    <!-- output: COMMAND -->  ...  <!-- /output -->       what a command prints

The methods and their options in the docstring of the package, `help(sparsify_compiler)`, are generated too.

`tests/test_docs.py` fails where a file differs from what this script writes.
"""

import argparse
import ast
import contextlib
import inspect
import io
import json
import os
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
from sparsify_compiler.methods import METHODS
from sparsify_compiler.options import DEFAULT_METHODS

os.environ["SPARSIFY_GUARD"] = "off"  # the guard's times differ from machine to machine
ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PACKAGE = ROOT / "sparsify_compiler" / "__init__.py"
RESULTS = ROOT / "benchmarks" / "results"
PART = re.compile(r"<!-- (table|options|output)(?:: (.+?))? -->\n(.*?)<!-- /\1 -->", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAMES = re.compile(r"(?<=^    method           ).+$", re.MULTILINE)
OWN_OPTIONS = re.compile(r'(?<=^Options of one method:\n\n).*?(?=^"""$)', re.DOTALL | re.MULTILINE)


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
    rows = option_rows(config.SparsifyConfig, {"method": DEFAULT_METHODS[0]})
    option, default, meaning = rows[0]
    named = f"{meaning} Choices: {listed(f'`{name}`' for name in METHODS)}."
    return table(("option", "default", "meaning"), [(option, default, named), preset, *rows[1:]])


def listed(words: Iterable[str]) -> str:
    """The words with commas, and `or` before the last."""
    *first, last = words
    return f"{', '.join(first)} or {last}"


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


def package_help(text: str) -> str:
    """The source of the package with the methods and their options written anew in its docstring."""
    names = listed(f"{name} (the default)" if name == DEFAULT_METHODS[0] else name for name in METHODS)
    lines = [
        f"    {name:<16} {', '.join(config.option_names(kind))}\n"
        for name, kind in METHODS.items()
        if fields(kind)
    ]
    return OWN_OPTIONS.sub("".join(lines), NAMES.sub(names, text, count=1), count=1)


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
    docs = attribute_docs(config)
    return f"{docs['CHECK_TABLES']}\n\n{docs['GUARD_VARIABLE']}"


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
    amx = "Intel" in machine["cpu"] and machine.get("fast_products") == "bfloat16"
    cpu = f"{machine['cpu'].replace('(R)', '')}, {machine['cpu_capability']}{', AMX' if amx else ''}"
    return (
        f"`{record['command']}`; {cpu}, {threads(machine)}, torch {machine['torch']}, {record['date'][:10]}."
    )


def threads(machine: Mapping[str, Any]) -> str:
    """The threads of a run, in words."""
    return f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(cases: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table with a line for each case.

    Args:
        columns: head of a column -> its format, which takes the entries of a case by name.
    """
    return table(columns, [[form.format(**case) for form in columns.values()] for case in cases])


def figures(name: str, columns: Mapping[str, str], keep: Callable[[Mapping[str, Any]], bool] = bool) -> str:
    """The cases of a record as a table, with its origin."""
    record = results(name)
    return f"{filled(filter(keep, record['cases']), columns)}\n\n{origin(record)}"


MODELS = {
    "wan-64": "Wan, 4 heads of 64",
    "wan-128": "Wan, 2 heads of 128",
    "hunyuan-64": "HunyuanVideo, 4 heads of 64",
}
"""Names of the cases of `benchmarks.model`, in words."""


def whole_models() -> str:
    """Steps of whole models, sparse and by plain torch.compile: one step of sampling, or of training."""
    cases = []
    for path in sorted(RESULTS.glob("model-*.json")):
        record = results(path.stem)
        for case in record["cases"]:
            model, dtype = case["name"].rsplit("-", 1)
            cases.append(
                {**case, "cpu": cpu_of(record), "model": MODELS[model], "dtype": dtype, "method": "tile"}
            )
    record = results("dsv-training-cpu")
    dense, sparse = (case["steps"] for case in record["cases"])
    dense_s, sparse_s = (median(step["seconds"] for step in steps[-50:]) for steps in (dense, sparse))
    training = {
        "cpu": cpu_of(record),
        "model": "evaluation model, 3 heads of 64, training",
        "tokens": 2304,
        "dtype": "float32",
        "method": "dsv",
        "density": [step["share"] for step in sparse if "share" in step][-1],
        "dense_s": dense_s,
        "sparse_s": sparse_s,
        "speedup": dense_s / sparse_s,
    }
    columns = {
        "CPU": "{cpu}",
        "model": "{model}",
        "tokens": "{tokens:,}",
        "type": "{dtype}",
        "method": "{method}",
        "kept pairs": "{density:.1%}",
        "`torch.compile`": "{dense_s:.3f} s",
        "sparse": "{sparse_s:.3f} s",
        "speed-up": "{speedup:.1f}x",
    }
    return filled([*cases, training], columns)


def cpu_of(record: Mapping[str, Any]) -> str:
    """The CPU of a record and its threads, in a few words."""
    machine = record["machine"]
    return f"{'Intel Xeon' if 'Intel' in machine['cpu'] else machine['cpu']}, {threads(machine)}"


def model_compilation() -> str:
    """Errors, speed-ups and compile times of whole models."""
    record = results("model-cpu")
    cases = [
        {
            **case,
            **{
                f"{kind}_text": "-" if (seconds := case[f"compile_{kind}_s"]) is None else f"{seconds:.1f} s"
                for kind in ("dense", "sparse")
            },
        }
        for case in record["cases"]
    ]
    columns = {
        "model": "{name}",
        "error": "{error:.0e}",
        "attention's share": "{attention_share:.0%}",
        "allowed": "{allowed:.2f}x",
        "reached": "{speedup:.2f}x",
        "compile, dense": "{dense_text}",
        "compile, sparse": "{sparse_text}",
    }
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def attention() -> str:
    """The attention op alone, forward."""
    columns = {
        "table": "{name}",
        "type": "{dtype}",
        "tokens": "{tokens:,}",
        "head dim": "{head_dim}",
        "density": "{density:.3f}",
        "SDPA": "{dense_ms:,.0f} ms",
        "sparse": "{ours_ms:,.1f} ms",
        "speed-up": "{speedup:.1f}x",
        "times density": "{efficiency:.2f}",
    }
    return figures("attention-cpu", columns)


def attention_training() -> str:
    """The attention op alone, forward and backward."""
    columns = {
        "table": "{kind}",
        "type": "{dtype}",
        "density": "{density:.3f}",
        "SDPA": "{flash_ms:,.0f} ms",
        "sparse": "{ours_ms:,.0f} ms",
        "speed-up": "{speedup:.1f}x",
        "times density": "{efficiency:.2f}",
    }
    return figures("training-cpu", columns, lambda case: "kind" in case)


METHOD_WORDS = {
    "svg2": "svg2",
    "cubes": "cubes of 16 keys",
    "keys": "keys, by clusters of queries",
    "dsv": "dsv, keys by prediction",
    "tile": "tile",
}
"""Methods in the order of the table of quality, in words."""


def quality() -> str:
    """Videos of the evaluation model: PSNR, loss and speed of each method."""
    record = results("quality-cpu")
    found = {(row["line"], row["target"]): row for row in record["rows"] if row["line"]}
    cases = []
    for method, target in ((method, target) for method in METHOD_WORDS for target in (0.1, 0.2)):
        three = [found[f"{method} {far_field}", target] for far_field in ("drop", "mean", "linear")]
        case = {
            "method": METHOD_WORDS[method],
            "density": f"{three[0]['density']:.2f}" if method == "tile" else target,
            "speed": ", ".join(f"{row['dense_seconds'] / row['seconds']:.2f}" for row in three),
        }
        cases.append({**case, **dict(zip(("drop", "mean", "linear"), three, strict=True))})
    far_fields = {name: f"{{{name}[psnr]:.1f}} ({{{name}[loss]:.3f}})" for name in ("drop", "mean", "linear")}
    columns = {
        "method": "{method}",
        "density": "{density}",
        **far_fields,
        "times as fast as dense": "{speed}",
    }
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def method_choice() -> str:
    """The best far field of each method at density 0.2: PSNR and speed."""
    record = results("quality-cpu")
    found = {(row["line"], row["target"]): row for row in record["rows"] if row["line"]}
    cases = []
    for method, words in METHOD_WORDS.items():
        far_fields = {one: found[f"{method} {one}", 0.2] for one in ("drop", "mean", "linear")}
        best = max(far_fields, key=lambda one: far_fields[one]["psnr"])
        row = far_fields[best]
        speed = row["dense_seconds"] / row["seconds"]
        cases.append({"words": words, "best": best, "speed": speed, "psnr": row["psnr"]})
    columns = {
        "method": "{words}",
        "far field": "`{best}`",
        "PSNR": "{psnr:.1f} dB",
        "times as fast as dense": "{speed:.2f}",
    }
    cases.sort(key=lambda case: case["psnr"])
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def method_costs() -> str:
    """The cost of choosing and of the far field, for svg2 and cubes."""
    columns = {
        "method": "{method}",
        "grid": "{grid[0]}x{grid[1]}x{grid[2]}",
        "density": "{density:.3f}",
        "SDPA": "{ms[dense]:,.0f} ms",
        "selection": "{selection_share:.1%}",
        "mean": "{far_field_share[mean]:.1%}",
        "linear": "{far_field_share[linear]:.1%}",
        "times density, drop": "{efficiency[drop]:.2f}",
        "with mean": "{efficiency[mean]:.2f}",
        "with linear": "{efficiency[linear]:.2f}",
    }
    return figures("methods-cost-cpu", columns)


def far_field_costs() -> str:
    """The cost of the far field, by the size of its groups."""
    columns = {
        "tokens": "{tokens:,}",
        "type": "{dtype}",
        "group": "{group}",
        "SDPA": "{dense_ms:,.0f} ms",
        "mean": "{mean added, % of dense:.1f} %",
        "linear": "{linear added, % of dense:.1f} %",
    }
    return figures("far-field-cpu", columns, lambda case: case["case"] == "cost")


def prediction() -> str:
    """The cost of choosing single keys."""
    columns = {
        "tokens": "{tokens:,}",
        "type": "{dtype}",
        "`chosen_by`": "{chosen_by}",
        "keys": "{keys:,}",
        "choice": "{top_k_ms:,.0f} ms",
        "share of dense": "{share_of_dense:.1%}",
    }
    return figures("prediction-cpu", columns)


def distillation() -> str:
    """The stages of `sparsify distill`."""
    record = results("distill-cpu")
    measured = ("step_error", "found")
    cases = [
        {**row, **{key: "-" if row[key] is None else f"{row[key]:.3f}" for key in measured}}
        for row in record["quality"]
    ]
    columns = {
        "videos": "{videos}",
        "calls of the model": "{calls}",
        "PSNR to 100 steps": "{psnr:.1f} dB",
        "error of a step": "{step_error}",
        "found": "{found}",
    }
    times = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in record["seconds"].items())
    return f"{filled(cases, columns)}\n\nA video takes: {times}. `sparsify distill --out DIR`; {record['machine']}."


def two_ranks() -> str:
    """Real times of two ranks against one process."""
    record = results("ranks-cpu")
    cases = [
        {
            **case,
            **{key: max(one[key] for one in case["cpu_of_ranks"]) for key in ("computing", "communicating")},
        }
        for case in record["cases"]
    ]
    columns = {
        "method": "`{method}`",
        "density": "{density:.2f}",
        "one process": "{wall[alone]:.2f} s",
        "the same again": "{wall[again]:.2f} s",
        "two ranks": "{wall[ranks]:.2f} s",
        "faster": "{speed_up:.2f}x",
        "CPU time of a rank, computing": "{computing:.2f} s",
        "communicating": "{communicating:.2f} s",
    }
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def pipelines() -> str:
    """Pipelines of diffusers that make video: sparse attentions, graphs, and the largest error of latents."""
    sys.path.append(str(ROOT))  # where this file runs as a script
    from benchmarks.small_pipelines import PIPELINES

    record = results("pipelines")
    cases = [
        {
            **case,
            "sites": f"{case['sparse']} of {case['video_attentions']}",
            "error": max(case["errors"]),
            "resolutions": ", ".join(f"{height} x {width}" for height, width in made.sizes),
            "videos": "1, 2" if made.several else "1",
        }
        for case in record["cases"]
        if (made := PIPELINES[case["pipeline"]])
    ]
    columns = {
        "pipeline": "{pipeline}",
        "sparse": "{sites}",
        "graphs": "{graphs}",
        "compiled again": "{compiled_again}",
        "resolutions": "{resolutions}",
        "videos": "{videos}",
        "error": "{error:.0e}",
    }
    return f"{filled(cases, columns)}\n\n{all_sparse(cases, 'pipelines')}\n{origin(record)}"


def families() -> str:
    """Families of diffusers through `apply`: sparse attentions, graphs, and the largest error of an output."""
    record = results("families")
    cases = [
        {
            **case,
            "sites": f"{case['sparse']} of {case['video_attentions']}" if case["video_attentions"] else "-",
            "error": max(case["errors"].values()),
        }
        for case in record["cases"]
    ]
    columns = {
        "family": "`{family}`",
        "class": "{model}",
        "sparse": "{sites}",
        "graphs": "{graphs}",
        "compiled again": "{compiled_again}",
        "error": "{error:.0e}",
    }
    return f"{filled(cases, columns)}\n\n{all_sparse(cases, 'families')}\n{origin(record)}"


def all_sparse(cases: Sequence[Mapping[str, Any]], what: str) -> str:
    """The number of cases in which all attention over the video is sparse, in a sentence."""
    count = sum(0 < case["sparse"] == case["video_attentions"] for case in cases)
    return f"All attention over the video is sparse in {count} of {len(cases)} {what}."


def repositories() -> str:
    """Transformers of original repositories: sparse attentions, graphs of a call, and the largest error."""
    record = results("repositories")
    cases = [{**case, "sites": f"{case['sparse']} of {case['video_attentions']}"} for case in record["cases"]]
    columns = {"model": "{model}", "sparse": "{sites}", "graphs": "{graphs}", "error": "{error:.0e}"}
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def training_habits() -> str:
    """Habits of training: for each, the ways that are sparse, and the largest error of a gradient."""
    record = results("training-habits")
    habits: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in record["cases"]:
        habits.setdefault((case["model"], case["habit"]), []).append(case)
    cases = []
    for (model, habit), ways in habits.items():
        dense = [
            f"{one['order']}, {one['compiled']}" for one in ways if one["sparse"] < one["video_attentions"]
        ]
        buckets = max(one["buckets"] for one in ways)
        more = [f"{buckets} buckets"] * (buckets > 1) + [f"dense: {one}" for one in dense]
        cases.append(
            {
                "model": model,
                "habit": habit,
                "ways": f"{len(ways) - len(dense)} of {len(ways)}",
                "error": max(one["error"] for one in ways),
                "more": "; ".join(more),
            }
        )
    columns = {
        "model": "{model}",
        "habit": "{habit}",
        "ways in which all is sparse": "{ways}",
        "largest error of a gradient": "{error:.0e}",
        "": "{more}",
    }
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def onnx_speed() -> str:
    """CPU times of exported attention and of a whole model in ONNX Runtime."""
    record = results("export-onnx")
    cases = [{**case, "faster": case["times faster than dense"]} for case in record["speed"]]
    columns = {
        "form": "{form}",
        "density": "{density:.2f}",
        "CPU time": "{milliseconds:,.0f} ms",
        "against dense": "{faster:.2f}x",
    }
    return f"{filled(cases, columns)}\n\n{origin(record)}"


def onnx_factors() -> str:
    """The factors by which exported attention takes less CPU time than dense in ONNX Runtime."""
    record, kinds = results("export-onnx"), ("standard operators", "our kernel")
    faster = {case["form"]: case["times faster than dense"] for case in record["speed"]}
    density = {case["form"]: case["density"] for case in record["speed"]}
    methods = [form.removesuffix(f", {kinds[0]}") for form in faster if form.endswith(kinds[0])]
    cases = [
        {
            "method": method,
            "density": density[f"{method}, {kinds[0]}"],
            **{kind: faster[f"{method}, {kind}"] for kind in kinds},
        }
        for method in methods
    ]
    columns = {"": "{method}, density {density:.2f}", **{kind: f"{{{kind}:.1f}}" for kind in kinds}}
    return filled(cases, columns)


TABLES: Mapping[str, Callable[[], str]] = {
    "whole models": whole_models,
    "model compilation": model_compilation,
    "attention": attention,
    "attention in training": attention_training,
    "quality": quality,
    "methods": method_choice,
    "method costs": method_costs,
    "far-field costs": far_field_costs,
    "prediction": prediction,
    "distillation": distillation,
    "two ranks": two_ranks,
    "ONNX speed": onnx_speed,
    "ONNX factors": onnx_factors,
    "training habits": training_habits,
    "pipelines": pipelines,
    "families": families,
    "repositories": repositories,
}


# outputs


def printed_by_code(code: str) -> str:
    """The output of a code block that runs on its own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "<code block>", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def printed_by_command(command: str) -> str:
    """The output of a command that runs in the root of the repository; with `2>&1` at its end, errors too."""
    *words, last = [sys.executable if word == "python" else word for word in shlex.split(command)]
    both = last == "2>&1"
    return subprocess.run(
        words if both else [*words, last],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else None,
        text=True,
        check=True,
    ).stdout


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
        kind, name = found.group(1, 2)
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
    for path in (*FILES, PACKAGE):
        old = path.read_text()
        new = package_help(old) if path == PACKAGE else rendered(old, outputs=options.outputs)
        if new != old:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
