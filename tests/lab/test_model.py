"""Prompts reach the model as vectors, and weights come from a file or say why not."""

import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify_compiler.lab import model, world
from sparsify_compiler.lab.training import Recipe, Stage, Trainer, batch, loss

PROMPT = "large red plain disc still; navy grid drifting up"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    model.save(model.build(), path, step=17)
    return path


def test_words_have_vectors_of_their_own_that_do_not_depend_on_the_run():
    red = model.word_vector("red")
    assert red.shape == (model.TEXT_DIM,)
    assert red[:3].tolist() == pytest.approx([0.5592731, 0.5779721, -0.3545656], abs=1e-6)
    assert not torch.equal(red, model.word_vector("blue"))


def test_each_phrase_is_a_token_in_its_place():
    text = model.encode([PROMPT, PROMPT.replace("red", "blue"), PROMPT.replace("up", "down")])
    assert text.shape == (3, model.TEXT_TOKENS, model.TEXT_DIM)
    assert [torch.equal(text[0, place], text[1, place]) for place in range(4)] == [False, True, True, True]
    assert [torch.equal(text[0, place], text[2, place]) for place in range(4)] == [True, True, True, False]
    torch.testing.assert_close(
        text[1, 0] - text[0, 0], model.word_vector("blue") - model.word_vector("red"), atol=1e-5, rtol=0
    )
    assert not model.unconditional(3).any()


def test_the_order_of_things_is_part_of_the_prompt():
    front, back = model.encode(
        ["small red plain disc still; small blue plain ring still; navy grid still",
         "small blue plain ring still; small red plain disc still; navy grid still"]
    )  # fmt: skip
    assert not torch.equal(front[0], back[1])


@pytest.mark.parametrize("prompts", [PROMPT, [], ""])
def test_what_is_no_list_of_prompts_is_refused(prompts):
    with pytest.raises(ValueError, match="a list of at least one prompt"):
        model.encode(prompts)


def test_a_prompt_of_too_many_things_is_refused():
    with pytest.raises(ValueError, match="at most 3 objects"):
        model.encode(["a; b; c; d; background"])


def test_pixels_come_back():
    video = torch.rand(1, 3, 2, 4, 4)
    torch.testing.assert_close(model.to_pixels(model.to_model(video)), video)
    seen = model.to_model(world.videos([world.scene(0, index) for index in range(100)], 2))
    assert abs(seen.mean()) < 0.1
    assert abs(seen.std() - 1) < 0.1


def test_building_is_repeatable_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    one, two = model.build().state_dict(), model.build().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_come_back_rounded_to_bfloat16(saved):
    got, built = model.load(saved), model.build()
    assert model.trained_steps(saved) == 17
    assert not got.training
    for name, value in built.named_parameters():
        assert torch.equal(got.get_parameter(name), value.bfloat16().float()), name


def test_missing_weights_say_where_they_come_from(tmp_path):
    with pytest.raises(model.WeightsError, match=r"no weights at .*lab\.train"):
        model.load(tmp_path / "none.safetensors")


