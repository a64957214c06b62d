"""Distil many guided steps into few, one call each: multistep latent consistency distillation.

    python examples/04_consistency_distillation.py --steps 300   # six to fifteen minutes on one core

Student and teacher are the shipped Wan of 4 M parameters. The example reports the PSNR of videos of held-out
prompts, compared with videos that the teacher makes from the same noise in a hundred guided steps. It does so for
the student, and for the teacher with the student's number of steps, with guidance (two calls a step) and without.
A video without motion would have a good PSNR, so the example also reports the motion, the mean |difference| of
neighbouring frames. After a kill, the same command continues from the last checkpoint.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.progress import Progress as Bar
from torch import nn

from sparsify_compiler import ConsistencyConfig, ConsistencyTrainer, sample_few_steps
from sparsify_compiler.lab import world
from sparsify_compiler.lab.machine import fast_products
from sparsify_compiler.lab.model import encode, load, to_model, to_pixels, unconditional
from sparsify_compiler.lab.quality import motion, psnr
from sparsify_compiler.lab.sampling import GUIDANCE, SHIFT, noise, sample
from sparsify_compiler.lab.training import WIDEST

EXACT_STEPS = 100
SAVE_EVERY = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--segments", type=int, default=5, help="number of steps of the student; must divide 50"
    )
    parser.add_argument("--frames", type=int, default=8, help="frames of a video (96 tokens each)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of AdamW")
    parser.add_argument("--videos", type=int, default=8, help="number of videos for validation")
    parser.add_argument("--out", type=Path, default=Path("demo_out/consistency"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    student, teacher = load(), load()
    trainer = ConsistencyTrainer(
        torch.compile(student, dynamic=False),
        torch.compile(teacher, dynamic=False),
        ConsistencyConfig(segments=options.segments, guidance=GUIDANCE, shift=SHIFT),
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.rate, weight_decay=0.0)
    losses = resume(student, trainer, optimizer, options.out)
    with Bar() as bar:
        task = bar.add_task("distilling", total=options.steps, completed=len(losses))
        while len(losses) < options.steps:
            begin = time.perf_counter()
            losses.append(advance(trainer, optimizer, len(losses), options.frames, options.batch))
            seconds = time.perf_counter() - begin
            bar.update(task, advance=1, description=f"loss {losses[-1]:.4f}  seconds {seconds:.2f}")
            if len(losses) % SAVE_EVERY == 0 or len(losses) == options.steps:
                checkpoint(student, trainer, optimizer, losses, options.out)
    for first in range(0, len(losses), 50):
        part = losses[first : first + 50]
        print(f"mean loss of steps {first + 1} to {first + len(part)}: {sum(part) / len(part):.4f}")
    validate(trainer, teacher, options.frames, options.videos)


def advance(
    trainer: ConsistencyTrainer, optimizer: torch.optim.Optimizer, step: int, frames: int, batch: int
) -> float:
    """Do one step of training and return its loss. Products of matrices are `fast_products`."""
    scenes = [world.scene(world.TRAINING, step * WIDEST + number) for number in range(batch)]
    video, text = to_model(world.videos(scenes, frames)), encode([scene.prompt for scene in scenes])
    with fast_products():
        loss = trainer.loss(
            video, {"encoder_hidden_states": text}, {"encoder_hidden_states": unconditional(batch)}
        )
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    trainer.step()
    return loss.item()


@torch.no_grad()
def validate(trainer: ConsistencyTrainer, teacher: nn.Module, frames: int, count: int) -> None:
    """Print the difference of few steps from many."""
    prompts = [world.scene(world.VALIDATION, number).prompt for number in range(count)]
    start, steps = noise(range(count), frames), trainer.config.segments
    with fast_products():
        exact = sample(teacher, prompts, start, steps=EXACT_STEPS)
        found = {
            f"teacher, {steps} guided steps": sample(teacher, prompts, start, steps=steps),
            f"teacher, {steps} steps": sample(teacher, prompts, start, steps=steps, guidance=1),
            f"student, {steps} steps": to_pixels(
                sample_few_steps(
                    trainer.target, start, {"encoder_hidden_states": encode(prompts)}, trainer.config
                )
            ),
        }
    print(f"teacher, {EXACT_STEPS} guided steps: motion {motion(exact).mean():.4f}")
    for name, videos in found.items():
        print(f"{name}: {psnr(videos, exact).mean():.2f} dB, motion {motion(videos).mean():.4f}")


def checkpoint(
    student: nn.Module,
    trainer: ConsistencyTrainer,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    out: Path,
) -> None:
    state = {
        "student": student.state_dict(),
        "consistency": trainer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
    }
    partial = out / "checkpoint.partial"
    torch.save(state, partial)
    partial.replace(out / "checkpoint.pt")


def resume(
    student: nn.Module, trainer: ConsistencyTrainer, optimizer: torch.optim.Optimizer, out: Path
) -> list[float]:
    """The losses of the steps so far."""
    if not (out / "checkpoint.pt").exists():
        return []
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    student.load_state_dict(state["student"])
    trainer.load_state_dict(state["consistency"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continues from step {len(state['losses'])}")
    return state["losses"]


if __name__ == "__main__":
    main()
