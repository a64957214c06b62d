"""A model on several ranks against the same model in one process.

`in_threads` runs the graphs of all ranks in threads of one process, after one trace by Dynamo: the graphs are those
that real ranks get, and threads exchange real tensors. `compare` is a function for real processes (`ranks.Pool`).
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sparsify_compiler import _torch
from sparsify_compiler.backend import configure
from sparsify_compiler.passes import pipeline
from sparsify_compiler.passes.sharding import Sharding
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.program import Phase, Variant
from sparsify_compiler.runtime.site import functions_of
from sparsify_compiler.testing.models import output_of, take_gradients


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The difference between several ranks and one process, for one graph."""

    sharding: Sharding
    output: float
    """Largest difference of an output on any rank, relative to the largest element of all outputs."""
    gradient: float = 0.0
    """The same of the gradients of all weights, averaged over ranks."""


Graph = tuple[fx.GraphModule, tuple[Any, ...]]
"""A graph that Dynamo made, and its inputs in a call."""


def in_threads(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    size: int,
    *,
    trains: bool = False,
    form: str = "hcp",
    hosts: int = 2,
    phase: Phase = "sparse",
    change: Callable[[fx.GraphModule, Ranks], object] = lambda graph, ranks: None,
) -> list[Outcome]:
    """The outcome for each graph that Dynamo makes of a model's call, in order.

    Args:
        options: those of the backend; `parallel` has its defaults.
        size: the number of ranks.
        trains: whether gradients are compared too, of the sum of the sines of all outputs.
        form: the form of the option `parallel`.
        hosts: in the form `hybrid`, the number of hosts, in which ranks share heads.
        phase: that of the variant.
        change: changes the graph of each rank, for tests of the comparison itself.
    """
    graphs = graphs_of(model, inputs, trains=trains)
    return [
        compare_graph(graph, options, size, trains=trains, form=form, hosts=hosts, phase=phase, change=change)
        for graph in graphs
    ]


def ranks_of_threads(rank: int, size: int, form: str = "hcp", hosts: int = 2) -> Ranks:
    """A rank among threads. The name of a group lists its members."""

    def among(members: Sequence[int]) -> Ranks:
        return Ranks(members.index(rank), len(members), " ".join(map(str, members)))

    every, inside = range(size), size // hosts
    if form == "hcp":
        return among(every)
    if form == "scp":
        return replace(among(every), sequence=among(every))
    host = rank // inside * inside
    return replace(
        among(every), sequence=among(every[rank % inside :: inside]), heads=among(every[host : host + inside])
    )


def graphs_of(model: Callable[..., Any], inputs: Mapping[str, Any], *, trains: bool = False) -> list[Graph]:
    """The graphs that Dynamo makes of a model's call, in order."""
    found: list[Graph] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append((gm, args))
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    with torch.set_grad_enabled(trains):
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return found


def compare_graph(
    graph: Graph,
    options: Mapping[str, Any],
    size: int,
    *,
    trains: bool = False,
    form: str = "hcp",
    hosts: int = 2,
    phase: Phase = "sparse",
    change: Callable[[fx.GraphModule, Ranks], object] = lambda graph, ranks: None,
) -> Outcome:
    """The outcome for one graph; arguments as in `in_threads`."""
    gm, args = graph
    config = configure({"dense_steps": 0, "dense_layers": 0, "parallel": "auto", **options})
    with torch.set_grad_enabled(trains):
        analysed = pipeline.analyse(gm, config)
        variant = Variant(phase=phase, trains=trains)
        alone = pipeline.rewrite(analysed, config, variant)
        graphs, shardings = [], []
        for rank in range(size):
            ranks = ranks_of_threads(rank, size, form, hosts)
            shared = pipeline.share(analysed, config, ranks, trains=trains)
            shardings.append(shared.meta["sharding"])
            graphs.append(pipeline.rewrite(shared, config, variant))
            change(graphs[-1], ranks)
    assert len(set(shardings)) == 1, "all ranks must decide the same"
    wanted, gradients = _result(alone, args, trains)
    found = all_ranks([partial(_result, one, args, trains) for one in graphs])
    mean = [sum(each) / size for each in zip(*(one for _, one in found), strict=True)]
    return Outcome(
        sharding=shardings[0],
        output=max(_difference(output, wanted) for output, _ in found),
        gradient=_difference(mean, gradients) if trains else 0.0,
    )


