"""The needs of CUDA graphs: nothing is decided on the host, and memory stays where it is."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from marks import fresh_dynamo
from torch import Tensor, fx
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx as compile_fx_module

from benchmarks import site_counts
from sparsify_compiler import generation
from sparsify_compiler.backend import sparsify
from sparsify_compiler.methods import METHODS, DynamicMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.sta import Sta
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.runtime.program import PlannedGraph, Variant
from sparsify_compiler.testing.replays import Lint
from sparsify_compiler.testing.videos import Video, latents

pytestmark = fresh_dynamo

GRID, HEADS = (8, 16, 16), 2
SITES = {
    "tile drop": (Tile(), "drop"),
    "sta linear": (Sta(tile=(4, 4, 4)), "linear"),
    **{f"cubes {far}": (Cubes(**site_counts._settings(far)), far) for far in ("drop", "mean", "linear")},
    **{f"svg2 {far}": (Svg2(**site_counts._settings(far)), far) for far in ("drop", "mean", "linear")},
    **{f"keys {far}": (Keys(kv_budget=0.1), far) for far in ("drop", "mean", "linear")},
    **{f"dsv {far}": (Dsv(query_group=(2, 4, 4)), far) for far in ("drop", "mean", "linear")},
    "svg2 max_error": (Svg2(max_error=0.1), "linear"),
    "cubes max_error": (Cubes(max_error=0.1), "linear"),
}


def test_every_method_is_checked() -> None:
    assert {name.split()[0] for name in SITES} == set(METHODS) - {"dense"}


@pytest.mark.parametrize("name", SITES)
def test_a_graph_can_replay_a_site(name: str) -> None:
    """In a dense step, in a first sparse step, and in later steps."""
    site = site_counts.site_of(*SITES[name], GRID, HEADS)
    phases = ("dense", "sparse") if isinstance(site.method, DynamicMethod) else ("sparse",)
    for phase in phases:
        for warm in (False, True):
            assert site_counts.unreplayable(site, phase, warm) == [], f"{phase}, warm={warm}"


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_a_site_that_asks_whether_its_state_holds_anything_is_a_fault(phase: str) -> None:
    site = site_counts.site_of(*SITES["svg2 linear"], GRID, HEADS)
    found = site_counts.unreplayable(site, phase, None)
    assert found == ["the host reads a value: aten.is_nonzero.default"]


META = torch.empty(4, 4, device="meta")
KEPT: list[Tensor] = []
FAULTS = {
    "the host reads a value": (lambda: META.sum().item(), lambda: bool(META.any()), lambda: META.equal(META)),
    "a size depends on a value": (
        META.nonzero, lambda: META[META > 0], lambda: torch.where(META > 0), lambda: META.unique(),
        lambda: META[0].int().repeat_interleave(META[0].int()), lambda: META.masked_select(META > 0),
    ),
    "a copy between devices": (lambda: torch.zeros(3).to("meta"),),
    "numbers of Python are copied": (lambda: torch.tensor([1, 2], device="meta"), lambda: META.new_tensor([1])),
    "the operator works on the host": (META.is_pinned,),
    "memory outlives": (lambda: KEPT.append(META + 1),),
    "": (
        lambda: META @ META, lambda: META.argsort(), lambda: META * torch.tensor(2.0), lambda: META.topk(2),
        lambda: META[META.argmax(-1)], lambda: torch.arange(4, device="meta"), lambda: META[0].zero_(),
        lambda: META.repeat_interleave(2, 0), lambda: torch.zeros(2).sum().item(),
    ),
}  # fmt: skip
"""Beginning of a fault -> operations that the lint finds."""


@pytest.mark.parametrize(("what", "number"), [(what, n) for what in FAULTS for n in range(len(FAULTS[what]))])
def test_the_lint_finds(what: str, number: int) -> None:
    lint, operation = Lint([META], "meta"), FAULTS[what][number]
    with lint.checking(), suppress(NotImplementedError, RuntimeError):  # of meta tensors
        operation()
    found = lint.faults + [f"memory outlives the call: {one}" for one in lint.left([])]
    assert [one for one in found if not what or not one.startswith(what)] == []
    assert bool(found) == bool(what)


SVG2 = {"method": "svg2", "q_clusters": 3, "kv_clusters": 6, "kmeans_iters": (4, 2), "top_p": 0.5}
USUAL = {"inner_backend": "eager", "far_field": "drop", "dense_steps": 2, "dense_layers": 0}
STEPS, VIDEOS = 5, 3


def videos(
    mode: str | None, count: int = VIDEOS, layers: int = 2, **options: object
) -> tuple[list[Tensor], dict[Variant, int], set[tuple[int, ...]]]:
    """(outputs of some videos, variant -> calls of it, the addresses of the state in each call)."""
    torch._dynamo.reset()
    model = Video(layers).eval()
    backend: Any = partial(sparsify, mode=mode, options=USUAL | SVG2 | options)
    compiled = torch.compile(model, backend=backend)
    outputs, calls, places = [], Counter[Variant](), set[tuple[int, ...]]()
    run = PlannedGraph.run

    def noted(self: PlannedGraph, variant: Variant, given: Any) -> Any:
        calls[variant] += 1
        places.add(tuple(one.data_ptr() for one in given[len(given) - len(self.extra.state) :]))
        return run(self, variant, given)

    with mock.patch.object(PlannedGraph, "run", noted), torch.no_grad():
        for video in range(count):
            with generation(STEPS, 1):
                for step in range(STEPS):
                    given = latents((4, 4, 4), seed=10 * video + step), torch.tensor([900.0 - 100 * step])
                    outputs.append(compiled(*given))
    return outputs, dict(calls), places


@pytest.mark.parametrize("options", [{}, {"far_field": "linear", "top_p": None, "max_error": 0.1}])
def test_graphs_have_programs_for_first_and_later_calls_and_one_memory(options: dict[str, object]) -> None:
    expected, usual, _ = videos(None, **options)
    outputs, replayed, places = videos("reduce-overhead", **options)
    assert all(map(torch.equal, outputs, expected))
    assert usual == {Variant("dense"): 2 * VIDEOS, Variant("sparse"): 3 * VIDEOS}
    assert replayed == {
        Variant("dense", warm=False): VIDEOS,
        Variant("dense", warm=True): VIDEOS,
        Variant("sparse", warm=True): 3 * VIDEOS,
    }
    assert len(places) == 1


def test_cuda_graphs_copy_the_arguments_of_a_call_alone() -> None:
    """Inductor knows that weights and state stay where they are, also in programs that are compiled late."""
    compile_fx, programs = compile_fx_module.compile_fx, []

    def inner(gm: fx.GraphModule, examples: Any, *, static_input_idxs: Sequence[int], **_: Any) -> Any:
        inputs = gm.graph.find_nodes(op="placeholder")
        static = {inputs[place] for place in static_input_idxs}
        written = {node.args[0] for node in gm.graph.nodes if node.target is torch.ops.aten.copy_.default}
        programs.append((len(inputs) - len(static), written <= static, len(written)))
        return make_boxed_func(gm.forward)

    def prepare(self: PlannedGraph, inputs: Any) -> None:
        self.compiled[Variant("dense", warm=False), ()] = self.compile(Variant("dense", warm=False), inputs)

    recording = partial(compile_fx, inner_compile=inner)
    with (
        mock.patch.object(compile_fx_module, "compile_fx", recording),
        mock.patch.object(PlannedGraph, "prepare", prepare),
    ):
        videos("reduce-overhead", count=1, layers=1, inner_backend="inductor")
    # The latents and the time step. A sparse call writes two tensors of state and a report.
    assert programs == [(2, True, 2), (2, True, 2), (2, True, 3)]
