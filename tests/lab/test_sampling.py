"""The sampler, against flows whose end is known."""

import pytest
import torch

from sparsify_compiler import OptionError
from sparsify_compiler.lab import model, sampling

PROMPTS = ["large red plain disc still; navy grid still", "small blue plain ring up; grey waves still"]


class ToOneVideo:
    """The exact velocity field of a world that has one video for each prompt (and one for no prompt)."""

    def __init__(self, with_prompt, without):
        self.videos = {True: with_prompt, False: without}
        self.asked = []

    def __call__(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        self.asked.append(len(hidden_states))
        told = encoder_hidden_states.flatten(1).any(dim=1)
        target = torch.stack([self.videos[bool(each)] for each in told])
        return ((hidden_states - target) / (timestep / 1000).view(-1, 1, 1, 1, 1),)


def worlds():
    start = sampling.noise([1, 2], frames=2)
    shape = start.shape[1:]
    return start, torch.full(shape, 0.5), torch.full(shape, 0.25)


def test_noise_is_each_samples_own():
    both = sampling.noise([1, 2], frames=2)
    assert torch.equal(both[1:], sampling.noise([2], frames=2))
    assert not torch.equal(both[0], both[1])


def test_the_schedule_goes_from_1_to_0_and_dwells_near_the_noise():
    times = sampling.times(10, shift=3)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert torch.allclose(sampling.times(4, shift=1), torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert (times > 0.5).sum() > 7


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"shift": 0}, "shift must be a positive number, got 0"),
        ({"shift": float("inf")}, "shift must be a positive number, got inf"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
    ],
)
def test_samples_that_cannot_be_made_are_told(options, says):
    start, video, other = worlds()
    with pytest.raises(OptionError, match=says):
        sampling.sample(ToOneVideo(video, other), PROMPTS, start, **options)


def test_without_guidance_it_ends_at_the_prompts_video():
    start, video, other = worlds()
    field = ToOneVideo(video, other)
    got = sampling.sample(field, PROMPTS, start, steps=5, guidance=1)
    torch.testing.assert_close(got, model.to_pixels(video.expand_as(start)), atol=1e-5, rtol=0)
    assert field.asked == [2] * 5


def test_guidance_goes_beyond_the_prompts_video_by_its_factor():
    start, video, other = worlds()
    field = ToOneVideo(video, other)
    got = sampling.sample(field, PROMPTS, start, steps=5, guidance=3)
    expected = model.to_pixels((other + 3 * (video - other)).expand_as(start))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert field.asked == [4] * 5


def test_the_model_is_called_where_the_noise_is():
    start = sampling.noise([1, 2], frames=2).to("meta")

    def field(hidden_states, timestep, encoder_hidden_states, return_dict):
        assert {x.device.type for x in (hidden_states, timestep, encoder_hidden_states)} == {"meta"}
        return (hidden_states,)

    assert sampling.sample(field, PROMPTS, start, steps=2).device.type == "meta"
