"""PyTorch's private API, as `_torch.py` uses it."""

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsify_compiler import _torch


class SharedSettings(SimpleNamespace):
    """Dynamo's settings as older versions of PyTorch have them: one value for all threads."""

    def _make_closure_patcher(self, **changes: Any) -> Callable[[], Callable[[], None]]:
        def change() -> Callable[[], None]:
            before = {name: getattr(self, name) for name in changes}
            self.__dict__.update(changes)
            return lambda: self.__dict__.update(before)

        return change


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_settings_hold_in_each_of_two_threads_and_are_put_back(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread enters while the other is within, and leaves after it; both meet an error."""
    import torch._dynamo.config as config

    if shared:
        entries = {"recompile_limit": SimpleNamespace(user_override=8)}
        config = SharedSettings(
            recompile_limit=8, allow_empty_graphs=False, skip_nnmodule_hook_guards=True, _config=entries
        )
        monkeypatch.setattr(torch._dynamo, "config", config)
    both, left = threading.Barrier(2), threading.Event()
    before, seen = (config.recompile_limit, config.allow_empty_graphs), []

    def enter(late: bool) -> None:
        try:
            with _torch.many_programs():
                both.wait(10)
                if late:
                    left.wait(10)
                with _torch.many_programs():
                    seen.append((config.recompile_limit, config.allow_empty_graphs))
                raise ZeroDivisionError
        except ZeroDivisionError:
            left.set()
        if not shared:
            seen.append((config.recompile_limit, config.allow_empty_graphs))

    threads = [threading.Thread(target=enter, args=(late,)) for late in (False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.count((max(before[0], 64), True)) == 2
    assert shared or seen.count(before) == 2
    assert (config.recompile_limit, config.allow_empty_graphs) == before


def test_two_threads_that_change_autocast_put_it_back() -> None:
    before, within = torch.amp.autocast_mode.autocast.__init__, threading.Event()

    def first() -> None:
        with _torch.autocast_on_meta("cpu"):
            within.set()
            time.sleep(0.2)

    def second() -> None:
        within.wait()
        with _torch.autocast_on_meta("cpu"):
            time.sleep(0.4)

    threads = [threading.Thread(target=one) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.amp.autocast_mode.autocast.__init__ is before
