"""Labels go from graph to graph where a model breaks, and never to tokens that moved in between."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify_compiler
from sparsify_compiler.testing.oracles import TileAttention

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]

FRAMES, HEIGHT, WIDTH, HEADS, D = 3, 2, 4, 2, 16
TOKENS = FRAMES * HEIGHT * WIDTH
OPTIONS = {"method": "tile", "reference_frames": 1, "inner_backend": "eager"}
log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())
Break = Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Attention with something that Dynamo does not trace before it, on the values."""

    def __init__(self, at_break: Break, projects: bool = True) -> None:
        super().__init__()
        self.at_break = at_break
        self.qkv, self.proj = (
            nn.Linear(HEADS * D, 3 * HEADS * D),
            nn.Linear(HEADS * D, HEADS * D) if projects else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, D)).permute(2, 0, 3, 1, 4)
        q, k, v = self.at_break(q), self.at_break(k), self.at_break(v)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + (out if self.proj is None else self.proj(out))


class Model(nn.Module):
    def __init__(self, at_break: Break, layers: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(4, HEADS * D, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList([Block(at_break, **options) for _ in range(layers)])
        self.requires_grad_(False)

    def forward(self, video: Tensor) -> Tensor:
        x = self.blocks[0](self.patch(video).flatten(2).transpose(1, 2))  # Dynamo skips a loop that breaks
        return x if len(self.blocks) == 1 else self.blocks[1](x)


def a_video(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 4, frames, 2 * height, 2 * width, generator=generator)


def warns(x: Tensor) -> Tensor:
    warnings.warn("not traced", stacklevel=1)
    return x


def logs(x: Tensor) -> Tensor:
    log.warning("not traced")
    return x


def reads(x: Tensor) -> Tensor:
    if x.sum().item() > 1e9:
        raise ValueError("too large")
    return x


@torch.compiler.disable
def looks(x: Tensor) -> Tensor:
    assert x.numpy().shape == x.shape
    return x


def exact(model: nn.Module, video: Tensor) -> Tensor:
    frames = video.shape[2]
    with TileAttention(frames, 1, video.shape[3] * video.shape[4] // 4):
        return model(video)


@pytest.mark.parametrize("at_break", [logs, reads, looks], ids=lambda one: one.__name__)
def test_a_break_before_attention(at_break: Break) -> None:
    model, video = Model(at_break), a_video()
    out = torch.compile(model, backend="sparsify", options=OPTIONS)(video)
    torch.testing.assert_close(out, exact(model, video))
    assert (out - model(video)).norm() > 0.01 * out.norm()
    torch._dynamo.reset()
    explained = sparsify_compiler.explain(model, video, options=OPTIONS)
    assert {plan.method for plan in explained.plans} == {"tile"}


def test_two_grids_of_one_length() -> None:
    model = Model(warns)
    compiled = torch.compile(model, backend="sparsify", options=OPTIONS, dynamic=True)
    for seed, sizes in enumerate([(3, 2, 4), (4, 2, 3), (3, 4, 2), (3, 2, 4)]):
        video = a_video(*sizes, seed=seed)
        torch.testing.assert_close(compiled(video), exact(model, video))


def moved(x: Tensor) -> Tensor:
    return x[:, :, torch.arange(TOKENS - 1, -1, -1)]


@torch.compiler.disable
def moves(x: Tensor) -> Tensor:
    return moved(x)


@torch.compiler.disable
def writes(x: Tensor) -> Tensor:
    x.copy_(moved(x).clone())
    return x


@torch.compiler.disable
def writes_through_a_view(x: Tensor) -> Tensor:
    x.transpose(1, 2).copy_(moved(x).clone().transpose(1, 2))
    return x


@torch.compiler.disable
def swaps_the_memory(x: Tensor) -> Tensor:
    x.data = moved(x).clone()
    return x


@pytest.mark.parametrize(
    "at_break", [moves, writes, writes_through_a_view, swaps_the_memory], ids=lambda one: one.__name__
)
def test_tokens_that_moved_at_the_break_stay_dense(at_break: Break) -> None:
    model, video = Model(at_break, layers=1), a_video()
    out = torch.compile(model, backend="sparsify", options=OPTIONS)(video)
    torch.testing.assert_close(out, model(video))


def test_an_output_written_through_another_output() -> None:
    """Both share memory; a compiler may count their versions apart."""

    class Writes(Model):
        def forward(self, video: Tensor) -> Tensor:
            x = self.patch(video).flatten(2).transpose(1, 2)
            same = x.unsqueeze(1)
            shuffle(same)
            return F.scaled_dot_product_attention(x, x, x) + same[:, 0]

    @torch.compiler.disable
    def shuffle(x: Tensor) -> None:
        x.copy_(moved(x).clone())

    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        model = Writes(warns)
        out = torch.compile(model, backend="sparsify", options={**OPTIONS, "inner_backend": inner})(a_video())
        torch.testing.assert_close(out, model(a_video()))


def test_inference_mode_counts_no_writes() -> None:
    model, video = Model(writes, layers=1), a_video()
    with torch.inference_mode():
        out = torch.compile(model, backend="sparsify", options=OPTIONS)(video)
        torch.testing.assert_close(out, model(video))


def test_layers_that_share_a_program_share_no_state() -> None:
    """Without weights of its own, the graph after the break does not know its layer."""
    options = {"method": "keys", "kv_budget": 0.3, "dense_layers": 0, "inner_backend": "eager"}
    model, video = Model(warns, projects=False), a_video()
    compiled = torch.compile(model, backend="sparsify", options=options)
    with sparsify_compiler.generation(steps=4):
        for _ in range(4):
            torch.testing.assert_close(compiled(video), model(video))


def test_a_second_call_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_compiler.passes import pipeline

    runs: list[str] = []
    original = pipeline.run

    def counted(*args: Any) -> Any:
        runs.append("run")
        return original(*args)

    model, video = Model(warns, layers=2), a_video()
    compiled = torch.compile(model, backend="sparsify", options=OPTIONS)
    compiled(video)
    monkeypatch.setattr(pipeline, "run", counted)
    for seed in range(2, 5):
        compiled(a_video(seed=seed))
    assert runs == []
