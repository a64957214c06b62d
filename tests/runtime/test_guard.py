"""The guard: sites run dense where dense attention takes less time, and no call but one is timed.

Runs are real; only their seconds are set, so no test depends on a clock.
"""

import json
import logging
import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler import OptionError, explain, generation, stats
from sparsify_compiler.backend import configure
from sparsify_compiler.hosts.scripts import _report
from sparsify_compiler.page import run_of
from sparsify_compiler.runtime import guard
from sparsify_compiler.runtime.cost import Speeds, Times, predicted_times
from sparsify_compiler.runtime.guard import RUNS, Stopwatch, Store
from sparsify_compiler.testing.videos import Video, latents

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]

GRID = (3, 4, 5)
STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "tile": {"reference_frames": 1},
    "tile, mean": {"reference_frames": 1, "far_field": "mean"},
    "sta": {"tile": (1, 2, 2), "window": (1, 1, 1)},
    "svg2": {"q_clusters": 3, "kv_clusters": 6, "kmeans_iters": (3, 1)},
    "cubes": {"cube": (1, 2, 2)},
    "keys": {"kv_budget": 0.2, "q_clusters": 3},
}
Pace = Callable[[str, str], float]
"""(case, `dense` or `sparse`) -> seconds."""


def options(method: str = "tile", **others: Any) -> dict[str, Any]:
    usual = {"dense_layers": 0, "dense_steps": 0, "inner_backend": "eager", "guard": "measured"}
    return {"method": method.split(",")[0], **METHODS[method], **usual, **others}


def compiled(model: nn.Module, method: str = "tile", **others: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="sparsify", options=options(method, **others), dynamic=False)


def video(model: Callable[..., Tensor], streams: int = 1, steps: int = STEPS) -> list[Tensor]:
    """The outputs of a generation, step by step, stream by stream."""
    with generation(steps, streams), torch.no_grad():
        return [
            model(latents(GRID, seed=10 * step + stream), torch.tensor([900.0 - 100 * step]))
            for step in range(steps)
            for stream in range(streams)
        ]


def equal(got: list[Tensor], expected: list[Tensor]) -> list[bool]:
    return list(map(torch.equal, got, expected))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the guard; its file."""
    monkeypatch.setattr(guard, "cache_folder", lambda: tmp_path)
    return guard.store().path


@pytest.fixture
def paced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Pace], Counter[tuple[str, str]]]:
    """Sets the seconds of all runs; counts the runs by case and kind."""

    def set_pace(pace: Pace) -> Counter[tuple[str, str]]:
        runs = Counter[tuple[str, str]]()

        def run(self: Stopwatch, case: str, how: str, *, function: Callable[[], Any], **_: Any) -> Any:
            result = function()
            runs[case, how] += 1
            self._runs.append((case, how, lambda: pace(case, how)))
            return result, pace(case, how)

        monkeypatch.setattr(Stopwatch, "_run", run)
        return runs

    return set_pace


def dense_wins(case: str, how: str) -> float:
    return 1e-3 if how == "dense" else 2e-3


def sparse_wins(case: str, how: str) -> float:
    return 2e-3 if how == "dense" else 1e-3


@pytest.mark.parametrize(("method", "streams"), [("tile", 1), ("sta", 2), ("svg2", 2), ("keys", 1)])
def test_dense_from_the_second_sparse_call_of_the_first_video_on(
    paced: Callable[[Pace], Counter[tuple[str, str]]], method: str, streams: int
) -> None:
    """The timed call itself is sparse. Later calls, and later videos, are the model's own, bit for bit."""
    runs = paced(dense_wins)
    dense, sparse = video(Video(2), streams), video(compiled(Video(2), method, guard="off"), streams)
    torch._dynamo.reset()
    model = compiled(Video(2), method)
    got = video(model, streams)
    assert sorted(how for _, how in runs.elements()) == ["dense"] * RUNS + ["sparse"] * RUNS
    timed = streams + 1  # each stream has a first call
    assert equal(got, sparse)[:timed] == [True] * timed
    assert equal(got, dense) == [False] * timed + [True] * (len(got) - timed)
    assert all(equal(video(model, streams), dense))
    torch._dynamo.reset()
    assert all(equal(video(compiled(Video(2), method), streams), dense))


@pytest.mark.parametrize("method", ["tile, mean", "svg2", "cubes"])
def test_timing_changes_no_result(paced: Callable[[Pace], Counter[tuple[str, str]]], method: str) -> None:
    runs = paced(sparse_wins)
    got = video(compiled(Video(2), method, dense_steps=1))
    assert runs.total() == 2 * RUNS
    torch._dynamo.reset()
    assert all(equal(got, video(compiled(Video(2), method, dense_steps=1, guard="off"))))


