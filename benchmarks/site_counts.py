"""`python -m benchmarks.static --sites`: launches, operations, host time and memory of one site of every method.

Each site runs once as a model calls it, by the provider `triton`, on meta tensors: shapes and launches are real,
elements are not. A launch of a Triton kernel is recorded and not made. A line gives

    triton     launches of Triton kernels
    aten       ATen operations that run a kernel on a GPU: no views, no allocations
    views      the rest: views and allocations
    faults     operations that a CUDA graph could not replay (`sparsify_compiler.testing.replays`)
    host_ms    processor time of the call's Python, without the launches
    written    GB of all results of operations, each counted once
    peak       the most memory alive at one time beyond inputs, state and output, as a multiple of q, k and v

Memory that an operation allocates inside itself, as a sort does, is not counted. Nothing here measures a GPU.
"""

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.sites import Grid, Inputs, Site
from benchmarks.harness import write_json
from sparsify_compiler import _torch
from sparsify_compiler.kernels import triton as provider
from sparsify_compiler.kernels.triton import configs
from sparsify_compiler.kernels.triton.launcher import Launch, tensors
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.svg2 import Svg2
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.runtime.site import Observer, SparseSite
from sparsify_compiler.testing.replays import Lint

RESULTS = Path(__file__).parent / "results" / "sites.json"
HEAD_DIM = 128
DENSITY = 0.1
"""The share of the keys that `keys` and `dsv` read."""
ARCH = configs.row(9)
"""The tiles of `configs` for compute capability 9.0."""
TRIES = 5
"""Number of calls; the fastest gives the host time."""

VIDEOS: dict[str, tuple[Grid, int]] = {
    "Wan 14B 720p": ((21, 45, 80), 40),
    "520,000 tokens, one rank of 8": ((52, 100, 100), 5),
}
"""Grid and heads. Ranks share the heads of these sites: keys of a head are compared on one rank."""


@dataclass(frozen=True, slots=True)
class Meta:
    """The device of the counts, as `benchmarks.gpu.sites` uses a device."""

    name: str = "meta"

    def size(self, real: Any, tiny: Any) -> Any:
        """The real size."""
        return real


def entries() -> Iterator[tuple[str, Any, str, bool]]:
    """(name, method, far field, whether the call continues from a state) of every site."""
    yield "tile", Tile(), "drop", True
    for far_field in ("drop", "linear"):
        yield f"cubes {far_field}", Cubes(**_settings(far_field)), far_field, True
    for far_field in ("drop", "linear"):
        for warm in (True, False):
            name = f"svg2 {far_field} {'warm' if warm else 'cold'}"
            yield name, Svg2(**_settings(far_field)), far_field, warm
    for far_field in ("drop", "mean"):
        yield f"keys {far_field}", Keys(kv_budget=DENSITY), far_field, True
    for far_field in ("drop", "mean"):
        yield f"dsv {far_field}", Dsv(query_group=(2, 4, 4)), far_field, True


def _settings(far_field: str) -> dict[str, Any]:
    return dict(Cubes.otherwise[far_field]) if far_field in Cubes.otherwise else {}


class Counts(TorchDispatchMode):
    """Counts of all operations and of the memory of their results, while it is on."""

    def __init__(self, held: list[Tensor]) -> None:
        """Args:
        held: tensors whose memory does not count.
        """
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.views = self.written = self.alive = self.peak = 0
        self._known = {id(t.untyped_storage()): t.untyped_storage() for t in held}
        self._sizes: dict[int, int] = {}
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "sparsify":  # its own operations were counted
            return out
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if all(t.device.type == "cpu" for t in tensors):
            return out
        new = [t for t in tensors if self._is_new(t)]
        for tensor in new:
            self._hold(tensor)
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.views += 1  # the kernel that fills it was a launch; its bytes are written once
            self.written += sum(t.nbytes for t in new)
        elif new or func._schema.is_mutable:
            self.operations[func.overloadpacket.__name__] += 1
            self.written += sum(t.nbytes for t in (new or tensors))
        else:
            self.views += 1
        return out

    def _is_new(self, tensor: Tensor) -> bool:
        at = id(tensor.untyped_storage())
        return at not in self._known and at not in self._sizes

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        at, size = id(storage), storage.nbytes()
        if at in self._sizes:
            return
        self._sizes[at] = size
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, at)

    def _free(self, at: int) -> None:
        self.alive -= self._sizes.pop(at)


