"""One hypothesis profile for all tests: no deadline (kernels compile), and the same examples always in CI.

One thread: most tests run many small operations, in each of which two threads wait for each other, for long where
the machine is busy. Tests of kernels that divide work among threads ask for several.
"""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("sparsify", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("sparsify")


@pytest.fixture
def fresh_dynamo() -> None:
    """Dynamo knows no program of another test."""
    torch._dynamo.reset()
