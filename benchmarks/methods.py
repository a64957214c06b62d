"""`python -m benchmarks.methods`: the attention mass that methods keep at equal density, and their cost.

    keep      share of the true attention mass that is read, at equal density, by every method and by flat blocks of
              64 tokens, on a planted video and on given ones, as a mean over heads; and the error of the output
              with each far field, and with the blocks of largest gain read instead of those of largest mass
    cost      one warm sparse call of a site, including selection and far field, relative to dense SDPA in the
    same run:
              efficiency is speed-up times density, 1 for a kernel that runs at SDPA's rate and selects at no cost
    sites     wall time and processor time of one warm call of every method, relative to dense SDPA in the same
              rounds, at three lengths; a second dense call shows the noise. With --busy a second process keeps one
              core busy meanwhile
    clusters  error of svg2 by the number of its key clusters, at equal total work
    memory    the most memory that the process of a call needs beyond the memory before it and the output, for every
              method at 32,760 tokens, in 2 heads of 128 bfloat16

Every timed call is first checked against float64 attention under the mask of its own table.
"""

import argparse
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.sites import Inputs
from benchmarks.gpu.sites import Site as GpuSite
from benchmarks.harness import machine, write_json
from benchmarks.site_counts import DENSITY, entries
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.far_field import FAR_FIELDS, attention_with_far_field
from sparsify_compiler.kernels.far_field.virtual_keys import FarBlocks
from sparsify_compiler.methods import DynamicMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dsv import Dsv
from sparsify_compiler.methods.keys import Keys
from sparsify_compiler.methods.selection import BlockMethod, Selection, State, Tokens
from sparsify_compiler.methods.svg2 import Svg2, clusters_for
from sparsify_compiler.methods.tile import Tile
from sparsify_compiler.plan import AttentionPlan, TokenLayout
from sparsify_compiler.runtime.site import SparseSite
from sparsify_compiler.runtime.site_inputs import REPORT, SiteInputs, state_shapes
from sparsify_compiler.table import BlockTable
from sparsify_compiler.testing.far_fields import nearest_blocks
from sparsify_compiler.testing.oracles import assert_close_to_float64
from sparsify_compiler.testing.strategies import site_of
from sparsify_compiler.timing import interleaved_medians

Grid = tuple[int, int, int]
DENSITIES = (0.1, 0.2, 0.3, 0.4)
WORKS = (0.3, 0.45, 0.6)


def planted_video(grid: Grid, heads: int, head_dim: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) [1, H, S, D]: things of a few kinds move over a background; similar tokens attend to each
    other.

    A token shows one of 24 things, the one with the nearest moving centre, and a thing has one of 8 kinds. Query
    and key are the sum of vectors for the kind, the thing and the place, and noise.
    """
    g = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    things, kinds = 24, 8
    start, speed = torch.rand(things, 2, generator=g), 0.5 * (torch.rand(things, 2, generator=g) - 0.5)
    time = torch.linspace(0, 1, frames)[:, None, None]
    centres = (start + time * speed).remainder(1.0) * torch.tensor([height, width])
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).float()
    thing = torch.cdist(place.expand(frames, -1, -1), centres).argmin(-1).flatten()
    kind = torch.randint(kinds, (things,), generator=g)[thing]
    waves = torch.randn(3, head_dim, generator=g)
    t, y, x = (axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) / 8 for n in grid), indexing="ij"))
    where = torch.stack([t, y, x], -1) @ waves

    def tokens(strength: float) -> Tensor:
        parts = [
            torch.randn(heads, kinds, head_dim, generator=g)[:, kind],
            torch.randn(heads, things, head_dim, generator=g)[:, thing],
            where.sin().expand(heads, -1, -1),
        ]
        mixed = sum(parts) + 0.7 * torch.randn(heads, len(thing), head_dim, generator=g)
        return strength * mixed[None]

    shared = torch.Generator().set_state(g.get_state())
    query = tokens(0.4)
    g.set_state(shared.get_state())  # kinds and things have the same vectors in both; only the noise differs
    key = tokens(1.0) + 0.5 * torch.randn(1, heads, len(thing), head_dim, generator=g)
    return query, key, torch.randn(1, heads, len(thing), head_dim, generator=g)


@torch.no_grad()
def recorded(level: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, value) of every layer of the trained evaluation model, on a held-out video at a noise level."""
    from sparsify_compiler.lab import model as trained
    from sparsify_compiler.lab.sparsity import Listen
    from sparsify_compiler.lab.world import VALIDATION, scene, videos

    model, shown = trained.load(), [scene(VALIDATION, 0)]
    clean = trained.to_model(videos(shown))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    heard: list[tuple[Tensor, Tensor, Tensor]] = []
    with Listen(lambda *tensors: heard.append(tuple(t.float() for t in tensors))):
        model(
            (1 - level) * clean + level * noise,
            torch.full((1,), 1000 * level),
            trained.encode([one.prompt for one in shown]),
        )
    return heard


