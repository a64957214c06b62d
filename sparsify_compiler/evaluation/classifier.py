"""What a video shows, read from its pixels: a small network trained on the world's own videos.

It is asked about one thing at a time: an object by its colour (no two of a video have the same), or the
background. The answers are the words a prompt would have used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsify_compiler.evaluation import world
from sparsify_compiler.evaluation.world import Scene

OBJECT: dict[str, Sequence[str]] = {
    "presence": ("absent", "present"),
    "shape": world.SHAPES,
    "texture": world.TEXTURES,
    "size": tuple(world.SIZES),
    "motion": world.MOTIONS,
}
"""What can be asked of a colour, and the answers."""
BACKGROUND: dict[str, Sequence[str]] = {
    "pattern": world.PATTERNS,
    "tone": tuple(world.TONES),
    "drift": world.DRIFTS,
}
"""What can be asked of the background, and the answers."""
COLOURS = tuple(world.COLOURS)
EVERY = 2
"""Only each so manieth frame is looked at: nothing moves more than 4 pixels in between."""


@dataclass(frozen=True, slots=True)
class Question:
    """A thing of a video, and what is true of it."""

    video: int
    """Its place in the batch."""
    colour: str | None
    """None for the background."""
    answers: Mapping[str, str]
    """By attribute. Of an absent colour, its absence is all there is to know."""


def questions(scenes: Sequence[Scene], *, absent: bool = False) -> list[Question]:
    """All that the prompts of scenes say and, if asked for, one colour of each that is not there."""
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
    """Convolutions on the torus over RGB and the likeness to the colour asked for; a linear head an attribute."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [
            (4, width, 5, (1, 2, 2)),
            (width, 2 * width, 3, (1, 2, 2)),
            (2 * width, 4 * width, 3, (2, 1, 1)),
        ]
        sizes.append((4 * width, 4 * width, 3, (1, 2, 2)))
        layers: list[nn.Module] = []
        for inputs, outputs, kernel, stride in sizes:
            layers += [
                TorusConv(inputs, outputs, kernel, stride),
                nn.GroupNorm(8, outputs),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(8 * width, len(words)) for name, words in (OBJECT | BACKGROUND).items()}
        )

    def forward(self, videos: Tensor, colours: Sequence[str | None]) -> dict[str, Tensor]:
        """Logits [videos, answers] by attribute, of videos [videos, 3, frames, height, width], RGB from 0 to 1."""
        videos = videos[:, :, ::EVERY]
        seen = self.trunk(torch.cat([2 * videos - 1, likeness(videos, colours)], dim=1))
        summary = torch.cat([seen.mean(dim=(2, 3, 4)), seen.mean(dim=2).amax(dim=(2, 3))], dim=1)
        return {name: head(summary) for name, head in self.heads.items()}


class TorusConv(nn.Module):
    """A 3-D convolution whose rows and columns go around."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, (3, kernel, kernel), stride, padding=(1, 0, 0))
        self.pad = kernel // 2

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, channels, frames, height, width] to the same, of other sizes."""
        return self.conv(nn.functional.pad(hidden, (self.pad,) * 4 + (0, 0), mode="circular"))


def likeness(videos: Tensor, colours: Sequence[str | None]) -> Tensor:
    """How near each pixel is to its video's colour, 1 to 0: [videos, 1, frames, height, width]; 0 for no colour."""
    wanted = torch.tensor([world.COLOURS[colour] if colour else (9.0, 9.0, 9.0) for colour in colours])
    squares = (videos - wanted.to(videos).view(-1, 3, 1, 1, 1)).square().sum(dim=1, keepdim=True)
    return torch.exp(-squares / 0.1)


def loss(classifier: Classifier, videos: Tensor, asked: Sequence[Question]) -> Tensor:
    """Cross-entropy of the answers, summed over attributes, each the mean over the questions that have it."""
    logits = classifier(
        videos[[question.video for question in asked]], [question.colour for question in asked]
    )
    total = torch.zeros(())
    for name, words in (OBJECT | BACKGROUND).items():
        rows = [row for row, question in enumerate(asked) if name in question.answers]
        truth = torch.tensor([words.index(asked[row].answers[name]) for row in rows])
        total = total + nn.functional.cross_entropy(logits[name][rows].float(), truth)
    return total


def train(steps: int = 800, batch: int = 8, rate: float = 3e-3) -> Classifier:
    """A classifier trained on the stream of videos kept for it; the same at every call on one machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.CLASSIFIER)
        classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        scenes = [world.scene(world.CLASSIFIER, step * batch + number) for number in range(batch)]
        with torch.autocast("cpu", torch.bfloat16):
            error = loss(classifier, world.videos(scenes), questions(scenes, absent=True))
        error.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return classifier.eval()


@torch.no_grad()
def found(classifier: Classifier, videos: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of what the prompts say that the classifier finds in the videos, by attribute and in `all`.

    Args:
        videos: RGB from 0 to 1, [scenes, 3, frames, height, width].
        scenes: what each was asked to show.
    """
    right: dict[str, list[bool]] = {}
    for question in questions(scenes):
        logits = classifier(videos[question.video : question.video + 1], [question.colour])
        for name, answer in question.answers.items():
            said = (OBJECT | BACKGROUND)[name][int(logits[name].argmax())]
            right.setdefault(name, []).append(said == answer)
    shares = {name: sum(hits) / len(hits) for name, hits in right.items()}
    hits = [hit for attribute in right.values() for hit in attribute]
    return {**shares, "all": sum(hits) / len(hits)}
