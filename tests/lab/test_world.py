"""Videos are a function of (seed, index), and show what their prompts say."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from sparsify_compiler.lab import world
from sparsify_compiler.lab.world import Scene, Thing

THING = Thing(
    shape="disc",
    colour="red",
    texture="plain",
    size="large",
    motion="still",
    start=(16.0, 24.0),
    speed=1.0,
    phase=0.0,
)
STILL = Scene(things=(THING,), pattern="grid", tone="navy", drift="still", offset=(0.0, 0.0))


def near(video, colour):
    """Which pixels [frames, height, width] are of a colour."""
    return np.abs(video - world.rgb(world.COLOURS[colour])).max(axis=0) < 0.02


def test_a_video_is_a_function_of_seed_and_index():
    assert world.scene(5, 7) == world.scene(5, 7)
    scene = world.scene(5, 7)
    assert np.array_equal(world.render(scene), world.render(scene))
    assert np.array_equal(world.render(scene, 4), world.render(scene)[:, :4]), (
        "a short video begins the long one"
    )


def test_streams_never_meet():
    seeds = (world.TRAINING, world.VALIDATION, world.CLASSIFIER, world.HELD_OUT)
    starts = {world.scene(seed, index).offset for seed, index in product(seeds, range(100))}
    assert len(starts) == 400


def test_every_attribute_occurs_and_colours_do_not_repeat():
    scenes = [world.scene(0, index) for index in range(300)]
    things = [thing for scene in scenes for thing in scene.things]
    assert {len(scene.things) for scene in scenes} == {1, 2, 3}
    for name, words in {
        "shape": world.SHAPES,
        "colour": world.COLOURS,
        "texture": world.TEXTURES,
        "size": world.SIZES,
        "motion": world.MOTIONS,
    }.items():
        assert {getattr(thing, name) for thing in things} == set(words)
    assert {(scene.pattern, scene.tone) for scene in scenes} == set(product(world.PATTERNS, world.TONES))
    assert {scene.drift for scene in scenes} == set(world.DRIFTS)
    assert all(len({thing.colour for thing in scene.things}) == len(scene.things) for scene in scenes)


def test_pixels_are_rgb_from_0_to_1_and_each_thing_in_front_shows_its_colour():
    for index in range(20):
        scene = world.scene(0, index)
        video = world.render(scene, 6)
        assert video.shape == (3, 6, world.HEIGHT, world.WIDTH)
        assert video.dtype == np.float32
        assert 0 <= video.min() <= video.max() <= 1
        assert near(video, scene.things[0].colour).any(axis=(1, 2)).all()
        for colour in set(world.COLOURS) - {thing.colour for thing in scene.things}:
            assert near(video, colour).mean() < 0.001, f"{colour} in {scene.prompt}"


@pytest.mark.parametrize("direction", world.DRIFTS)
def test_things_and_background_move_as_said_and_come_back_around(direction):
    thing = replace(THING, motion=direction, speed=1.0)
    video = world.render(replace(STILL, things=(thing,), drift=direction, pattern="waves"), 12)
    down, right = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "still": (0, 0)}[
        direction
    ]
    moved = np.roll(video[:, 0], (11 * down, 11 * right), axis=(1, 2))
    np.testing.assert_allclose(video[:, 11], moved, atol=1e-4)


def test_what_moves_begins_near_the_side_it_leaves_and_the_rest_anywhere():
    starts = {motion: [] for motion in world.MOTIONS}
    for index in range(400):
        scene = world.scene(0, index)
        assert 0 <= min(scene.offset) <= max(scene.offset) <= 4
        for thing in scene.things:
            starts[thing.motion].append(thing.start)
    extent = {"left": (0, 32, 36, 48), "right": (0, 32, 0, 12), "up": (24, 32, 0, 48), "down": (0, 8, 0, 48)}
    for motion, found in starts.items():
        top, bottom, left, right = extent.get(motion, (0, 32, 0, 48))
        rows, columns = np.array(found).T
        for places, low, high in ((rows, top, bottom), (columns, left, right)):
            assert low <= places.min() < low + 0.1 * (high - low)
            assert high - 0.1 * (high - low) < places.max() <= high


def test_what_circles_is_back_after_a_period_and_elsewhere_before():
    video = world.render(replace(STILL, things=(replace(THING, motion="circling"),)))
    np.testing.assert_allclose(video[:, world.PERIOD], video[:, 0], atol=1e-4)
    assert np.abs(video[:, world.PERIOD // 2] - video[:, 0]).max() > 0.5


@pytest.mark.parametrize("size", world.SIZES)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_shapes_have_their_areas(shape, size):
    radius = world.SIZES[size]
    thing = replace(THING, shape=shape, size=size, motion="circling")  # over all offsets from the pixels
    inside = (world.render(replace(STILL, things=(thing,)))[0] > 0.6).sum(axis=(1, 2))
    area = {
        "disc": math.pi * radius**2,
        "ring": math.pi * ((1.03 * radius) ** 2 - (0.47 * radius) ** 2),
        "square": (1.7 * radius) ** 2,
        "cross": 4 * 0.72 * radius**2 - (0.72 * radius) ** 2,
        "triangle": math.sqrt(3) / 4 * (2 * math.sqrt(3) * 0.62 * radius) ** 2,
    }[shape]
    assert inside.mean() == pytest.approx(area, rel=0.05)


def test_textures_differ_in_where_the_white_is():
    white = {}
    for texture in world.TEXTURES:
        scene = replace(STILL, things=(replace(THING, shape="square", texture=texture),))
        white[texture] = world.render(scene, 1)[1, 0, 9:24, 17:32]  # green is white's in a red square
    assert white["plain"].max() == pytest.approx(0.1)
    assert all(white[texture].max() > 0.95 for texture in ("striped", "checked", "dotted"))
    assert white["striped"].std(axis=1).max() < 1e-6 < 0.3 < white["striped"].std(axis=0).min()
    assert white["checked"].std(axis=1).mean() > 0.3
    assert white["dotted"].mean() < 0.4 < white["checked"].mean()


def test_what_is_in_front_hides_what_is_behind():
    behind = replace(THING, colour="blue", size="small")
    video = world.render(replace(STILL, things=(THING, behind)), 1)
    assert not near(video, "blue").any()
    assert near(world.render(replace(STILL, things=(behind, THING)), 1), "blue").any()


def test_the_prompt_says_it_all():
    scene = world.scene(0, 1)
    assert len(scene.prompt.split("; ")) == len(scene.things) + 1
    for thing in scene.things:
        words = set(thing.phrase.split())
        assert {thing.shape, thing.colour, thing.texture, thing.size, thing.motion} <= words
        assert thing.phrase in scene.prompt
    assert {scene.tone, scene.pattern, scene.drift} <= set(scene.prompt.split("; ")[-1].split())
