"""One hypothesis profile for all tests: no deadline (kernels compile), and the same examples always in CI.

The guard is off: on tiny tensors dense attention is faster, and most tests are about sparse attention.

One thread: most tests run many small operations, in each of which two threads wait for each other, for long where
the machine is busy. Tests of kernels that divide work among threads ask for several.
"""

import gc
import logging
import os
import subprocess
import sys
from typing import Any

os.environ["SPARSIFY_GUARD"] = "off"

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from sparsify_compiler.runtime import site
from sparsify_compiler.table import BlockTable

torch.set_num_threads(1)

# PyTorch writes every graph in full to this logger if it has a handler. Pytest adds a handler to each logger that
# does not propagate.
logging.getLogger("torch.__trace").propagate = True

# After each compilation PyTorch measures the time of guards, for a log, and first empties the processor's caches.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

settings.register_profile("sparsify", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("sparsify")


def pytest_collection_finish() -> None:
    """Search for garbage less often: imported modules live to the end, and traced graphs live long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is marked `alone` in a process of its own."""
    if pyfuncitem.get_closest_marker("alone") is None or "TEST_ALONE" in os.environ:
        return None
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    where = pyfuncitem.config.rootpath
    done = subprocess.run(
        command, env=others | {"TEST_ALONE": "1"}, cwd=where, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return True


@pytest.fixture
def fresh_dynamo() -> None:
    """Dynamo knows no program of another test."""
    torch._dynamo.reset()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[BlockTable]:
    """The tables that sites use, in order."""
    used, attend = list[BlockTable](), site.attention_with_far_field

    def spy(query: Tensor, key: Tensor, value: Tensor, table: BlockTable, **others: Any) -> Any:
        used.append(table)
        return attend(query, key, value, table, **others)

    monkeypatch.setattr(site, "attention_with_far_field", spy)
    return used