def relative_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: BlockTable,
    far_field: str,
    far_blocks: FarBlocks | None = None,
) -> float:
    """Relative error of the attention's output."""
    dense = scaled_dot_product_attention(query, key, value)
    out, _, _ = attention_with_far_field(
        query, key, value, table, far_field=far_field, far_blocks=far_blocks, provider="cpu"
    )
    return float((out - dense).norm() / dense.norm())


def mass_kept(query: Tensor, key: Tensor, table: BlockTable) -> float:
    """Mean share of the attention mass on the pairs that a table keeps."""
    scores = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
    return float((scores * table.mask()).sum(-1).mean())


def selection_of(
    method: Any, query: Tensor, key: Tensor, layout: TokenLayout, far_field: str = "drop"
) -> Selection:
    """The selection of a cold call of a dynamic method."""
    method = method.fit(site_of(query), layout)
    zeros = (torch.zeros(shape) for shape in method.state(site_of(query), layout).values())
    tokens = Tokens(
        query=query,
        key=key,
        layout=layout,
        scale=query.shape[-1] ** -0.5,
        provider="cpu",
        far_field=far_field,
    )
    selection, _ = method.select(tokens, State(torch.tensor(False), tuple(zeros)), **method.constants(layout))
    return selection


def table_of(method: Any, query: Tensor, key: Tensor, layout: TokenLayout) -> BlockTable:
    """The table of a cold call."""
    fitted = method.fit(site_of(query), layout)
    if isinstance(fitted, DynamicMethod):
        return selection_of(method, query, key, layout).table
    return fitted.table(layout)


def at_density(make: Callable[[float, float], BlockTable], density: float) -> BlockTable:
    """The table of about this density, by bisection of `make(top_p, min_kv_ratio)`. The floor is half the density,
    about as in the released code, and top_p rises to 0.99; then the floor rises too."""
    low, high = 0.0, 2.0
    table = make(0.99, density / 2)
    for _ in range(10):
        middle = (low + high) / 2
        table = make(min(max(middle, 1e-6), 0.99), max(middle - 1, density / 2))
        low, high = (middle, high) if table.density() < density else (low, middle)
    return table


def by_gain(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, density: float
) -> tuple[float, float]:
    """(density, relative error) of the linear far field on a table of blocks; those of largest gain are read."""
    nothing = replace(table, kv_num_blocks=torch.zeros_like(table.kv_num_blocks))
    dense = scaled_dot_product_attention(query, key, value)
    low, high = -12.0, 12.0
    for _ in range(12):
        middle = (low + high) / 2
        out, _, report = attention_with_far_field(
            query, key, value, nothing, far_field="linear", min_gain=2.0**middle, provider="cpu"
        )
        reached = float(report.density.mean())
        low, high = (low, middle) if reached < density else (middle, high)
    return reached, float((out - dense).norm() / dense.norm())


def keep_cases(
    name: str, grid: Grid, problems: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Iterator[dict[str, Any]]:
    """At every density: the mass that each method keeps, and the error of each far field; means over problems."""
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)

    for density in DENSITIES:
        reference = [Tile(reference_frames=k) for k in range(1, grid[0] + 1)]
        tile = min(reference, key=lambda one: abs(one.table(layout).density() - density))
        rows: dict[str, list[dict[str, float]]] = {}
        for query, key, value in problems:

            def dynamic(
                kind: Callable[..., Any], top_p: float, floor: float, query: Tensor = query, key: Tensor = key
            ) -> BlockTable:
                return table_of(kind(top_p=top_p, min_kv_ratio=floor), query, key, layout)

            tables = {
                "tile": tile.table(layout),
                "flat blocks of 64": nearest_blocks(query, key, 64, 64, density),
                "cubes": at_density(partial(dynamic, Cubes), density),
                "small cubes": at_density(
                    partial(dynamic, partial(Cubes, cube=(4, 2, 2), query_cube=(4, 2, 4))), density
                ),
                "svg2": at_density(partial(dynamic, Svg2), density),
            }
            for method, table in tables.items():
                errors = {far: relative_error(query, key, value, table, far) for far in FAR_FIELDS}
                gain_density, gain_error = by_gain(query, key, value, table, density)
                rows.setdefault(method, []).append(
                    {
                        "density": table.density(),
                        "kept": mass_kept(query, key, table),
                        **errors,
                        "linear by gain": gain_error,
                        "density by gain": gain_density,
                    }
                )
            for clusters, method in single_keys(density, layout).items():
                chosen = {far: selection_of(method, query, key, layout, far) for far in FAR_FIELDS}
                table = chosen["drop"].table
                errors = {
                    far: relative_error(query, key, value, table, far, one.far_blocks)
                    for far, one in chosen.items()
                }
                rows.setdefault(f"keys by {clusters} clusters", []).append(
                    {"density": table.density(), "kept": mass_kept(query, key, table), **errors}
                )
        yield {
            "kind": "keep",
            "problem": name,
            "asked_density": density,
            "methods": {
                method: {field: round(mean(row[field] for row in some), 4) for field in some[0]}
                for method, some in rows.items()
            },
        }


