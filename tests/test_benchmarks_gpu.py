"""`benchmarks.gpu` without a GPU: the whole of it as a dry run; what its runner survives; what its checks see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.attention import reference
from sparsify_compiler.methods import METHODS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Warn only mode", "ignore:.*flex_attention called without")


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    """`benchmarks` is no part of the package, so it is imported from the checkout."""
    monkeypatch.syspath_prepend(ROOT)


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    run = command_line("--out", "nowhere")
    assert run.returncode == 2
    assert run.stderr == "benchmarks.gpu needs a CUDA GPU, and torch sees none\n"


def run_dry(out, *arguments):
    """(printed output, records, folder) of a dry run."""
    pytest.importorskip("triton", minversion="3.7")  # of 3.6 the interpreter does not know NumPy 2.4
    run = command_line("--dry-run", "--out", str(out), "--seconds", "3600", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return run.stdout, records, out


def test_a_step_of_each_group_runs_dry(tmp_path):
    steps = ["forward float32", "site dsv", "speed dsv"]
    _, records, _ = run_dry(tmp_path, "--only", *steps)
    assert {r["step"] for r in records} == set(steps)
    for record in records:
        assert record["status"] == "ok"
        assert record["cases"]
        assert all(case["ok"] and case["launched"] for case in record["cases"])


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The dry run of every step, run once."""
    return run_dry(tmp_path_factory.mktemp("gpu"))


@pytest.mark.nightly
def test_every_step_runs_dry(dry_run):
    from benchmarks.gpu.steps import STEPS

    printed, records, out = dry_run
    assert {r["step"] for r in records} == {step.name for step in STEPS} | {"coverage"}
    assert {r["status"] for r in records} == {"ok"}
    for record in records[:-1]:
        assert record["cases"]
        assert all(
            case["ok"] and case["launched"] for case in record["cases"] if case["case"] not in NO_KERNEL
        )
    assert len(list(out.iterdir())) <= 8
    report = (out / "report.txt").read_text()
    assert "nothing is wrong, and everything was run" in report
    assert printed.endswith(report.split("\n\n", 1)[1] + "\n")
    assert len(report) < 12_000


NO_KERNEL = ("device", "ceilings")


@pytest.mark.nightly
def test_every_kernel_is_checked_in_every_type(dry_run):
    from benchmarks.gpu.runner import SPEED
    from benchmarks.kernels import kernels

    launched: dict[str, set[str]] = {}
    for record in (r for r in dry_run[1] if r["group"] != SPEED):
        for case in record["cases"]:
            for name, types in case["launched"].items():
                launched.setdefault(name, set()).update(types)
    assert launched.keys() == kernels().keys()
    of_indices = {"rank_kernel", "place_kernel", "readers_kernel"}
    of_centroids = {"scores_kernel", "select_kernel"}
    for name, types in launched.items():
        if name in of_indices:
            assert types == {"int32"}
        elif name in of_centroids:
            assert types == {"float32"}
        else:
            assert types == {"float32", "float16", "bfloat16"}


@pytest.mark.nightly
def test_every_method_has_a_site(dry_run):
    sites = {r["step"].removeprefix("site ") for r in dry_run[1] if r["step"].startswith("site ")}
    assert sites == METHODS.keys() - {"dense"}


def test_a_kernel_without_a_check_is_a_failure(monkeypatch):
    from benchmarks.gpu import __main__ as command

    known = {"one_kernel": None, "new_kernel": None}
    monkeypatch.setattr(command, "kernels", lambda: known)
    right = {"case": "a", "ok": True, "launched": {"one_kernel": ["float32"]}}
    wrong = {"case": "b", "ok": False, "error": "", "launched": {"new_kernel": ["float32"]}}
    timed = {"case": "c", "ok": True, "launched": {"new_kernel": ["float32"]}}
    records = [{"group": "correct", "cases": [right, wrong]}, {"group": "speed", "cases": [timed]}]
    found = command.coverage(records)
    assert (found["status"], found["error"]) == ("failed", "no check launched new_kernel")
    del known["new_kernel"]
    assert command.coverage(records)["status"] == "ok"


