"""The classifier follows what the prompt said, and is scored on it."""

import numpy as np
import pytest
import torch

from sparsify_compiler.lab import classifier, world
from sparsify_compiler.lab.classifier import BACKGROUND, OBJECT, Classifier


def alone(count):
    """Scenes of one thing."""
    scenes = (world.scene(world.HELD_OUT, index) for index in range(1000))
    return [scene for scene in scenes if len(scene.things) == 1][:count]


def test_questions_are_about_all_that_prompts_say():
    scenes = [world.scene(world.HELD_OUT, index) for index in range(5)]
    asked = classifier.questions(scenes, absent=True)
    for number, scene in enumerate(scenes):
        mine = [question for question in asked if question.video == number]
        assert [question.colour for question in mine[:-1]] == [
            *(thing.colour for thing in scene.things),
            None,
        ]
        *things, background, missing = mine
        said = set(scene.prompt.replace(";", "").split())
        for question in (*things, background):
            assert set(question.answers.values()) - {"present"} <= said
        assert set(background.answers) == set(BACKGROUND)
        assert missing.colour not in said
        assert missing.answers == {"presence": "absent"}
    assert len(classifier.questions(scenes)) == len(asked) - 5


def test_things_are_followed_around_the_torus():
    scenes = alone(8)
    near = classifier.likeness(world.videos(scenes), [scene.things[0].colour for scene in scenes])
    rows, columns = classifier.centre(near.sum(dim=3)), classifier.centre(near.sum(dim=2))
    frames = np.arange(world.FRAMES)
    for scene, row, column in zip(scenes, rows, columns, strict=True):
        y, x = scene.things[0].centre(frames)
        assert abs(world.around(row.numpy() - y, world.HEIGHT)).max() < 1.5, scene.prompt
        assert abs(world.around(column.numpy() - x, world.WIDTH)).max() < 1.5, scene.prompt


def test_a_portrait_stands_still_while_its_thing_moves():
    scenes = [scene for scene in alone(30) if scene.things[0].motion in ("left", "up", "circling")][:4]
    videos, colours = world.videos(scenes), [scene.things[0].colour for scene in scenes]
    near = classifier.likeness(videos, colours)
    centres = classifier.centre(near.sum(dim=3)), classifier.centre(near.sum(dim=2))
    image = classifier.portraits(videos, near, *centres)
    assert image.shape == (4, 7, classifier.SIDE, classifier.SIDE)
    moving = videos.std(dim=2).mean(dim=(1, 2, 3))
    middle = slice(classifier.SIDE // 2 - 4, classifier.SIDE // 2 + 4)
    assert image[:, 3].mean(dim=(1, 2)).gt(near.mean(dim=(1, 2, 3))).all()
    assert (image[:, 4:, middle, middle].mean(dim=(1, 2, 3)) < 2 * moving).all()


def test_drift_and_tone_need_no_training():
    scenes = [world.scene(world.HELD_OUT, index) for index in range(40)]
    shares = classifier.found(Classifier(), world.videos(scenes), scenes)
    assert shares["drift"] == shares["tone"] == 1
    assert shares.keys() == {*OBJECT, *BACKGROUND, "all"}
    assert shares["shape"] < 0.6


def test_answers_are_scored_in_the_order_of_the_questions():
    scenes = [world.scene(world.HELD_OUT, index) for index in range(3)]
    asked = classifier.questions(scenes, absent=True)
    right, logits = classifier.truth(asked), classifier.answers(Classifier(), world.videos(scenes), asked)
    assert {name: len(row) for name, row in right.items()} == {name: len(row) for name, row in logits.items()}
    things = [thing for scene in scenes for thing in scene.things]
    assert [world.SHAPES[number] for number in right["shape"]] == [thing.shape for thing in things]
    assert [world.DRIFTS[number] for number in right["drift"]] == [scene.drift for scene in scenes]
    assert len(right["presence"]) == len(things) + 3


def test_it_learns():
    trained = classifier.train(steps=12, batch=5)
    scenes = [world.scene(world.HELD_OUT, index) for index in range(30)]
    shares = classifier.found(trained, world.videos(scenes), scenes)
    assert shares["texture"] > 0.4, shares
    assert shares["motion"] > 0.4, shares


def test_training_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    classifier.train(steps=1, batch=1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_unknown_colour_is_no_question():
    with pytest.raises(KeyError):
        classifier.likeness(torch.zeros(1, 3, 1, 4, 4), ["mauve"])