@contextmanager
def faked(mode: Counts | Lint | None) -> Iterator[Counter[str]]:
    """Run the package's ops on meta tensors by their Triton launches, which are recorded: kernel -> launches."""
    launched: Counter[str] = Counter()

    def launch(self: Launch) -> None:
        if all(self.grid):
            name = str(self.kernel.__name__)
            launched[name] += 1
            if isinstance(mode, Lint):
                mode.check_launch(name, tensors(self.arguments.values()))

    def through(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with mode or nullcontext():
                return function(*args)

        return run

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Launch, "__call__", launch))
        stack.enter_context(mock.patch.object(provider, "supports", return_value=None))
        stack.enter_context(mock.patch.object(configs, "architecture", return_value=ARCH))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", return_value=False))
        stack.enter_context(_torch.running_on("meta", "sparsify", through))
        yield launched


def site_of(method: Any, far_field: str, grid: Grid, heads: int) -> Site:
    """A site on meta tensors."""
    device: Any = Meta()
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)
    query, key, value = (
        torch.empty(1, layout.tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for _ in range(3)
    )
    inputs = Inputs(layout=layout, query=query, key=key, value=value)
    return Site(device, method, DENSITY, far_field, "triton", inputs)


def unreplayable(site: Site, phase: str, warm: bool | None) -> list[str]:
    """The operations of a call that a CUDA graph could not replay.

    Args:
        phase: `dense` or `sparse`.
        warm: as `SiteInputs.warm`.
    """
    names, given = replace(site.names, warm=warm), site.inputs
    flag = torch.tensor(False) if warm is None else None
    held = [*site.operands.values(), flag, *site.state, site.report]
    query, key, value = given.query, given.key, given.value
    lint = Lint([query, key, value, given.key_bias, *held], query.device.type)
    with faked(lint), torch.no_grad(), lint.checking():
        if phase == "sparse":
            module: torch.nn.Module = SparseSite(site.plan, names, choice=site.choice)
            out = module(query, key, value, given.key_bias, *held)
        else:
            out = Observer(site.plan, names)(torch.empty_like(query), query, key, given.key_bias, *held)
    return lint.faults + [f"memory outlives the call: {one}" for one in lint.left([out])]


def counted(name: str, method: Any, far_field: str, warm: bool, grid: Grid, heads: int) -> dict[str, Any]:
    """The counts of one site."""
    with faked(None), torch.no_grad():
        site = site_of(method, far_field, grid, heads)
        query, key, value = site.inputs.query, site.inputs.key, site.inputs.value
        qkv = sum(t.nbytes for t in (query, key, value))
        taken = []
        for _ in range(TRIES):
            start = time.process_time()
            site.call(warm)
            taken.append(time.process_time() - start)
    mode = Counts([query, key, value, *site.operands.values(), *site.state, site.report])
    with faked(mode) as launched, torch.no_grad(), mode:
        out = site.call(warm)
    return {
        "site": name,
        "triton": sum(launched.values()),
        "aten": sum(mode.operations.values()),
        "views": mode.views,
        "faults": len(unreplayable(site, "sparse", warm)),
        "host_ms": round(1e3 * min(taken), 2),
        "written": round(mode.written / 1e9, 2),
        "peak": round((mode.peak - out.nbytes) / qkv, 3),
        "peak_gb": round((mode.peak - out.nbytes) / 1e9, 2),
        "kernels": dict(launched),
        "operations": dict(mode.operations.most_common()),
    }


COLUMNS = ("site", "triton", "aten", "views", "faults", "host_ms", "written", "peak", "peak_gb")


def main(path: Path | None, only: str = "") -> None:
    """Print the lines of the sites whose name has `only` in it; write them to `path`."""
    cases = []
    for video, (grid, heads) in VIDEOS.items():
        print(f"{video}: {math.prod(grid)} tokens, {heads} heads")
        print(" | ".join(COLUMNS))
        for name, method, far_field, warm in entries():
            if only in name:
                found = counted(name, method, far_field, warm, grid, heads)
                cases.append({"video": video, "tokens": math.prod(grid), "heads": heads} | found)
                print(" | ".join(str(found[column]) for column in COLUMNS), flush=True)
    if path is not None:
        write_json(path, cases, lines=True)