WORKER = """
import os, signal, sys, time
from benchmarks.gpu.device import DryRun
from benchmarks.gpu.runner import CORRECT, SPEED, Step, serve

def right(device):
    yield "one", lambda: {"found": 1}

def raises(device):
    yield "before", lambda: None
    yield "wrong", lambda: 1 / 0
    yield "after", lambda: print("printed by a case") or {"found": 2}

def prepares_badly(device):
    yield "before", lambda: None
    raise AssertionError("while preparing")

def ends(how):
    def step(device):
        yield "before", lambda: {"found": 3}
        yield "last", how
    return step

steps = {
    "right": right, "raises": raises, "prepares badly": prepares_badly,
    "hangs": ends(lambda: time.sleep(1000)),
    "is killed": ends(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "exits": ends(lambda: print("last words", file=sys.stderr) or sys.stderr.flush() or os._exit(7)),
    "is empty": lambda device: (),
}
STEPS = {
    name: Step(name=name, function=function, seconds=2 if name == "hangs" else 60, group=CORRECT)
    for name, function in steps.items()
}
if __name__ == "__main__":
    serve(STEPS, DryRun())
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """Runs steps of `WORKER` by name, one after the other, with a step that is right at the end."""
    from benchmarks.gpu.runner import Run

    path = tmp_path / "faulty_worker.py"
    path.write_text(WORKER)
    monkeypatch.syspath_prepend(tmp_path)
    import faulty_worker

    def run(*names: str, seconds: float = 300):
        steps = [faulty_worker.STEPS[name] for name in (*names, "right")]
        command = [sys.executable, str(path)]
        told: list[str] = []
        records = Run(
            steps,
            command,
            tmp_path,
            seconds=seconds,
            workers=1,
            environment={"PYTHONPATH": str(ROOT)},
            tell=told.append,
        ).all()
        lines = (tmp_path / "results.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == records
        assert [r["step"] for r in records] == [step.name for step in steps]
        assert len(told) == len(records)
        return records

    yield run
    sys.modules.pop("faulty_worker")


def cases_of(record):
    return [(case["case"], case["ok"]) for case in record["cases"]]


def test_a_case_that_raises_leaves_the_others(faulty, tmp_path):
    raised, badly, empty, right = faulty("raises", "prepares badly", "is empty")
    assert raised["status"] == "failed"
    assert cases_of(raised) == [("before", True), ("wrong", False), ("after", True)]
    assert raised["cases"][1]["error"].startswith("ZeroDivisionError: division by zero (faulty_worker.py:")
    assert raised["cases"][2]["found"] == 2
    assert "printed by a case" in (tmp_path / "log.txt").read_text()
    assert badly["status"] == "failed"
    assert cases_of(badly) == [("before", True), ("(preparing)", False)]
    assert "while preparing" in badly["cases"][1]["error"]
    assert (empty["status"], empty["cases"]) == ("failed", [])
    assert (right["status"], cases_of(right)) == ("ok", [("one", True)])


def test_a_step_that_hangs_or_crashes_leaves_the_others(faulty):
    """The first step starts the worker, so that the short limit of the one that hangs is its own."""
    first, hung, killed, exited, right = faulty("right", "hangs", "is killed", "exits")
    assert first["status"] == right["status"] == "ok"
    assert hung["status"] == "timed out"
    assert "killed after 2 s and 1 cases" in hung["error"]
    for record, words in ((killed, "SIGKILL"), (exited, "exit code 7")):
        assert record["status"] == "crashed"
        assert words in record["error"]
    assert "last words" in exited["error"]
    for record in (hung, killed, exited):
        assert cases_of(record) == [("before", True)]
        assert record["cases"][0]["found"] == 3


def test_what_the_deadline_cuts_off_is_said(faulty):
    hung, right = faulty("hangs", seconds=0.5)
    assert hung["status"] == "timed out"
    assert (right["status"], right["cases"]) == ("not run: out of time", [])
    assert [r["status"] for r in faulty("raises", seconds=0)] == ["not run: out of time"] * 2


def test_new_memory_is_poisoned():
    from sparsify_compiler.testing.poison import poisoned_memory

    with poisoned_memory():
        like = torch.zeros(2)
        assert like.new_empty(3).isnan().all()
        assert (like.new_empty(3, dtype=torch.int32) == -(2**30)).all()
        assert like.new_empty(3, dtype=torch.bool).shape == (3,)


def test_reading_a_value_back_is_seen_without_a_gpu():
    from benchmarks.gpu.device import DryRun

    with DryRun().not_synchronising():
        assert bool(torch.tensor(True))
        for read in (torch.Tensor.item, bool, int, torch.Tensor.tolist, torch.Tensor.nonzero):
            with pytest.raises(RuntimeError, match="would wait for a GPU"):
                read(torch.ones(()))
    assert torch.ones(()).item() == 1


def test_a_graph_writes_its_results_anew():
    from benchmarks.gpu.device import DryRun

    given = torch.ones(2)
    (twice, _), replay = DryRun().captured(lambda: (2 * given, None))
    given.add_(1)
    assert twice.tolist() == [2, 2]
    replay()
    assert twice.tolist() == [4, 4]


@pytest.fixture
def tiny(monkeypatch):
    """A dry run whose kernels are the reference's, which needs no interpreter."""
    from benchmarks.gpu import attention, blocks, clusters, prediction, sites, speed
    from benchmarks.gpu.device import DryRun

    choose, load = providers.choose, providers.load
    monkeypatch.setattr(providers, "choose", lambda _, **of: choose("reference", **of))
    monkeypatch.setattr(providers, "load", lambda _, room: load("reference", room))
    monkeypatch.setattr(providers, "fuses", lambda _: False)
    monkeypatch.setattr(
        attention,
        "forward",
        lambda q, k, v, table, bias, scale, _: reference.forward(q, k, v, table, bias, scale),
    )
    for module in (attention, speed):
        monkeypatch.setattr(module, "backward", lambda *arguments: reference.backward(*arguments[:-1]))
    # The reference looks at values, as a kernel may not.
    monkeypatch.setattr(DryRun, "not_synchronising", lambda self: torch.no_grad())
    modules = {"blocks": blocks, "clusters": clusters, "prediction": prediction, "sites": sites}
    return DryRun(), {"attention": attention, "speed": speed, **modules}


