"""The memory and the launches of whole sites at video size, counted on meta tensors."""

import pytest
import torch

from benchmarks import site_counts

ENTRIES = {name: (method, far_field, warm) for name, method, far_field, warm in site_counts.entries()}
WAN, LONG = site_counts.VIDEOS.values()


@pytest.mark.parametrize("name", [name for name in ENTRIES if not name.endswith("cold")])
def test_a_site_takes_no_more_memory_than_query_key_and_value(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(site_counts, "TRIES", 1)
    found = site_counts.counted(name, *ENTRIES[name], *WAN)
    assert 0 < found["peak"] <= 1.0
    assert found["faults"] == 0


def test_groups_of_any_number_take_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_counts, "TRIES", 1)
    (method, far_field, warm), launches = ENTRIES["dsv drop"], []
    for grid in ((2, 4, 4), (4, 8, 8), (12, 40, 40)):
        found = site_counts.counted("dsv", method, far_field, warm, grid, 2)
        launches.append(found["kernels"])
    assert launches[0] == launches[1] == launches[2]


def test_memory_is_that_of_the_results_that_are_alive() -> None:
    held = torch.empty(10, device="meta")
    mode = site_counts.Counts([held])
    with mode:
        held.add_(1)
        kept = held + 1
        view = kept[2:]
        for _ in range(3):
            view * 2
    assert (mode.alive, mode.peak, mode.written) == (40, 72, 40 + 40 + 3 * 32)
    assert (dict(mode.operations), mode.views) == ({"add_": 1, "add": 1, "mul": 3}, 1)
