"""The guard: a site runs dense where dense attention takes less time than sparse attention.

Every distinct site is timed once, on the tensors of a real call: its second sparse call, when k-means has started
and everything is compiled. `Stopwatch` is a dispatch mode that is active during this call alone. It sees the ops
of sites, and runs each again, and dense attention on the same query, key and value: at most three times each, in
turns. On a CPU, long attention runs on an eighth of the queries first, which is enough where the difference is
clear. So no op of a graph times anything, and no other call pays for it. `Guard` decides between calls, for all
sites of a graph together: `Program` then takes the variant in which these sites run the model's own call. A
decision holds as long as the process, and a file keeps the times for later ones (`Times` of a case, a text of all
that they depend on).

The times. On a GPU, CUDA events, which are read after the call with one synchronisation. On a CPU, the smaller of
two clocks, the wall clock and the CPU time of the process, for each run: attention computes and never waits, so
on an idle machine the wall clock is the smaller one. Where other processes take the cores, the wall clock counts
their turns too, and the CPU time is an upper bound of what an idle machine would take. Of several runs the
smallest counts, since all disturbances add time. Near a tie the site stays sparse, as the options ask.

The file lies in the cache folder of the package. Its name and its entries depend on the machine and on the
versions of package and torch. Entries have a checksum. Wrong ones are ignored and named in one line of the log.
"""

import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sparsify_compiler.config import CUDA_GRAPHS
from sparsify_compiler.methods import LearningMethod
from sparsify_compiler.outputs import cache_folder
from sparsify_compiler.parallel.group import facts_of_all
from sparsify_compiler.plan import AttentionPlan, AttentionSite, GraphPlan, Ranks
from sparsify_compiler.runtime.cost import Times, predicted_times
from sparsify_compiler.runtime.rates import cpu_model, measured_speeds
from sparsify_compiler.runtime.site import is_table_alone

log = logging.getLogger("sparsify_compiler")

RUNS = 3
"""The most runs of sparse and of dense attention of a distinct site."""
_LONG = 0.01
"""Seconds of sparse attention on a CPU from which dense attention is timed on a part of the queries first."""
_PARTS = 8
"""The number of such parts of the queries."""
_SCORES = 1 << 26
"""The most scores that attention by hand computes at once while it is timed."""
_CLEAR = 3.0
"""Ratio of the two times, by the part, at which nothing more is timed."""


def case_of(plan: AttentionPlan, recall: float, device: str | None = None) -> str | None:
    """A text of all that the times of a site depend on; None for a site that is not timed.

    Sites that learn have a rule of their own. Where ranks share the queries of a site, dense attention is not an op
    of one rank.

    Args:
        recall: the option `measure_recall`.
        device: the device type, where it is not that of the site.
    """
    learns = isinstance(plan.settings, LearningMethod) and plan.settings.learns
    where = _device(device or plan.site.device)
    if plan.method == "dense" or learns or plan.sequence is not None or where is None:
        return None
    site, layout = plan.site, plan.layout
    shared = plan.sharing and (plan.sharing.ranks.size, plan.sharing.heads)
    sizes = (
        site.batch,
        site.heads,
        site.kv_heads,
        site.q_tokens,
        site.kv_tokens,
        site.head_dim,
        site.value_dim,
    )
    tokens = layout.before, layout.grid, layout.after
    how = plan.settings, plan.far_field, plan.provider, recall
    return repr((sizes, site.dtype, site.mask, site.spelling, tokens, how, shared, where))


def _device(kind: str) -> str | None:
    """The device of this machine, for `case_of`; None where the machine has no such device."""
    if kind == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return None


@functools.cache
def machine() -> str:
    """The machine and the versions that times depend on, apart from the device and its threads."""
    from sparsify_compiler import __version__

    cores = os.cpu_count()
    return f"{cpu_model()}, {cores} cores, torch {torch.__version__}, sparsify_compiler {__version__}"


