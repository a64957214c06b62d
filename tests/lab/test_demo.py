"""The demo: what it measures is so, what it writes can be looked at."""

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sparsify_compiler import cli
from sparsify_compiler.lab import demo, sampling, world
from sparsify_compiler.lab.demo.videos import METHOD, MOST_ERROR, TARGET
from sparsify_compiler.lab.model import load

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

TINY = demo.Size(
    grid=(5, 3, 4),
    heads=2,
    head_dim=16,
    layers=2,
    dtype=torch.float32,
    reference_frames=1,
    rounds=2,
    prompts=2,
    frames=3,
    steps=3,
    backend="eager",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The result of a small demo, and what it printed."""
    console = Console(width=240, record=True)
    result = demo.run("cpu", tmp_path_factory.mktemp("demo"), size=TINY, console=console)
    return result, console.export_text()


def test_a_step_is_measured_checked_and_drawn(run):
    result, text = run
    step = result.step
    assert result.passed
    assert step.density["tile"] == pytest.approx((3 * 5 - 2) / 25)
    assert 0.1 <= step.density["svg2"] < 1
    assert 0 < step.recall <= 1
    assert step.distance["tile"] > 100 * step.bound, "the check must be able to fail"
    assert step.picture.exists()
    assert "blocks.{0..1}.attn1" in text
    assert "times as fast" in text


def test_a_demo_whose_check_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.SIZES, "cpu", replace(TINY, layers=1, rounds=1))
    monkeypatch.setitem(demo.BOUND, torch.float32, math.nan)
    monkeypatch.setattr(demo.videos, "run", lambda *_: None)
    failed = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path)])
    assert failed.exit_code == 1
    assert "does NOT compute" in failed.stdout


def test_the_videos_are_the_models(run):
    """The dense ones are those of the same sampler on the plain model; the sparse ones are others."""
    made = run[0].videos
    assert made.prompts == tuple(world.scene(world.HELD_OUT, index).prompt for index in range(2))
    start = sampling.noise([0, 1], TINY.frames)
    plain = sampling.sample(load(), made.prompts, start, steps=TINY.steps)
    torch.testing.assert_close(made.videos["dense"], plain, atol=1e-3, rtol=0)
    for name in (METHOD, TARGET):
        assert made.videos[name].shape == plain.shape
        assert (made.videos[name] - plain).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3


def test_the_numbers_are_those_of_the_videos(run):
    made, text = run[0].videos, run[1]
    arrays = {name: videos.double().numpy() for name, videos in made.videos.items()}
    assert list(arrays) == ["dense", METHOD, TARGET]
    lines = {line.split(" │ ")[0].strip("│ "): line for line in text.splitlines()}
    for row, prompt in enumerate(made.prompts):
        assert set(prompt.split()) <= set(text.split())
        for name in (METHOD, TARGET):
            error = np.mean((arrays[name][row] - arrays["dense"][row]) ** 2)
            assert made.psnr(name)[row] == pytest.approx(-10 * math.log10(error), abs=1e-3)
            assert f"{made.psnr(name)[row]:.1f} dB" in lines[f"PSNR to dense, {name}"]
        for name, videos in arrays.items():
            moved = np.mean(
                [np.abs(videos[row, :, i + 1] - videos[row, :, i]) for i in range(TINY.frames - 1)]
            )
            assert made.motion(name)[row] == pytest.approx(moved, abs=1e-5)
            assert f"{made.motion(name)[row]:.4f}" in lines[f"motion, {name}"]
    assert made.speedup(METHOD) == made.seconds["dense"] / made.seconds[METHOD]
    assert f"{made.speedup(METHOD):.2f} times as fast" in text
    (line,) = (line for line in text.splitlines() if "error of attention" in line)
    measured = np.mean([float(one.measured_error.mean()) for one in made.errors.measurements])
    assert f"at most {MOST_ERROR:g}, {measured:.3f}" in line
    assert {one.asked_error for one in made.errors.measurements} == {MOST_ERROR}
    assert all(0 < seconds < math.inf for times in (made.seconds, made.warm_up) for seconds in times.values())
    assert 0 < made.attention_share < math.inf


def test_the_density_of_every_attention_is_told(run):
    """A fifth of three steps is one, which is dense; a video begins anew after the warm-up."""
    made, text = run[0].videos, run[1]
    sites = {f"blocks.{layer}.attn1" for layer in range(6)}
    assert made.stats.dense_calls == 1
    assert {(one.site, one.call) for one in made.stats.measurements} == {
        (site, call) for site in sites for call in range(1, TINY.steps)
    }
    assert all(0.03 <= float(one.density.mean()) < 1 for one in made.stats.measurements)
    assert all(site in text for site in sites)
    assert made.picture.stat().st_size > 0


def test_the_gif_shows_the_videos_in_their_order(run):
    made = run[0].videos
    with Image.open(made.gif) as gif:
        assert gif.n_frames == TINY.frames
        assert gif.info["loop"] == 0
        shown = np.stack([pixels(gif, frame) for frame in range(gif.n_frames)])
    height, width = 4 * world.HEIGHT, 4 * world.WIDTH
    assert shown.shape == (TINY.frames, 2 * height + 4, 3 * width + 8, 3)
    rows = [shown[:, row * (height + 4) :][:, :height] for row in range(2)]
    parts = {
        name: np.stack([row[:, :, place * (width + 4) :][:, :, :width] for row in rows])
        for place, name in enumerate(("dense", METHOD, TARGET))
    }
    videos = {name: np.stack([enlarged(row) for row in made.videos[name]]) for name in parts}
    for name, other in permutations(parts, 2):
        apart = np.abs(videos[name] - videos[other]) > 0.25
        assert apart.any(), "the videos must differ for the parts to"
        error = np.abs(parts[name] - videos[name])
        assert (error.mean(axis=(1, 2, 3, 4)) < 0.04).all(), "256 evenly spread colours would do so"
        assert error[apart].mean() < np.abs(parts[name] - videos[other])[apart].mean() / 2


def pixels(gif, frame):
    gif.seek(frame)
    return np.asarray(gif.convert("RGB")) / 255


def enlarged(video):
    """[3, frames, height, width] as [frames, 4 height, 4 width, 3]."""
    return np.kron(video.permute(1, 2, 3, 0).numpy(), np.ones((1, 4, 4, 1)))


def test_half_precision_is_by_autocast():
    seen = []

    def program(hidden_states, timestep, encoder_hidden_states, return_dict):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), hidden_states.dtype))
        return (hidden_states,)

    prompts = [world.scene(world.HELD_OUT, 0).prompt]
    videos = demo.videos.generate(program, prompts, replace(TINY, dtype=torch.bfloat16), "cpu", steps=2)
    assert videos.dtype == torch.float32
    assert seen == [(True, torch.bfloat16, torch.float32)] * 2
