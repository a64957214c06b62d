"""The model: its configuration, how prompts and pixels reach it, and where its weights are."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify_compiler.config import integer
from sparsify_compiler.errors import OptionError, SparsifyError
from sparsify_compiler.lab.world import MOST_OBJECTS

WEIGHTS = Path(__file__).with_name("weights.safetensors")
TEXT_DIM = 64
TEXT_TOKENS = MOST_OBJECTS + 1
CONFIG: Mapping[str, Any] = {
    "patch_size": (1, 4, 4),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "num_layers": 6,
    "ffn_dim": 768,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "rope_max_seq_len": 64,
}
"""Of `WanTransformer3DModel`: 24 frames of 32 x 48 pixels are 24 x 8 x 12 = 2,304 tokens."""
MOST_FRAMES: int = CONFIG["rope_max_seq_len"]
"""Frames times their spacing: what rotary positions reach to."""
WAVES = 4
"""A patch's place is told by waves of 1 to this many half periods over the frames, the height and the width."""
MEAN, STD = 0.40, 0.25
"""Of the world's pixels: what the model sees has mean 0 and deviation 1."""


class WeightsError(SparsifyError):
    """The weights of the evaluation model are missing, damaged or of another model."""


def check_frames(frames: object, *, least: int = 1, spacing: int = 1) -> None:
    """Raises:
    OptionError: the model has no positions for such videos.
    """
    count = integer(frames)
    if count is None or not least <= count <= MOST_FRAMES // spacing:
        apart = f", {spacing} apart" if spacing > 1 else ""
        raise OptionError(
            f"frames must be an integer from {least} to {MOST_FRAMES // spacing}{apart}, got {frames!r}"
        )


def build(config: Mapping[str, Any] = CONFIG, *, seed: int = 0) -> nn.Module:
    """An untrained `WanTransformer3DModel` with `Placed` patches, the same for every call.

    It starts with an output of zero.
    """
    from diffusers import WanTransformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = WanTransformer3DModel(**config)
        model.patch_embedding = Placed(model.patch_embedding)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


class Placed(nn.Conv3d):
    """A patch embedding that also tells each patch its place in the video.

    Rotary positions are relative, and pure noise looks everywhere the same; but there a prompt's movements decide
    what is where.
    """

    def __init__(self, embedding: nn.Conv3d) -> None:
        size, stride = embedding.kernel_size, embedding.stride
        super().__init__(embedding.in_channels, embedding.out_channels, size, stride)  # type: ignore[arg-type]
        self.load_state_dict(embedding.state_dict())
        self.places = nn.Parameter(torch.randn(self.out_channels, 3 * 2 * WAVES) / 10)
        """For frames, rows and columns in turn, of the sines and the cosines."""

    def forward(self, videos: Tensor) -> Tensor:
        """Of [B, channels, frames, height, width]: [B, out channels, frames, rows, columns] of patches."""
        patches = super().forward(videos)
        halves = torch.arange(1, WAVES + 1, device=patches.device)
        for axis, weight in enumerate(self.places.chunk(3, dim=1)):
            extent = patches.shape[2 + axis]
            angle = torch.outer(halves, torch.arange(extent, device=patches.device) * (pi / extent))
            along = [1, 1, 1]
            along[axis] = extent
            patches = patches + (weight @ torch.cat([angle.sin(), angle.cos()]).to(weight)).view(-1, *along)
        return patches


class Spaced(nn.Module):
    """Rotary positions of a video of which only every `spacing`-th frame is there."""

    def __init__(self, rope: nn.Module, spacing: int) -> None:
        super().__init__()
        self.rope, self.spacing = rope, spacing

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """As `WanRotaryPosEmbed`: of [B, C, frames, rows, columns], each [1, tokens, 1, head dim]."""
        frames = hidden.shape[2]
        whole = self.rope(hidden.repeat_interleave(self.spacing, dim=2))
        return tuple(each.unflatten(1, (frames, self.spacing, -1))[:, :, 0].flatten(1, 2) for each in whole)


