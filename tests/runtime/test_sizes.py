"""Sizes that a plan needs: other sizes get their own program, or an error; never the table of another plan."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import fresh_dynamo, no_warnings
from recorder import Recorder
from torch import Tensor, nn

from sparsify_compiler.errors import GridError, OperandError, OptionError
from sparsify_compiler.runtime.site import _functions

pytestmark = [fresh_dynamo, no_warnings]

WIDTH = 16
DENSE_TILE = {"method": "tile", "reference_frames": 3}
"""Three of three frames are references: the output is dense attention, if the table is for the right tokens."""
SVG2 = {"method": "svg2", "q_clusters": 4, "kv_clusters": 6, "dense_layers": 0, "dense_steps": 0}

torch.manual_seed(0)
CONV = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2)).requires_grad_(False)
ALONG = nn.Conv1d(WIDTH, WIDTH, 3, padding=1).requires_grad_(False)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def embed(video: Tensor) -> Tensor:
    return CONV(video).flatten(2).transpose(1, 2)


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(heads(x.sin()), heads(x.cos()), heads(x))


def backwards(text: Tensor) -> Tensor:
    return text[:, torch.arange(text.shape[1]).flip(0)]


def video_of(batch: int = 1, frames: int = 3) -> Tensor:
    return torch.randn(batch, 4, frames, 4, 10, generator=torch.Generator().manual_seed(batch))


def text_of(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))


def check(model: Callable[..., Tensor], calls: list[tuple[Tensor, ...]], **options: Any) -> Recorder:
    """Compiled first: an eager run before would hide faults."""
    recorder = Recorder(**({} if "method" in options else DENSE_TILE), **options)
    compiled = torch.compile(model, backend=recorder)
    with torch.no_grad():
        for inputs in calls:
            torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
    return recorder


LOSERS: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda text: text.roll(1, 1),
    "conv1d": lambda text: ALONG(text.mT).mT,
    "indexing": backwards,
    "every second": lambda text: text[:, ::2],
    "matmul": lambda text: torch.ones(text.shape[1], text.shape[1]) @ text,
}
"""Operators on a text after which no label has its length."""


@pytest.mark.parametrize("name", LOSERS)
def test_a_text_whose_length_no_label_tells(name: str) -> None:
    def model(video: Tensor, text: Tensor) -> Tensor:
        return attend(torch.cat([LOSERS[name](text), embed(video)], 1))

    recorder = check(model, [(video_of(), text_of(tokens)) for tokens in (7, 9, 13)])
    assert len(recorder.layouts()) == len(set(recorder.layouts())) == 3


def test_two_texts_that_add_up_to_the_same() -> None:
    """The number of tokens does not tell where the video lies among them."""

    def model(video: Tensor, first: Tensor, last: Tensor) -> Tensor:
        return attend(torch.cat([first.roll(1, 1), embed(video), last.roll(1, 1)], 1))

    pairs = [(7, 5), (9, 3), (8, 4)]
    recorder = check(model, [(video_of(), text_of(a), text_of(b)) for a, b in pairs])
    assert recorder.layouts() == pairs


def test_a_text_that_is_filled_up_to_the_same() -> None:
    def model(video: Tensor, text: Tensor) -> Tensor:
        rest = torch.zeros(1, 12 - text.shape[1], WIDTH)
        return attend(torch.cat([text.roll(1, 1), embed(video), rest], 1))

    recorder = check(model, [(video_of(), text_of(tokens)) for tokens in (7, 9, 3)])
    assert recorder.layouts() == [(7, 5), (9, 3), (3, 9)]


def test_a_prompt_elsewhere_and_a_batch_stay_free() -> None:
    def model(video: Tensor, text: Tensor) -> Tensor:
        x = embed(video)
        x = x + F.scaled_dot_product_attention(heads(x), heads(text), heads(text)).transpose(1, 2).flatten(2)
        return attend(x)

    calls = [(video_of(batch), text_of(tokens, batch)) for tokens, batch in ((7, 2), (9, 3), (5, 4), (6, 5))]
    assert len(check(model, calls).programs) == 2  # one static, one for any prompt and batch


def test_memory_is_of_one_batch() -> None:
    def model(video: Tensor) -> Tensor:
        return attend(embed(video))

    recorder = check(model, [(video_of(batch),) for batch in (2, 3, 4)], **SVG2, top_p=1.0)
    assert len(recorder.programs) == 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_given_grid_is_of_its_tokens(dynamic: bool | None) -> None:
    compiled = torch.compile(attend, backend=Recorder(**DENSE_TILE, grid=(3, 2, 5)), dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(text_of(30)), attend(text_of(30)), rtol=1e-4, atol=1e-5)
        with pytest.raises(GridError, match=r"\(3, 2, 5\) = 30 tokens, but .* 60 tokens"):
            compiled(text_of(60))


@pytest.mark.parametrize("dim", [2, 3])
def test_frames_and_rows_must_not_be_marked_dynamic(dim: int) -> None:
    video = video_of()
    torch._dynamo.mark_dynamic(video, dim)
    with torch.no_grad(), pytest.raises(OptionError, match=rf"marked dynamic, got .*size\({dim}\) = "):
        torch.compile(lambda v: attend(embed(v)), backend=Recorder(**DENSE_TILE))(video)
    torch._dynamo.reset()
    with torch.no_grad():  # nothing rests on it where nothing is sparse
        torch.compile(lambda v: attend(embed(v)), backend=Recorder(method="dense"))(video)


def test_a_marked_batch_is_free() -> None:
    video = video_of(2)
    torch._dynamo.mark_dynamic(video, 0)
    recorder = check(lambda v: attend(embed(v)), [(video,), (video_of(3),)])
    assert len(recorder.programs) == 1


@pytest.mark.parametrize("options", [DENSE_TILE, SVG2])
def test_a_program_refuses_other_sizes(options: dict[str, Any]) -> None:
    """Whatever Dynamo's guards let through."""
    recorder = Recorder(**options, grid=(3, 2, 5))
    with torch.no_grad():
        torch.compile(attend, backend=recorder)(text_of(30))
        (program,) = recorder.programs
        for other in (text_of(60), text_of(29), text_of(30)[..., :8], text_of(30)[0]):
            with pytest.raises(OperandError, match=r"attention .* needs an input .* shape \[1, 30, 16\]"):
                program(other)


@pytest.mark.parametrize("options", [DENSE_TILE, SVG2])
def test_a_site_refuses_other_sizes(options: dict[str, Any]) -> None:
    """Whatever comes in between: 60 tokens never meet the table of 30."""
    recorder = Recorder(**options)
    x = text_of(30)
    with torch.no_grad():
        torch.compile(lambda v: attend(embed(v)), backend=recorder)(video_of())
        (run,) = recorder.programs[0].own.compiled.values()  # with `eager`, the rewritten graph
        site = run.__self__.sparsify_site0
        for tensors in ([heads(text_of(60))] * 3, [heads(x), heads(text_of(60)), heads(x)], [x[:, None]] * 3):
            with pytest.raises(OperandError, match=r"attention 'attention': (query|key) must be \[.*30, 8\]"):
                site(*tensors, None)


def test_what_programs_call_by_name_goes_with_them() -> None:
    recorder = Recorder(**SVG2, seed=7)  # options that no other test has
    with torch.no_grad():
        torch.compile(lambda v: attend(embed(v)), backend=recorder)(video_of())
    (name,) = (function.name for function in recorder.programs[0].own.functions)
    assert name in _functions
    recorder.forget()
    torch._dynamo.reset()
    gc.collect()
    assert name not in _functions