@pytest.mark.parametrize("host", ["whole", "regional"])
def test_models_that_apply_changed(paced: Callable[[Pace], Counter[tuple[str, str]]], host: str) -> None:
    """One block is timed for all blocks alike. The blocks after it are dense in the same call."""
    runs = paced(dense_wins)
    dense = video(Video(3))
    model = Video(3)
    sparsify_compiler.apply(model, regional=host == "regional", **options("svg2"))
    got = video(model)
    assert runs.total() == 2 * RUNS
    assert equal(got, dense) == [False, False, True, True]
    assert sorted(name for name, _ in stats(model).guarded) == [f"blocks.{number}" for number in range(3)]
    assert all(plan.method == "dense" for plan in model_plans(model))
    assert stats(model).dense_calls == STEPS - 2
    assert [one.phase for one in stats(model).times] == ["sparse", "sparse", "dense", "dense"]


def test_an_applied_model_that_is_dense_from_its_first_call(
    paced: Callable[[Pace], Counter[tuple[str, str]]],
) -> None:
    """Its times are those of dense calls, its report names the guard, and it needs no analysis as a whole."""
    paced(dense_wins)
    video(compiled(Video(2)))
    torch._dynamo.reset()
    model = Video(2)
    changed = sparsify_compiler.apply(model, **options())
    video(model)
    assert changed.models[0].analysis is None
    assert [one.phase for one in changed.stats().times] == ["dense"] * STEPS
    text = _report(run_of(changed.models[0], "Video"))
    assert "The guard ran blocks.0, blocks.1 dense." in text
    assert "first steps" not in text


def model_plans(model: nn.Module) -> list[sparsify_compiler.AttentionPlan]:
    return explain(model, latents(GRID), torch.tensor([900.0])).plans


