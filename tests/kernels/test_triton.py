"""Provider triton: `triton_cases.py` and `triton_backward_cases.py`, on the GPU if there is one, else interpreted.

Triton decides when it is imported whether it compiles or interprets, so the cases run in their own process.
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from sparsify_compiler.kernels import triton as provider

CASES = [Path(__file__).with_name(name) for name in ("triton_cases.py", "triton_backward_cases.py")]


def run_python(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def interpreter_is_broken() -> bool:
    """Triton 3.6's interpreter turns arrays of one element into integers, which NumPy 2.4 refuses."""
    return Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4")


def test_cases() -> None:
    if not torch.cuda.is_available() and interpreter_is_broken():
        pytest.skip("Triton 3.6's interpreter needs NumPy below 2.4")
    run = run_python(
        "-m", "pytest", *map(str, CASES), "-p", "no:cacheprovider", interpret=not torch.cuda.is_available()
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_provider_does_not_import_triton() -> None:
    code = "import sys, sparsify_compiler.kernels.triton; sys.exit('triton' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_missing_triton_is_a_reason(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    why = provider.supports(device="cuda", dtype=torch.bfloat16, head_dim=64, value_dim=64)
    assert "triton cannot be imported" in why


def test_supports_names_what_is_wrong() -> None:
    fits = {"device": "cuda", "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64}
    assert provider.supports(**fits) is None
    assert "TRITON_INTERPRET" in provider.supports(**fits | {"device": "cpu"})
    assert "got xpu" in provider.supports(**fits | {"device": "xpu"})
    assert "got float64" in provider.supports(**fits | {"dtype": torch.float64})
    assert "got 288" in provider.supports(**fits | {"value_dim": 288})