def spoiled(function, place):
    """The function with a large error in one element of one of its results, next to the largest element."""

    def call(*arguments, **options):
        results = list(function(*arguments, **options))
        result = results[place] = results[place].contiguous().clone()
        if result.is_floating_point():
            result.view(-1)[0] += 0.3 * (1 + result[result.isfinite()].abs().max())
        else:
            result.view(-1)[0] += 1
        return tuple(results)

    return call


def first(cases, word: str):
    """The first case with a word in its name."""
    return next(function for name, function in cases if word in name)


@pytest.mark.parametrize(
    ("module", "word", "function", "places"),
    [
        ("blocks", "statistics float32", "block_means", (0, 1)),
        ("blocks", "statistics bfloat16", "block_statistics", (0, 1, 2, 3, 4, 5)),
        ("blocks", "merge float16", "merge_far_field", (0, 1)),
        ("blocks", "near and far float32 linear", "attention_with_far_field", (0, 1)),
        ("clusters", "k-means bfloat16 D", "kmeans", (0, 1)),
        ("clusters", "k-means float32 far", "kmeans", (1,)),
        ("clusters", "sort", "sort_by_label", (0, 1)),
        ("clusters", "top-p", "top_p_blocks", (0, 1, 2)),
        ("prediction", "float32 rank", "top_k_keys", (0, 1)),
        ("prediction", "integers", "top_k_keys", (0, 1)),
        ("prediction", "bfloat16 groups", "top_k_keys", (0, 1)),
    ],
)
def test_checks_see_what_is_wrong_and_nothing_else(tiny, monkeypatch, module, word, function, places):
    device, modules = tiny
    check = first(modules[module].cases(device), word)
    check()
    right = getattr(modules[module], function)
    for place in places:
        monkeypatch.setattr(modules[module], function, spoiled(right, place))
        with pytest.raises((AssertionError, RuntimeError)):
            check()


