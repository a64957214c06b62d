"""Training is repeatable to the bit, also over a restart, and learns."""

import json

import pytest
import torch

from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.lab import train, world
from sparsify_compiler.lab.model import CONFIG, build, encode, to_model
from sparsify_compiler.lab.training import LEVELS, Recipe, Stage, Trainer, batch, validation

TINY = CONFIG | {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64}
STAGES = (Stage(frames=2, batch=3, steps=3), Stage(frames=4, batch=2, steps=1))
RECIPE = Recipe(stages=STAGES, warmup=2, power=2)


def trainer(recipe=RECIPE, **options):
    return Trainer(build(TINY), recipe, compiled=False, **options)


def test_stages_follow_each_other_and_the_last_does_not_end():
    assert [RECIPE.stage(step).frames for step in (0, 2, 3, 4, 1000)] == [2, 2, 4, 4, 4]
    assert train.stages("2x3x3,4x2x1") == STAGES
    assert train.stages("8@3x16x500") == (Stage(frames=8, batch=16, steps=500, spacing=3),)


def test_a_batch_is_a_function_of_the_step():
    one, again, other = batch(RECIPE, 1), batch(RECIPE, 1), batch(RECIPE, 2)
    assert torch.equal(one.noisy, again.noisy)
    assert torch.equal(one.velocity, again.velocity)
    assert not torch.equal(one.noisy, other.noisy)
    assert batch(RECIPE, 3).noisy.shape == (2, 3, 4, world.HEIGHT, world.WIDTH)


def test_a_batch_is_videos_and_noise_mixed_at_its_level():
    got = batch(RECIPE, 4)
    scenes = [world.scene(RECIPE.seed, 4 * 1024 + number) for number in range(2)]
    video = to_model(world.videos(scenes, 4))
    level = got.time.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(got.noisy - level * got.velocity, video, atol=1e-4, rtol=0)
    noise = got.noisy + (1 - level) * got.velocity
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_frames_at_a_distance_are_of_the_same_video():
    whole, some = (
        batch(Recipe(stages=(Stage(frames=frames, batch=2, steps=1, spacing=spacing),)), 4)
        for frames, spacing in ((7, 1), (3, 3))
    )

    def video(of):
        return of.noisy - of.time.view(-1, 1, 1, 1, 1) * of.velocity

    torch.testing.assert_close(video(some), video(whole)[:, :, ::3], atol=1e-4, rtol=0)


def test_prompts_are_withheld_as_often_as_said_and_else_the_scenes_own():
    recipe = Recipe(stages=(Stage(frames=1, batch=400, steps=1),), dropout=0.25)
    got = batch(recipe, 0)
    withheld = ~got.text.flatten(1).any(dim=1)
    assert 0.18 < withheld.float().mean() < 0.32
    prompts = encode([world.scene(recipe.seed, number).prompt for number in range(400)])
    assert torch.equal(got.text[~withheld], prompts[~withheld])
    odds = got.time / (1 - got.time)
    assert torch.log(odds).median().exp().item() == pytest.approx(recipe.shift, rel=0.05)


def test_a_restart_changes_nothing(tmp_path):
    straight, first = trainer(), trainer()
    losses = [straight.advance() for _ in range(5)]
    assert [first.advance() for _ in range(2)] == losses[:2]
    first.save(tmp_path / "checkpoint.pt")
    second = trainer()
    second.restore(tmp_path / "checkpoint.pt")
    assert [second.advance() for _ in range(3)] == losses[2:]
    for name, value in straight.model.named_parameters():
        assert torch.equal(value, second.model.get_parameter(name)), name
        assert torch.equal(straight.average[name], second.average[name]), name


def test_the_average_lags_and_can_be_put_in_place():
    learner = trainer()
    before = learner.model.proj_out.weight.detach().clone()
    for _ in range(3):
        learner.advance()
    after = learner.model.proj_out.weight.detach().clone()
    with learner.averaged():
        average = learner.model.proj_out.weight.detach().clone()
    assert torch.equal(learner.model.proj_out.weight, after)
    assert torch.equal(average, learner.average["proj_out.weight"])
    assert 0 < (average - after).norm() < (before - after).norm()


