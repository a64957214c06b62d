"""The documentation agrees with the code: code runs, outputs and tables are as printed, names and links exist."""

import copy
import importlib
import importlib.util
import math
import re
import runpy
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import typer
from marks import needs_onnx
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler
from sparsify_compiler import cli, run
from sparsify_compiler.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    """A script of the folder docs, as a module."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, words, messages = script("generate"), script("words"), script("messages")
PAGES = [path for path in generate.FILES if path.suffix == ".md"]
NAMING = [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md"]
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
OUTPUT = re.compile(r"<!-- output(?:: (.+?))? -->\n```text\n(.*?)\n```\n<!-- /output -->", re.DOTALL)
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("path", PAGES, ids=name)
naming = pytest.mark.parametrize("path", NAMING, ids=name)


def output_of(path: Path, command: str | None) -> str:
    """The output that a page shows for a command, or for its only code block with an output."""
    (shown,) = [text for source, text in OUTPUT.findall(path.read_text()) if source == (command or "")]
    return shown


def shape(output: str) -> str:
    """An output without its numbers and the widths of its columns."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", output.replace("─", ""))).strip()


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code writes its files into a folder of its own and shares no state with other tests."""
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.enable_grad():
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, in_a_folder: None) -> None:
    """Sparse graphs run as they are, without Inductor, which takes most of the time and changes no output."""
    compile_ = torch.compile

    def without_inductor(model: Any, **named: Any) -> Any:
        if named.get("backend") == "sparsify":
            named["options"] = {**named.get("options", {}), "inner_backend": "eager"}
        return compile_(model, **named)

    monkeypatch.setattr(torch, "compile", without_inductor)


# generated parts


@pages
def test_tables_and_options_are_as_generated(path: Path) -> None:
    text = path.read_text()
    assert generate.rendered(text, outputs=False) == text, "python docs/generate.py writes it anew"


def test_the_help_of_the_package_is_as_generated() -> None:
    text = generate.PACKAGE.read_text()
    assert generate.package_help(text) == text, "python docs/generate.py writes it anew"
    changed = text.replace("dense, tile, ", "").replace("    tile             reference_frames\n", "")
    assert len(changed) < len(text) - 40
    assert generate.package_help(changed) == text


def test_every_method_and_environment_variable_is_described() -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    for method, kind in METHODS.items():
        section = text.split(f"## `{method}`\n")[1].split("\n## ")[0]
        for option in fields(kind):
            assert f"| `{option.name}` |" in section, f"{method} has no {option.name}"
    sources = "".join(path.read_text() for path in (ROOT / "sparsify_compiler").rglob("*.py"))
    for variable in set(re.findall(r"environ[\w.]*[\[(]\"(SPARSIFY_\w+)\"", sources)):
        assert f"`{variable}`" in text


def test_docstrings_of_attributes_are_the_strings_after_them() -> None:
    class Base:
        first: int = 1
        """Of the base,
        in two lines."""

    class Derived(Base):
        second = 2
        """Its own."""
        third: int = 3
        fourth: int = 4
        """After one that has none."""

    assert generate.attribute_docs(Derived) == {
        "first": "Of the base, in two lines.",
        "second": "Its own.",
        "fourth": "After one that has none.",
    }


# code and outputs


@pytest.mark.usefixtures("quick")
def test_the_code_of_the_readme_prints_what_stands_there() -> None:
    (code,) = generate.CODE.findall((ROOT / "README.md").read_text())
    printed = generate.as_block(generate.printed_by_code(code))
    assert printed == f"```text\n{output_of(ROOT / 'README.md', None)}\n```"


@pytest.mark.nightly
@pytest.mark.usefixtures("in_a_folder")
def test_the_code_of_the_readme_prints_the_same_with_inductor() -> None:
    (code,) = generate.CODE.findall((ROOT / "README.md").read_text())
    assert output_of(ROOT / "README.md", None) in generate.as_block(generate.printed_by_code(code))


EXAMPLE = "examples/02_generate_with_the_default.py"


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")
def test_the_example_prints_an_output_of_this_shape(capsys: pytest.CaptureFixture[str]) -> None:
    variables = runpy.run_path(str(ROOT / EXAMPLE))
    variables["main"].__globals__["STEPS"] = 1
    variables["main"]()
    assert shape(capsys.readouterr().out) == shape(output_of(ROOT / "docs" / "usage.md", f"python {EXAMPLE}"))


@pytest.mark.nightly
def test_the_example_prints_these_numbers() -> None:
    """Centroids, and so densities, differ a little from one CPU to another."""
    shown = output_of(ROOT / "docs" / "usage.md", f"python {EXAMPLE}")
    printed = generate.printed_by_command(f"python {EXAMPLE}")
    assert shape(printed) == shape(shown)
    for new, old in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(new) == pytest.approx(float(old), abs=0.02)


class Block(nn.Module):
    """Self-attention over the video, of two heads of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.project(tokens).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return tokens + scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """A model that is called as those of diffusers are."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv3d(3, 32, 1), nn.Linear(32, 3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        patches = self.patch(hidden_states)
        tokens = patches.flatten(2).mT + encoder_hidden_states.mean(1, keepdim=True)
        tokens = tokens + 0.001 * timestep[:, None, None]
        for block in self.blocks:
            tokens = block(tokens)
        return (self.out(tokens).mT.unflatten(2, hidden_states.shape[2:]),)


def video() -> tuple[nn.Module, dict[str, Any]]:
    """A small model, and the inputs of a call with a video of 6 frames."""
    inputs = {
        "hidden_states": torch.randn(1, 3, 6, 4, 4),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32),
    }
    return Video().eval(), inputs


def searched() -> dict[str, Any]:
    model, inputs = video()
    return {"torch": torch, "model": model, "inputs": [inputs]}


AT_ONCE: dict[str, Any] = {"threshold": 10.0, "profile_every": (1, 1), "break_even": 1.0}
"""Settings with which `dsv` reaches its second stage in the first steps."""


def trained() -> dict[str, Any]:
    transformer, inputs = video()

    def loss(model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        return model(**batch)[0].square().mean()

    return {
        "torch": torch,
        "sparsify_compiler": SimpleNamespace(DSVTrainer=partial(sparsify_compiler.DSVTrainer, **AT_ONCE)),
        "transformer": transformer,
        "data": [inputs] * 2,
        "loss": loss,
        "optimizer": torch.optim.SGD(transformer.parameters(), lr=0.01),
    }


def distilled_steps() -> dict[str, Any]:
    teacher, inputs = video()
    student = copy.deepcopy(teacher)
    latents, text = inputs["hidden_states"], inputs["encoder_hidden_states"]
    public = ("ConsistencyConfig", "ConsistencyTrainer", "sample_few_steps")
    return {
        **{one: getattr(sparsify_compiler, one) for one in public},
        "student": student,
        "teacher": teacher,
        "data": [(latents, text, torch.zeros_like(text))],
        "noise": torch.randn_like(latents),
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.01),
    }


def distilled_sparsity() -> dict[str, Any]:
    transformer, inputs = video()
    return {
        "torch": torch,
        "copy": copy,
        "Distillation": sparsify_compiler.Distillation,
        "transformer": transformer,
        "data": [inputs],
    }


def policy_is_used(found: Mapping[str, Any]) -> None:
    with torch.no_grad():
        found["fast"](**found["inputs"][0])
    assert Path("policy.json").exists()
    assert len(found["policy"].layers) == 2


def training_reaches_both_stages(found: Mapping[str, Any]) -> None:
    saved = torch.load("checkpoint.pt")
    assert saved.keys() == {"model", "dsv"}
    assert found["dsv"].stage == 2
    assert found["dsv"].progress is not None
    assert Path("predictor.safetensors").exists()


def latents_are_finite(found: Mapping[str, Any]) -> None:
    assert found["latents"].shape == found["noise"].shape
    assert found["latents"].isfinite().all()


def gradients_are_there(found: Mapping[str, Any]) -> None:
    assert found["loss"].attention > 0
    assert any(p.grad is not None and p.grad.any() for p in found["student"].parameters())


def piped() -> dict[str, Any]:
    transformer, inputs = video()

    class Pipeline:
        components: ClassVar[dict[str, Any]] = {"transformer": transformer, "scheduler": None}

        def __call__(self, prompt: Tensor) -> Tensor:
            now = inputs | {"encoder_hidden_states": prompt}
            with torch.no_grad():
                for time in (900.0, 500.0):
                    out: Tensor = transformer(**now | {"timestep": torch.tensor([time])})[0]
            return out

    return {
        "sparsify_compiler": SimpleNamespace(
            apply=partial(sparsify_compiler.apply, dense_steps=1, inner_backend="eager")
        ),
        "pipe": Pipeline(),
        "prompt": inputs["encoder_hidden_states"],
    }


def both_blocks_were_sparse(found: Mapping[str, Any]) -> None:
    assert found["frames"].isfinite().all()
    assert all(
        "_compiled_call_impl" not in one.__dict__ for one in found["pipe"].components["transformer"].modules()
    )


Use = tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], None]]
"""The names that a code block uses, and what must hold after it."""


def reported() -> dict[str, Any]:
    found = piped()
    found["sparsify_compiler"].apply = partial(found["sparsify_compiler"].apply, dense_layers=0)
    return found


def a_page_was_written(found: Mapping[str, Any]) -> None:
    assert "blocks.0" in Path("page.html").read_text()


def extending() -> dict[str, Any]:
    model, inputs = video()
    names = (
        "VideoMethod",
        "cut",
        "static_table",
        "check_count",
        "METHODS",
        "AttentionSite",
        "TokenLayout",
        "BlockTable",
    )
    places = [
        "methods.base",
        "methods.grid",
        "methods.grid",
        "methods.selection",
        "methods",
        "plan",
        "plan",
        "table",
    ]
    found = {
        name: getattr(importlib.import_module(f"sparsify_compiler.{place}"), name)
        for name, place in zip(names, places, strict=True)
    }
    return {
        "torch": torch,
        "dataclass": dataclass,
        "ClassVar": ClassVar,
        "model": model,
        "inputs": inputs,
        **found,
    }


def frames_read_their_neighbours(found: Mapping[str, Any]) -> None:
    """Of 6 frames, each reads 3, the first and the last 2."""
    try:
        with torch.no_grad():
            found["fast"](**found["inputs"])
        measured = sparsify_compiler.stats(found["fast"])
        assert measured.density == pytest.approx(16 / 36)
        assert {one.method for one in measured.measurements} == {"near_frames"}
    finally:
        del METHODS["near_frames"]


USES: dict[str, dict[str, Use]] = {
    "index.md": {"Or one line in Python": (reported, a_page_was_written)},
    "usage.md": {"Apply it to a pipeline": (piped, both_blocks_were_sparse)},
    "training.md": {"Train with dsv": (trained, training_reaches_both_stages)},
    "distillation.md": {
        "A method for each layer": (searched, policy_is_used),
        "Distil many steps into few": (distilled_steps, latents_are_finite),
        "Distil a sparse model": (distilled_sparsity, gradients_are_there),
    },
    "extending.md": {"A method of your own": (extending, frames_read_their_neighbours)},
}
"""Page -> heading -> the code block below it."""


def code_below(path: Path) -> dict[str, str]:
    """Heading -> the code block below it."""
    text = path.read_text()
    return {HEADING.findall(text[: found.start()])[-1]: found[1] for found in generate.CODE.finditer(text)}


def exporting() -> dict[str, Any]:
    transformer, inputs = video()
    return {
        "torch": torch,
        "sparsify_compiler": sparsify_compiler,
        "transformer": transformer,
        "inputs": inputs,
        "onnxruntime": importlib.import_module("onnxruntime") if find_spec("onnxruntime") else None,
    }


def output_is_that_of_the_model(found: Mapping[str, Any]) -> None:
    assert found["output"][0].shape[-3:] == found["inputs"]["hidden_states"].shape[-3:]


USES["export.md"] = {
    "PyTorch": (exporting, output_is_that_of_the_model),
    "AOTInductor": (exporting, output_is_that_of_the_model),
    "ONNX Runtime": (exporting, output_is_that_of_the_model),
}

ENGINES = ("TensorRT", "The kernel as a plugin")
"""Code of the same page that tests/exporting run, with substitutes for what needs a GPU."""

CODE = [
    *((page, heading) for page, uses in USES.items() if page != "export.md" for heading in uses),
    ("export.md", "PyTorch"),
    pytest.param("export.md", "AOTInductor", marks=pytest.mark.nightly),
    pytest.param("export.md", "ONNX Runtime", marks=[pytest.mark.nightly, needs_onnx]),
]
"""(page, heading) of all code of the pages."""


def test_all_code_is_run() -> None:
    for path in PAGES:
        run = ["sparsify-compiler"] if path.name == "README.md" else [*USES.get(path.name, [])]
        run += ENGINES if path.name == "export.md" else []
        assert list(code_below(path)) == run, f"{path.name} has code that no test runs"


@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning")
@pytest.mark.parametrize(("page", "heading"), CODE)
def test_code_runs(page: str, heading: str) -> None:
    names, check = USES[page][heading]
    found = names()
    exec(compile(code_below(ROOT / "docs" / page)[heading], heading, "exec"), found)
    check(found)


# names


@naming
def test_files_exist(path: Path) -> None:
    """Paths in inline code, from the root, from the package or from the page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    suffixes = r"py|cpp|h|json|md|png"
    for named in re.findall(rf"`((?:\.?[\w-]+/)*[\w-]+\.(?:{suffixes}))`", text):
        if named in MADE:
            continue
        places = [
            ROOT / named,
            ROOT / "sparsify_compiler" / named,
            ROOT / "sparsify_compiler/kernels/cpu/csrc" / named,
        ]
        places.append(ROOT / "sparsify_compiler/passes" / named)
        assert any(place.exists() for place in places), f"{name(path)} names {named}"