class TwoKinds(Video):
    """A model whose second block has other heads than the first."""

    def __init__(self) -> None:
        super().__init__(2)
        self.blocks[1] = Wide(32)
        with torch.no_grad():
            for number, parameter in enumerate(self.blocks[1].parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


class Wide(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        query, key, value = self.qkv(x + time[:, None]).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("method", ["tile", "svg2"])
def test_each_kind_of_site_is_decided_by_itself(
    paced: Callable[[Pace], Counter[tuple[str, str]]], method: str
) -> None:
    """The sites of two heads run dense, those of four stay sparse and keep their state."""
    runs = paced(lambda case, how: (dense_wins if case.startswith("((1, 2,") else sparse_wins)(case, how))
    first_dense = video(compiled(TwoKinds(), method, guard="off", dense_layers=1))
    torch._dynamo.reset()
    model = compiled(TwoKinds(), method, dense_steps=1)
    video(model)
    assert runs.total() == 4 * RUNS
    torch._dynamo.reset()
    model = compiled(TwoKinds(), method)
    assert all(equal(video(model), first_dense))
    assert {one.site for one in stats(model).measurements} == {"blocks.1"}
    assert [site for site, _ in stats(model).guarded] == ["blocks.0"]


def test_no_video_compiles_twice(
    paced: Callable[[Pace], Counter[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paced(dense_wins)
    counted, compile = list[int](), sparsify_compiler._torch.compile_with
    monkeypatch.setattr(
        sparsify_compiler._torch,
        "compile_with",
        lambda *args, **kwargs: counted.append(1) or compile(*args, **kwargs),
    )
    model, seen = compiled(Video(2), "svg2", dense_steps=1), list[int]()
    with generation(STEPS), torch.no_grad():
        for step in range(STEPS):
            model(latents(GRID, seed=step), torch.tensor([900.0 - 100 * step]))
            seen.append(len(counted))
    assert seen == [1, 2, 2, 3]  # dense, sparse, the timed call, then the model's own attention
    video(model)
    assert len(counted) == 3


@pytest.mark.parametrize("host", ["plain", "checkpoint"])
def test_training_decides_by_the_file_before_it_compiles(
    paced: Callable[[Pace], Counter[tuple[str, str]]], host: str
) -> None:
    def gradient(model: Callable[..., Tensor], of: Video) -> Tensor | None:
        model(latents(GRID), torch.tensor([500.0])).square().sum().backward()
        return of.blocks[0].qkv.weight.grad

    runs = paced(dense_wins)
    plain, unknown, known = Video(2), Video(2), Video(2)
    for one in (plain, unknown, known):
        one.train()
        one.use_reentrant = False if host == "checkpoint" else None
    expected = gradient(plain, plain)
    assert not torch.equal(gradient(compiled(unknown, "svg2"), unknown), expected)
    assert not runs
    video(compiled(Video(2), "svg2"))
    torch._dynamo.reset()
    assert torch.equal(gradient(compiled(known, "svg2"), known), expected)


def test_cached_never_times(paced: Callable[[Pace], Counter[tuple[str, str]]]) -> None:
    runs = paced(dense_wins)
    sparse = video(compiled(Video(2), guard="off"))
    torch._dynamo.reset()
    assert all(equal(video(compiled(Video(2), guard="cached")), sparse))
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True)
    try:
        assert all(equal(video(compiled(Video(2), guard="measured")), sparse))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not runs
    torch._dynamo.reset()
    video(compiled(Video(2), guard="measured"))
    torch._dynamo.reset()
    assert all(equal(video(compiled(Video(2), guard="cached")), video(Video(2))))


def test_near_a_tie_sites_stay_sparse(paced: Callable[[Pace], Counter[tuple[str, str]]]) -> None:
    paced(lambda case, how: 0.99e-3 if how == "dense" else 1e-3)
    model = compiled(Video(2))
    video(model)
    assert not stats(model).guarded


@pytest.mark.parametrize(
    ("dense", "counted"), [(0.1, {"dense": 1, "sparse": 1}), (0.8, {"dense": 4, "sparse": 3})]
)
def test_long_runs_are_timed_on_a_part_of_the_queries_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, dense: float, counted: dict[str, int]
) -> None:
    """Where this part shows a clear difference, nothing more runs."""
    runs, computed = Counter[str](), guard._dense
    queries = list[int]()

    def run(self: Stopwatch, case: str, how: str, *, function: Callable[[], Any], **_: Any) -> Any:
        runs[how] += 1
        seconds = dense if how == "dense" else 0.9
        self._runs.append((case, how, lambda: seconds))
        return function(), seconds

    def spy(of: Any, query: Tensor, **others: Any) -> Tensor:
        queries.append(query.shape[2])
        return computed(of, query, **others)

    monkeypatch.setattr(Stopwatch, "_run", run)
    monkeypatch.setattr(guard, "_dense", spy)
    video(compiled(Video(2)))
    assert runs == counted
    assert queries == [8, 60, 60, 60][: counted["dense"]]


def test_dense_attention_that_fails_leaves_a_site_sparse(
    paced: Callable[[Pace], Counter[tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError

    paced(dense_wins)
    monkeypatch.setattr(guard, "_dense", lacks_memory)
    got = video(compiled(Video(2)))
    torch._dynamo.reset()
    assert all(equal(got, video(compiled(Video(2), guard="off"))))


def test_attention_by_hand_never_computes_all_scores_of_a_long_video(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four heads and 60 keys: 1,200 scores are those of 5 queries, a twelfth of all."""
    queries, scales, dense, run = list[int](), set[float](), guard._dense, Stopwatch._run

    def spy(of: Any, query: Tensor, **others: Any) -> Tensor:
        queries.append(query.shape[2])
        return dense(of, query, **others)

    def scaled(self: Stopwatch, case: str, how: str, *, scale: float = 1.0, **others: Any) -> Any:
        scales.add(scale)
        return run(self, case, how, scale=scale, **others)

    monkeypatch.setattr(guard, "_SCORES", 1200)
    monkeypatch.setattr(guard, "_dense", spy)
    monkeypatch.setattr(Stopwatch, "_run", scaled)
    model = Video(1)
    model.blocks[0] = Spelled("by hand")
    video(compiled(model), steps=2)
    assert set(queries) == {5}
    assert scales == {1.0, 12.0}


def test_other_shapes_settings_and_threads_are_other_cases(cache: Path) -> None:
    def case(grid: tuple[int, int, int] = GRID, dtype: torch.dtype = torch.float32, **others: Any) -> str:
        model = Video(1).to(dtype)
        plans = explain(
            model, latents(grid).to(dtype), torch.tensor([9.0]).to(dtype), options=options(**others)
        ).plans
        found = guard.case_of(plans[0], 0.0)
        assert found is not None
        return found

    threads = torch.get_num_threads()
    cases = [case(), case((3, 4, 6)), case(dtype=torch.bfloat16), case(reference_frames=2)]
    cases += [case(provider="reference"), case(far_field="mean"), case(method="svg2")]
    torch.set_num_threads(threads + 1)
    try:
        cases.append(case())
    finally:
        torch.set_num_threads(threads)
    assert len(set(cases)) == len(cases)
    assert case() == cases[0]


class Spelled(nn.Module):
    """Attention of four heads, in a spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        query = (x + time[:, None]).unflatten(-1, (4, 8)).transpose(1, 2)
        return x + self.attend(query).transpose(1, 2).flatten(2)

    def attend(self, query: Tensor) -> Tensor:
        if self.spelling == "by hand":
            return (query @ query.transpose(-1, -2) * 0.3).softmax(-1) @ query
        if self.spelling == "grouped":
            key = query[:, ::2]
            return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        mask = torch.arange(query.shape[2])[None, None, None] < 50
        return F.scaled_dot_product_attention(query, query, query, attn_mask=mask, scale=0.4)


@pytest.mark.parametrize("spelling", ["key mask", "grouped", "by hand"])
@pytest.mark.parametrize("method", ["tile", "keys"])
def test_dense_attention_is_timed_on_the_tensors_of_the_site(
    cache: Path, monkeypatch: pytest.MonkeyPatch, spelling: str, method: str
) -> None:
    runs, dense = list[tuple[Tensor, Tensor]](), guard._dense

    def spy(of: Any, query: Tensor, **others: Any) -> Tensor:
        out = dense(of, query, **others)
        runs.append((query, out))
        return out

    monkeypatch.setattr(guard, "_dense", spy)
    model = Video(1)
    model.blocks[0] = Spelled(spelling)
    video(compiled(model, method), steps=2)
    query, out = runs[-1]
    seen = list[Tensor]()
    hook = model.blocks[0].register_forward_hook(lambda _, given, __: seen.extend(given))
    video(model, steps=2)
    hook.remove()
    x, time = seen[-2:]
    torch.testing.assert_close(query, (x + time[:, None]).unflatten(-1, (4, 8)).transpose(1, 2))
    torch.testing.assert_close(out, model.blocks[0].attend(query))


def test_stats_and_explain_have_the_times(paced: Callable[[Pace], Counter[tuple[str, str]]]) -> None:
    paced(dense_wins)
    model = compiled(Video(2))
    given = latents(GRID), torch.tensor([900.0])
    plans = explain(model, *given).plans
    assert all(plan.method == "tile" for plan in plans)
    assert re.search(r"; predicted: dense: [\d.]+ ms here, [\d.]+ ms sparse$", plans[0].reason)
    video(model)
    assert "The guard ran blocks.0, blocks.1 dense. Dense: 1 ms here, 2 ms sparse." in str(stats(model))
    assert f"{STEPS - 2} dense and 2 sparse calls" in str(stats(model))
    plans = explain(model, *given).plans
    assert [plan.method for plan in plans] == ["dense"] * 2
    assert "dense: 1 ms here, 2 ms sparse (tile)" in plans[0].reason
    (plan,) = explain(Video(1), *given, options=options(guard="off")).plans
    assert plan.method == "tile"
    assert "dense:" not in plan.reason


def test_predicted_times() -> None:
    """60 tokens, 2 heads of 16: 2 * 2 * 60 * 60 * (16 + 16) operations of dense attention."""
    given, speeds = (latents(GRID), torch.tensor([900.0])), Speeds(dense=230_400, sparse=460_800)
    (plan,) = explain(Video(1), *given, options=options(guard="off")).plans
    assert plan.density == pytest.approx(7 / 9)
    assert predicted_times(plan, speeds) == "dense: 2000 ms here, 778 ms sparse"
    speeds = Speeds(dense=460_800, sparse=230_400)
    (plan,) = explain(Video(1), *given, options=options("svg2", guard="off")).plans
    assert "below a density of 0.5" in predicted_times(plan, speeds)


def test_explain_says_where_sparse_attention_is_faster(
    paced: Callable[[Pace], Counter[tuple[str, str]]],
) -> None:
    paced(sparse_wins)
    model = compiled(Video(2))
    video(model)
    plan, _ = explain(model, latents(GRID), torch.tensor([900.0])).plans
    assert plan.method == "tile"
    assert plan.reason.endswith("dense: 2 ms here, 1 ms sparse")


def test_an_applied_model_explains_the_times_of_sites_that_stay_sparse(
    paced: Callable[[Pace], Counter[tuple[str, str]]],
) -> None:
    paced(sparse_wins)
    model = Video(2)
    changed = sparsify_compiler.apply(model, **options())
    video(model)
    assert all(plan.reason.endswith("dense: 2 ms here, 1 ms sparse") for plan in changed.explain().plans), (
        changed.explain()
    )


def test_a_wrong_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_GUARD", "no")
    with pytest.raises(OptionError, match=r"guard in the environment variable SPARSIFY_GUARD 'no'"):
        configure({"method": "svg2"})


@pytest.mark.parametrize("value", ["on", "", True, 1, None.__class__, ["off"]])
def test_wrong_values(value: object) -> None:
    with pytest.raises(OptionError, match=r"guard .*must be one of cached, measured, off"):
        video(compiled(Video(1), guard=value))


# the file


def entry(store: Store) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.path.read_text())["entries"][0]
    return found


@pytest.fixture
def kept(tmp_path: Path) -> Store:
    """A store whose file has one case."""
    store = Store(tmp_path / "guard.json", "this machine, version 1")
    store.add({"a": Times(1.0, 2.0)})
    return store


def read(store: Store, machine: str = "this machine, version 1") -> Times | None:
    """The times of the case, as another process reads them."""
    return Store(store.path, machine).get("a")


def test_another_process_reads_the_times(kept: Store, caplog: pytest.LogCaptureFixture) -> None:
    assert read(kept) == Times(1.0, 2.0)
    assert Store(kept.path, "this machine, version 1").get("b") is None
    assert not caplog.records


def test_times_that_are_known_stay(kept: Store) -> None:
    other = Store(kept.path, kept.machine)
    other.add({"a": Times(5.0, 1.0), "b": Times(3.0, 4.0)})
    assert other.get("a") == Times(1.0, 2.0)
    assert Store(kept.path, kept.machine).get("b") == Times(3.0, 4.0)
    assert kept.get("b") is None, "a decision does not change while a process runs"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text.replace("1.0", "9.0"), "1 changed after the guard wrote it"),
        (lambda text: text.replace('"a"', '"b"'), "1 changed after the guard wrote it"),
        (lambda text: text.replace("checksum", "sum"), "1 changed after the guard wrote it"),
        (lambda text: '{"entries": ["a", 3]}', "2 changed after the guard wrote it"),
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "", "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "{}", "damaged"),
        (lambda text: '{"entries": 3}', "damaged"),
        (lambda text: "\x00\xff", "damaged"),
    ],
    ids=[
        "edited",
        "renamed",
        "no checksum",
        "no entries",
        "half",
        "empty",
        "list",
        "none",
        "number",
        "bytes",
    ],
)
def test_wrong_files_are_ignored_with_one_line(
    kept: Store, caplog: pytest.LogCaptureFixture, change: Callable[[str], str], why: str
) -> None:
    kept.path.write_bytes(change(kept.path.read_text()).encode("latin-1"))
    store = Store(kept.path, kept.machine)
    assert store.get("a") is None
    store.add({"a": Times(3.0, 4.0)})
    (line,) = caplog.records
    assert why in line.getMessage()
    assert str(kept.path) in line.getMessage()
    assert read(kept) == Times(3.0, 4.0)


@pytest.mark.parametrize("machine", ["another machine, version 1", "this machine, version 2"])
def test_entries_of_another_machine_or_version_are_ignored(
    kept: Store, caplog: pytest.LogCaptureFixture, machine: str
) -> None:
    assert read(kept, machine) is None
    assert "1 of another machine or version" in caplog.text


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan, 3, "1.0", None])
def test_entries_without_valid_times_are_ignored(
    kept: Store, caplog: pytest.LogCaptureFixture, number: object
) -> None:
    changed = {**entry(kept), "dense": number}
    changed["checksum"] = guard._checksum(changed)
    kept.path.write_text(json.dumps({"entries": [changed]}))
    assert read(kept) is None
    assert "1 without valid times" in caplog.text


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path / "missing" / "guard.json", "this machine")
    store.add({"a": Times(1.0, 2.0)})
    assert store.get("a") == Times(1.0, 2.0)
    assert "cannot keep its times" in caplog.text


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "guard.json"
    workers = [fork.Process(target=write_some, args=(path, number)) for number in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
        assert one.exitcode == 0
    store = Store(path, "this machine")
    assert all(store.get(f"{number}.{i}") is not None for number in range(4) for i in range(10))
    assert sorted(one.suffix for one in tmp_path.iterdir()) == [".json", ".lock"]


def write_some(path: Path, number: int) -> None:
    logging.disable()
    for i in range(10):
        Store(path, "this machine").add({f"{number}.{i}": Times(1.0, 2.0)})


def test_the_names_that_the_stopwatch_reads_are_those_of_the_ops() -> None:
    for name in ("site", "block_sparse_attention"):
        arguments = getattr(torch.ops.sparsify, name).default._schema.arguments
        assert [one.name for one in arguments[:3]] == ["query", "key", "value"]
        assert "key_bias" in [one.name for one in arguments]
    assert torch.ops.sparsify.site.default._schema.arguments[-1].name == "site"