@dataclass(slots=True, eq=False)
class Store:
    """The times of cases, in memory and in a file that several processes may read and write."""

    path: Path
    machine: str
    _known: dict[str, Times] | None = None
    _told: bool = False
    """Whether the log has named the errors in the file."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, case: str) -> Times | None:
        """The times of a case. The file is read once in a process, so that no decision changes during a video."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(case)

    def add(self, times: Mapping[str, Times]) -> None:
        """Keep new times. Where a case is known already, the times stay: one process may have decided by them."""
        for case in times:
            self.get(case)
        with self._lock:
            assert self._known is not None
            self._known = {**times, **self._known}
            try:
                with _locked(self.path):
                    self._write({**times, **self._read()})
            except OSError as error:
                self._tell(f"the guard cannot keep its times in {self.path}: {error}")

    def _read(self) -> dict[str, Times]:
        """The entries of the file that are right."""
        try:
            content = json.loads(self.path.read_bytes())
            entries = content["entries"]
            wrong, found = Counter[str](), dict[str, Times]()
            for entry in entries:
                why, case, times = self._checked(entry)
                if why:
                    wrong[why] += 1
                else:
                    found[case] = times
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._tell(f"the guard ignores {self.path}, which is damaged: {error}")
            return {}
        if wrong:
            causes = ", ".join(f"{count} {why}" for why, count in wrong.items())
            self._tell(f"the guard ignores entries of {self.path}: {causes}")
        return found

    def _tell(self, what: str) -> None:
        """One line in the log."""
        if not self._told:
            log.warning("%s", what)
        self._told = True

    def _checked(self, entry: Any) -> tuple[str, str, Times]:
        """(cause why an entry is wrong, its case, its times)."""
        nothing = "", Times(math.nan, math.nan)
        if not isinstance(entry, dict) or entry.get("checksum") != _checksum(entry):
            return "changed after the guard wrote it", *nothing
        if entry.get("machine") != self.machine:
            return "of another machine or version", *nothing
        case, numbers = entry.get("case"), (entry.get("dense"), entry.get("sparse"))
        valid = [x for x in numbers if isinstance(x, float) and 0 < x < math.inf]
        if not isinstance(case, str) or len(valid) < len(numbers):
            return "without valid times", *nothing
        return "", case, Times(*valid)

    def _write(self, known: Mapping[str, Times]) -> None:
        entries = [
            {"case": case, "machine": self.machine, "dense": times.dense, "sparse": times.sparse}
            for case, times in known.items()
        ]
        content = {"entries": [{**entry, "checksum": _checksum(entry)} for entry in entries]}
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, suffix=".tmp") as file:
            try:
                json.dump(content, file, indent=1)
                file.flush()
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise


