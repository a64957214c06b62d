"""The guard on real ranks: all of them take the times of rank 0."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sparsify_compiler._torch import process_group
from sparsify_compiler.errors import RankError
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime import guard
from sparsify_compiler.testing.dits import Attend
from sparsify_compiler.testing.ranks import Pool

STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "svg2": {"q_clusters": 3, "kv_clusters": 9, "top_p": 0.3, "far_field": "drop"},
    "cubes": {"cube": (1, 1, 1), "top_p": 0.3, "far_field": "drop"},
}


def videos(ranks: Ranks, dense_on_rank_0: bool, form: str, method: str) -> list[list[float]]:
    """Two videos, by two programs: the difference of each step from the dense model. Ranks measure other times."""
    pace = {"dense": 1e-3 if dense_on_rank_0 == (ranks.rank == 0) else 3e-3, "sparse": 2e-3}

    def run(self: Any, case: str, how: str, *, function: Callable[[], Any], **_: Any) -> Any:
        self._runs.append((case, how, lambda: pace[how]))
        return function(), pace[how]

    mesh = DeviceMesh.from_group(process_group(ranks.group), "cpu")
    options = {
        "method": method,
        **METHODS[method],
        "parallel": {"form": form, "mesh": mesh, "timeout": ranks.timeout},
        "dense_steps": 0,
        "dense_layers": 0,
        "inner_backend": "eager",
        "guard": "measured",
    }
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(guard, "cache_folder", lambda: Path(folder)),
        patch.object(guard.Stopwatch, "_run", run),
        torch.no_grad(),
    ):
        for _ in range(2):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = Attend().eval()
            compiled = torch.compile(model, backend="sparsify", options=options, dynamic=False)
            found.append([difference(compiled, model, step) for step in range(STEPS)])
    return found


def in_another_environment(ranks: Ranks) -> str:
    """The error of a call where rank 1 has another choice of the guard."""
    options = {
        **{"method": "svg2", **METHODS["svg2"], "dense_steps": 0, "inner_backend": "eager"},
        "parallel": {
            "mesh": DeviceMesh.from_group(process_group(ranks.group), "cpu"),
            "timeout": ranks.timeout,
        },
    }
    torch.manual_seed(0)
    model = Attend().eval()
    choice = {"SPARSIFY_GUARD": ("off", "cached")[ranks.rank]}
    with patch.dict(os.environ, choice), torch.no_grad(), pytest.raises(RankError) as raised:
        torch.compile(model, backend="sparsify", options=options)(torch.randn(1, 4, 3, 4, 6))
    return str(raised.value)


def test_ranks_that_guard_otherwise_are_told_apart(pool: Pool) -> None:
    for error in pool.run(2, in_another_environment):
        assert "guard" in error


def difference(compiled: Callable[..., Tensor], model: nn.Module, step: int) -> float:
    video = 3 * torch.randn(1, 4, 3, 4, 6, generator=torch.Generator().manual_seed(step))
    return float((compiled(video) - model(video)).abs().max())


@pytest.mark.parametrize("dense", [True, False])
def test_ranks_decide_by_the_times_of_rank_0(pool: Pool, dense: bool) -> None:
    for first, second in pool.run(2, videos, dense, "hcp", "svg2"):
        assert [step < 1e-5 for step in first] == [False, False, dense, dense]
        assert [step < 1e-5 for step in second] == [dense] * STEPS


def test_attention_whose_queries_ranks_share_is_not_timed(pool: Pool) -> None:
    for first, second in pool.run(2, videos, True, "scp", "cubes"):
        assert not any(step < 1e-5 for step in (*first, *second))
