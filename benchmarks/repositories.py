"""Transformers of original repositories with `apply`: `python -m benchmarks.repositories FOLDER --out FILE`.

FOLDER has clones of the repositories in `REPOSITORIES`, under their names. Each transformer is made small, with
random weights. Attention by a library that runs on GPUs alone is replaced by `scaled_dot_product_attention`.
Nothing else of a repository is changed, and nothing of it is kept here. The model runs with `apply`, under options
that select every key, in four calls; then its twin runs without. A row is right if all attentions over the video
that the twin ran are sparse, the grid is right, and outputs are the twin's within rounding.

Every row runs in a process of its own. Needs the extra `pipelines`, and `einops`.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparsify_compiler
from benchmarks.attentions import EXACT, AtLeast, Attentions
from benchmarks.harness import write_json

ROUNDING = 2e-5
"""The largest relative error of outputs in float32."""
OTHER_ROUNDING = {"SkyReels-V2, diffusion forcing": 1e-4}
"""The same for models that Dynamo alone, with its backend `eager`, changes by 5e-5."""
DENSE = {
    "HunyuanVideo": "mask depends on the query",
}
"""Models whose attention stays dense -> a part of the reason. Segments of the tokens depend on the values of a
mask."""
GRID = (5, 7, 9)
"""Frames, rows and columns of tokens."""
TOKENS = GRID[0] * GRID[1] * GRID[2]
TIMES = (950.0, 800.0, 600.0, 400.0)
TEXT = 11

Call = Callable[[nn.Module, float], Tensor]
"""(model, time step) -> the output of a call."""


@dataclass(frozen=True, slots=True)
class Repository:
    """How to make a model, and how to call it."""

    clone: str
    """Name of the folder, and of the repository on GitHub."""
    make: Callable[[Path], tuple[nn.Module, Call]]


REPOSITORIES: dict[str, Repository] = {}


def repository(
    name: str, clone: str
) -> Callable[[Callable[[Path], tuple[nn.Module, Call]]], Callable[[Path], tuple[nn.Module, Call]]]:
    """Add a model, which the function makes from a clone."""

    def add(make: Callable[[Path], tuple[nn.Module, Call]]) -> Callable[[Path], tuple[nn.Module, Call]]:
        REPOSITORIES[name] = Repository(clone, make)
        return make

    return add


def module(folder: Path, name: str) -> Any:
    """A module of a clone, without the `__init__` of the packages around it, which import whole applications."""
    sys.path.insert(0, str(folder))
    parts = name.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if package not in sys.modules:
            made = types.ModuleType(package)
            made.__path__ = [str(folder.joinpath(*parts[:end]))]
            sys.modules[package] = made
    return importlib.import_module(name)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(channels: int) -> Tensor:
    """[1, C, F, H, W], whose patches of 1 x 2 x 2 form the grid."""
    return random(1, channels, GRID[0], 2 * GRID[1], 2 * GRID[2])


WAN = {"in_dim": 4, "out_dim": 4, "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16, "num_heads": 2}


def _wan(folder: Path, packages: str) -> tuple[nn.Module, Call]:
    attention = module(folder, f"{packages}.attention").attention
    code = module(folder, f"{packages}.model")
    code.flash_attention = partial(attention, dtype=torch.float32)  # their own form without flash_attn
    model = code.WanModel(**WAN, text_len=32, num_layers=2)

    def call(one: nn.Module, time: float) -> Tensor:
        text = random(TEXT, 16)
        return one([latents(4)[0]], t=torch.tensor([time]), context=[text], seq_len=TOKENS)[0]  # type: ignore

    return model, call


@repository("Wan 2.1", "Wan2.1")
def _wan_21(folder: Path) -> tuple[nn.Module, Call]:
    return _wan(folder, "wan.modules")


@repository("Wan 2.2", "Wan2.2")
def _wan_22(folder: Path) -> tuple[nn.Module, Call]:
    return _wan(folder, "wan.modules")


@repository("SkyReels-V2, diffusion forcing", "SkyReels-V2")
def _skyreels(folder: Path) -> tuple[nn.Module, Call]:
    attention = module(folder, "skyreels_v2_infer.modules.attention").attention
    code = module(folder, "skyreels_v2_infer.modules.transformer")
    code.flash_attention = partial(attention, dtype=torch.float32)
    model = code.WanModel(**WAN, text_len=TEXT, num_layers=2)

    def call(one: nn.Module, time: float) -> Tensor:
        times = torch.full((1, GRID[0]), time)
        return one(latents(4), t=times, context=random(1, TEXT, 16))  # type: ignore[no-any-return]

    return model, call


@repository("HunyuanVideo", "HunyuanVideo")
def _hunyuan(folder: Path) -> tuple[nn.Module, Call]:
    """Attention over segments: the video with the valid text, and the padding."""
    original = module(folder, "hyvideo.modules.attenion")
    code = module(folder, "hyvideo.modules.models")
    used = 8

    def segments(text_mask: Tensor, video: int) -> Tensor:
        length = text_mask.sum(1, dtype=torch.int32) + video
        return torch.stack(
            [length * 0, length[0:1].sum().expand(1), length * 0 + video + text_mask.shape[1]]
        )[:, 0]

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, **_: Any) -> Tensor:
        segment = torch.arange(q.shape[1]) >= cu_seqlens_q[1]
        mask = (segment[:, None] == segment[None])[None, None]
        return original.attention(q, k, v, mode="torch", attn_mask=mask)  # type: ignore[no-any-return]

    code.get_cu_seqlens, code.attention = segments, attend
    sizes = types.SimpleNamespace(text_states_dim=16, text_states_dim_2=8)
    model = code.HYVideoDiffusionTransformer(
        sizes,
        in_channels=4,
        hidden_size=64,
        heads_num=2,
        mm_double_blocks_depth=2,
        mm_single_blocks_depth=2,
        rope_dim_list=[8, 12, 12],
        guidance_embed=True,
    )

    def call(one: nn.Module, time: float) -> Tensor:
        mask = (torch.arange(TEXT) < used).long()[None]
        return one(  # type: ignore[no-any-return]
            latents(4),
            torch.tensor([time]),
            text_states=random(1, TEXT, 16),
            text_mask=mask,
            text_states_2=random(1, 8),
            freqs_cos=random(TOKENS, 32, seed=1).cos(),
            freqs_sin=random(TOKENS, 32, seed=1).sin(),
            guidance=torch.tensor([6000.0]),
            return_dict=False,
        )

    return model, call


@repository("LTX-Video", "LTX-Video")
def _ltx(folder: Path) -> tuple[nn.Module, Call]:
    """Packed tokens: the grid is in the values of positions."""
    code = module(folder, "ltx_video.models.transformers.transformer3d")
    model = code.Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        caption_channels=16,
        attention_bias=True,
        activation_fn="gelu-approximate",
        adaptive_norm="single_scale_shift",
        standardization_norm="rms_norm",
        norm_elementwise_affine=False,
        qk_norm="rms_norm",
        positional_embedding_type="rope",
        positional_embedding_theta=10000.0,
        positional_embedding_max_pos=[20, 2048, 2048],
        timestep_scale_multiplier=1000,
    )

    def call(one: nn.Module, time: float) -> Tensor:
        places = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
        grid = torch.stack(places).flatten(1)[None].float() * torch.tensor([8.0, 32.0, 32.0])[:, None]
        return one(  # type: ignore[no-any-return]
            random(1, TOKENS, 4),
            indices_grid=grid,
            encoder_hidden_states=random(1, TEXT, 16),
            encoder_attention_mask=torch.ones(1, TEXT),
            timestep=torch.full((1, TOKENS), time / 1000),
            return_dict=False,
        )[0]

    return model, call


@repository("Open-Sora 2", "Open-Sora")
def _open_sora(folder: Path) -> tuple[nn.Module, Call]:
    """Text before packed tokens of the video, whose grid is in the values of positions."""
    for name in ("flash_attn", "liger_kernel.ops.rope", "liger_kernel.ops.rms_norm"):
        for end in range(1, len(name.split(".")) + 1):
            package = ".".join(name.split(".")[:end])
            sys.modules.setdefault(package, types.ModuleType(package))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v))).transpose(1, 2)

    class RMSNorm(torch.autograd.Function):
        """In the place of a Triton kernel."""

        @staticmethod
        def apply(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Tensor:  # type: ignore[override]
            return nn.functional.rms_norm(x, weight.shape, weight, eps)

    sys.modules["flash_attn"].flash_attn_func = attend  # type: ignore[attr-defined]
    sys.modules["liger_kernel.ops.rope"].LigerRopeFunction = None  # type: ignore[attr-defined]
    sys.modules["liger_kernel.ops.rms_norm"].LigerRMSNormFunction = RMSNorm  # type: ignore[attr-defined]
    for name, what in (("registry", "MODELS"), ("utils.ckpt", "load_checkpoint")):
        part = types.ModuleType(f"opensora.{name}")
        setattr(part, what, types.SimpleNamespace(register_module=lambda _: lambda made: made))
        sys.modules[part.__name__] = part
    acceleration = types.ModuleType("opensora.acceleration.checkpoint")
    acceleration.auto_grad_checkpoint = lambda block, *args: block(*args)  # type: ignore[attr-defined]
    sys.modules[acceleration.__name__] = acceleration
    code = module(folder, "opensora.models.mmdit.model")
    model = code.MMDiTModel(
        code.MMDiTConfig(
            from_pretrained="",
            cache_dir="",
            in_channels=16,
            vec_in_dim=8,
            context_in_dim=16,
            hidden_size=64,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            depth_single_blocks=2,
            axes_dim=[8, 12, 12],
            theta=10000,
            qkv_bias=True,
            guidance_embed=False,
        )
    )

    def call(one: nn.Module, time: float) -> Tensor:
        places = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
        ids = torch.stack(places, -1).flatten(0, 2)[None].float()
        return one(  # type: ignore[no-any-return]
            img=random(1, TOKENS, 16),
            img_ids=ids,
            txt=random(1, TEXT, 16),
            txt_ids=torch.zeros(1, TEXT, 3),
            timesteps=torch.tensor([time / 1000]),
            y_vec=random(1, 8),
        )

    return model, call


def _comfy(folder: Path) -> Any:
    """The layers that ComfyUI makes models of; its attention is that of PyTorch."""
    sys.path.insert(0, str(folder))
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    importlib.import_module("comfy.options").enable_args_parsing()
    return importlib.import_module("comfy.ops").disable_weight_init


@repository("ComfyUI, Wan", "ComfyUI")
def _comfy_wan(folder: Path) -> tuple[nn.Module, Call]:
    layers = _comfy(folder)
    code = importlib.import_module("comfy.ldm.wan.model")
    model = code.WanModel(**WAN, text_len=TEXT, num_layers=2, operations=layers)

    def call(one: nn.Module, time: float) -> Tensor:
        return one(latents(4), torch.tensor([time]), random(1, TEXT, 16))  # type: ignore[no-any-return]

    return model, call


@repository("ComfyUI, Wan VACE", "ComfyUI")
def _comfy_vace(folder: Path) -> tuple[nn.Module, Call]:
    layers = _comfy(folder)
    code = importlib.import_module("comfy.ldm.wan.model")
    model = code.VaceWanModel(
        **WAN, text_len=TEXT, num_layers=2, vace_layers=2, vace_in_dim=6, operations=layers
    )

    def call(one: nn.Module, time: float) -> Tensor:
        control = latents(6)[:, None]
        return one(  # type: ignore[no-any-return]
            latents(4), torch.tensor([time]), random(1, TEXT, 16), vace_context=control, vace_strength=[1.0]
        )

    return model, call


@repository("ComfyUI, HunyuanVideo", "ComfyUI")
def _comfy_hunyuan(folder: Path) -> tuple[nn.Module, Call]:
    layers = _comfy(folder)
    code = importlib.import_module("comfy.ldm.hunyuan_video.model")
    model = code.HunyuanVideo(
        in_channels=4,
        out_channels=4,
        vec_in_dim=8,
        context_in_dim=16,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[8, 12, 12],
        theta=256,
        patch_size=[1, 2, 2],
        qkv_bias=True,
        guidance_embed=True,
        byt5=False,
        meanflow=False,
        operations=layers,
    )

    def call(one: nn.Module, time: float) -> Tensor:
        return one(  # type: ignore[no-any-return]
            latents(4),
            torch.tensor([time]),
            random(1, TEXT, 16),
            y=random(1, 8),
            guidance=torch.tensor([6.0]),
        )

    return model, call


@repository("ComfyUI, LTX-Video", "ComfyUI")
def _comfy_ltx(folder: Path) -> tuple[nn.Module, Call]:
    layers = _comfy(folder)
    code = importlib.import_module("comfy.ldm.lightricks.model")
    model = code.LTXVModel(
        in_channels=4,
        cross_attention_dim=64,
        attention_head_dim=32,
        num_attention_heads=2,
        caption_channels=16,
        num_layers=2,
        operations=layers,
    )

    def call(one: nn.Module, time: float) -> Tensor:
        video = random(1, 4, *GRID)
        return one(  # type: ignore[no-any-return]
            video, torch.tensor([time / 1000]), random(1, TEXT, 16), attention_mask=None, frame_rate=25
        )

    return model, call


@dataclass(kw_only=True, slots=True)
class Row:
    """A result."""

    model: str
    video_attentions: int = 0
    """Attentions over the video that the twin ran."""
    sparse: int = 0
    graphs: int = 0
    """Graphs of a call."""
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    """The grids of the sparse attentions."""
    error: float = 0.0
    """The largest relative error of an output."""
    seconds: float = 0.0
    fault: str = ""


def measure(name: str, folder: Path, inner: str) -> Row:
    """One row."""
    row, start = Row(model=name), time.perf_counter()
    try:
        _measure(row, REPOSITORIES[name], folder, inner)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = "".join(str(error).strip().splitlines()[:1])
        row.fault = f"{type(error).__name__}: {message[:300]} ({Path(place.filename).name}:{place.lineno})"
        traceback.print_exc()
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _measure(row: Row, what: Repository, folder: Path, inner: str) -> None:
    torch.manual_seed(0)
    clone = folder / what.clone
    model, call = what.make(clone)
    twin, _ = what.make(clone)
    with torch.no_grad():
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.copy_(
                torch.randn(one.shape) * one.shape[-1] ** -0.5 if one.dim() > 1 else torch.randn(one.shape)
            )
            other.copy_(one)
    model.eval(), twin.eval()
    with torch.no_grad():
        changed = sparsify_compiler.apply(model, **EXACT, inner_backend=inner)
        got = [call(model, now).clone() for now in TIMES]
        applied = changed.models[0]
        plans = [*applied.plans, *applied.outside]
        row.graphs = len(applied.graphs)
        with Attentions(twin, AtLeast(TOKENS)) as ran:
            expected = [call(twin, now).clone() for now in TIMES]
    row.error = max(
        float((one - other).norm() / other.norm()) for one, other in zip(got, expected, strict=True)
    )
    sparse = {plan.site.name for plan in plans if plan.method != "dense"}
    # An attention in a graph without a Parameter has no path in the model for its name.
    unnamed = {name for name in sparse if name.partition("#")[0] == "attention"}
    row.video_attentions, row.sparse = len(ran.found), len(sparse & ran.found) + len(unnamed)
    row.grids = sorted({plan.layout.grid for plan in plans if plan.method != "dense" and plan.layout.grid})
    told = {plan.site.name for plan in plans if DENSE.get(row.model, "?") in plan.reason}
    if told and not row.sparse and row.error <= ROUNDING:
        return
    if row.sparse != len(ran.found) or sparse - unnamed - ran.found:
        row.fault = f"ran {sorted(ran.found)}, sparse {sorted(sparse)}, others: " + str(
            {plan.site.name: plan.reason for plan in plans if plan.method == "dense"}
        )
    elif not ran.found:
        row.fault = "the twin ran no attention over the video"
    elif not row.error <= OTHER_ROUNDING.get(row.model, ROUNDING):
        row.fault = f"error {row.error:.1e}"
    elif row.grids != [GRID]:
        row.fault = f"the grid is {GRID}, found {row.grids}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows. Returns 1 if a row is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[*REPOSITORIES], metavar="MODEL")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--inner-backend", default="eager")
    parser.add_argument("--here", action="store_true", help="run one row in this process, and print it")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    if args.here:
        print(json.dumps(asdict(measure(args.only[0], args.folder, args.inner_backend))))
        return 0
    rows = []
    for name in args.only:
        command = [
            sys.executable,
            "-m",
            "benchmarks.repositories",
            str(args.folder),
            "--here",
            "--only",
            name,
        ]
        ran = subprocess.run(
            [*command, "--inner-backend", args.inner_backend], capture_output=True, text=True, check=False
        )
        try:
            row = Row(**json.loads(ran.stdout.splitlines()[-1]))
        except (IndexError, ValueError):
            row = Row(model=name, fault=(ran.stderr or "no output").strip()[-300:])
        rows.append(row)
        print(
            f"{name}: {row.sparse} of {row.video_attentions} sparse, {row.graphs} graphs, error {row.error:.1e}, "
            f"{row.seconds} s: {row.fault or 'right'}",
            flush=True,
        )
        if args.out is not None:
            write_json(args.out, [asdict(one) for one in rows], lines=True)
    wrong = [row for row in rows if row.fault]
    print(f"{len(rows)} models, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
