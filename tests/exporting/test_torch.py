"""Exports that PyTorch runs: equal to torch.compile, in a fresh process; errors for wrong calls."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from loops import METHODS, compiled, generation, joint, outputs, policy, predictor_file
from marks import fresh_dynamo, needs_diffusers, no_warnings
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler import OptionError, SparsifyError, export, load
from sparsify_compiler.errors import OperandError
from sparsify_compiler.exporting.files import writing
from sparsify_compiler.testing.models import CASES, Made

pytestmark = [fresh_dynamo, no_warnings]

GRID = (4, 4, 5)
EXACT = ("dense", "tile")
OTHERS = ("hunyuan_video", "cogvideox", "ltx", "allegro", "easyanimate")
FRESH = """
import sys, torch, sparsify_compiler
torch.set_num_threads(1)
model = sparsify_compiler.load(sys.argv[1])
with torch.no_grad():
    torch.save([model(**call)[0] for call in torch.load(sys.argv[2])], sys.argv[3])
"""


@pytest.fixture(scope="module")
def wan() -> Made:
    return CASES["wan"].build(GRID, batch=1)


def nightly(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.nightly)


@needs_diffusers
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("wan", "tile"),
        *(nightly("wan", method) for method in METHODS if method != "tile"),
        *(nightly(family, method) for family in OTHERS for method in METHODS),
    ],
)
def test_a_generation_is_that_of_torch_compile(family: str, method: str, tmp_path: Path) -> None:
    """Bit for bit, except for what a far field rounds: `torch.compile` computes it in one call on the CPU."""
    model, inputs = CASES[family].build(GRID, batch=1)
    inputs["return_dict"] = True
    exported = export(model, inputs, tmp_path / "out", options=METHODS[method])
    sparse = len(exported.plan.sparse)
    assert (sparse > 0) == (method != "dense"), str(exported)
    steps = 4 if exported.plan.dense_steps else 1
    expected = outputs(compiled(model, METHODS[method]), inputs, steps)
    got = outputs(load(tmp_path / "out"), inputs, steps)
    for one, other in zip(got, expected, strict=True):
        rounding = 0.0 if method in EXACT else 1e-5 * float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=rounding)
    dense = outputs(model, inputs, steps)
    assert torch.equal(got[-1], dense[-1]) == (sparse == 0), "the check must be able to fail"


def test_a_method_with_state_runs_in_a_fresh_process(tmp_path: Path) -> None:
    """A dense and a sparse program, state of two streams, weights in one file."""
    model, inputs = joint(GRID, 1)
    options = METHODS["svg2"] | {"dense_steps": 1}
    path = tmp_path / "out"
    exported = export(model, inputs, path, options=options)
    assert [plan.method for plan in exported.plan.sparse] == ["svg2"]
    assert {file.name for file in path.iterdir()} == {
        "dense.pt2", "plan.json", "sparse.pt2", "state.pt", "weights.pt",
    }  # fmt: skip
    assert exported.phases == ("dense", "sparse")

    torch.save(list(generation(inputs, 3)), tmp_path / "calls.pt")
    script = [sys.executable, "-c", FRESH, path, tmp_path / "calls.pt", tmp_path / "got.pt"]
    subprocess.run(script, check=True)
    got: list[Tensor] = torch.load(tmp_path / "got.pt")
    # Exported sites run op by op; on a CPU, compiled ones run in one call, which adds in another order.
    for one, other in zip(got, outputs(compiled(model, options), inputs, 3), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    expected = got

    weights = torch.load(path / "weights.pt")
    own = model.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in own.items())

    loaded = load(path)  # two generations of which one says what it is
    with sparsify_compiler.generation(3, streams=2):
        assert all(map(torch.equal, outputs(loaded, inputs, 3), expected))
    assert all(map(torch.equal, outputs(loaded, inputs, 3), expected))
    state = [torch.zeros(shape) for _, shape, _ in loaded.plan["state"]]
    call = {name: one for name, one in inputs.items() if isinstance(one, Tensor)}
    first = torch.tensor(False), *state
    _, after = loaded.programs["dense"](first, **call)
    assert bool(after[0])
    assert not first[0]
    assert all(not tensor.any() for tensor in state), "programs write to no argument"
    assert all(tensor.any() for tensor in after)


def same(got: list[Tensor], expected: list[Tensor], format: str) -> None:
    """Assert that outputs are equal: bit for bit, within rounding where a compiler may order sums anew."""
    for one, other in zip(got, expected, strict=True):
        if format == "torch":
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@needs_diffusers
@pytest.mark.nightly
@pytest.mark.parametrize("format", ["torch", "aoti"])
def test_methods_of_a_policy_mix(wan: Made, format: str, tmp_path: Path) -> None:
    model, inputs = wan
    general = ("dense_layers", "dense_steps")
    svg2, keys = ({k: v for k, v in METHODS[m].items() if k not in general} for m in ("svg2", "keys"))
    options = {"policy": policy(model, inputs, svg2, keys), "dense_steps": 1}
    exported = export(model, inputs, tmp_path / "out", format=format, options=options)
    assert [plan.method for plan in exported.plan.sparse] == ["svg2", "keys"]
    expected = outputs(compiled(model, options), inputs, 3)
    same(outputs(load(tmp_path / "out"), inputs, 3), expected, format)


@needs_diffusers
@pytest.mark.nightly
@pytest.mark.parametrize("format", ["torch", "aoti"])
def test_a_trained_predictor_goes_into_the_file(wan: Made, format: str, tmp_path: Path) -> None:
    model, inputs = wan
    options = {
        "method": "dsv",
        "dense_steps": 1,
        "predictor": predictor_file(tmp_path / "p.safetensors", model, inputs),
    }
    exported = export(model, inputs, tmp_path / "out", format=format, options=options)
    assert [plan.method for plan in exported.plan.sparse] == ["dsv", "dsv"]
    (tmp_path / "p.safetensors").rename(tmp_path / "elsewhere")
    got = outputs(load(tmp_path / "out"), inputs, 2)
    (tmp_path / "elsewhere").rename(tmp_path / "p.safetensors")
    same(got, outputs(compiled(model, options), inputs, 2), format)


@needs_diffusers
@pytest.mark.nightly
def test_a_file_holds_the_weights_once(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, text_dim=16, freq_dim=32, ffn_dim=4096, num_layers=2
    ).eval()
    inputs = {
        "hidden_states": torch.randn(1, 16, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    exported = export(model, inputs, tmp_path / "out", options=METHODS["tile"] | {"dense_steps": 2})
    weights = sum(one.nbytes for one in model.state_dict().values())
    assert exported.phases == ("dense", "sparse")
    assert weights < exported.size < weights + 3e6


@needs_diffusers
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["tile", "svg2"])
def test_packages_of_aotinductor(wan: Made, method: str, tmp_path: Path) -> None:
    model, inputs = wan
    exported = export(model, inputs, tmp_path / "out", format="aoti", options=METHODS[method])
    torch._dynamo.reset()
    fast = torch.compile(model, backend="sparsify", options=METHODS[method])
    got, expected = (outputs(one, inputs, 3) for one in (load(tmp_path / "out"), fast))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    turned = {**inputs, "hidden_states": inputs["hidden_states"].transpose(3, 4).contiguous().transpose(3, 4)}
    assert torch.equal(
        outputs(load(tmp_path / "out"), turned, 1)[0], outputs(load(tmp_path / "out"), inputs, 1)[0]
    )
    report = exported.check(2, seed=1)
    assert report.errors.keys() == {*exported.phases} == exported.benchmark(1).files.keys()
    assert all(one.relative < 1e-5 for one in report.errors.values()), str(report)
    file = exported.file("sparse")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OptionError, match=r"is damaged: .* Export the model again") as caught:
        load(tmp_path / "out")
    assert "\n" not in str(caught.value)


# Calls and files that do not fit


class Small(nn.Module):
    """A model without attention, so nothing of it is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: float = 1.0, more: Any = None) -> Any:
        copied = torch.zeros(1, *hidden_states.shape)
        copied.data[:].copy_(hidden_states)  # hidden from export, and with a broadcast
        with torch.autocast("cpu", enabled=False):
            shown = self.linear(copied[0]) * scale + timestep
        return {"shown": shown, "more": more}


