"""`sparsify run`: a script behaves as without it, and its video transformers are sparse."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_compiler import run
from sparsify_compiler.hosts.scripts import shows_a_video
from sparsify_compiler.testing.videos import Video

TILE = [
    *("--option", "method=tile", "--option", "reference_frames=2"),
    *("--option", "dense_steps=1", "--option", "inner_backend=eager"),
]


def python(
    *words: str, run: bool, cwd: Path, options: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    before = ["-m", "sparsify_compiler.run", *(options or [])] if run else []
    command = [sys.executable, "-W", "ignore", *before, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input="some input", timeout=300)


SCRIPT = '''
"""A script."""
import argparse, atexit, inspect, os, pickle, sys

class Own:
    """Pickled by the name of its module."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--stats", "--regional"):
        parser.add_argument(name, action="store_true")
    for name in ("--option", "--mode", "-m", "--end"):
        parser.add_argument(name)
    words, rest = parser.parse_known_args()
    print(words, rest, sys.argv, __name__, __file__, __doc__, __spec__, __package__, sys.path[0])
    print(sorted(set(globals()) - {"words", "rest", "parser", "name"}), __builtins__, __loader__.path)
    print(type(pickle.loads(pickle.dumps(Own()))), sys.stdin.read(), os.getcwd())
    os.chdir("/")
    print(inspect.getsource(Own))
    atexit.register(print, "after all")

    def fail(depth=0):
        if words.end == "hook":
            def hook(kind, error, trace):
                while trace is not None:
                    print(trace.tb_frame.f_code.co_filename, trace.tb_lineno, file=sys.stderr)
                    trace = trace.tb_next
            sys.excepthook = hook
        if words.end == "chain":
            try:
                1 / 0
            except ZeroDivisionError:
                raise KeyError("a key")
        raise {"exit": SystemExit(3), "text": SystemExit("a last word"), "interrupt": KeyboardInterrupt()}.get(
            words.end, ValueError("an error")
        )

    fail()
'''


@pytest.mark.parametrize("end", ["exit", "text", "interrupt", "error", "chain", "hook"])
def test_a_script_is_what_it_is(tmp_path: Path, end: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "script.py").write_text(SCRIPT)
    words = [
        "in/script.py",
        "--stats",
        "--option",
        "a=b",
        "--mode",
        "x",
        "-m",
        "y",
        "--end",
        end,
        "--",
        "--z",
    ]
    alone, under = (python(*words, run=run, cwd=tmp_path) for run in (False, True))
    assert (under.returncode, under.stdout, under.stderr) == (alone.returncode, alone.stdout, alone.stderr)
    assert alone.stdout.endswith("after all\n")


def test_all_that_python_runs(tmp_path: Path) -> None:
    code = "import sys, helper; print(__name__, __file__, __package__, sys.argv, sys.path[0], helper.x)"
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for folder in (tmp_path, tmp_path / "package"):
        (folder / "helper.py").write_text("x = 1")
        (folder / "__main__.py").write_text(f"{code}; print(__spec__.name)")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(tmp_path / "helper.py", "helper.py")
        archive.write(tmp_path / "__main__.py", "__main__.py")
    (tmp_path / "wrong.py").write_text("x = (\n")
    for words in (["package", "a"], ["all.zip"], ["-m", "package", "-m"], ["-m", "helper"], ["wrong.py"]):
        alone, under = (python(*words, run=run, cwd=tmp_path) for run in (False, True))
        found = (under.returncode, under.stdout, under.stderr)
        assert found == (alone.returncode, alone.stdout, alone.stderr), words
    under = python("nowhere.py", run=True, cwd=tmp_path)
    assert (under.returncode, under.stdout) == (2, "")
    assert under.stderr == (
        f"sparsify: can't open file '{tmp_path / 'nowhere.py'}': [Errno 2] No such file or directory\n"
    )
    under = python("-m", "nowhere", run=True, cwd=tmp_path)
    assert (under.returncode, under.stderr) == (1, "sparsify: no module named nowhere that can run\n")


def test_stats_of_a_script_without_torch(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; sys.exit('a last word')")
    under = python("script.py", run=True, cwd=tmp_path, options=["--stats"])
    assert under.returncode == 1
    assert under.stderr == "a last word\nsparsify: no sparse call: the script does not import torch\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stat", "--opton", "a=1", "x.py"], "no such option: --opton"),
        (["--option", "method=tle", "x.py"], "Did you mean 'tile'"),
        (["--option", "tile", "x.py"], "--option must be written name=value, got 'tile'"),
        (["--option", "method=tile", "--option", "top_p=0.5", "x.py"], "top_p"),
        (["--mode", "fast", "x.py"], "unknown mode 'fast'"),
        (["--regional", "--option", "parallel=auto", "x.py"], "parallel shares a whole model"),
        (
            ["--mode", "reduce-overhead", "--option", "parallel=auto", "x.py"],
            "does not work with CUDA graphs",
        ),
        (["--stats"], "a script must be given"),
        (["--report", "nowhere/page.html", "x.py"], "make nowhere first"),
        (["--report", ".", "x.py"], "got the folder '.': try report.html"),
        (["--report", "page.pdf", "x.py"], "must end in .html, got 'page.pdf': try page.html"),
        (["--report", "/proc/page.html", "x.py"], "must be a file that can be written"),
        (["--option"], "--option option requires 1 argument"),
    ],
)
def test_wrong_options_end_it_before_the_script_starts(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert says in text
    assert text.startswith("sparsify: ")
    assert text.count("\n") == 1


VARIANTS = '''
import copy, functools, gc, sys, weakref
from torch import compile
import torch
partial = functools.partial(torch.compile, backend="eager", fullgraph=True)
from sparsify_compiler.testing.videos import Video, latents, steps

