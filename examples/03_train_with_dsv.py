"""Train a small video model with method `dsv`: dense while a predictor learns, then sparse where that is faster.

    python examples/03_train_with_dsv.py --steps 300                  # about eight minutes on one core
    python examples/03_train_with_dsv.py --steps 300 --method dense   # dense training, to compare

The shipped Wan of 4 M parameters, trained on short procedural videos, learns longer ones by flow matching.
Attention becomes sparse as a model learns; from random weights, a few hundred steps are too few for that. After a
kill, the same command continues from the last checkpoint. Curves of loss, predictor, sparsity and time are
written to `--out`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from rich.progress import Progress as Bar

from sparsify_compiler import DSVTrainer
from sparsify_compiler.lab.model import load
from sparsify_compiler.lab.training import Recipe, Stage, Trainer
from sparsify_compiler.pictures import figure, save

SAVE_EVERY = 25
RATES = {"matrix_rate": 0.002, "rate": 2e-4}
"""Rates for a trained model: at the rates of its first training, some hundred small batches undo much."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--frames", type=int, default=24, help="frames of a video (96 tokens each)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--method", choices=("dsv", "dense"), default="dsv")
    parser.add_argument(
        "--mass", type=float, default=0.9, help="share of a head's attention that must be kept"
    )
    parser.add_argument(
        "--query-group", type=int, nargs=3, metavar=("F", "H", "W"), help="tokens that select keys together"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="loss of the predictor below which stage 2 begins"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_out/dsv"))
    options = parser.parse_args()
    out = options.out / options.method
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    stage = Stage(frames=options.frames, batch=options.batch, steps=options.steps)
    trainer = Trainer(load(), Recipe(stages=(stage,), **RATES))
    dsv = None
    if options.method == "dsv":
        group = tuple(options.query_group) if options.query_group else None
        method = {"method": "dsv", "mass": options.mass, "query_group": group}
        trainer.compiled = torch.compile(trainer.model, backend="sparsify", dynamic=False, options=method)
        dsv = DSVTrainer(trainer.compiled, threshold=options.threshold)
    records = resume(trainer, dsv, out)
    with Bar() as bar:
        task = bar.add_task("training", total=options.steps, completed=trainer.step)
        while trainer.step < options.steps:
            begin = time.perf_counter()
            record: dict[str, float] = {"loss": trainer.advance()}
            if dsv is not None and (seen := dsv.step()) is not None:
                record |= {
                    "stage": seen.stage,
                    "predictor": seen.loss,
                    "critical": seen.critical,
                    "share": seen.share,
                    "kept": seen.kept,
                }
            record["seconds"] = time.perf_counter() - begin
            records.append(record)
            text = "  ".join(f"{name} {value:.3f}" for name, value in record.items())
            bar.update(task, advance=1, description=text)
            if trainer.step % SAVE_EVERY == 0 or trainer.step == options.steps:
                checkpoint(trainer, dsv, records, out)
    if dsv is not None and dsv.stage == 2:
        dsv.save_predictor(out / "predictor.safetensors")
    for head in dsv.heads if dsv is not None else ():
        print(
            f"{head.site} head {head.head}: reads {head.share:.3f} of the keys for groups of {head.group}, keeps "
            f"{head.kept:.3f}; an oracle {head.critical:.3f}"
        )
    print(f"mean loss of the last 50 steps: {sum(r['loss'] for r in records[-50:]) / len(records[-50:]):.4f}")
    print(f"curves: {draw(records, out / 'curves.png')}")


def checkpoint(trainer: Trainer, dsv: DSVTrainer | None, records: list[dict[str, float]], out: Path) -> None:
    """Save the checkpoint of the model last, so that the one that `resume` finds is never ahead of the rest."""
    if dsv is not None:
        torch.save(dsv.state_dict(), out / f"dsv_{trainer.step}.pt")
    (out / f"records_{trainer.step}.json").write_text(json.dumps(records))
    trainer.save(out / "checkpoint.pt")


def resume(trainer: Trainer, dsv: DSVTrainer | None, out: Path) -> list[dict[str, float]]:
    if not (out / "checkpoint.pt").exists():
        return []
    trainer.restore(out / "checkpoint.pt")
    if dsv is not None:
        dsv.load_state_dict(torch.load(out / f"dsv_{trainer.step}.pt", weights_only=True))
    print(f"continues from step {trainer.step}")
    return json.loads((out / f"records_{trainer.step}.json").read_text())


def draw(records: list[dict[str, float]], path: Path) -> Path:
    """Draw four curves over the steps."""
    drawn = figure(10, 7)
    panels = drawn.subplots(2, 2).flatten()
    for axes, names in zip(
        panels, (("loss",), ("predictor",), ("critical", "share", "kept"), ("seconds",)), strict=True
    ):
        for name in names:
            points = [(step, record[name]) for step, record in enumerate(records) if name in record]
            if points:
                axes.plot(*zip(*points, strict=True), ".-", label=name)
        axes.set(xlabel="step")
        if names[0] in ("loss", "predictor", "seconds"):
            axes.set_yscale("log")
        axes.legend(names)
    return save(drawn, path)


if __name__ == "__main__":
    main()