def test_fresh_optimizers_warm_up_again():
    learner = trainer(step=1000)
    assert learner.step == 1000
    learner.advance()
    assert learner.optimizers[1].param_groups[0]["lr"] == pytest.approx(
        RECIPE.rate / 2 / (1 + 1000 / RECIPE.settle) ** 0.5
    )


def test_rates_fall_in_a_straight_line_to_the_last_step():
    recipe = Recipe(stages=STAGES, warmup=1, settle=10**9, end=6, cooldown=4)
    scales = [trainer(recipe, step=step).scale() for step in range(8)]
    assert scales == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25, 0, 0])
    assert trainer(step=10**6).scale() > 0


def test_it_learns():
    recipe = Recipe(stages=(Stage(frames=1, batch=8, steps=1),), warmup=5)
    learner = trainer(recipe)
    untrained = validation(learner.compiled, 1)
    for _ in range(20):
        learner.advance()
    trained = validation(learner.compiled, 1)
    assert untrained.keys() == set(LEVELS)
    assert sum(trained.values()) < 0.8 * sum(untrained.values()), (trained, untrained)


def test_a_loss_that_is_not_finite_stops_it():
    learner = trainer()
    torch.nn.init.constant_(learner.model.proj_out.bias, float("nan"))
    with pytest.raises(SparsifyError, match="got nan at step 0"):
        learner.advance()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--stages nonsense", "stages must be FRAMES[@SPACING]xBATCHxSTEPS,..., got 'nonsense'"),
        ("--stages 2x1", "got '2x1'"),
        ("--stages 0x1x1", "frames must be an integer from 1 to 64, got 0"),
        ("--stages 24@3x1x1", "frames must be an integer from 1 to 21, 3 apart, got 24"),
        ("--stages 2@0x1x1", "a spacing of at least 1"),
        ("--stages 2x0x1", "a batch of 1 to 1024"),
        ("--stages 2x2000x1", "a batch of 1 to 1024"),
        ("--shift 0", "shift must be a positive number, got 0.0"),
        ("--shift -1", "shift must be a positive number, got -1.0"),
        ("--shift nan", "shift must be a positive number, got nan"),
        ("--minutes nan", "minutes must be above 0"),
        ("--minutes 0", "minutes must be above 0"),
        ("--save-every -1", "at least 0"),
        ("--end 0", "end must be after the 0 steps that are done, got 0"),
    ],
)
def test_options_that_make_no_sense_are_told_before_a_step(tmp_path, monkeypatch, words, says):
    monkeypatch.setattr(train, "build", lambda: build(TINY))
    with pytest.raises(SparsifyError) as error:
        train.main(["--out", str(tmp_path / "run"), *words.split()])
    assert says in str(error.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_folder_or_checkpoint_that_is_none_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda: build(TINY))
    (tmp_path / "file").write_text("")
    with pytest.raises(SparsifyError, match="out must be a folder"):
        train.main(["--out", str(tmp_path / "file")])
    path = tmp_path / "checkpoint.pt"
    trainer().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SparsifyError, match=r"checkpoint\.pt is damaged"):
        train.main(["--out", str(tmp_path)])
    Trainer(build(TINY | {"num_layers": 2}), RECIPE, compiled=False).save(path)
    with pytest.raises(SparsifyError, match="is no checkpoint of this model"):
        train.main(["--out", str(tmp_path)])


def test_a_run_leaves_checkpoint_weights_log_and_picture(tmp_path):
    learner = trainer()
    learner.advance()
    train.run(learner, tmp_path, minutes=0, save_every=1, look_every=1)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "weights.safetensors", "log.jsonl", "samples_000001.png"
    }  # fmt: skip
    (record,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert record["step"] == 1
    assert len(record["validation"]) == len(LEVELS)