class Plain(torch.nn.Module):
    """Takes a time step and is no video transformer."""
    def forward(self, x, t):
        return x * t

class Decorated(Video):
    @torch.compile(backend="eager")
    def forward(self, hidden_states, timestep):
        return super().forward(hidden_states, timestep)

class NoGrad(Video):
    @torch.no_grad()
    def forward(self, hidden_states, timestep):
        return super().forward(hidden_states, timestep)

def hook(model):
    found = getattr(model, "_orig_mod", model).__dict__.get("_compiled_call_impl")
    return type(found).__name__, getattr(getattr(found, "model", None), "parts_only", None)

def whole(model): return model
def module(model): return torch.compile(model, backend="eager", dynamic=False)
def named(model): return compile(backend="eager")(model)
def made_partial(model): return partial(model)
def in_place(model): model.compile(backend="eager"); return model
def twice(model): model.compile(backend="eager"); return torch.compile(model, backend="eager")
def forward(model): model.forward = torch.compile(model.forward, backend="eager"); return model
def copied(model): return copy.deepcopy(model)
def blocks(model):
    for one in model.blocks: one.compile(backend="eager")
    return model
def wrapped_blocks(model):
    for i, one in enumerate(model.blocks): model.blocks[i] = torch.compile(one, backend="eager")
    return model

video = latents((5, 3, 3))
dense = steps(Video(1).forward, video, 3)
expected = None
for how in (whole, module, named, made_partial, in_place, twice, forward, copied, blocks, wrapped_blocks):
    model = how(Video(1))
    found = steps(model, video, 3)
    expected = expected or found
    assert hook(model) == ("Hook", "blocks" in how.__name__), (how, hook(model))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected)), how
    assert torch.allclose(found[0], dense[0], atol=1e-5) and not torch.allclose(found[1], dense[1], atol=1e-2)
for kind in (Decorated, NoGrad):
    found = steps(kind(1), video, 3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected)), kind
alone = torch.compile(Video(1).forward, backend="eager")
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(steps(alone, video, 3), expected))

graphs = []
def spy(graph, inputs):
    graphs.append(graph)
    return graph
@torch.compile(backend=spy)
def double(x): return 2 * x
assert double(torch.ones(2)).tolist() == [2, 2] and len(graphs) == 1
plain = torch.compile(Plain(), backend=spy)
assert plain(torch.ones(2), 3).tolist() == [3, 3] and len(graphs) == 2

class Image(Video):
    def __init__(self):
        super().__init__(1)
        self.patch = torch.nn.Conv2d(4, 32, 2, 2)
image, before = video[:, :, 0], len(graphs)
model = Image()
assert torch.equal(steps(model, image, 1)[0], steps(model.forward, image, 1)[0])
assert "_compiled_call_impl" not in model.__dict__
model = torch.compile(Image(), backend=spy)
steps(model, image, 2)
assert len(graphs) == before + 1