MADE = {"masks.png", "density.png", "DIR/report.md", "plan.json"}
"""Files that commands write."""


@naming
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), target
        if anchor:
            anchors = {
                re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-")
                for one in HEADING.findall(page.read_text())
            }
            assert anchor in anchors, target


def commands(path: Path) -> list[list[str]]:
    """The commands that a page has in blocks, in inline code and as sources of outputs, as words."""
    text = path.read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:sparsify|python) [^`]+)`", re.sub(r"\n", " ", text))
    sources = [source for source, _ in OUTPUT.findall(text) if source]
    parts = [part for line in [*lines, *inline, *sources] for part in line.split("&&")]
    return [split for part in parts if (split := shlex.split(part, comments=True))]


@naming
def test_commands_exist(path: Path) -> None:
    for first, *rest in commands(path):
        if first == "sparsify":
            check_subcommand(rest)
        elif first == "python" and rest[0] == "-m" and rest[1].startswith("benchmarks"):
            assert importlib.util.find_spec(rest[1]), rest
            source = (ROOT / rest[1].replace(".", "/")).with_suffix(".py")
            texts = [
                one.read_text() for one in (*source.parent.glob("*.py"), *source.with_suffix("").glob("*.py"))
            ]
            for option in (word for word in rest if word.startswith("--") and word != "--help"):
                assert any(f'"{option}"' in text for text in texts), f"{rest[1]} has no {option}"
        elif first == "python" and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).exists(), rest