def test_checks_of_attention_see_what_is_wrong(tiny, monkeypatch):
    device, modules = tiny
    attention = modules["attention"]
    dtype = torch.float32
    for case in attention.forward_cases(dtype, device):
        case[1]()
    check = first(attention.forward_cases(dtype, device), "full")
    for place in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "forward", spoiled(attention.forward, place))
            with pytest.raises(AssertionError):
                check()
    check = first(attention.backward_cases(dtype, device), "by block")
    check()
    for place in (0, 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "backward", spoiled(attention.backward, place))
            with pytest.raises(AssertionError):
                check()


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_wrong_gradients_of_video_size_are_seen(tiny, monkeypatch, wrong):
    device, modules = tiny
    speed = modules["speed"]
    problem = speed.video_problem(device, 2, 0.5)
    way = next(config for _, _, config in modules["attention"].backward_ways(device, torch.bfloat16))
    speed.error_of_some_gradients(problem, way)
    monkeypatch.setattr(speed, "backward", spoiled(speed.backward, wrong))
    with pytest.raises(AssertionError):
        speed.error_of_some_gradients(problem, way)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_a_site_that_differs_from_the_reference_is_seen(tiny, monkeypatch, name):
    device, modules = tiny
    sites = modules["sites"]
    check = first(sites.cases(name, device), "grouped heads")
    assert check()["off"] == 0
    call = sites.Site.call
    monkeypatch.setattr(
        sites.Site,
        "call",
        lambda self, warm=True: call(self, warm) * (1.02 if self.plan.provider == "triton" else 1),
    )
    with pytest.raises(AssertionError, match="from the reference with the same selection"):
        check()


def test_candidates_that_are_wrong_have_no_time(tiny, monkeypatch):
    device, modules = tiny
    speed, attention = modules["speed"], modules["attention"]
    name, bad = list(attention.candidates(device).items())[1]
    right = attention.forward

    def forward(*arguments):
        out, lse = right(*arguments)
        return 1.5 * out if arguments[-1] == bad else out, lse

    monkeypatch.setattr(attention, "forward", forward)
    found = speed.time_tiles(device, 0.2)
    assert name in found["wrong"]
    assert name not in found["ms"]
    shipped = found["shipped"]
    assert {shipped, f"{shipped} again", "cudnn", "flash"} <= found["ms"].keys()


def test_rows_of_the_mask_are_those_of_the_table(tiny):
    from benchmarks.gpu import inputs

    device, rows = tiny[0], torch.tensor([0, 7, 30, 39])
    shapes = {"ordered": [(2, 3), (1, 3), (1, 1)], "flat": [(2, 1)]}
    for kind, leads in shapes.items():
        for lead in leads:
            table = inputs.cluster_table(device, *lead, 40, 5, 9, 0.4, ordered=kind == "ordered")
            assert torch.equal(inputs.mask_of_rows(table, rows), table.mask()[:, :, rows])
    table = inputs.single_key_table(device, 2, 100, 20, 0.13)
    assert torch.equal(inputs.mask_of_rows(table, rows), table.mask()[:, :, rows])
    assert torch.equal(table.mask().sum(-1), torch.full((1, 2, 100), 13))
    assert not torch.equal(table.mask()[:, 0], table.mask()[:, 1])


