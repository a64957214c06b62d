"""The lock of compilation: calls of applied models and compilations in several threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler import _torch
from sparsify_compiler._torch_lock import CompileLock, compile_lock

LONG = 60.0


class Log:
    """What threads do, in order, and events that let them go on."""

    def __init__(self) -> None:
        self.lock, self.done = CompileLock(threading.RLock()), list[str]()
        self.entered, self.leave = threading.Event(), threading.Event()

    def call(self, *, compiles: bool = False, nested: bool = False) -> None:
        with self.lock.call():
            self.entered.set()
            assert self.leave.wait(LONG)
            if nested:
                with self.lock.call():
                    self.done.append("nested")
            if compiles:
                self.compile()
            self.done.append("call")

    def compile(self) -> None:
        with self.lock, self.lock:
            self.done.append("compile")


def waiting(lock: CompileLock, threads: int) -> None:
    """Return when so many threads compile or wait to."""
    with lock._changed:
        assert lock._changed.wait_for(lambda: len(lock._compiling) == threads, LONG)


def test_a_compilation_waits_for_calls_and_new_calls_for_it() -> None:
    log = Log()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(log.call, nested=True)
        assert log.entered.wait(LONG)
        compiled = pool.submit(log.compile)
        waiting(log.lock, 1)
        second = pool.submit(log.call)
        assert not compiled.done()
        assert not log.done
        log.leave.set()
        for one in (first, compiled, second):
            one.result(LONG)
    assert log.done == ["nested", "call", "compile", "call"]
    assert not log.lock._calls
    assert not log.lock._compiling


@pytest.mark.parametrize("threads", [2, 5])
def test_calls_that_all_compile_do_so_one_after_another(threads: int) -> None:
    log = Log()
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(log.call, compiles=True) for _ in range(threads)]
        log.leave.set()
        for one in calls:
            one.result(LONG)
    assert sorted(log.done) == sorted(["compile", "call"] * threads)
    assert log.done.index("call") > 0
    assert not log.lock._calls
    assert not log.lock._compiling


def test_a_call_that_raises_is_left() -> None:
    lock = CompileLock(threading.RLock())
    for enter in (lock.call, lambda: lock):
        with pytest.raises(ZeroDivisionError), enter():
            raise ZeroDivisionError
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lock.__enter__).result(LONG)


def test_pytorch_holds_it_while_it_compiles() -> None:
    held: list[bool] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        held.append(bool(compile_lock()._compiling))
        return gm

    compile_lock()
    torch.compile(nn.ReLU(), backend=backend)(torch.ones(2))
    assert held == [True]
    assert not compile_lock()._compiling


def test_a_graph_is_compiled_twice() -> None:
    """PyTorch's cache leaves the graph without the sources of its parameters."""
    results: list[Callable[..., object]] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graph = torch.fx.Graph()
        graph.output((graph.call_function(torch.mul, (graph.placeholder("x"), graph.get_attr("scale"))),))
        own = torch.fx.GraphModule({"scale": torch.full((), 2.0)}, graph)
        own.meta["dynamo_compile_id"] = gm.meta["dynamo_compile_id"]
        results.extend(_torch.compile_with("inductor", own, inputs, None) for _ in range(2))
        return results[-1]

    x = torch.randn(3)
    assert torch.compile(lambda x: x + 1, backend=backend)(x).equal(2 * x)
    assert len(results) == 2
