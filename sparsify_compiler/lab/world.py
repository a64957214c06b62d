"""A world of moving textured shapes: videos and their prompts, a pure function of (seed, index).

The image is a torus: what leaves on the right comes back on the left, so that an object that went out of sight
returns with the shape, colour and texture it had. What moves straight begins near the side that it leaves, and a
background near the origin: what a prompt says of movement shows in the mean of all the videos it describes, and so
can be learnt from pure noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating]

FRAMES, HEIGHT, WIDTH = 24, 32, 48
"""Of a whole video: frames and pixels."""

COLOURS = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (1.00, 0.90, 0.05),
    "magenta": (0.95, 0.15, 0.90),
    "cyan": (0.05, 0.90, 0.95),
}
"""Of objects, in RGB from 0 to 1. No two objects of a video have the same."""
TONES = {"navy": (0.10, 0.12, 0.36), "grey": (0.27, 0.27, 0.27), "brown": (0.34, 0.20, 0.08)}
"""Of backgrounds."""
SHAPES = ("disc", "square", "triangle", "cross", "ring")
TEXTURES = ("plain", "striped", "checked", "dotted")
SIZES = {"small": 7.0, "large": 10.0}
"""Radius in pixels."""
STEPS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0), "still": (0.0, 0.0)}
"""Directions in (rows, columns)."""
MOTIONS = (*STEPS, "circling")
PATTERNS = ("grid", "waves", "tiles")
DRIFTS = tuple(STEPS)

MOST_OBJECTS = 3
SPEEDS = (1.0, 1.75)
"""Least and greatest of an object, in pixels a frame."""
DRIFT_SPEED = 1.0
ORBIT, PERIOD = 6.0, 12
"""Radius in pixels and frames per turn of a circling object."""
PATTERN_PERIOD = 16
"""Pixels after which a background repeats; divides height and width."""
BEGINNING = 0.25
"""Of the height or width, counted from the side left, where things that move begin; of a background's period, its
greatest offset."""
HIGHLIGHT = 0.22
"""What the light parts of a background have more of, in every channel."""

TRAINING, VALIDATION, CLASSIFIER, HELD_OUT = range(4)
"""Seeds of the streams of videos that never meet: each index of each seed draws from its own generator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """An object: what a prompt says of it, and then what only its pixels show."""

    shape: str
    colour: str
    texture: str
    size: str
    motion: str
    start: tuple[float, float]
    """Centre at frame 0 in (rows, columns), pixels; of the orbit where it circles."""
    speed: float
    """Pixels a frame, for those that move straight."""
    phase: float
    """Of its orbit at frame 0, in radians."""

    @property
    def phrase(self) -> str:
        motion = f"moving {self.motion}" if self.motion in ("left", "right", "up", "down") else self.motion
        return f"{self.size} {self.colour} {self.texture} {self.shape} {motion}"

    def centre(self, frame: Array) -> tuple[Array, Array]:
        """Rows and columns of the centre, at frames of any shape."""
        if self.motion == "circling":
            angle = self.phase + frame * (2 * np.pi / PERIOD)
            shift = ORBIT * np.sin(angle), ORBIT * np.cos(angle)
        else:
            down, right = STEPS[self.motion]
            shift = frame * (self.speed * down), frame * (self.speed * right)
        return self.start[0] + shift[0], self.start[1] + shift[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """All there is to know about a video."""

    things: tuple[Thing, ...]
    """From front to back."""
    pattern: str
    tone: str
    drift: str
    """Where the camera's movement takes the background."""
    offset: tuple[float, float]
    """Of the background at frame 0, in pixels."""

    @property
    def prompt(self) -> str:
        drift = "still" if self.drift == "still" else f"drifting {self.drift}"
        return "; ".join([thing.phrase for thing in self.things] + [f"{self.tone} {self.pattern} {drift}"])


def scene(seed: int, index: int) -> Scene:
    """The scene of a video. All that its prompt says is independent and uniform, but colours do not repeat."""
    rng = np.random.default_rng([seed, index])
    colours = rng.permutation(list(COLOURS))[: rng.integers(1, MOST_OBJECTS + 1)]
    things = [
        Thing(
            shape=str(rng.choice(SHAPES)),
            colour=str(colour),
            texture=str(rng.choice(TEXTURES)),
            size=str(rng.choice(list(SIZES))),
            motion=(motion := str(rng.choice(MOTIONS))),
            start=start(rng, motion),
            speed=rng.uniform(*SPEEDS),
            phase=rng.uniform(0, 2 * np.pi),
        )
        for colour in colours
    ]
    return Scene(
        things=tuple(things),
        pattern=str(rng.choice(PATTERNS)),
        tone=str(rng.choice(list(TONES))),
        drift=str(rng.choice(DRIFTS)),
        offset=(
            rng.uniform(0, BEGINNING * PATTERN_PERIOD),
            rng.uniform(0, BEGINNING * PATTERN_PERIOD),
        ),
    )


def start(rng: np.random.Generator, motion: str) -> tuple[float, float]:
    """Centre (rows, columns) at frame 0, in pixels: near the side that a straight motion leaves, else anywhere."""

    def along(direction: float, size: int) -> float:
        place = rng.uniform() * (BEGINNING if direction else 1)
        return size * (1 - place if direction < 0 else place)

    down, right = STEPS.get(motion, STEPS["still"])
    return along(down, HEIGHT), along(right, WIDTH)


def render(scene: Scene, frames: int = FRAMES, spacing: int = 1) -> Array:
    """Frames 0, spacing, 2 spacing, ... of a video: [3, frames, HEIGHT, WIDTH], RGB from 0 to 1.

    Edges are smooth over one pixel.
    """
    frame, row, column = np.meshgrid(
        *(np.arange(size, dtype=np.float32) for size in (frames, HEIGHT, WIDTH)), indexing="ij", sparse=True
    )
    frame = frame * spacing
    dy, dx = ((DRIFT_SPEED * step) * frame for step in STEPS[scene.drift])
    lit = background(scene.pattern, row - dy - scene.offset[0], column - dx - scene.offset[1])
    video = rgb(TONES[scene.tone]) + HIGHLIGHT * lit
    for thing in reversed(scene.things):
        y, x = thing.centre(frame)
        y, x = around(row - y, HEIGHT), around(column - x, WIDTH)
        white = texture(thing.texture, y, x)
        cover = np.clip(0.5 - distance(thing.shape, y, x, SIZES[thing.size]), 0, 1)
        video += cover * (rgb(COLOURS[thing.colour]) * (1 - white) + white - video)
    return video.astype(np.float32)


def rgb(colour: tuple[float, float, float]) -> Array:
    """[3, 1, 1, 1]."""
    return np.array(colour, dtype=np.float32).reshape(3, 1, 1, 1)


def around(difference: Array, size: int) -> Array:
    """The shortest way on the torus: from -size/2 to size/2."""
    return (difference + size / 2) % size - size / 2


def background(pattern: str, y: Array, x: Array) -> Array:
    """How light a background is at places in pixels, 0 to 1, with period `PATTERN_PERIOD` in both."""
    turn = 2 * np.pi / PATTERN_PERIOD
    if pattern == "grid":
        return np.clip(2.0 - np.minimum(abs(around(y, PATTERN_PERIOD)), abs(around(x, PATTERN_PERIOD))), 0, 1)
    if pattern == "waves":
        return np.clip(0.5 + 0.8 * np.sin(turn * (y + 3 * np.sin(turn * x))), 0, 1)
    return np.clip(0.5 + 2.5 * np.sin(turn * x) * np.sin(turn * y), 0, 1)


def texture(name: str, y: Array, x: Array) -> Array:
    """How white an object is at places in pixels from its centre, 0 to 1."""
    if name == "plain":
        return np.zeros_like(y + x)
    if name == "striped":
        return np.clip(0.5 + 1.5 * np.sin((2 * np.pi / 6) * y), 0, 1) + 0 * x
    if name == "checked":
        return np.clip(0.5 + 2.5 * np.sin((np.pi / 4.5) * y) * np.sin((np.pi / 4.5) * x), 0, 1)
    return np.clip(2.0 - np.hypot(around(y, 6), around(x, 6)), 0, 1)


def distance(shape: str, y: Array, x: Array, radius: float) -> Array:
    """Pixels from the edge of a shape at places from its centre, negative inside (near the edge, at least)."""
    if shape == "disc":
        return np.hypot(y, x) - radius
    if shape == "ring":
        return abs(np.hypot(y, x) - 0.75 * radius) - 0.28 * radius
    if shape == "square":
        return np.maximum(abs(y), abs(x)) - 0.85 * radius
    if shape == "triangle":
        return np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.62 * radius
    arm = 0.36 * radius
    return np.minimum(np.maximum(abs(x) - radius, abs(y) - arm), np.maximum(abs(y) - radius, abs(x) - arm))


def videos(scenes: Sequence[Scene], frames: int = FRAMES, spacing: int = 1) -> Tensor:
    """Rendered scenes: float32 [scenes, 3, frames, HEIGHT, WIDTH], RGB from 0 to 1."""
    return torch.from_numpy(np.stack([render(each, frames, spacing) for each in scenes]))