def single_keys(density: float, layout: TokenLayout) -> dict[int, Keys]:
    """`keys` with the same number of query clusters as svg2, and with twice and four times as many."""
    usual, _ = clusters_for(layout.tokens)
    return {n * usual: Keys(kv_budget=density, q_clusters=n * usual) for n in (1, 2, 4)}


def cluster_cases(
    name: str, grid: Grid, problems: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Iterator[dict[str, Any]]:
    """Errors of svg2 with more and with fewer clusters of keys, at equal work.

    Work is counted in products of dense attention: the density, a virtual key for each cluster, and two iterations
    of k-means over both kinds of clusters. Fewer clusters leave more work for the density.
    """
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)
    q_clusters, usual = clusters_for(layout.tokens)
    for work in WORKS:
        for kv_clusters in (2 * usual, usual * 3 // 2, usual, usual * 2 // 3, usual // 2):
            density = work - (2 * kv_clusters + q_clusters) / layout.tokens
            reached, errors = [], []
            for query, key, value in problems:

                def make(
                    top_p: float,
                    floor: float,
                    clusters: int = kv_clusters,
                    query: Tensor = query,
                    key: Tensor = key,
                ) -> BlockTable:
                    method = Svg2(top_p=top_p, min_kv_ratio=floor, kv_clusters=clusters)
                    return table_of(method, query, key, layout)

                table = at_density(make, density)
                reached.append(table.density())
                errors.append([relative_error(query, key, value, table, far) for far in FAR_FIELDS])
            yield {
                "kind": "clusters",
                "problem": name,
                "tokens": layout.tokens,
                "work": work,
                "clusters": [q_clusters, kv_clusters],
                "density": round(mean(reached), 4),
                "error": {
                    far: round(mean(some), 4)
                    for far, some in zip(FAR_FIELDS, zip(*errors, strict=True), strict=True)
                },
            }


@dataclass(frozen=True, slots=True)
class Site:
    """One warm site on fixed tensors."""

    method: Any
    far_field: str
    layout: TokenLayout
    query: Tensor
    key: Tensor
    value: Tensor

    def call(self) -> Callable[[], Tensor]:
        """Run a later call, which continues from the state of the call before."""
        method = self.method.fit(site_of(self.query), self.layout)
        site = site_of(self.query)
        plan = AttentionPlan(
            site=site,
            layout=self.layout,
            method=method.name,
            settings=method,
            provider="cpu",
            far_field=self.far_field,
            reason="",
        )
        constants = method.constants(self.layout)
        shapes = state_shapes(plan)
        state = [torch.zeros(shape) for shape in shapes.values()]
        report = torch.zeros(len(REPORT), site.batch, site.heads)
        module = SparseSite(plan, SiteInputs(constants=tuple(constants), state=tuple(shapes), remembers=True))

        def run(initialised: bool = True) -> Tensor:
            return module(
                self.query,
                self.key,
                self.value,
                None,
                *constants.values(),
                torch.tensor(initialised),
                *state,
                report,
            )

        run(initialised=False)
        return run


def never_by_gain(method: Any, far_field: str) -> Any:
    """The method with a `min_gain` above all gains, if it has one: gains are estimated, but select no block."""
    if not isinstance(method, BlockMethod):
        return method
    return replace(method, min_gain=1e9 if far_field == "linear" else None)


@torch.no_grad()
def cost_case(
    name: str, method: Any, grid: Grid, heads: int, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """A site with every far field, next to dense SDPA."""
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)
    query, key, value = (t.to(dtype) for t in planted_video(grid, heads, 64))
    table = table_of(method, query, key, layout)
    out, lse = block_sparse_attention(query, key, value, table)
    some = slice(0, 1)
    shared = BlockTable(**{name: None if t is None else t[:, some] for name, t in table.tensors().items()})
    if layout.tokens <= 8192:
        assert_close_to_float64(
            out[:, some], lse[:, some], query[:, some], key[:, some], value[:, some], shared.mask()
        )
    calls: dict[str, Callable[[], object]] = {
        far: Site(never_by_gain(method, far), far, layout, query, key, value).call() for far in FAR_FIELDS
    }

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value)

    def near() -> object:
        return block_sparse_attention(query, key, value, table)

    seconds = interleaved_medians({"dense": dense, "near": near, **calls}, repeats)
    density = table.density()
    return {
        "kind": "cost",
        "method": name,
        "grid": grid,
        "heads": heads,
        "dtype": str(dtype)[6:],
        "density": round(density, 4),
        "blocks": [table.q_bounds.shape[-1] - 1, table.kv_bounds.shape[-1] - 1],
        "ms": {step: round(1e3 * value, 1) for step, value in seconds.items()},
        "selection_share": round((seconds["drop"] - seconds["near"]) / seconds["dense"], 4),
        "far_field_share": {
            far: round((seconds[far] - seconds["drop"]) / seconds["dense"], 4) for far in FAR_FIELDS[1:]
        },
        "efficiency": {far: round(seconds["dense"] / seconds[far] * density, 3) for far in FAR_FIELDS},
    }