def _checksum(entry: Mapping[str, Any]) -> str:
    """A checksum of all other fields of an entry."""
    rest = {name: value for name, value in entry.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Other processes wait where they write the same file."""
    with path.with_suffix(".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: one process may lose what it adds
            log.info("%s cannot be locked: %s", path, error)
        yield


@functools.cache
def _store_in(folder: Path) -> Store:
    of_machine = hashlib.sha256(machine().encode()).hexdigest()[:12]
    return Store(folder / f"guard-{of_machine}.json", machine())


def store() -> Store:
    """The times that this process knows."""
    return _store_in(cache_folder())


class _Site(NamedTuple):
    """A site whose times are not known yet."""

    plan: AttentionPlan
    case: str


class Stopwatch(TorchDispatchMode):
    """A mode that times the sites of one call of a graph, sparse and dense."""

    supports_higher_order_operators = True

    def __init__(self, sites: Sequence[_Site], known: Iterable[str], *, alike: bool) -> None:
        """Args:
        sites: the sparse sites of the call, in the order of the graph.
        known: the cases whose times are known.
        alike: whether other ranks make the same runs at the same time, since ops of sites exchange tensors.
        """
        super().__init__()
        self._alike = alike
        self._by_name = {one.plan.site.name: one for one in sites}
        self._tables = [one for one in sites if is_table_alone(one.plan)]
        self._cases = set(known)
        self._runs: list[tuple[str, str, Callable[[], float]]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: otherwise Dynamo compiles nothing under a mode."""
        return True

    def times(self) -> dict[str, Times]:
        """Case -> its times. On a GPU this waits for the runs."""
        found: dict[str, dict[str, list[float]]] = {}
        if self._runs and torch.cuda.is_available():
            torch.cuda.synchronize()
        for case, how, seconds in self._runs:
            found.setdefault(case, {"dense": [], "sparse": []})[how].append(seconds())
        return {
            case: Times(min(one["dense"]), min(one["sparse"])) for case, one in found.items() if one["dense"]
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = self._site(func, args) if isinstance(func, torch._ops.OpOverload) else None
        if site is None or site.case in self._cases:
            return func(*args, **kwargs)
        self._cases.add(site.case)
        again = _repeatable(func, args)
        query, key, value = args[:3]
        run = functools.partial(self._run, site.case, device=query.device)

        def dense(rows: int) -> float | None:
            """Time the first rows, as a part of all; nothing is known where this fails, as where memory lacks."""
            part = functools.partial(
                _dense, site.plan.site, query[:, :, :rows], key=key, value=value, bias=_bias(func, args)
            )
            try:
                return run("dense", function=part, scale=query.shape[2] / rows)[1]
            except RuntimeError as error:
                log.info("dense attention of %s cannot be timed: %s", site.plan.site.name, error)
                return None

        rows = query.shape[2]
        if site.plan.site.spelling == "unfused":  # all scores at once may need more memory than there is
            rows = max(1, min(rows, _SCORES // (query.shape[0] * query.shape[1] * key.shape[2])))
        result, taken = run("sparse", function=lambda: func(*args, **kwargs))
        if taken is not None and taken > _LONG and not self._alike:
            of_dense = dense(min(rows, -(-query.shape[2] // _PARTS)))
            if of_dense is not None:
                if max(of_dense / taken, taken / of_dense) > _CLEAR:
                    return result
                self._runs.pop()
        for number in range(RUNS):
            if number:
                run("sparse", function=lambda: func(*again, **kwargs))
            dense(rows)
        return result

    def _site(self, func: torch._ops.OpOverload, args: Any) -> _Site | None:
        """The site that an op belongs to, if its times are not known yet."""
        name = func._schema.name
        if name == "sparsify::site":
            return None if _captures(args[0].device) else self._by_name.get(args[-1])
        if name != "sparsify::block_sparse_attention":
            return None
        # A table alone is one op without a name. Layers run in the order of the graph.
        shapes = [tuple(one.shape) for one in args[:3]]
        for place, one in enumerate(self._tables):
            site = one.plan.site
            if shapes[0][1:] == (site.heads, site.q_tokens, site.head_dim) and shapes[2][1:] == (
                site.kv_heads,
                site.kv_tokens,
                site.value_dim,
            ):
                del self._tables[place]
                return None if _captures(args[0].device) else one
        return None

    def _run(
        self,
        case: str,
        how: str,
        device: torch.device,
        function: Callable[[], Any],
        scale: float = 1.0,
    ) -> tuple[Any, float | None]:
        """(the result of a run, its seconds times `scale` if they are known now)."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = function()
            end.record()
            self._runs.append((case, how, lambda: scale * begin.elapsed_time(end) / 1e3))
            return result, None
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        seconds = scale * max(1e-9, min(time.perf_counter() - wall, time.process_time() - cpu))
        self._runs.append((case, how, lambda: seconds))
        return result, seconds


def _captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, of which no run can be timed."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _repeatable(func: torch._ops.OpOverload, args: Sequence[Any]) -> list[Any]:
    """The arguments for further runs of an op: copies of those that it writes to."""
    written = (one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)
    return [
        tree_map_only(Tensor, Tensor.clone, one) if writes else one
        for one, writes in zip(args, written, strict=False)
    ]


def _bias(func: torch._ops.OpOverload, args: Sequence[Any]) -> Tensor | None:
    names = [one.name for one in func._schema.arguments]
    bias: Tensor | None = args[names.index("key_bias")]
    return bias


def _dense(site: AttentionSite, query: Tensor, *, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Dense attention, as far as it is spelled as in the model: by hand, or one op."""
    mask = None if bias is None else bias[:, :, None].to(query.dtype)
    groups = query.shape[1] // key.shape[1]
    if site.spelling != "unfused":
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=site.scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    scores = query @ key.transpose(-1, -2) * site.scale
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@dataclass(slots=True, eq=False)
class Guard:
    """The decisions for the sites of one graph under one plan."""

    plan: GraphPlan
    """The plan of all ranks."""
    sites: tuple[_Site, ...]
    """The sparse sites that are timed, with their plans on this rank."""
    ranks: Ranks | None
    settled: bool
    """Whether nothing more is timed."""
    times: dict[str, Times] = field(default_factory=dict)
    """Case -> times, as far as they are known."""
    dense: tuple[str, ...] = ()
    """The names of the sites that run dense."""
    _ran: bool = False
    """Whether a sparse call ran."""

    @classmethod
    def of(
        cls,
        plan: GraphPlan,
        here: Iterable[AttentionPlan],
        option: str | None,
        *,
        recall: float,
        ranks: Ranks | None,
        mode: str | None,
        trains: bool,
    ) -> "Guard":
        """The guard of a graph.

        All ranks that share a model call this together; then rank 0 decides.

        Args:
            plan: the plan of all ranks.
            here: the plans of its sites as they run on this rank.
            option: the option `guard`.
            recall: the option `measure_recall`.
            mode: the mode of torch.compile. CUDA graphs leave no call in which ops could be timed.
            trains: whether the graph runs in training.
        """
        cases = [(one, case_of(one, recall)) for one in here] if option != "off" else []
        sites = tuple(_Site(one, case) for one, case in cases if case is not None)
        never = trains or mode in CUDA_GRAPHS or torch.are_deterministic_algorithms_enabled()
        guard = cls(plan, sites, ranks, settled=option != "measured" or never)
        guard._know({case: times for _, case in sites if (times := store().get(case)) is not None})
        return guard

    @property
    def all_dense(self) -> bool:
        """Whether every sparse site of the plan runs dense."""
        return bool(self.dense) and len(self.dense) == len(self.plan.sparse)

    @property
    def unknown(self) -> tuple[_Site, ...]:
        """The sites whose times are not known."""
        return tuple(one for one in self.sites if one.case not in self.times)

    def update(self) -> None:
        """Take the times that the process knows by now, before a call. Ranks have the same times already."""
        if not self.settled and self.ranks is None:
            known = {one.case: store().get(one.case) for one in self.unknown}
            if found := {case: times for case, times in known.items() if times is not None}:
                self._know(found)

    @contextmanager
    def watching(self, *, warm: bool) -> Iterator[None]:
        """Around a sparse call of the graph.

        Args:
            warm: whether the call compiles nothing and has a state. The first such call after another is timed.
        """
        timed = warm and self._ran and not self.settled
        self._ran = True
        if not timed:
            yield
            return
        self.settled = True
        running = [one for one in self.sites if one.plan.site.name not in self.dense]
        stopwatch = Stopwatch(running, self.times, alike=self.ranks is not None)
        with stopwatch:
            yield
        self._know(found := stopwatch.times())
        if self.ranks is None or self.ranks.rank == 0:
            store().add(found)
            if self.dense:
                log.warning("%s", self)

    def __str__(self) -> str:
        slower = Counter(one.case for one in self.sites if one.plan.site.name in self.dense)
        texts = "; ".join(f"{self.times[case]}, at {count} sites" for case, count in slower.items())
        return (
            f"the guard runs {len(self.dense)} of {len(self.sites)} sparse attentions of a graph dense, which is "
            f"faster: {texts}. options={{'guard': 'off'}} keeps them sparse"
        )

    def _know(self, times: Mapping[str, Times]) -> None:
        """Add times, as rank 0 has them, and decide."""
        self.times = {**self.times, **self._of_rank_0(times)}
        self.settled |= not self.unknown
        wins = {case for case, times in self.times.items() if times.dense_wins}
        self.dense = tuple(one.plan.site.name for one in self.sites if one.case in wins)
        # Heads move by the loads that sites report, and a site that runs dense reports none.
        shared = [one.plan.sharing for one in self.sites]
        moving = any(one is not None and one.balance != "off" for one in shared)
        if moving and not self.all_dense:
            self.dense = ()

    def _of_rank_0(self, times: Mapping[str, Times]) -> Mapping[str, Times]:
        if self.ranks is None or self.ranks.size == 1:
            return times
        # By case, since ranks that differ are compared later, with a better error.
        first, *_ = facts_of_all(self.ranks, times, "the times of the guard")
        own = {one.case for one in self.sites}
        return {case: Times(*seconds) for case, seconds in first.items() if case in own}

    def shown(self) -> GraphPlan:
        """The plan, with the times that are known. The sites that run dense are dense in it."""
        times = {one.plan.site.name: self.times[one.case] for one in self.sites if one.case in self.times}
        return replace(
            self.plan,
            plans=tuple(
                _with_times(one, times.get(one.site.name), dense=one.site.name in self.dense)
                for one in self.plan
            ),
        )


def as_dense(plan: AttentionPlan, times: Times) -> AttentionPlan:
    """The plan of a site that the guard runs dense."""
    why = f"the guard: {times} ({plan.method})"
    return replace(
        plan,
        method="dense",
        settings=None,
        provider="",
        far_field="drop",
        density=1.0,
        guarded=str(times),
        reason=why,
    )


def _with_times(plan: AttentionPlan, times: Times | None, *, dense: bool) -> AttentionPlan:
    """The plan of a site with its times, if they are known."""
    if times is None:
        return plan
    return as_dense(plan, times) if dense else replace(plan, reason=f"{plan.reason}; {times}")


def known_plan(plan: GraphPlan, option: str | None, recall: float, device: str | None) -> GraphPlan:
    """A plan as it runs by the times that are known now, for `explain`. Other times are predicted.

    Args:
        option, recall: as in `Guard.of`.
        device: as in `case_of`.
    """
    return replace(plan, plans=tuple(_known(plan.plans, option, recall, device)))


def _known(
    plans: Iterable[AttentionPlan], option: str | None, recall: float, device: str | None
) -> Iterator[AttentionPlan]:
    for one in plans:
        case = case_of(one, recall, device) if option != "off" else None
        times = None if case is None else store().get(case)
        if times is None and case is not None and option == "measured":
            speeds = measured_speeds(one.site.dtype, device or one.site.device, one.provider)
            yield replace(one, reason=f"{one.reason}; predicted: {predicted_times(one, speeds)}")
        elif times is None:
            yield one
        else:
            yield _with_times(one, times, dense=times.dense_wins)
