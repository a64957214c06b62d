"""Quality of videos of few steps, compared with the videos of many steps from the same noise.

All numbers are of held-out prompts. They give the distance of the videos from the exact ones, and their
motion. They give the error of one step that begins on the exact way: errors of early steps grow on the way to
a video, errors of single steps do not. And they give the share of the prompts' attributes that a classifier
finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from sparsify_compiler.lab import classifier, files, world
from sparsify_compiler.lab.machine import fast_products
from sparsify_compiler.lab.model import encode, to_pixels
from sparsify_compiler.lab.quality import motion, mse, psnr
from sparsify_compiler.lab.sampling import GUIDANCE, guided, noise, sample, times, trajectory
from sparsify_compiler.lab.students import Settings
from sparsify_compiler.lab.world import Scene
from sparsify_compiler.runtime.clock import generation

EXACT_STEPS = 100
"""Guided steps of the exact videos, which all others are compared with."""
VIDEOS, ASKED, BATCH = 8, 64, 4
"""Held-out videos to compare, held-out videos to look for attributes in, and videos in one batch."""

Model = Callable[..., Any]
Maker = Callable[[Sequence[Scene], Tensor], Tensor]
"""A function that makes videos, or another tensor for each video, from scenes and noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """Means over videos of held-out prompts; PSNR in dB, errors of RGB from 0 to 1."""

    videos: str
    calls: int
    """Calls of the model for one video."""
    psnr: float
    """PSNR to the model's videos in `EXACT_STEPS` guided steps."""
    mse: float
    motion: float
    step_error: float | None = None
    """Error of one step from each state on the exact way: squared distance to the next state, relative to the
    squared distance between the two states. None for more steps than the students take."""
    found: float | None = None
    """Share of the attributes in `ASKED` prompts that the classifier finds in their videos. None for videos
    of another length than the classifier knows, and for more steps than the students take."""
    psnr_to_dense: float | None = None
    """PSNR to the videos of the dense student; only for sparse videos."""
    mse_to_dense: float | None = None


class Comparison:
    """Comparison with the exact videos of a model. Files keep all results, so no result is computed twice."""

    def __init__(self, model: Model, folder: Path, settings: Settings, bar: Progress) -> None:
        """Make the exact videos."""
        folder.mkdir(exist_ok=True)
        self.folder, self.settings, self.bar = folder, settings, bar
        self.judge = cache(classifier.train)
        self.ways = self._kept("exact", partial(_way, model, settings.segments), self._noises(VIDEOS))
        """[VIDEOS, segments + 1, 3, frames, HEIGHT, WIDTH]: the states at the times of a student."""
        self.exact = to_pixels(self.ways[:, -1])

    def videos(self, name: str, model: Model, steps: int, guidance: float) -> Tensor:
        """Videos [VIDEOS, 3, frames, HEIGHT, WIDTH], RGB from 0 to 1, kept under the name."""
        return self._kept(name, partial(generate, model, steps, guidance), self._noises(VIDEOS))

    def quality(
        self,
        name: str,
        words: str,
        model: Model,
        steps: int,
        guidance: float,
        dense: Tensor | None = None,
    ) -> Quality:
        """Quality of the videos that a model makes in this number of steps.

        Args:
            dense: the videos of the dense student, to compare with too.
        """
        torch.compiler.reset()
        videos, error, found = self.videos(name, model, steps, guidance), None, None
        if steps == self.settings.segments:
            make = partial(_step_errors, model, guidance)
            error = _mean(self._kept(f"{name}-steps", make, self.ways.split(BATCH)))
            if self.settings.frames == world.FRAMES:
                make = partial(_hits, self.judge, partial(generate, model, steps, guidance))
                found = _mean(self._kept(f"{name}-found", make, self._noises(ASKED)).float())
        return Quality(
            videos=words,
            calls=steps * (1 if guidance == 1 else 2),
            psnr=_mean(psnr(videos, self.exact)),
            mse=_mean(mse(videos, self.exact)),
            motion=_mean(motion(videos)),
            step_error=error,
            found=found,
            psnr_to_dense=None if dense is None else _mean(psnr(videos, dense)),
            mse_to_dense=None if dense is None else _mean(mse(videos, dense)),
        )

    def _noises(self, count: int) -> list[Tensor]:
        return [noise(numbers, self.settings.frames) for numbers in _batches(count)]

    def _kept(self, name: str, make: Maker, starts: Sequence[Tensor]) -> Tensor:
        """The results of `make` for the held-out prompts and the start of each batch."""
        count, found = sum(map(len, starts)), []
        task = self.bar.add_task(name, total=count)
        for numbers, start in zip(_batches(count), starts, strict=True):
            scenes = [world.scene(world.HELD_OUT, number) for number in numbers]
            found.append(files.kept(self.folder / f"{name}-{numbers[0]}.pt", partial(make, scenes, start)))
            self.bar.advance(task, len(numbers))
        return torch.cat(found)


def generate(model: Model, steps: int, guidance: float, scenes: Sequence[Scene], start: Tensor) -> Tensor:
    """Videos of the scenes' prompts from noise, RGB from 0 to 1. A student has guidance 1."""
    with fast_products(), generation(steps, streams=1):
        return sample(model, _prompts(scenes), start, steps=steps, guidance=guidance)


def _way(model: Model, segments: int, scenes: Sequence[Scene], start: Tensor) -> Tensor:
    """The states at the times of a student on the exact way: [B, segments + 1, ...] of `start` [B, ...]."""
    with fast_products():
        states = trajectory(model, _prompts(scenes), start, steps=EXACT_STEPS, guidance=GUIDANCE)
        return torch.stack(list(islice(states, 0, None, EXACT_STEPS // segments)), dim=1)


@torch.no_grad()
def _step_errors(model: Model, guidance: float, scenes: Sequence[Scene], way: Tensor) -> Tensor:
    """Errors of each step from the states of the exact way [B, segments + 1, ...]: [B, segments]."""
    segments = way.shape[1] - 1
    text, errors = encode(_prompts(scenes)), []
    with fast_products(), generation(segments, streams=1):
        pairs = zip(pairwise(times(segments).tolist()), pairwise(way.unbind(1)), strict=True)
        for (now, after), (begin, end) in pairs:
            landed = begin + (after - now) * guided(model, begin, now, text, guidance)
            errors.append(mse(landed, end) / mse(begin, end))
    return torch.stack(errors, dim=1)


def _hits(
    judge: Callable[[], classifier.Classifier], make: Maker, scenes: Sequence[Scene], start: Tensor
) -> Tensor:
    """Whether the classifier finds each attribute of the prompts: bool [attributes of all scenes]."""
    return torch.cat(list(classifier.hits(judge(), make(scenes, start), scenes).values()))


def _batches(count: int) -> list[range]:
    """Numbers of held-out videos."""
    return [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]


def _prompts(scenes: Sequence[Scene]) -> list[str]:
    return [scene.prompt for scene in scenes]


def _mean(of_videos: Tensor) -> float:
    return of_videos.mean().item()