SITES: dict[int, tuple[Grid, int]] = {
    2304: ((9, 16, 16), 8),
    9216: ((9, 32, 32), 4),
    32760: ((21, 30, 52), 2),
}
"""Tokens -> grid and heads."""


def sites(grid: Grid) -> dict[str, tuple[Any, float, str]]:
    """(method, share of the keys, far field) of every site that is timed."""
    found: dict[str, tuple[Any, float, str]] = {"tile drop": (Tile(), 0.2, "drop")}
    for far_field in FAR_FIELDS:
        for name, density in (("svg2", 0.2), ("cubes", 0.2)):
            found[f"{name} {far_field}"] = (
                never_by_gain(methods(density)[name], far_field),
                density,
                far_field,
            )
    found["svg2 linear 0.13"] = never_by_gain(methods(0.13)["svg2"], "linear"), 0.13, "linear"
    for far_field in ("drop", "mean"):
        found[f"keys {far_field}"] = Keys(kv_budget=0.1), 0.1, far_field
        found[f"dsv {far_field}"] = Dsv(query_group=(1, 4, 4)), 0.1, far_field
    return found


@contextmanager
def busy_core() -> Iterator[None]:
    """A context in which a second process computes on one core."""
    process = get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _spin() -> None:
    while True:
        pass


@torch.no_grad()
def site_cases(tokens: int, dtype: torch.dtype, repeats: int) -> Iterator[dict[str, Any]]:
    """A warm call of every method, in rounds with two of dense SDPA."""
    grid, heads = SITES[tokens]
    layout = TokenLayout(tokens=tokens, grid=grid)
    query, key, value = (t.to(dtype) for t in planted_video(grid, heads, 64))
    inputs, device = (
        Inputs(layout=layout, query=query, key=key, value=value),
        cast(Any, SimpleNamespace(name="cpu")),
    )

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value)

    for name, (method, density, far_field) in sites(grid).items():
        site = GpuSite(device, method, density, far_field, "cpu", inputs)
        site.call(warm=False)
        calls = {"dense": dense, "dense again": dense, "site": site.call}
        wall, cpu = (dict[str, list[float]]((call, []) for call in calls) for _ in range(2))
        for round_ in range(repeats + 1):
            for call, run in calls.items():
                before = time.perf_counter(), time.process_time()
                run()
                if round_:  # the first does not count
                    wall[call].append(time.perf_counter() - before[0])
                    cpu[call].append(time.process_time() - before[1])
        of_dense = median(wall["dense"]), median(cpu["dense"])
        read = site.reported()["density"]
        yield {
            "kind": "site",
            "site": name,
            "tokens": tokens,
            "heads": heads,
            "dtype": str(dtype)[6:],
            "threads": torch.get_num_threads(),
            "density": round(read, 4),
            "wall_ms": {call: round(1e3 * median(times), 1) for call, times in wall.items()},
            "cpu_ms": {call: round(1e3 * median(times), 1) for call, times in cpu.items()},
            "wall_over_dense": round(median(wall["site"]) / of_dense[0], 3),
            "cpu_over_dense": round(median(cpu["site"]) / of_dense[1], 3),
            "wall_dense_over_itself": round(median(wall["dense again"]) / of_dense[0], 3),
            "efficiency": round(of_dense[0] / median(wall["site"]) * read, 3),
        }