def _result(graph: fx.GraphModule, args: Sequence[Any], trains: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of all inputs that need one) of a lowered graph in its first call."""
    functions = functions_of(graph)
    given = [
        one.detach().clone().requires_grad_(trains and one.requires_grad) if isinstance(one, Tensor) else one
        for one in args
    ]
    with torch.set_grad_enabled(trains):
        outputs = [
            one for one in tree_leaves(graph(*given, *graph.meta["extra"].blank())) if isinstance(one, Tensor)
        ]
    assert functions is not None  # ops find them by name as long as they live
    learning = [one for one in given if isinstance(one, Tensor) and one.requires_grad]
    if not trains:
        return outputs, []
    loss = sum(one.sin().sum() for one in outputs if one.requires_grad)
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, learning, allow_unused=True)
    return [one.detach() for one in outputs], [
        torch.zeros_like(of) if one is None else one for one, of in zip(gradients, learning, strict=True)
    ]


def all_ranks(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of functions that run in a thread each and exchange tensors; raises the first error."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []
    barriers: dict[str, threading.Barrier] = {}
    posted: list[Any] = [None] * len(functions)
    here, lock = threading.local(), threading.Lock()

    def exchange(
        received: Tensor, sent: Tensor, to_receive: list[int], to_send: list[int], group: str, timeout: float
    ) -> None:
        members = [int(one) for one in group.split()]
        with lock:
            assert not errors, "another rank failed"
            barrier = barriers.setdefault(group, threading.Barrier(len(members), timeout=60))
        posted[here.rank] = sent.split(to_send)
        barrier.wait()
        parts = [posted[one][members.index(here.rank)] for one in members]
        assert [part.numel() for part in parts] == to_receive, "ranks must agree about what they exchange"
        torch.cat([part.reshape(-1) for part in parts], out=received)
        barrier.wait()

    def work(rank: int) -> None:
        here.rank = rank
        try:
            results[rank] = functions[rank]()
        except BaseException as error:
            errors.append(error)
            with lock:
                for barrier in barriers.values():
                    barrier.abort()

    with patch.object(_torch, "all_to_all", exchange):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(functions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return results


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest element; infinite where one is not a number."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True) if b.numel()]
    scale = max(float(b.abs().max()) for _, b in pairs)
    largest = max(float((a - b).abs().max().nan_to_num(torch.inf)) for a, b in pairs)
    return largest / scale if scale else largest


def compare(
    ranks: Ranks,
    build: Callable[[], tuple[nn.Module, Mapping[str, Any]]],
    options: Mapping[str, Any],
    *,
    trains: bool = False,
    calls: int = 1,
    form: str = "hcp",
) -> tuple[Outcome, int]:
    """Compile a model for these ranks, and for one process without Inductor, and call both.

    Args:
        build: makes the model, in eval mode, and the inputs of a call. The first input differs from call to call.
        options: those of the backend, without `parallel`.
        calls: number of calls of each compiled model.
        form: the form of the option `parallel`. For `hybrid`, all processes run this; there are two hosts.

    Returns:
        (outcome, with gradients of the parameters; number of graphs that were compiled for these ranks).
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    options = {"dense_steps": 0, "dense_layers": 0, **options}
    model, inputs = build()
    group = _torch.process_group(ranks.group)
    hosts = (2, ranks.size // 2)
    mesh = init_device_mesh("cpu", hosts) if form == "hybrid" else DeviceMesh.from_group(group, "cpu")
    parallel = {"form": form, "mesh": mesh, "timeout": ranks.timeout}
    outputs, gradients = _calls(model, inputs, {**options, "inner_backend": "eager"}, trains, calls)
    with _noted() as shardings:
        found, mean = _calls(model, inputs, {**options, "parallel": parallel}, trains, calls)
    for one in mean:
        dist.all_reduce(one, group=group)
        one /= ranks.size
    gradient = _difference(mean, gradients) if trains else 0.0
    error = _difference(found, outputs)
    return Outcome(sharding=shardings[0], output=error, gradient=gradient), len(shardings)


def _calls(
    model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any], trains: bool, calls: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs of the calls, gradients of the parameters in the order of their names)."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparsify", options=dict(options), dynamic=False)
    outputs = []
    with torch.set_grad_enabled(trains):
        for call in range(calls):
            first, latents = next(iter(inputs.items()))
            now = {**inputs, first: latents + call * 0.05 * latents.flip(-1)}
            result = compiled(**now)
            outputs.append(result if isinstance(result, Tensor) else output_of(result))
        if trains:
            torch.stack([out.sin().sum() for out in outputs]).sum().backward()
    gradients = take_gradients(model)
    return [out.detach() for out in outputs], [gradients[name] for name in sorted(gradients)]


@contextmanager
def _noted() -> Iterator[list[Sharding]]:
    """Note the way in which ranks share each graph that is compiled."""
    found: list[Sharding] = []
    share = pipeline.share

    def noting(*args: Any, **others: Any) -> fx.GraphModule:
        graph = share(*args, **others)
        found.append(graph.meta["sharding"])
        return graph

    with patch.object(pipeline, "share", noting):
        yield found