def spaced(model: nn.Module, spacing: int) -> nn.Module:
    """The model, for videos of every `spacing`-th frame: the same parameters, other temporal positions."""
    if spacing == 1:
        return model
    result = copy.copy(model)
    result._modules = {**model._modules, "rope": Spaced(model.get_submodule("rope"), spacing)}
    return result


def to_model(videos: Tensor) -> Tensor:
    """RGB from 0 to 1 as the model sees it; same shape."""
    return (videos - MEAN) / STD


def to_pixels(samples: Tensor) -> Tensor:
    """What the model made as RGB from 0 to 1; same shape."""
    return (samples * STD + MEAN).clamp(0, 1)


def encode(prompts: Sequence[str]) -> Tensor:
    """Embeddings of prompts: float32 [prompts, TEXT_TOKENS, TEXT_DIM].

    Each phrase is a token: the sum of its words' vectors and of its place's. The background's phrase, the last,
    takes the last place; the places between it and the objects say that there is nothing.

    Raises:
        ValueError: no list of prompts, or one of more objects.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
    embeddings = []
    for prompt in prompts:
        *objects, background = prompt.split("; ")
        phrases = [*objects, *["nothing"] * (TEXT_TOKENS - 1 - len(objects)), background]
        if len(phrases) != TEXT_TOKENS:
            raise ValueError(f"expected at most {MOST_OBJECTS} objects and a background, got {prompt!r}")
        embeddings.append(
            torch.stack(
                [
                    sum((word_vector(word) for word in phrase.split()), word_vector(f"place {place}"))
                    for place, phrase in enumerate(phrases)
                ]
            )
        )
    return torch.stack(embeddings)


def unconditional(count: int) -> Tensor:
    """The embedding of no prompt: [count, TEXT_TOKENS, TEXT_DIM]."""
    return torch.zeros(count, TEXT_TOKENS, TEXT_DIM)


@cache
def word_vector(word: str) -> Tensor:
    """A word as a Gaussian vector of deviation 1/2 drawn from its hash: float32 [TEXT_DIM]."""
    rng = np.random.default_rng(list(hashlib.sha256(word.encode()).digest()))
    return torch.from_numpy(rng.normal(scale=0.5, size=TEXT_DIM).astype(np.float32))


def save(model: nn.Module, path: Path, *, step: int) -> None:
    """Writes the weights in bfloat16, and the number of training steps, at once or not at all."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.named_parameters()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def load(path: Path = WEIGHTS) -> nn.Module:
    """The trained model in evaluation mode, in float32 (its file holds bfloat16)."""
    weights, _ = read(path)
    model = build()
    expected = {name: value.shape for name, value in model.named_parameters()}
    got = {name: value.shape for name, value in weights.items()}
    if expected != got:
        odd = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise WeightsError(
            f"{path} holds another model: {len(odd)} of its tensors differ in name or shape, {odd[0]!r} first. "
            "Take the file that came with this version of the package."
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise WeightsError(f"{path} must hold finite numbers of a floating type, {name!r} does not")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def digest(model: nn.Module) -> str:
    """Of the weights: two models with the same one are the same."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def trained_steps(path: Path = WEIGHTS) -> int:
    """How many steps of training the weights have seen."""
    step = (read(path)[1] or {}).get("step", "")
    if not step.isdecimal():
        raise WeightsError(
            f"{path} must say in its metadata how many steps of training it has seen, got {step!r}: save it with "
            "sparsify_compiler.lab.model.save(model, path, step=...)"
        )
    return int(step)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The tensors and the metadata, if it has any, of a file of weights."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise WeightsError(
            f"no weights at {path}: they come with the package, so install it again, or train them with "
            "`python -m sparsify_compiler.lab.train --out DIR`."
        )
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata()
    except (SafetensorError, OSError) as error:  # OSError: a folder
        raise WeightsError(f"{path} is damaged ({error}): install the package again.") from error
