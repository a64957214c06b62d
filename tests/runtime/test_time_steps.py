"""A time step as models get it: a tensor, or a number of Python."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler.runtime.program import Inputs, read_inputs
from sparsify_compiler.runtime.state import states_of

GRID = (3, 2, 5)
OPTIONS = {"method": "tile", "reference_frames": 1, "dense_steps": 2, "inner_backend": "eager"}

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]


class Video(nn.Module):
    """Patches and one attention; `t` is a time step, or nothing that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 16, (1, 2, 2), (1, 2, 2)).requires_grad_(False)

    def forward(self, latents: Tensor, timestep: float | None = None, t: int = 0) -> Tensor:
        x = self.patch(latents).flatten(2).transpose(1, 2) + (t if timestep is None else timestep) / 1000
        heads = [one.unflatten(-1, (2, -1)).transpose(1, 2) for one in (x, x.sin(), x.cos())]
        return scaled_dot_product_attention(*heads)


def phases(calls: list[dict[str, float]]) -> str:
    """`d` or `s` for each call of a new model."""
    model = Video()
    compiled = torch.compile(model, backend="sparsify", options=OPTIONS)
    with torch.no_grad():
        for call in calls:
            compiled(torch.randn(1, 4, 3, 4, 10), **call)
    (state,) = states_of(model.parameters())
    return "".join(record.phase[0] for record in state.history)


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("name", ["timestep", "t"])
def test_a_time_step_may_be_a_number(name: str, kind: type) -> None:
    assert phases([{name: kind(900 - 100 * step)} for step in range(5)]) == "ddsss"


def test_a_number_of_frames_is_no_time_step() -> None:
    assert phases([{"t": GRID[0]}] * 3) == "sss"


def test_numbers_of_a_time_step() -> None:
    inputs = Inputs(owner=None, time=0, others={"latents": 1})
    frames = torch.tensor([[1000.0, 500.0, 0.0]])
    time, prints = read_inputs(inputs, [frames, torch.ones(3)])
    assert (time.mean, time.largest) == (500.0, 1000.0)
    assert time.squares == pytest.approx(1.25e6 / 3, rel=1e-12)
    assert prints == {"latents": (3.0, 3.0)}
    batch = torch.full((3,), 997.1)
    time, _ = read_inputs(inputs, [batch, torch.ones(3)])
    assert time.mean == time.largest == float(batch[0])
    assert time.squares == float(batch[0]) ** 2
    constant = Inputs(owner=None, time=None, others={}, constant_time=900.0)
    assert read_inputs(constant, [])[0].mean == 900.0