model = Video(1)
steps(model, video, 3)
gone = weakref.ref(model)
del model, found
gc.collect()
assert gone() is None
print("done")
sys.exit(int(sys.argv[1]))
'''


def test_models_are_sparse_however_they_are_compiled(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(VARIANTS)
    under = python("script.py", "5", run=True, cwd=tmp_path, options=[*TILE, "--stats"])
    assert (under.returncode, under.stdout) == (5, "done\n"), under.stderr
    assert "sparsify: Video: 1 of 1 video attentions sparse\n" in under.stderr
    assert under.stderr.count("1 dense and 2 sparse calls") == 14
    assert "Image" not in under.stderr
    assert all(
        line.startswith(("sparsify: ", " ")) or " calls; " in line
        for line in under.stderr.splitlines()
        if line
    )


PIPELINES = """
import tempfile
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

def made():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, ffn_dim=16, num_layers=1, text_dim=8, freq_dim=8
    )

WanTransformer3DModel._keep_in_fp32_modules = None  # needs accelerate

class Pipeline(DiffusionPipeline):
    _optional_components = ["transformer_2"]

    def __init__(self, transformer: WanTransformer3DModel, scheduler, transformer_2: WanTransformer3DModel = None):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, steps=8):
        self.scheduler.set_timesteps(steps)
        for i, time in enumerate(self.scheduler.timesteps):
            second = self.transformer_2 is not None and 2 * i >= steps
            (self.transformer_2 if second else self.transformer)(
                hidden_states=torch.randn(1, 16, 3, 4, 4),
                timestep=time.expand(1),
                encoder_hidden_states=torch.ones(1, 4, 8),
            )

def seen(model):
    model = getattr(model, "_orig_mod", model).__dict__["_compiled_call_impl"].model
    calls = [one for one in model.state.history if one.video == model.state.video]
    return model.name, model.parts_only, "".join(one.phase[0] for one in calls), {c.tick.steps for c in calls}

with tempfile.TemporaryDirectory() as folder:
    Pipeline(made(), FlowMatchEulerDiscreteScheduler(), made()).save_pretrained(folder)
    pipe = Pipeline.from_pretrained(folder)
pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
pipe.transformer_2 = torch.compile(pipe.transformer_2, mode="max-autotune-no-cudagraphs", backend="inductor")
for _ in range(2):
    pipe()
    print(*seen(pipe.transformer), *seen(pipe.transformer_2))
pipe.transformer, pipe.transformer_2 = made(), None
pipe(4)
print(*seen(pipe.transformer))
raise RuntimeError("at the end")
"""


def test_pipelines_are_sparse_however_they_are_made(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    (tmp_path / "script.py").write_text(PIPELINES)
    options = [*TILE, "--option", "dense_steps=0.25", "--stats", "--report", "page.html"]
    under = python("script.py", run=True, cwd=tmp_path, options=options)
    both = "transformer True ddss {8} transformer_2 False ssss {8}\n"
    assert under.stdout == both * 2 + "transformer False dsss {4}\n", under.stderr
    assert under.returncode == 1
    lines = under.stderr.splitlines()
    first = lines.index("Traceback (most recent call last):")
    assert (
        lines[first + 1] == f'  File "{tmp_path / "script.py"}", line {PIPELINES.count(chr(10))}, in <module>'
    )
    last = "sparsify: the last video of transformer (WanTransformer3DModel)"
    assert lines[first + 4] == last
    assert lines.count(last) == 2
    assert lines[-1] == f"sparsify: report: {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text()
    for name in ("transformer (WanTransformer3DModel)", "transformer_2 (WanTransformer3DModel)"):
        assert f"<h2>{name}</h2>" in page
    assert page.count("The last video has 2 dense and 2 sparse calls.") == 1


SPAWN = """
import multiprocessing, sys

class Own:
    pass

def work(own):
    from torch import nn
    class Model(nn.Module):
        def forward(self, x, timestep): ...
    print(__name__, type(own).__module__, sys.argv, "_compiled_call_impl" in vars(Model))
    return Own()

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert type(pool.apply(work, (Own(),))) is Own
"""


def test_processes_that_the_script_spawns_are_watched_too(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SPAWN)
    under = python("script.py", "a", run=True, cwd=tmp_path)
    assert under.returncode == 0, under.stderr
    assert under.stdout == "__mp_main__ __mp_main__ ['script.py', 'a'] True\n"


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def places(frames: int) -> torch.Tensor:
    """[tokens, 3]: frame, row and column of each token."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(3), torch.arange(4)).float()


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"hidden_states": zeros(1, 4, 5, 4, 4)}, True),
        ({"hidden_states": zeros(1, 5, 4, 4, 4)}, True),
        ({"hidden_states": zeros(1, 4, 1, 4, 4)}, False),
        ({"hidden_states": zeros(1, 1, 4, 4, 4)}, False),
        ({"hidden_states": zeros(1, 4, 4, 4)}, False),
        ({"hidden_states": [zeros(4, 5, 4, 4)]}, True),
        ({"hidden_states": [zeros(4, 1, 4, 4)]}, False),
        ({"hidden_states": zeros(1, 36, 8), "num_frames": 3}, True),
        ({"hidden_states": zeros(1, 36, 8), "num_frames": 1}, False),
        ({"hidden_states": zeros(1, 36, 8), "img_ids": places(3)}, True),
        ({"hidden_states": zeros(1, 12, 8), "img_ids": places(1)}, False),
        ({"hidden_states": zeros(1, 36, 8), "img_shapes": [[(3, 3, 4)]]}, True),
        ({"hidden_states": zeros(1, 36, 8), "img_shapes": [[(1, 3, 4)]]}, False),
    ],
)
def test_videos_are_told_from_images(named: dict[str, Any], expected: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, hidden_states: Any, timestep: Any, **kwargs: Any) -> None: ...

    assert shows_a_video(Model(), (), {**named, "timestep": torch.ones(1)}) == expected


def test_the_command_line_runs_scripts(tmp_path: Path) -> None:
    """By the command `sparsify` too, which must not handle the exceptions of the script."""
    (tmp_path / "script.py").write_text("import sys; print(sys.argv); raise KeyboardInterrupt")
    command = "from sparsify_compiler.cli import main; main()"
    words = [sys.executable, "-c", command, "run", "script.py", "--help"]
    under = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert under.stdout == "['script.py', '--help']\n"
    assert under.returncode == -2
    assert "Aborted" not in under.stderr
    assert textwrap.dedent(under.stderr).count("File ") == 1


def test_models_without_the_command_are_left_alone() -> None:
    assert "_compiled_call_impl" not in vars(Video)