MEMORY: tuple[Grid, int] = ((21, 30, 52), 2)
"""Grid of Wan at 480p, and heads."""


def memory_cases() -> Iterator[dict[str, Any]]:
    """The memory of one call of every method and of dense attention, each in a process of its own."""
    names = ["dense", *(name for name, *_ in entries() if not name.endswith("cold"))]
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            yield pool.submit(memory_case, name).result()


@torch.no_grad()
def memory_case(name: str) -> dict[str, Any]:
    """Peak memory of the process in one call, beyond inputs and output, with memory that kernels allocate."""
    grid, heads = MEMORY
    one_call(name, (2, 8, 8), heads)()  # loads libraries
    call = one_call(name, grid, heads)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the call takes memory that was freed before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    out = call()
    peak = _status("VmHWM") - before
    return {
        "kind": "memory",
        "site": name,
        "tokens": math.prod(grid),
        "heads": heads,
        "peak_beyond_output_over_qkv": round((peak - out.nbytes) / (3 * out.nbytes), 3),
        "peak_mb": round((peak - out.nbytes) / 1e6),
    }


def one_call(name: str, grid: Grid, heads: int) -> Callable[[], Tensor]:
    """The first call of one of `entries`, or of dense attention."""
    layout = TokenLayout(tokens=math.prod(grid), grid=grid)
    query, key, value = (
        torch.randn(1, layout.tokens, heads, 128, generator=torch.Generator().manual_seed(seed))
        .to(torch.bfloat16)
        .transpose(1, 2)
        for seed in range(3)
    )
    if name == "dense":
        return partial(scaled_dot_product_attention, query, key, value)
    method, far_field = next((method, far) for found, method, far, _ in entries() if found == name)
    if hasattr(method, "kmeans_iters"):
        method = replace(method, kmeans_iters=(1, 1))
    inputs = Inputs(layout=layout, query=query, key=key, value=value)
    device: Any = SimpleNamespace(name="cpu")
    return partial(GpuSite(device, method, DENSITY, far_field, "cpu", inputs).call, warm=False)


def _status(name: str) -> int:
    """A number of bytes of this process that Linux reports."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def methods(density: float) -> dict[str, Any]:
    """The dynamic methods with exactly this share of the key blocks, or of the keys."""
    share = {"top_p": 1e-6, "min_kv_ratio": density}
    return {"svg2": Svg2(**share), "cubes": Cubes(**share), "keys": Keys(kv_budget=density)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["keep", "clusters", "cost", "sites", "memory"])
    parser.add_argument("--tokens", type=int, nargs="+", choices=SITES, default=list(SITES), help="of sites")
    parser.add_argument("--busy", action="store_true", help="of sites: a second process keeps one core busy")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/methods-cpu.json"))
    arguments = parser.parse_args()
    print(machine())
    cases: list[dict[str, Any]] = []

    def add(case: dict[str, Any]) -> None:
        cases.append(case)
        print(case, flush=True)

    if arguments.only in (None, "keep"):
        grid = (8, 16, 24)
        for case in keep_cases("planted video", grid, [planted_video(grid, 2, 64)]):
            add(case)
        trained = [problem for level in (0.5, 0.9) for problem in recorded(level)]
        for case in keep_cases("trained model", (24, 8, 12), trained):
            add(case)
    if arguments.only in (None, "clusters"):
        for case in cluster_cases("planted video", (8, 16, 24), [planted_video((8, 16, 24), 2, 64)]):
            add(case)
        trained = [problem for level in (0.5, 0.9) for problem in recorded(level)]
        for case in cluster_cases("trained model", (24, 8, 12), trained):
            add(case)
    if arguments.only in (None, "cost"):
        for grid in ((8, 32, 32), (16, 32, 32)):
            for density in (0.1, 0.25, 0.4):
                for name, method in methods(density).items():
                    add(
                        cost_case(
                            name, method, grid, 8 if grid[0] == 8 else 4, torch.float32, arguments.repeats
                        )
                    )
    if arguments.only in (None, "cost", "sites"):
        with busy_core() if arguments.busy else nullcontext():
            for tokens, dtype in product(arguments.tokens, (torch.float32, torch.bfloat16)):
                for case in site_cases(tokens, dtype, arguments.repeats):
                    add(case | {"busy": arguments.busy})
    if arguments.only in (None, "memory"):
        for case in memory_cases():
            add(case)
    write_json(arguments.json, cases)


if __name__ == "__main__":
    main()
