"""A classifier of the attributes in a video: small networks trained on the world's own videos.

A question names an object by its colour, since no two objects of a video have the same. The object's pixels
give its track. The track gives its motion. The mean of the frames cut out along the track is a portrait,
which shows shape, texture and size. Each possible drift of the background is undone; the one that fits best
gives a still picture of the background, which shows its pattern and tone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor, nn

from sparsify_compiler.lab import world
from sparsify_compiler.lab.world import Scene

OBJECT: dict[str, Sequence[str]] = {
    "presence": ("absent", "present"),
    "shape": world.SHAPES,
    "texture": world.TEXTURES,
    "size": tuple(world.SIZES),
    "motion": world.MOTIONS,
}
"""Attributes of an object, and the values of each."""
BACKGROUND: dict[str, Sequence[str]] = {
    "drift": world.DRIFTS,
    "pattern": world.PATTERNS,
    "tone": tuple(world.TONES),
}
"""Attributes of the background, and the values of each."""
COLOURS = tuple(world.COLOURS)
SIDE = 28
"""Side of a portrait in pixels."""

Answers = dict[str, Tensor]
"""Attribute -> logits [things, values]."""


@dataclass(frozen=True, slots=True)
class Question:
    """A thing of a video, and its true attributes."""

    video: int
    """Index of the video in the batch."""
    colour: str | None
    """Colour of the object; None for the background."""
    answers: Mapping[str, str]
    """Attribute -> value. An absent colour has only the attribute `presence`."""


def questions(scenes: Sequence[Scene], *, absent: bool = False) -> list[Question]:
    """Questions about all attributes in the prompts of scenes.

    Args:
        absent: whether to add one absent colour for each scene.
    """
    result = []
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            answers = {name: getattr(thing, name) for name in OBJECT if name != "presence"}
            result.append(Question(number, thing.colour, {"presence": "present", **answers}))
        result.append(Question(number, None, {name: getattr(scene, name) for name in BACKGROUND}))
        if absent:
            missing = [colour for colour in COLOURS if all(colour != thing.colour for thing in scene.things)]
            result.append(Question(number, missing[number % len(missing)], {"presence": "absent"}))
    return result


class Classifier(nn.Module):
    """Networks that read attributes from videos of `world.FRAMES` frames. Drift and tone need no training."""

    def __init__(self) -> None:
        super().__init__()
        self.portrait = nn.Sequential(
            *convolution(7, 24, stride=1),
            *convolution(24, 48, stride=2),
            *convolution(48, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, 96),
            nn.ReLU(),
        )
        self.track = nn.Sequential(nn.Linear(3 * world.FRAMES, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
        self.background = nn.Sequential(
            *convolution(3, 24, stride=2),
            *convolution(24, 48, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict(
            {
                "shape": nn.Linear(96, len(OBJECT["shape"])),
                "texture": nn.Linear(96, len(OBJECT["texture"])),
                "size": nn.Linear(96, len(OBJECT["size"])),
                "motion": nn.Linear(64, len(OBJECT["motion"])),
                "presence": nn.Linear(64, len(OBJECT["presence"])),
                "pattern": nn.Linear(48, len(BACKGROUND["pattern"])),
            }
        )

    def objects(self, videos: Tensor, colours: Sequence[str]) -> Answers:
        """Logits for the object of one colour in each video.

        Args:
            videos: [things, 3, frames, height, width], RGB from 0 to 1.
        """
        near = likeness(videos, colours)
        mass = near.sum(dim=(2, 3))
        rows, columns = centre(near.sum(dim=3)), centre(near.sum(dim=2))
        image = self.portrait(portraits(videos, near, rows, columns))
        moves = [step(rows, world.HEIGHT), step(columns, world.WIDTH)]
        path = self.track(torch.cat([*moves, mass / 100], dim=1))
        features = {"motion": path, "presence": path}
        return {name: self.heads[name](features.get(name, image)) for name in OBJECT}

    def backgrounds(self, videos: Tensor) -> Answers:
        """Logits for the background of each video.

        Args:
            videos: [videos, 3, frames, height, width], RGB from 0 to 1.
        """
        stills, misfits = zip(*(still(videos, direction) for direction in world.DRIFTS), strict=True)
        misfit = torch.stack(misfits, dim=1)
        best = torch.stack(stills)[misfit.argmin(dim=1), torch.arange(len(videos))]
        pattern = self.background(10 * (best - best.mean(dim=(2, 3), keepdim=True)))
        tones = hue(torch.tensor(list(world.TONES.values())))
        tone = -torch.cdist(hue(best.flatten(2).median(dim=2).values), tones)
        return {"drift": -misfit, "pattern": self.heads["pattern"](pattern), "tone": tone}


def hue(colours: Tensor) -> Tensor:
    """RGB [colours, 3] less its mean, which the light parts of a background change."""
    return colours - colours.mean(dim=1, keepdim=True)


def convolution(inputs: int, outputs: int, *, stride: int) -> tuple[nn.Module, ...]:
    """Layers of a normalised two-dimensional convolution on the torus."""
    return (
        nn.Conv2d(inputs, outputs, 5, stride, padding=2, padding_mode="circular"),
        nn.GroupNorm(8, outputs),
        nn.ReLU(),
    )


def likeness(videos: Tensor, colours: Sequence[str]) -> Tensor:
    """Closeness of each pixel to its video's colour, 1 to 0: [videos, frames, height, width]."""
    wanted = torch.tensor([world.COLOURS[colour] for colour in colours]).view(-1, 3, 1, 1, 1)
    return torch.exp(-(videos - wanted).square().sum(dim=1) / 0.05)