def check_subcommand(args: list[str]) -> None:
    """Fails unless `sparsify` has the command with these options."""
    if args[0] == "run":
        run.parser().parse_args(args[1:])  # raises for an option that it does not have
        return
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        assert args, f"{command.name} needs a command"
        assert args[0] in command.commands, f"sparsify has no {args[0]}"
        command, args = command.commands[args[0]], args[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    for option in (word for word in args if word.startswith("--")):
        assert option in known, f"sparsify {command.name} has no {option}"


# messages


def test_every_error_and_warning_has_an_entry() -> None:
    found, patterns = list(messages.messages()), messages.patterns()
    assert len(found) > 300
    without = [one for one in found if not any(messages.fits(pattern, one.text) for pattern in patterns)]
    assert without == [], "docs/troubleshooting.md needs an entry for each"
    texts = [one.text for one in found] + LATER
    assert [one for one in patterns if not any(messages.fits(one, text) for text in texts)] == []
    few = [one for one in patterns if len(re.findall(r"[a-zA-Z_]{2,}", one)) < 2]
    assert few == ["attention ...: ...", "policy ...: ..."], "these begin with their word"


LATER = [
    *("no call of this model was recorded", "no call of this model's last video was recorded"),
    *("calls of a graph show no time step",),
    *(
        "no sparse call: ",
        "no sparse call of ... was recorded",
        "no sparse call of ...: all ... calls",
        "no report: ...",
    ),
    "the guard runs ... of ... sparse attentions of a graph dense",
    *("the guard cannot keep its times in ...: ...", "the guard ignores ..., which is damaged: ..."),
]
"""Parts of messages that are put together from variables, or printed by `sparsify run`."""


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('raise OptionError(f"{name} must be {a + 1}, got {b!r}")', ["... must be ..., got ..."]),
        ('raise Own("one " "two" + three)\nclass Own(GridError): ...', ["one two..."]),
        ('log.warning("%s lasts %.1f s", a, b)', ["... lasts ... s"]),
        ('warn_once(text)\nraise ValueError("foreign")\nlog.info("none")', []),
    ],
)
def test_messages_are_found(tmp_path: Path, code: str, found: list[str]) -> None:
    (tmp_path / "errors.py").write_text(
        "class SparsifyError(ValueError): ...\nclass OptionError(SparsifyError): ...\n"
    )
    (tmp_path / "code.py").write_text(f"class GridError(OptionError): ...\n{code}")
    assert [one.text for one in messages.messages(tmp_path)] == found


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("... must be ..., got ...", "grid must be three integers, got ...", True),
        ("... must be ..., got ...", "grid must be three integers", False),
        ("grid must be", "grid must be three", True),
        ("grid must be", "the grid must be three", False),
        ("a ... c", "a c", True),
    ],
)
def test_patterns_fit(pattern: str, text: str, fits: bool) -> None:
    assert messages.fits(pattern, text) == fits


