"""PyTorch's lock of compilation, extended to calls of applied models.

While PyTorch traces, it replaces the call of every module of the process. Another thread that calls a module in the
meantime gets an error, or is traced along. So no thread compiles while another is within a call of an applied
model, and none begins a call while another compiles, or waits for it. A thread that waits to compile calls no
module, so calls that all come to compile do so one after another.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class CompileLock:
    """A lock of compilation that one thread can take several times. It stands in the place of PyTorch's own."""

    def __init__(self, lock: Any) -> None:
        """
        Args:
            lock: PyTorch's own. It is held too, for code that has a reference to it.
        """
        self._lock = lock
        self._changed = threading.Condition()
        self._calls = Counter[int]()
        """Thread -> its open calls, one in another."""
        self._compiling: list[int] = []
        """The thread that compiles, and then those that wait for it."""
        self._depth = 0

    def __enter__(self) -> None:
        """Wait until no other thread compiles, and all calls of others have ended or wait here too."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._compiling:
                self._compiling.append(me)
                self._changed.notify_all()
                try:
                    self._changed.wait_for(
                        lambda: self._compiling[0] == me and self._calls.keys() <= set(self._compiling)
                    )
                except BaseException:
                    self._compiling.remove(me)
                    self._changed.notify_all()
                    raise
            self._depth += 1
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        """Let the next thread compile, or calls begin."""
        self._lock.release()
        with self._changed:
            self._depth -= 1
            if not self._depth:
                del self._compiling[0]
                self._changed.notify_all()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Wait until no other thread compiles; none does before the end, unless this one waits to compile."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(
                lambda: me in self._calls or not self._compiling or self._compiling == [me]
            )
            self._calls[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls[me] -= 1
                if not self._calls[me]:
                    del self._calls[me]
                self._changed.notify_all()


@cache
def compile_lock() -> CompileLock:
    """The lock of this process. PyTorch holds it while Dynamo or Inductor compiles."""
    from torch._dynamo import convert_frame

    lock = CompileLock(convert_frame.compile_lock)
    convert_frame.compile_lock = lock  # type: ignore[assignment]
    return lock
