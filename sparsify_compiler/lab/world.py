"""A world of moving textured shapes: videos and their prompts, a pure function of (seed, index).

The image is a torus: an object that leaves on the right comes back on the left, with the same shape, colour
and texture. An object that moves straight begins near the side that it moves away from, and a background near
the origin. So the mean of all videos of a prompt shows the movement in the prompt, and a model can learn it
from pure noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating]

FRAMES, HEIGHT, WIDTH = 24, 32, 48
"""Frames, and height and width in pixels, of a whole video."""

COLOURS = {
    "red": (0.95, 0.10, 0.10),
    "green": (0.10, 0.80, 0.15),
    "blue": (0.15, 0.30, 1.00),
    "yellow": (1.00, 0.90, 0.05),
    "magenta": (0.95, 0.15, 0.90),
    "cyan": (0.05, 0.90, 0.95),
}
"""Colours of objects, in RGB from 0 to 1. No two objects of a video have the same."""
TONES = {"navy": (0.10, 0.12, 0.36), "grey": (0.27, 0.27, 0.27), "brown": (0.34, 0.20, 0.08)}
"""Colours of backgrounds."""
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
"""Least and greatest speed of an object, in pixels a frame."""
DRIFT_SPEED = 1.0
ORBIT, PERIOD = 6.0, 12
"""Radius in pixels and frames per turn of a circling object."""
PATTERN_PERIOD = 16
"""Pixels after which a background repeats; divides height and width."""
BEGINNING = 0.25
"""Share of the height or width, from the side that it leaves, in which a moving object begins; and share of a
background's period that is its greatest offset."""
HIGHLIGHT = 0.22
"""Brightness that the light parts of a background add to every channel."""

TRAINING, VALIDATION, CLASSIFIER, HELD_OUT = range(4)
"""Seeds of separate streams of videos: each index of each seed draws from its own generator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """An object: the attributes in the prompt, then those that only the pixels show."""

    shape: str
    colour: str
    texture: str
    size: str
    motion: str
    start: tuple[float, float]
    """Centre of the object, or of its orbit, at frame 0: (rows, columns) in pixels."""
    speed: float
    """Pixels a frame, for objects that move straight."""
    phase: float
    """Angle on the orbit at frame 0, in radians."""

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
    """All attributes of a video."""

    things: tuple[Thing, ...]
    """Objects from front to back."""
    pattern: str
    tone: str
    drift: str
    """Direction in which the background moves."""
    offset: tuple[float, float]
    """Offset of the background at frame 0, in pixels."""

    @property
    def prompt(self) -> str:
        drift = "still" if self.drift == "still" else f"drifting {self.drift}"
        return "; ".join([thing.phrase for thing in self.things] + [f"{self.tone} {self.pattern} {drift}"])


def scene(seed: int, index: int) -> Scene:
    """The scene of a video. Attributes are independent and uniform, but colours do not repeat."""
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
    """Draw the centre (rows, columns) at frame 0, in pixels.

    A straight motion begins near the side that it leaves, another one anywhere.
    """

    def along(direction: float, size: int) -> float:
        place = rng.uniform() * (BEGINNING if direction else 1)
        return size * (1 - place if direction < 0 else place)

    down, right = STEPS.get(motion, STEPS["still"])
    return along(down, HEIGHT), along(right, WIDTH)


def render(scene: Scene, frames: int = FRAMES, spacing: int = 1) -> Array:
    """Render frames 0, spacing, 2 spacing, ... of a video: [3, frames, HEIGHT, WIDTH], RGB from 0 to 1.

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
    """A colour as an array [3, 1, 1, 1]."""
    return np.array(colour, dtype=np.float32).reshape(3, 1, 1, 1)


def around(difference: Array, size: int) -> Array:
    """Shortest way on the torus, from -size/2 to size/2."""
    return (difference + size / 2) % size - size / 2


def background(pattern: str, y: Array, x: Array) -> Array:
    """Brightness of a background at places in pixels, 0 to 1. It repeats after `PATTERN_PERIOD` both ways."""
    turn = 2 * np.pi / PATTERN_PERIOD
    if pattern == "grid":
        return np.clip(2.0 - np.minimum(abs(around(y, PATTERN_PERIOD)), abs(around(x, PATTERN_PERIOD))), 0, 1)
    if pattern == "waves":
        return np.clip(0.5 + 0.8 * np.sin(turn * (y + 3 * np.sin(turn * x))), 0, 1)
    return np.clip(0.5 + 2.5 * np.sin(turn * x) * np.sin(turn * y), 0, 1)


def texture(name: str, y: Array, x: Array) -> Array:
    """Whiteness of an object at places in pixels from its centre, 0 to 1."""
    if name == "plain":
        return np.zeros_like(y + x)
    if name == "striped":
        return np.clip(0.5 + 1.5 * np.sin((2 * np.pi / 6) * y), 0, 1) + 0 * x
    if name == "checked":
        return np.clip(0.5 + 2.5 * np.sin((np.pi / 4.5) * y) * np.sin((np.pi / 4.5) * x), 0, 1)
    return np.clip(2.0 - np.hypot(around(y, 6), around(x, 6)), 0, 1)


def distance(shape: str, y: Array, x: Array, radius: float) -> Array:
    """Distance in pixels from the edge of a shape, negative inside, at places from its centre.

    It is exact near the edge.
    """
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
    """Render scenes: float32 [scenes, 3, frames, HEIGHT, WIDTH], RGB from 0 to 1."""
    return torch.from_numpy(np.stack([render(each, frames, spacing) for each in scenes]))