def centre(mass: Tensor) -> Tensor:
    """Mean place on a circle, in pixels, of masses [videos, frames, places]: [videos, frames]."""
    places = mass.shape[2]
    angle = torch.arange(places) * (2 * pi / places)
    return torch.atan2((mass * angle.sin()).sum(dim=2), (mass * angle.cos()).sum(dim=2)) * (places / (2 * pi))


def step(places: Tensor, size: int) -> Tensor:
    """Shortest way around from each frame to the next, in pixels: [videos, frames], 0 at the end."""
    ahead = (places.diff(dim=1) + size / 2) % size - size / 2
    return nn.functional.pad(ahead, (0, 1))


def portraits(videos: Tensor, near: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean and deviation of RGB and the mean likeness along a track: [videos, 7, SIDE, SIDE].

    The weight of a frame is the part of the object that it shows.
    """
    around = torch.arange(SIDE) - SIDE // 2
    y = (rows.round().long().unsqueeze(2) + around) % world.HEIGHT
    x = (columns.round().long().unsqueeze(2) + around) % world.WIDTH
    which, frame = (
        torch.arange(len(videos)).view(-1, 1, 1, 1),
        torch.arange(videos.shape[2]).view(1, -1, 1, 1),
    )
    full = torch.cat([videos, near.unsqueeze(1)], dim=1).movedim(1, 4)
    cut = full[which, frame, y.unsqueeze(3), x.unsqueeze(2)]
    weight = near.sum(dim=(2, 3)).add(1e-3)
    weight = (weight / weight.sum(dim=1, keepdim=True)).view(len(videos), -1, 1, 1, 1)
    mean = (weight * cut).sum(dim=1)
    deviation = (weight * (cut - mean.unsqueeze(1)).square()).sum(dim=1).sqrt()
    return torch.cat([mean, deviation[..., :3]], dim=3).movedim(3, 1)


def still(videos: Tensor, direction: str) -> tuple[Tensor, Tensor]:
    """The still background, if it drifts in a direction, and the mean distance of the frames from it.

    Shapes: [videos, 3, height, width] and [videos]. Objects do not count: they are white or of strong
    colours.
    """
    span = videos.amax(dim=1, keepdim=True) - videos.amin(dim=1, keepdim=True)
    dull = ((span < 0.45) & (videos.amin(dim=1, keepdim=True) < 0.65)).float()
    frames, weight = hold(videos, direction), hold(dull, direction)
    image = (weight * frames).sum(dim=2) / weight.sum(dim=2).clamp(min=1)
    miss = weight * (frames - image.unsqueeze(2)).abs()
    return image, miss.sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4)).clamp(min=1)


def hold(videos: Tensor, direction: str) -> Tensor:
    """Videos with the drift undone: each frame is moved back by the drift since the first frame."""
    down, right = (round(-world.DRIFT_SPEED * part) for part in world.STEPS[direction])
    frames = [
        frame.roll((number * down, number * right), dims=(2, 3))
        for number, frame in enumerate(videos.unbind(dim=2))
    ]
    return torch.stack(frames, dim=2)


def answers(classifier: Classifier, videos: Tensor, asked: Sequence[Question]) -> Answers:
    """Logits for all questions about videos: [questions that have the attribute, values], in their order."""
    things = [question for question in asked if question.colour]
    rest = [question for question in asked if not question.colour]
    result = classifier.objects(
        videos[[question.video for question in things]], [question.colour or "" for question in things]
    )
    for name in result:
        result[name] = result[name][[name in question.answers for question in things]]
    return result | classifier.backgrounds(videos[[question.video for question in rest]])


def truth(asked: Sequence[Question]) -> Answers:
    """Indices of the true values: int64 [questions that have the attribute]."""
    return {
        name: torch.tensor(
            [words.index(question.answers[name]) for question in asked if name in question.answers],
            dtype=torch.int64,
        )
        for name, words in (OBJECT | BACKGROUND).items()
    }


def train(steps: int = 150, batch: int = 16, rate: float = 2e-3) -> Classifier:
    """Train a classifier on its own stream of videos. Every call on one machine gives the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.CLASSIFIER)
        classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for number in range(steps):
        scenes = [world.scene(world.CLASSIFIER, number * batch + place) for place in range(batch)]
        asked = questions(scenes, absent=True)
        right = truth(asked)
        logits = answers(classifier, world.videos(scenes), asked)
        trained = [name for name in right if name in OBJECT or name == "pattern"]
        torch.stack(
            [nn.functional.cross_entropy(logits[name], right[name]) for name in trained]
        ).sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return classifier.eval()


@torch.no_grad()
def hits(classifier: Classifier, videos: Tensor, scenes: Sequence[Scene]) -> Answers:
    """Whether the classifier finds the prompts' attributes in videos.

    Args:
        videos: RGB from 0 to 1, [scenes, 3, frames, height, width].
        scenes: the scene whose prompt each video shows.

    Returns:
        Attribute -> bool [questions with this attribute].
    """
    asked = questions(scenes)
    logits, right = answers(classifier, videos, asked), truth(asked)
    return {name: logits[name].argmax(dim=1) == right[name] for name in right}


def found(classifier: Classifier, videos: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Share of `hits` for each attribute, and in `all`."""
    of = hits(classifier, videos, scenes)
    return {
        name: hit.float().mean().item() for name, hit in {**of, "all": torch.cat(list(of.values()))}.items()
    }
