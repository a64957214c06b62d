"""The command line: what it prints, and that mistakes come as one line."""

import subprocess
import sys
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from sparsify_compiler import OptionError, SparsifyError, cli, diffusers_model, doctor

WAN = [
    "explain",
    "WanTransformer3DModel",
    "--device",
    "cuda",
    "--config",
    '{"num_layers": 1, "num_attention_heads": 2}',
]
INPUTS = ["hidden_states=1x16x5x14x18", "timestep=1:int64", "encoder_hidden_states=1x11x4096"]
ARGUMENTS = [*WAN, *(word for text in INPUTS for word in ("--input", text))]
TILE = [*ARGUMENTS, "--option", "method=tile"]


def run(*words: str):
    return CliRunner().invoke(cli.app, list(words))


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"sparsify-compiler {metadata.version('sparsify-compiler')}\n"


def test_explain_draws_a_diffusers_model_without_its_weights(tmp_path):
    pytest.importorskip("diffusers")
    three = ["--config", '{"num_layers": 3, "num_attention_heads": 2}']
    result = run(*TILE, *three, "--option", "reference_frames=2", "--picture", str(tmp_path / "masks.png"))
    assert result.exit_code == 0, result.exception
    assert "5x7x9" in result.stdout
    assert "3 of 6 attention calls sparse" in result.stdout
    assert "triton" in result.stdout
    assert (tmp_path / "masks.png").exists()


def test_explain_runs_a_small_model(tmp_path):
    pytest.importorskip("diffusers")
    small = (
        '{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "text_dim": 8}'
    )
    inputs = ["hidden_states=1x16x5x14x18", "timestep=1:int64", "encoder_hidden_states=1x11x8"]
    words = [word for text in inputs for word in ("--input", text)]
    result = run(
        *(*WAN[:2], "--device", "cpu", "--config", small, *words),
        *("--run", "3", "--option", "dense_steps=1", "--picture", str(tmp_path / "density.png")),
    )
    assert result.exit_code == 0, result.exception
    assert "1 dense and 2 sparse calls" in result.stdout
    assert result.stderr.startswith("steps: 0 of 3\n")
    assert "\nsteps: 3 of 3" in result.stderr
    assert (tmp_path / "density.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["explain", "WanTransformr3DModel"], "Did you mean WanTransformer3DModel"),
        (["explain", "WanPipeline"], "no model class"),
        (["explain", "ModelMixin"], "no model class"),
        (["explain", "AutoModel"], "is a loader"),
        ([*WAN, "--config", '{"num_attention_heads": 0}'], "from the config: ZeroDivisionError: "),
        (
            ["explain", "LTXVideoTransformer3DModel", "--config", '{"activation_fn": "zzz"}'],
            "from the config: UnboundLocalError: ",
        ),
        ([*WAN, "--config", sys.executable], "must hold a JSON object: 'utf-8'"),
        ([*WAN, "--config", "[1]"], "the config must hold a JSON object, got list"),
        ([*ARGUMENTS, "--value", "return_dict=False"], "try return_dict=false"),
        ([*ARGUMENTS, "--value", "return_dict=no"], """try return_dict='"no"'"""),
        ([*ARGUMENTS, "--device", "foo"], "unknown device 'foo': must be one of cpu, cuda"),
        ([*ARGUMENTS, "--option", f"dump={__file__}"], "dump must be a folder"),
        ([*TILE, "--picture", f"{__file__}/masks.png"], "cannot save the picture as"),
        (WAN, "needs hidden_states, timestep, encoder_hidden_states"),
        ([*ARGUMENTS, "--input", "hidden_stats=1"], "does not take hidden_stats"),
        ([*ARGUMENTS, "--input", "timestep=1y2"], "must have a shape"),
        ([*ARGUMENTS, "--input", "timestep=1:float33"], "must have a data type"),
        ([*ARGUMENTS, "--input", "timestep"], "name=value"),
        ([*ARGUMENTS, "--input", "hidden_states=1x15x5x14x18"], "does not run on these inputs"),
        ([*ARGUMENTS, "--config", "{"], "must hold a JSON object"),
        ([*ARGUMENTS, "--config", "nowhere.json"], "nowhere.json"),
        ([*ARGUMENTS, "--option", "reference_frame=2"], "Did you mean 'reference_frames'"),
        ([*TILE, "--option", "reference_frames=6"], "1..5"),
        ([*ARGUMENTS, "--option", "grid=5,7,8"], "multiply"),
        (["demo", "--device", "tpu"], "device must be one of"),
    ],
)
def test_mistakes_are_told(words, says):
    pytest.importorskip("diffusers")
    error = run(*words).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert says in str(error)


def test_main_prints_an_error_as_one_line():
    command = [
        sys.executable,
        "-c",
        "from sparsify_compiler.cli import main; main()",
        "demo",
        "--device",
        "tpu",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "sparsify: device must be one of cpu, cuda, got 'tpu'\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("5,7,9", (5, 7, 9)),
        ("[5, 7, 9]", (5, 7, 9)),
        ("tile", "tile"),
        ("true", True),
        ('"2"', "2"),
    ],
)
def test_option_values(text, value):
    assert diffusers_model.parse_option(text) == value
    if text not in ("5,7,9", "tile"):
        assert diffusers_model.parse_value("name", text) == value


def test_config_from_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"num_layers": 3}')
    assert diffusers_model.read_config(str(path)) == {"num_layers": 3}
    path.write_text("[3]")
    with pytest.raises(OptionError, match="got list"):
        diffusers_model.read_config(str(path))


def test_doctor_proves_the_providers():
    result = run("doctor")
    assert result.exit_code == 0, result.exception
    assert "BROKEN" not in result.stdout
    assert torch.__version__.split("+")[0] in result.stdout
    assert doctor.proof("cpu", "cpu") == "works (checked against float64 in float32)"
    assert doctor.proof("cpu", "cuda").startswith("no: ")


def test_doctor_tells_a_broken_provider(monkeypatch):
    from sparsify_compiler.kernels.attention import cpu as attention

    monkeypatch.setattr(attention, "forward", lambda *_: (torch.zeros(1, 2, 213, 64), torch.zeros(1, 2, 213)))
    assert doctor.proof("cpu", "cpu").startswith("BROKEN: AssertionError")