class Breaks(Small):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return hidden_states


class Casts(Small):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return self.linear(hidden_states)


class Returns(Small):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
        return self.value and (hidden_states, self.value)


class Counts(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        self.calls[1:].add_(1)
        return hidden_states + self.calls


class Pair(NamedTuple):
    velocity: Tensor
    count: int


@dataclass
class Fields:
    velocity: Tensor
    loss: Tensor | None = None


class OfClass(Small):
    """A model whose arguments have names that programs use, and whose output is of a class of its own."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, state: Tensor, inputs: dict[str, Any], *, flag: bool = False, sizes: Any = None) -> Any:
        velocity = self.linear(state.sin()) * inputs["scale"] + inputs["more"][0]
        return Pair(velocity, 3) if self.kind is Pair else Fields(velocity)


CALL = {"hidden_states": torch.ones(2, 4), "timestep": torch.tensor([3.0])}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "out"
    torch.manual_seed(0)
    export(Small().eval(), {**CALL, "scale": 2.0}, path, options={"method": "tile"})
    return path


@torch.no_grad()
def test_a_call_is_bound_as_the_model_binds_it(small: Path) -> None:
    loaded = load(small)
    hidden_states, timestep = CALL.values()
    expected = loaded(hidden_states=hidden_states, timestep=timestep, scale=2.0)
    assert expected.keys() == {"shown", "more"}
    torch.manual_seed(0)
    assert torch.equal(expected["shown"], Small()(hidden_states, timestep, 2.0)["shown"])
    assert expected["more"] is None
    assert torch.equal(loaded(hidden_states, timestep, 2.0)["shown"], expected["shown"])
    assert torch.equal(loaded(hidden_states, timestep, scale=2.0, more=None)["shown"], expected["shown"])


@pytest.mark.parametrize(
    ("args", "changes", "says"),
    [
        (
            (),
            {"hidden_states": torch.ones(3, 4)},
            r"'hidden_states' must be float32 \[2, 4\].*got float32 \[3, 4\]",
        ),
        ((), {"hidden_states": torch.ones(2, 4).half()}, r"must be float32 \[2, 4\].*got float16 \[2, 4\]"),
        ((), {"hidden_states": None}, r"must be float32 \[2, 4\].*got None"),
        (
            (),
            {"hidden_states": torch.ones(2, 4, device="meta")},
            r"must be float32 \[2, 4\].*got float32 \[2, 4\] on meta",
        ),
        ((), {"scale": 3.0}, "'scale' must be 2.0, as in the exported call, got 3.0: export again"),
        ((), {"more": 1}, "'more' must be left out"),
        ((), {"other": None}, "'other' must be left out, .* which had hidden_states, timestep, scale"),
        ((CALL["hidden_states"],), {}, "'hidden_states' is given twice"),
        ((0,) * 5, {}, "takes 4 arguments in order, got 5"),
    ],
)
def test_other_calls_than_the_exported_one_are_refused(
    small: Path, args: Any, changes: Any, says: str
) -> None:
    with pytest.raises(OperandError, match=says):
        load(small)(*args, **{**CALL, "scale": 2.0, **changes})
    with pytest.raises(OperandError, match="'timestep' is missing"):
        load(small)(hidden_states=CALL["hidden_states"], scale=2.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "in the format 'sparsify-compiler export 3', got 'other'"),
        ({"package": "0.0.1"}, r"exported by sparsify-compiler 0.0.1, and this is .*: install that version"),
        ({"files": "aoti", "torch": "2.0"}, "exported by torch 2.0, and this is"),
        ({"device": "cuda"}, "exported on a GPU and needs one"),
        ({"phases": ["sparse"]}, "is damaged"),
        ({"weights": "other"}, "is damaged: weights.pt has other tensors than those of its programs. Export"),
        ({"files": "else"}, "is damaged"),
        ({"outputs": ["json.Output"]}, "a Output of json, which cannot be imported"),
        ({"outputs": ["no_such_module.Output"]}, "a Output of no_such_module, which cannot be imported"),
    ],
)
def test_files_that_do_not_fit_are_refused(small: Path, tmp_path: Path, change: Any, says: str) -> None:
    if change.get("device") == "cuda" and torch.cuda.is_available():
        change = {"package": "0.0.1"}
        says = "exported by sparsify-compiler 0.0.1"
    content = json.loads((small / "plan.json").read_text()) | change
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SparsifyError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("kind", [Pair, Fields])
def test_arguments_and_outputs_of_every_form(kind: type, tmp_path: Path) -> None:
    model = OfClass(kind).eval()
    call = {
        "state": torch.randn(3, 4),
        "inputs": {"scale": 2, "more": [torch.randn(4), None]},
        "sizes": (1, "x"),
    }
    export(model, call, tmp_path / "out")
    loaded = load(tmp_path / "out")
    call["state"] = torch.randn(4, 3).T
    got, expected = loaded(**call), model(**call)
    assert type(got) is kind
    torch.testing.assert_close(got.velocity, expected.velocity)
    assert kind is Fields or got.count == 3
    seen = []
    loaded.programs = {"dense": lambda _, **inputs: (seen.append(inputs["state"]), ())}
    loaded(**call)
    assert seen[0].is_contiguous(), "packages of AOTInductor read their inputs by the strides of the export"
    with pytest.raises(OperandError, match=r"'inputs' must be \(2, float32 \[4\], None\) in the form"):
        loaded(**{**call, "inputs": {"scale": 3, "more": [torch.randn(4), None]}})


def test_a_folder_of_something_else_is_refused(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OptionError, match=r"path must be a folder that sparsify_compiler\.export wrote"):
        load(tmp_path)
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: None if file.name == "plan.json" else 100])
    with pytest.raises(OptionError, match=r"is damaged: .* Export the model again"):
        load(tmp_path)
    (tmp_path / "weights.pt").write_bytes((small / "weights.pt").read_bytes())
    with pytest.raises(OptionError, match=r"is damaged: .* Export the model again") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not caplog.records
    content = json.loads((small / "plan.json").read_text())
    del content["arguments"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(OptionError, match=r"is damaged: plan\.json lacks 'arguments'\. Export"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model", "kwargs", "options", "says"),
    [
        (Small(), CALL, {}, "model must be in evaluation mode"),
        (torch.sin, CALL, {}, "model must be a module, got builtin"),
        (Small().eval(), {}, {}, "kwargs must be the keyword arguments .* got a mapping of nothing"),
        (Small().eval(), (CALL,), {}, "kwargs must be the keyword arguments"),
        (
            Small().eval(),
            {**CALL, "other": 1},
            {},
            "Small takes no argument 'other': it takes hidden_states",
        ),
        (
            Small().eval(),
            {**CALL, "more": object()},
            {},
            "'more' must hold tensors, numbers, .* got object",
        ),
        (Small().eval(), CALL, {"method": "tiel"}, "Did you mean 'tile'"),
        (Breaks().eval(), CALL, {}, "export needs Breaks as one graph, which Dynamo cannot make"),
        (Casts().eval(), CALL, {}, "Casts turns autocast on in its own code"),
        (
            Small().eval(),
            {"hidden_states": CALL["hidden_states"]},
            {},
            "missing a required argument: 'timestep'",
        ),
        (
            Small().eval(),
            {**CALL, "timestep": "now"},
            {},
            "the call of Small must run .* got TypeError: unsup",
        ),
        (Returns("a string").eval(), CALL, {}, "Returns returns the string 'a string', which a file cannot"),
        (Returns(None).eval(), CALL, {}, "Returns returns no tensor"),
        (Counts().eval(), CALL, {}, "Counts writes to its tensor 'calls' in every call"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    model: Any, kwargs: Any, options: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(SparsifyError, match=says) as caught:
        export(model, kwargs, tmp_path / "out", options=options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_paths_and_formats_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small().eval()
    with pytest.raises(OptionError, match=r"path must be new, got .*, which exists"):
        export(model, CALL, tmp_path)
    with pytest.raises(OptionError, match="path must lie in a folder that exists"):
        export(model, CALL, tmp_path / "none" / "out")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OptionError, match="path must be new, got '~', which exists"):
        export(model, CALL, "~")
    for path in (None, "", 3):
        with pytest.raises(OptionError, match=f"path must be a string or a Path, got {path!r}"):
            export(model, CALL, path)  # type: ignore[arg-type]
    for path, says in (("~/none", "No such file"), ("model.onnx", "onnxruntime.InferenceSession loads")):
        with pytest.raises(
            OptionError, match=rf"path must be a folder that sparsify_compiler\.export .*{says}"
        ):
            load(path)
    for format in ("torch", "aoti", "tensorrt"):
        with pytest.raises(
            OptionError, match=f"opset is for format='onnx', got opset=20 with format='{format}'"
        ):
            export(model, CALL, tmp_path / "out", format=format, opset=20)
    with pytest.raises(OptionError, match=r"unknown format 'torhc'.* Did you mean 'torch'"):
        export(model, CALL, tmp_path / "out", format="torhc")
    with pytest.raises(OptionError, match="a file is for one process, got the option parallel"):
        export(model, CALL, tmp_path / "out", options={"parallel": "auto"})
    with torch.autocast("cpu"), pytest.raises(OptionError, match="must run outside of autocast"):
        export(model, CALL, tmp_path / "out")

    def fails(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", fails)  # of the plan, the last file
    with pytest.raises(KeyboardInterrupt):
        export(model, CALL, tmp_path / "out", options={"method": "tile"})
    assert not list(tmp_path.iterdir()), "nothing half written is left"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SparsifyError, match=r"Small cannot be written .* No space left on device"):
        export(model, CALL, tmp_path / "out", options={"method": "tile"})
    assert not list(tmp_path.iterdir())


def test_devices_that_do_not_fit(tmp_path: Path) -> None:
    model = Small().eval()
    with pytest.raises(OptionError, match=r"device must be one of this machine, .* got 'cpuu'"):
        export(model, CALL, tmp_path / "out", device="cpuu")
    with pytest.raises(OptionError, match=r"that of the model and its arguments, cpu, got 'meta': move both"):
        export(model, CALL, tmp_path / "out", device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(
            OptionError, match=r"one of this machine, .* got 'cuda': export where there is one"
        ):
            export(model, CALL, tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    path = tmp_path / "out[1]"
    script = (
        "import os, sys; from pathlib import Path; from sparsify_compiler.exporting.files import writing\n"
        "with writing(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'plan.json').write_text('half')\n"
        "    os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, path])
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out[1]-")
    with writing(path) as alive:
        assert {*tmp_path.iterdir()} == {alive}
        with writing(path) as other:
            assert {*tmp_path.iterdir()} == {alive, other}
        assert {*tmp_path.iterdir()} == {alive, path}
        path.rmdir()
    assert {*tmp_path.iterdir()} == {path}


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    from torch._inductor import config

    missing = config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with (
        missing,
        pytest.raises(SparsifyError, match=r"format 'aoti' needs a C\+\+ compiler, which is missing"),
    ):
        export(Small().eval(), CALL, tmp_path / "out", format="aoti", options={"method": "tile"})
    assert not list(tmp_path.iterdir())


def test_dsv_needs_a_predictor(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"attention has method 'dsv' without a predictor: train one"):
        export(*joint(GRID, 1), tmp_path / "out", options={"method": "dsv"})