def test_a_damaged_file_says_so(saved, tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(saved.read_bytes()[:100_000])
    with pytest.raises(model.WeightsError, match="damaged"):
        model.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_weights_that_are_no_numbers_are_told(saved, tmp_path, value):
    tensors = load_file(saved)
    bias = tensors["proj_out.bias"]
    tensors["proj_out.bias"] = bias.int() if value is None else bias.fill_(value)
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"step": "1"})
    with pytest.raises(model.WeightsError, match=r"finite numbers.*'proj_out.bias' does not"):
        model.load(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("metadata", [None, {"step": "abc"}, {"other": "1"}])
def test_weights_that_do_not_say_their_step_are_told(saved, tmp_path, metadata):
    save_file(load_file(saved), tmp_path / "other.safetensors", metadata=metadata)
    with pytest.raises(model.WeightsError, match="how many steps of training"):
        model.trained_steps(tmp_path / "other.safetensors")


def test_a_folder_is_no_weights(tmp_path):
    with pytest.raises(model.WeightsError, match="damaged"):
        model.load(tmp_path)


def test_weights_of_another_model_name_what_differs(saved, tmp_path):
    tensors = load_file(saved)
    tensors["proj_out.bias"] = tensors["proj_out.bias"][:5].contiguous()
    save_file(tensors, tmp_path / "other.safetensors", metadata={"step": "1"})
    with pytest.raises(model.WeightsError, match=r"1 of its tensors.*'proj_out.bias'"):
        model.load(tmp_path / "other.safetensors")


def test_the_remedy_is_for_the_file_that_is_wrong(saved, tmp_path, monkeypatch):
    """A file that a user gave is not mended by another installation, nor that of the package by another path."""
    other = load_file(saved)
    other.pop("proj_out.bias")
    path = tmp_path / "weights.safetensors"

    def said(content):
        if content is None:
            path.unlink(missing_ok=True)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        with pytest.raises(model.WeightsError) as error:
            model.load(path)
        return str(error.value)

    wrong = (
        None,
        b"a checkpoint of torch",
        other,
        load_file(saved) | {"proj_out.bias": torch.full((1,), torch.nan)},
    )
    for content in wrong:
        text = said(content)
        assert "Leave the path out to use the weights of the package" in text
        assert "sparsify search CHECKPOINT" in text
        assert "install" not in text
    monkeypatch.setattr(model, "WEIGHTS", path)
    for content in wrong:
        text = said(content)
        assert "install it again" in text
        assert "Leave the path out" not in text


def test_the_shipped_weights_are_small_trained_and_can_be_trained_on():
    assert model.WEIGHTS.stat().st_size <= 12_000_000
    shipped = model.load()
    steps = model.trained_steps()
    assert f"{steps:,} steps" in model.WEIGHTS.with_name("MODEL_CARD.md").read_text()
    recipe = Recipe(stages=(Stage(frames=4, batch=4, steps=1),), dropout=0)
    assert (
        Trainer(shipped, recipe, step=steps, compiled=False).advance()
        < 0.6
        < 1
        < untrained_loss(recipe, steps)
    )


def untrained_loss(recipe, step):
    return loss(model.build(), batch(recipe, step)).mean().item()


def test_patches_are_told_their_places_by_waves_over_the_video():
    patches = model.build().patch_embedding
    video = torch.randn(1, 3, 6, 8, 12)
    plain = torch.nn.functional.conv3d(video, patches.weight, patches.bias, stride=(1, 4, 4))
    told = (patches(video) - plain)[0].detach()
    for frame, row, column in product(range(6), range(2), range(3)):
        parts = (frame / 6, row / 2, column / 3)
        waves = [
            wave(count * math.pi * part)
            for part in parts
            for wave in (math.sin, math.cos)
            for count in (1, 2, 3, 4)
        ]
        expected = (patches.places.detach() * torch.tensor(waves)).sum(dim=1)
        torch.testing.assert_close(told[:, frame, row, column], expected, atol=1e-5, rtol=0)
    some = (patches(video[:, :, ::3]) - plain[:, :, ::3])[0]
    torch.testing.assert_close(some, told[:, ::3], atol=1e-5, rtol=0)


@pytest.mark.parametrize("spacing", [1, 3])
def test_a_model_of_frames_at_a_distance_knows_their_places(spacing):
    whole = model.build()
    some = model.spaced(whole, spacing)
    video = torch.zeros(1, 3, 4 * spacing, 8, 12)
    for every, got in zip(whole.rope(video), some.rope(video[:, :, ::spacing]), strict=True):
        assert torch.equal(got, every.unflatten(1, (4 * spacing, 6))[:, ::spacing].flatten(1, 2))
    ours, theirs = dict(some.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is theirs[name] for name in theirs)
