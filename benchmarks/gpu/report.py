"""The records of a run as short text: faults, the kernels that ran with their types, and the times."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.gpu.runner import OK, SPEED, Record

MOST_CHARACTERS = 11_000
"""Largest length of a report. The front of a longer report is cut off."""


def text(records: list[Record]) -> str:
    """The report."""
    sections = [kernels(records), steps(records), *times(records), break_even(records), wrong(records)]
    return "\n\n".join(section for section in sections if section)[-MOST_CHARACTERS:] + "\n"


def kernels(records: Iterable[Record]) -> str:
    """Every kernel with the types in which it was launched."""
    seen: dict[str, set[str]] = {}
    for record in records:
        for case in record["cases"]:
            for name, types in case.get("launched", {}).items():
                seen.setdefault(name, set()).update(types)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "int"}
    lines = [f"{name}: {' '.join(sorted(short[t] for t in types))}" for name, types in sorted(seen.items())]
    return "\n".join([f"launched, {len(lines)} kernels", *lines]) if lines else ""


def steps(records: Iterable[Record]) -> str:
    """A line for each step."""
    lines = []
    for record in records:
        cases = record["cases"]
        off = [case["off"] for case in cases if "off" in case]
        worst = f", at most {max(off):.1e} off" if off else ""
        passed = f"{sum(case['ok'] for case in cases)}/{len(cases)}"
        lines.append(f"{record['step']}: {record['status']}, {passed}, {record['seconds']:.0f} s{worst}")
    return "\n".join(lines)


def wrong(records: Iterable[Record]) -> str:
    """The faults, shortened."""
    lines = []
    for record in records:
        lines += [
            f"{record['step']}: {case['case']}: {case['error'][:300]}"
            for case in record["cases"]
            if not case["ok"]
        ]
        if error := record.get("error"):
            lines.append(f"{record['step']}: {record['status']}: {error[-300:]}")
        elif record["status"] not in (OK, "failed"):
            lines.append(f"{record['step']}: {record['status']}")
    return "\n".join(["wrong, or not run", *lines]) if lines else "nothing is wrong, and everything was run"


def timed(records: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """(step, case) of every timed case."""
    for record in records:
        if record["group"] == SPEED:
            yield from ((record["step"], case) for case in record["cases"] if "ms" in case)


def times(records: Iterable[Record]) -> list[str]:
    """A section for each timed case, with dense attention in its first line."""
    sections = [
        f"copy {case['copy_tb_s']:.2f} TB/s, product {case['product_tflops']:.0f} TFLOP/s"
        for record in records
        for case in record["cases"]
        if "copy_tb_s" in case
    ]
    for step, case in timed(records):
        head = f"{step}, {case['case']}: density {case['density']:.3f}, dense {case['dense_ms']:.1f} ms"
        lines = [f"{head} {case['dense_tflops']:.0f} TFLOP/s"]
        for name, ms in sorted(case["ms"].items(), key=lambda item: item[1]):
            figures = f"x{case['speedup'][name]:.2f}, {case['tflops'][name]:.0f} TFLOP/s"
            lines.append(f"  {name}: {ms:.2f} ms, {figures}, efficiency {case['efficiency'][name]:.2f}")
        if "graph_ms" in case:
            lines.append(
                f"  cold {case['cold_ms']:.0f} ms, graph {case['graph_ms']:.2f}, kernels {case['kernels_ms']:.2f}, "
                f"peak {case['peak_over_qkv']:.2f} of q, k and v"
            )
        lines += [f"  {name}: {why}" for name, why in case.get("wrong", {}).items()]
        if "kernels" in case:
            slowest = sorted(case["kernels"].items(), key=lambda item: -item[1]["ms"])[:5]
            parts = (f"{n.removesuffix('_kernel')} {k['ms']:.2f} ({k['launches']})" for n, k in slowest)
            lines.append("  " + ", ".join(parts))
        sections.append("\n".join(lines))
    return sections


def break_even(records: list[Record]) -> str:
    """The densities at which sparse attention takes as long as dense, by a straight line through the times."""
    points: dict[str, list[tuple[float, float]]] = {}
    for step, case in timed(records):
        for name, ms in case["ms"].items():
            if name not in ("cudnn", "flash") and not name.endswith("again"):
                key = f"{step}: {case['case'].split(' at ')[0]}: {name}"
                points.setdefault(key, []).append((case["density"], ms / case["dense_ms"]))
    lines = [
        f"{name}: {density:.2f}"
        for name, found in points.items()
        if (density := even_density(found)) is not None
    ]
    return "\n".join(["as slow as dense at density", *lines]) if lines else ""


def even_density(points: list[tuple[float, float]]) -> float | None:
    """The density where the least squares line through (density, time over dense time) is 1; None if it falls."""
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
    return mean_x + (1 - mean_y) / slope if slope > 0 else None


def header(machine: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())