def test_clusters_of_every_head_are_their_own(tiny):
    from benchmarks.gpu import inputs

    sizes, order = inputs.clusters(tiny[0], 1, 3, 500, 10, ordered=True)
    assert order.sort(-1).values.equal(torch.arange(500, dtype=torch.int32).expand(1, 3, -1))
    assert (sizes.sum(-1) == 500).all()
    assert (sizes[..., 1] == 1).all()
    assert (sizes[..., 2] == 0).all()
    assert not torch.equal(sizes[:, 0], sizes[:, 1])
    assert not torch.equal(order[:, 0], order[:, 1])


def test_flex_reads_the_same_blocks(tiny):
    from benchmarks.gpu import inputs, speed

    table = inputs.flat_table(tiny[0], 2, 1024, 128, 128, 0.5)
    mask = speed.flex_mask(table)
    assert torch.equal(mask.to_dense().bool(), table.block_mask())
    i, j = torch.randint(1024, (2, 99), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(99, dtype=torch.long)
    assert torch.equal(mask.mask_mod(zero, zero + 1, i, j), table.mask()[0, 1, i, j])


def test_every_way_of_the_backward_pass_is_checked(tiny):
    from benchmarks.gpu.attention import backward_ways, shipped

    for dtype in (torch.float32, torch.bfloat16):
        ways = list(backward_ways(tiny[0], dtype))
        assert {(config.keys is None, config.group) for _, _, config in ways} == {
            (True, 1),
            (False, 1),
            (False, 64),
        }
        assert {width for width, _, _ in ways} == {width for width, _ in shipped(tiny[0], dtype)}


def test_figures_and_their_report():
    from benchmarks.gpu import report, speed

    query = torch.empty(1, 2, 1000, 64, device="meta")
    work = speed.flops(query, query)
    assert work == 4 * 1000**2 * 64 * 2
    times = {"ours": 1.0, "cudnn": 4.0, "flash": 5.0}
    figures = speed.rated(times, 0.2, work, ("cudnn", "flash"))
    assert figures["dense_ms"] == 4
    assert figures["speedup"]["ours"] == 4
    assert figures["efficiency"]["ours"] == pytest.approx(0.8)
    assert figures["tflops"]["ours"] == pytest.approx(work * 0.2 / 1e9)
    assert figures["tflops"]["cudnn"] == pytest.approx(work / 4e9)
    cases = [
        {"case": f"some at density {d}", "ok": True, "launched": {"a_kernel": ["bfloat16"]}} for d in (1, 2)
    ]
    slower = speed.rated(times | {"ours": 3.0}, 0.6, work, ("cudnn", "flash"))
    cases = [cases[0] | figures, cases[1] | slower]
    bad = {"case": "odd", "ok": False, "error": "far off", "launched": {}}
    records = [
        {"step": "speed it", "group": "speed", "status": "ok", "seconds": 1.0, "cases": cases},
        {"step": "check", "group": "correct", "status": "failed", "seconds": 1.0, "cases": [bad]},
        {"step": "late", "group": "speed", "status": "not run: out of time", "seconds": 0.0, "cases": []},
    ]
    text = report.text(records)
    assert "a_kernel: bf16" in text
    assert "  ours: 1.00 ms, x4.00, 0 TFLOP/s, efficiency 0.80" in text
    assert "speed it: some: ours: 0.80" in text  # 1/4 of dense at 0.2, 3/4 at 0.6
    assert "check: odd: far off" in text
    assert "late: not run: out of time" in text
    assert "nothing is wrong" not in text
    assert len(report.text(records * 200)) <= report.MOST_CHARACTERS + 1


def test_a_line_that_does_not_rise_meets_nothing():
    from benchmarks.gpu.report import even_density

    assert even_density([(0.1, 0.5)]) is None
    assert even_density([(0.1, 0.5), (0.2, 0.4)]) is None
    assert even_density([(0.1, 0.5), (0.3, 1.5), (0.2, 1.0)]) == pytest.approx(0.2)
