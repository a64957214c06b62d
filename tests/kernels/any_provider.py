"""Cases that run on every provider: those that are here, and Triton's in a process that interprets it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = HAS_GPU or os.environ.get("TRITON_INTERPRET") == "1"
PROVIDERS = ["reference", "cpu", *(["triton"] if HAS_TRITON else [])]
IS_SLOW = HAS_TRITON and not HAS_GPU
"""The interpreter takes milliseconds for a program: shapes are smaller there, and examples fewer."""


POISONED = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value", "ignore:overflow"),
]
"""Marks of cases that run on poisoned memory."""


def examples(slow: int, fast: int) -> settings:
    """The numbers of examples in the interpreter and elsewhere."""
    return settings(
        max_examples=slow if IS_SLOW else fast, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


def opcheck(op: Any, arguments: Any) -> None:
    """`torch.library.opcheck`, of a slow provider the checks of what its kernels read, write and return.

    How an op is traced and differentiated is the same for all providers.
    """
    of_kernels = {"test_utils": ("test_schema", "test_faketensor")} if IS_SLOW else {}
    torch.library.opcheck(op, arguments, **of_kernels)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(provider: str) -> str:
    return "cuda" if provider == "triton" and HAS_GPU else "cpu"


def pass_in_the_interpreter(*words: str) -> None:
    """Asserts that pytest passes on these words where Triton is interpreted."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
