"""The model: its configuration, its weights, and the form of its prompts and pixels."""

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
"""Arguments of `WanTransformer3DModel`: 24 frames of 32 x 48 pixels are 24 x 8 x 12 = 2,304 tokens."""
MOST_FRAMES: int = CONFIG["rope_max_seq_len"]
"""Most frames times spacing: the reach of the rotary positions."""
WAVES = 4
"""The place of a patch is waves of 1 to this many half periods over the frames, the height and the width."""
MEAN, STD = 0.40, 0.25
"""Mean and deviation of the world's pixels. Those of the model's input are 0 and 1."""


class WeightsError(SparsifyError):
    """The weights of the evaluation model are missing, damaged or of another model."""


def check_frames(frames: object, *, least: int = 1, spacing: int = 1) -> None:
    """Check a number of frames.

    Raises:
        OptionError: the model has no positions for such videos.
    """
    count = integer(frames)
    if count is None or not least <= count <= MOST_FRAMES // spacing:
        apart = f", {spacing} apart" if spacing > 1 else ""
        raise OptionError(
            f"frames must be an integer from {least} to {MOST_FRAMES // spacing}{apart}, got {frames!r}"
        )


def build(config: Mapping[str, Any] = CONFIG, *, seed: int = 0) -> nn.Module:
    """Build an untrained `WanTransformer3DModel` with `Placed` patches, the same for every call.

    Its output is zero.
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
    """A patch embedding that also adds the place of each patch in the video.

    Rotary positions are relative, and pure noise looks the same everywhere. But in pure noise the prompt's
    movements decide the place of every object.
    """

    def __init__(self, embedding: nn.Conv3d) -> None:
        size, stride = embedding.kernel_size, embedding.stride
        super().__init__(
            embedding.in_channels,
            embedding.out_channels,
            (size[0], size[1], size[2]),
            (stride[0], stride[1], stride[2]),
        )
        self.load_state_dict(embedding.state_dict())
        self.places = nn.Parameter(torch.randn(self.out_channels, 3 * 2 * WAVES) / 10)
        """Weights of sines and cosines, for frames, rows and columns in turn."""

    def forward(self, videos: Tensor) -> Tensor:
        """Embed videos [B, channels, frames, height, width] as [B, out channels, frames, rows, columns]."""
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
    """Rotary positions of a video that has only every `spacing`-th frame."""

    def __init__(self, rope: nn.Module, spacing: int) -> None:
        super().__init__()
        self.rope, self.spacing = rope, spacing

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Positions as `WanRotaryPosEmbed` returns them, each [1, tokens, 1, head dim].

        Args:
            hidden: [B, C, frames, rows, columns].
        """
        frames = hidden.shape[2]
        whole = self.rope(hidden.repeat_interleave(self.spacing, dim=2))
        return tuple(each.unflatten(1, (frames, self.spacing, -1))[:, :, 0].flatten(1, 2) for each in whole)


def spaced(model: nn.Module, spacing: int) -> nn.Module:
    """Return the model for videos of every `spacing`-th frame: same parameters, other temporal positions."""
    if spacing == 1:
        return model
    result = copy.copy(model)
    result._modules = {**model._modules, "rope": Spaced(model.get_submodule("rope"), spacing)}
    return result


def to_model(videos: Tensor) -> Tensor:
    """Turn RGB from 0 to 1 into the model's input, of the same shape."""
    return (videos - MEAN) / STD


def to_pixels(samples: Tensor) -> Tensor:
    """Turn the model's output into RGB from 0 to 1, of the same shape."""
    return (samples * STD + MEAN).clamp(0, 1)


def encode(prompts: Sequence[str]) -> Tensor:
    """Embeddings of prompts: float32 [prompts, TEXT_TOKENS, TEXT_DIM].

    Each phrase is a token: the sum of the vectors of its words and of its place. The last place is that of
    the background. Places between the objects and the background have the word "nothing".

    Raises:
        ValueError: no list of prompts, or a prompt with too many objects.
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
    """The embedding of the empty prompt: [count, TEXT_TOKENS, TEXT_DIM]."""
    return torch.zeros(count, TEXT_TOKENS, TEXT_DIM)


@cache
def word_vector(word: str) -> Tensor:
    """Gaussian vector of deviation 1/2, drawn from the hash of a word: float32 [TEXT_DIM]."""
    rng = np.random.default_rng(list(hashlib.sha256(word.encode()).digest()))
    return torch.from_numpy(rng.normal(scale=0.5, size=TEXT_DIM).astype(np.float32))


def save(model: nn.Module, path: Path, *, step: int) -> None:
    """Write the weights in bfloat16 and the number of training steps. The file is complete or missing."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.named_parameters()
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def load(path: Path = WEIGHTS) -> nn.Module:
    """Load the trained model in evaluation mode, in float32. The file has bfloat16."""
    weights, _ = read(path)
    model = build()
    expected = {name: value.shape for name, value in model.named_parameters()}
    got = {name: value.shape for name, value in weights.items()}
    if expected != got:
        odd = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise WeightsError(
            f"{path} holds another model: {len(odd)} of its tensors differ in name or shape, {odd[0]!r} first. "
            f"{_remedy(path)}"
        )
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise WeightsError(
                f"{path} must hold finite numbers of a floating type, {name!r} does not. {_remedy(path)}"
            )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def digest(model: nn.Module) -> str:
    """Hash of the weights. Two models with the same hash are the same."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def trained_steps(path: Path = WEIGHTS) -> int:
    """Number of training steps of the weights."""
    step = (read(path)[1] or {}).get("step", "")
    if not step.isdecimal():
        raise WeightsError(
            f"the metadata of {path} must say how many steps of training it has seen, got {step!r}: save it with "
            "sparsify_compiler.lab.model.save(model, path, step=...)"
        )
    return int(step)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Read the tensors of a file of weights, and its metadata or None."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise WeightsError(f"no weights at {path}. {_remedy(path)}")
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata()
    except (SafetensorError, OSError) as error:  # OSError: a folder
        raise WeightsError(f"{path} is damaged, or no safetensors ({error}). {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    """The advice where weights cannot be used: those of the package, or a file that a user gave."""
    train = "`python -m sparsify_compiler.lab.train --out DIR`"
    if path == WEIGHTS:
        return f"They come with the package: install it again, or train them with {train}."
    return (
        f"Leave the path out to use the weights of the package, or give a file that {train} or `sparsify distill` "
        "wrote with this version of it. For a model of your own there is `sparsify search CHECKPOINT`."
    )