def test_reasons_of_plans_are_in_the_code() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", messages.PAGE.read_text().split(messages.REASONS)[1], re.MULTILINE)
    sources = "".join(path.read_text() for path in messages.PACKAGE.rglob("*.py"))
    assert len(rows) > 5
    for reason in re.findall(r"`(.*?)`", "".join(rows)):
        start = re.sub(r"its (scores|weights) are ", " are ", reason.split("...")[0].strip())
        assert start in sources, reason


# the README, and words


def test_the_readme_is_short_and_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") < 150
    marked = text.split("<!-- ci -->")[1].split("<!-- /ci -->")[0]
    assert [line.split(" && ")[1] for line in marked.splitlines() if line.startswith("pip install")] == [
        "sparsify demo",
        "pytest -n auto --dist loadfile",
    ]


def test_the_picture_of_the_readme_is_the_mask_of_the_paper() -> None:
    drawn = re.findall(
        r"^(?:query|frame)? +(\d)  ((?:[X.] ?){6})", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert [int(number) for number, _ in drawn] == list(range(6))
    reference = {math.ceil(i * 6 / 2) for i in range(2)}
    for i, (_, row) in enumerate(drawn):
        assert [mark == "X" for mark in row.split()] == [i == j or bool({i, j} & reference) for j in range(6)]


def test_words_that_went_are_gone() -> None:
    assert list(words.find(ROOT / path for path in words.PATHS)) == []


@pytest.mark.parametrize(
    ("file", "text", "lines"),
    [
        ("a.md", "A table is\nto be read.", [1]),
        ("a.md", "One.\n\nSo it stood in for two, but for three.", [3, 3]),
        ("a.md", "```\nbut for\n```\n`but for` and butter for", []),
        ("a.py", '"""Of the tokens,\nwhat is left."""\nhence = 1  # hence\n', [2, 3, 1]),
        ("a.py", 'foretold = "It is\\n"\n', []),
    ],
)
def test_words_are_found(tmp_path: Path, file: str, text: str, lines: list[int]) -> None:
    (tmp_path / file).write_text(text)
    found = [int(line.split(":")[1]) for line in words.find([tmp_path])]
    assert found == lines
