"""The command line: see `python -m benchmarks.gpu --help`."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.device import Device, DryRun, Gpu
from benchmarks.gpu.runner import CORRECT, FAILED, OK, RESULTS, Record, Run, perform, serve, unchecked
from benchmarks.gpu.steps import STEPS
from benchmarks.harness import machine
from benchmarks.kernels import kernels

ROOT = Path(__file__).parents[2]
SECONDS = 480.0
REPORT = "report.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Checks and times every Triton kernel on the GPU. Writes results.jsonl, a line for each step; "
        "report.txt, which is printed last; and log.txt.",
    )
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument(
        "--dry-run", action="store_true", help="run everything on the CPU, tiny, in the interpreter"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no step begins after this time")
    parser.add_argument(
        "--only", nargs="+", metavar="STEP", choices=[s.name for s in STEPS], help="run only these steps"
    )
    parser.add_argument(
        "--step", choices=[s.name for s in STEPS], help="run this step in this process, and print its cases"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA GPU, and torch sees none", file=sys.stderr)
        raise SystemExit(2)
    device: Device = DryRun() if options.dry_run else Gpu()
    by_name = {step.name: step for step in STEPS}
    if options.serve:
        return serve(by_name, device)
    if options.step:
        raise SystemExit(not perform(by_name[options.step], device, Path("/dev/stdout")))
    if options.out is None:
        parser.error("--out is needed")
    records = run_all(options, device)
    raise SystemExit(any(record["status"] != OK for record in records))


def run_all(options: argparse.Namespace, device: Device) -> list[Record]:
    """Run the steps, print and write the report."""

    print(report.header(machine()), flush=True)
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    environment = {"TRITON_INTERPRET": str(int(options.dry_run)), "PYTHONPATH": python_path()}
    if options.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = Run(
        steps,
        [sys.executable, "-m", "benchmarks.gpu", "--serve", *(["--dry-run"] if options.dry_run else [])],
        options.out,
        seconds=options.seconds,
        workers=min(16, os.cpu_count() or 1),
        environment=environment,
        tell=lambda line: print(line, flush=True),
    )
    records = run.all()
    if not options.only:
        records.append(coverage(records))
        with (options.out / RESULTS).open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    written = report.text(records)
    (options.out / REPORT).write_text(f"{report.header(machine())}\n{device.facts()}\n\n{written}")
    print("\n" + written)
    return records


def coverage(records: list[Record]) -> Record:
    """The record that says whether a right case launched every kernel of the package."""
    missing = unchecked(kernels(), records)
    found: Record = {"step": "coverage", "group": CORRECT, "status": OK, "seconds": 0.0, "cases": []}
    if missing:
        found |= {"status": FAILED, "error": f"no check launched {', '.join(missing)}"}
    return found


def python_path() -> str:
    """The PYTHONPATH of workers, with the checkout first."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    main()
