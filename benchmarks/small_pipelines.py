"""Pipelines of diffusers that make video, with all their components, small and with random weights.

`PIPELINES` says how each is made and called. Text encoders, tokenizers of a few words, VAEs and schedulers are made
here; transformers are those of `testing/models`. Where a text encoder is a large language model, calls get
embeddings in its place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.testing.models import CASES
from sparsify_compiler.testing.models.case import NOISE

WIDTH, POOLED, TEXT = 16, 8, 16
"""Width of text embeddings, of pooled ones, and the number of tokens of a prompt."""
WORDS = [
    "a",
    "an",
    "the",
    "red",
    "blue",
    "cat",
    "dog",
    "runs",
    "jumps",
    "sleeps",
    "on",
    "in",
    "over",
    "under",
    "grass",
    "water",
    "table",
    "slowly",
]
PROMPTS = ("a red cat runs over the grass", "the blue dog sleeps")
SIZES = ((112, 144), (96, 80))
"""(height, width) in pixels, where the VAE makes one latent of 8 x 8 pixels."""
FRAMES = 17
"""Frames of a video, where the VAE makes one latent frame of the first one and of every further 4."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """How to make a pipeline, and how to call it."""

    make: Callable[[], dict[str, Any]]
    """The components that the class takes."""
    call: Callable[[int, int, int], dict[str, Any]]
    """(prompt, height, width) -> arguments of a call for one video, except those of `_COMMON`."""
    sizes: Sequence[tuple[int, int]]
    tokens: Callable[[int, int], int]
    """(height, width) -> the number of tokens of the video."""
    several: bool
    """Whether the pipeline itself can make two videos of one prompt."""


PIPELINES: dict[str, Pipeline] = {}


def pipeline(
    name: str,
    call: Callable[[int, int, int], dict[str, Any]],
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    tokens: Callable[[int, int], int] | None = None,
    several: bool = True,
) -> Callable[[Callable[[], dict[str, Any]]], Callable[[], dict[str, Any]]]:
    """Add a pipeline, whose components the function makes, under the name of its class."""

    def add(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
        PIPELINES[name] = Pipeline(make, call, sizes, tokens or _tokens(), several)
        return make

    return add


def _tokens(frames: int = (FRAMES - 1) // 4 + 1, pixels: int = 16) -> Callable[[int, int], int]:
    return lambda height, width: frames * (height // pixels) * (width // pixels)


# ---- components


def transformer(family: str, **changes: Any) -> nn.Module:
    """The model of a family of `testing/models`, with changes of its configuration; its weights are random."""
    model, _ = CASES[family].build(batch=1)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}  # type: ignore
    made = type(model).from_config({**config, **changes})  # type: ignore[attr-defined]
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=NOISE)
    return made.eval()  # type: ignore[no-any-return]


def words() -> Any:
    """A tokenizer of `transformers` that knows `WORDS`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def t5(kind: str = "T5") -> dict[str, Any]:
    """A text encoder of the family T5, with its tokenizer."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        d_model=WIDTH, d_kv=8, d_ff=32, num_heads=2, num_layers=1, vocab_size=len(WORDS) + 3
    )
    encoder = getattr(transformers, f"{kind}EncoderModel")(config).eval()
    return {"text_encoder": encoder, "tokenizer": words()}


def clip_image() -> dict[str, Any]:
    """An encoder of images, with its processor."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip import CLIPImageProcessorPil

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    processor = CLIPImageProcessorPil(crop_size=8, size=8)
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}


def wan_vae(channels: int = 4) -> Any:
    """A VAE with latents of 4 frames x 8 x 8 pixels."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    ).eval()


def flow(**named: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **named})


def unipc() -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler()


# ---- arguments of calls


def image(height: int, width: int, seed: int = 0) -> Any:
    """A picture of random colours."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def video(height: int, width: int, frames: int = FRAMES) -> list[Any]:
    """Pictures of random colours."""
    return [image(height, width, seed) for seed in range(frames)]


def pixels(height: int, width: int) -> Tensor:
    """[1, 3, F, H, W], a video of random colours between 0 and 1."""
    return random(1, 3, FRAMES, height, width, seed=5).sigmoid()


def mask(height: int, width: int) -> Tensor:
    """[1, 1, F, H, W], 255 in all frames except the first, which a pipeline keeps."""
    kept = torch.full((1, 1, FRAMES, height, width), 255.0)
    kept[:, :, 0] = 0
    return kept


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_text(prompt: int, height: int, width: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[prompt], "negative_prompt": "the", "height": height, "width": width}


def _sized(named: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Arguments by name; functions among them get height and width."""
    return {name: value(height, width) if callable(value) else value for name, value in named.items()}


def text(**named: Any) -> Callable[[int, int, int], dict[str, Any]]:
    """Arguments of a call by text, and further ones as in `_sized`."""

    def call(prompt: int, height: int, width: int) -> dict[str, Any]:
        more = _sized(named, height, width)
        return by_text(prompt, height, width) | more

    return call


WAN = {"num_frames": FRAMES, "max_sequence_length": TEXT}
WITH_IMAGE = {"num_frames": FRAMES, "max_sequence_length": 512, "image": image}
"""Wan takes the last 512 tokens for the text's where an image comes before."""

# ---- Wan and the families built on it


@pipeline("WanPipeline", text(**WAN))
def _wan() -> dict[str, Any]:
    return t5("UMT5") | {"vae": wan_vae(), "scheduler": flow(), "transformer": transformer("wan")}


@pipeline("WanPipeline, two experts", text(**WAN))
def _wan_22() -> dict[str, Any]:
    return _wan() | {"transformer_2": transformer("wan"), "boundary_ratio": 0.875, "scheduler": unipc()}


@pipeline("WanPipeline, a time for each token", text(**WAN))
def _wan_5b() -> dict[str, Any]:
    return _wan() | {"expand_timesteps": True}


@pipeline("WanImageToVideoPipeline", text(**WITH_IMAGE), several=False)
def _wan_i2v() -> dict[str, Any]:
    return _wan() | clip_image() | {"transformer": transformer("wan_i2v", in_channels=12)}


@pipeline("WanVideoToVideoPipeline", text(max_sequence_length=TEXT, video=video, strength=0.9))
def _wan_v2v() -> dict[str, Any]:
    return _wan() | {"scheduler": unipc()}


@pipeline(
    "WanVACEPipeline", text(**WAN, video=video, reference_images=image), tokens=_tokens(6), several=False
)
def _wan_vace() -> dict[str, Any]:
    return _wan() | {"transformer": transformer("wan_vace", vace_in_channels=8 + 64)}


@pipeline(
    "WanAnimatePipeline",
    text(
        image=image,
        pose_video=video,
        face_video=lambda height, width: video(16, 16),
        segment_frame_length=FRAMES,
        max_sequence_length=512,
    ),
    tokens=_tokens(frames=6),
)
def _wan_animate() -> dict[str, Any]:
    return (
        _wan()
        | clip_image()
        | {
            "transformer": transformer("wan_animate", image_dim=WIDTH, added_kv_proj_dim=32),
            "scheduler": unipc(),
        }
    )


@pipeline("LucyEditPipeline", text(**WAN, video=video), several=False)
def _lucy() -> dict[str, Any]:
    return _wan() | {"transformer": transformer("wan", in_channels=8)}


@pipeline("ChronoEditPipeline", text(**WITH_IMAGE), tokens=_tokens(2), several=False)
def _chronoedit() -> dict[str, Any]:
    model = transformer("chronoedit", in_channels=12, image_dim=WIDTH, added_kv_proj_dim=24)
    return _wan() | clip_image() | {"transformer": model}


@pipeline("SkyReelsV2Pipeline", text(**WAN))
def _skyreels() -> dict[str, Any]:
    return _wan() | {"transformer": transformer("skyreels_v2"), "scheduler": unipc()}


@pipeline("SkyReelsV2ImageToVideoPipeline", text(**WITH_IMAGE), several=False)
def _skyreels_i2v() -> dict[str, Any]:
    from transformers import CLIPVisionModelWithProjection

    parts = clip_image()
    parts["image_encoder"] = CLIPVisionModelWithProjection(parts["image_encoder"].config).eval()
    model = transformer("skyreels_v2", in_channels=12, image_dim=WIDTH, added_kv_proj_dim=32)
    return _skyreels() | parts | {"transformer": model}


@pipeline("SkyReelsV2DiffusionForcingPipeline", text(**WAN, base_num_frames=FRAMES))
def _skyreels_df() -> dict[str, Any]:
    return _skyreels()


@pipeline("SkyReelsV2DiffusionForcingImageToVideoPipeline", text(**WAN, image=image, base_num_frames=FRAMES))
def _skyreels_df_i2v() -> dict[str, Any]:
    return _skyreels()


@pipeline(
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    text(
        max_sequence_length=TEXT,
        num_frames=25,
        video=lambda height, width: video(height, width, 9),
        base_num_frames=FRAMES,
        overlap_history=9,
    ),
    tokens=_tokens(frames=3),
)
def _skyreels_df_v2v() -> dict[str, Any]:
    return _skyreels()


@pipeline("AnyFlowPipeline", text(**WAN))
def _anyflow() -> dict[str, Any]:
    from diffusers import FlowMapEulerDiscreteScheduler

    return _wan() | {"transformer": transformer("anyflow"), "scheduler": FlowMapEulerDiscreteScheduler()}


@pipeline(
    "HeliosPipeline",
    text(**WAN, history_sizes=[4, 2, 1], num_latent_frames_per_chunk=5),
    several=False,
)
def _helios() -> dict[str, Any]:
    from diffusers import HeliosScheduler

    return _wan() | {"transformer": transformer("helios"), "scheduler": HeliosScheduler(stages=1)}


@pipeline(
    "HeliosPyramidPipeline",
    text(
        **WAN,
        history_sizes=[4, 2, 1],
        num_latent_frames_per_chunk=5,
        pyramid_num_inference_steps_list=[2, 2],
    ),
    sizes=((96, 160), (128, 64)),
    several=False,
)
def _helios_pyramid() -> dict[str, Any]:
    from diffusers import HeliosScheduler

    scheduler = HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3)
    return _wan() | {"transformer": transformer("helios"), "scheduler": scheduler}


# ---- LTX


@pipeline(
    "LTXPipeline",
    text(num_frames=33, max_sequence_length=TEXT),
    sizes=((224, 288), (192, 160)),
    tokens=_tokens(5, 32),
)
def _ltx() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
    ).eval()
    return t5() | {"vae": vae, "scheduler": flow(), "transformer": transformer("ltx")}


@pipeline(
    "LTXImageToVideoPipeline",
    text(num_frames=33, max_sequence_length=TEXT, image=image),
    sizes=((224, 288), (192, 160)),
    tokens=_tokens(5, 32),
)
def _ltx_i2v() -> dict[str, Any]:
    return _ltx()


@pipeline(
    "LTXConditionPipeline",
    text(num_frames=33, max_sequence_length=TEXT, image=image),
    sizes=((224, 288), (192, 160)),
    tokens=_tokens(5, 32),
)
def _ltx_condition() -> dict[str, Any]:
    return _ltx()


@pipeline(
    "LTXConditionPipeline, a later frame",
    text(num_frames=33, max_sequence_length=TEXT, image=image, frame_index=16),
    sizes=((224, 288), (192, 160)),
    tokens=_tokens(5, 32),
    several=False,
)
def _ltx_later() -> dict[str, Any]:
    """The tokens of the conditioned frame lie before those of the video."""
    return _ltx()


def _ltx2_call(**named: Any) -> Callable[[int, int, int], dict[str, Any]]:
    """Arguments of a call with embeddings, padded before their tokens, and all terms of guidance."""

    def call(prompt: int, height: int, width: int) -> dict[str, Any]:
        mask = torch.ones(1, TEXT, dtype=torch.long)
        mask[:, : 4 + 3 * prompt] = 0
        return {
            "prompt_embeds": random(1, TEXT, WIDTH, seed=prompt),
            "prompt_attention_mask": mask,
            "negative_prompt_embeds": random(1, TEXT, WIDTH, seed=9),
            "negative_prompt_attention_mask": mask,
            "height": height,
            "width": width,
            "num_frames": 33,
            "spatio_temporal_guidance_blocks": [1],
        } | _sized(named, height, width)

    return call


@pipeline("LTX2Pipeline", _ltx2_call(), sizes=((224, 288), (192, 160)), tokens=_tokens(5, 32), several=False)
def _ltx2() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    ).eval()
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    ).eval()
    heads = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": WIDTH // 2,
            "num_layers": 1,
            "num_learnable_registers": 8,
        }.items()
    }
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=1, connector_rope_base_seq_len=32, **heads
    ).eval()
    return {
        "text_encoder": None,
        "tokenizer": words(),
        "connectors": connectors,
        "vae": vae,
        "audio_vae": audio_vae,
        "vocoder": vocoder,
        "scheduler": flow(use_dynamic_shifting=True),
        "transformer": transformer("ltx2", perturbed_attn=True),
    }


@pipeline(
    "LTX2ImageToVideoPipeline",
    _ltx2_call(image=image, image_crf=0),
    sizes=((224, 288), (192, 160)),
    tokens=_tokens(5, 32),
    several=False,
)
def _ltx2_i2v() -> dict[str, Any]:
    return _ltx2()


# ---- HunyuanVideo


def hunyuan_vae() -> Any:
    """A VAE with latents of 4 frames x 8 x 8 pixels."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def embedded(prompt: int, height: int, width: int) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, 9 - 3 * prompt :] = 0
    return {
        "prompt_embeds": random(1, TEXT, WIDTH, seed=prompt),
        "pooled_prompt_embeds": random(1, POOLED, seed=prompt),
        "prompt_attention_mask": mask,
        "height": height,
        "width": width,
        "num_frames": FRAMES,
    }


@pipeline("HunyuanVideoPipeline", embedded, several=False)
def _hunyuan() -> dict[str, Any]:
    return {
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "vae": hunyuan_vae(),
        "scheduler": flow(),
        "transformer": transformer("hunyuan_video"),
    }


def _negative(prompt: int, height: int, width: int) -> dict[str, Any]:
    given = embedded(prompt, height, width)
    return (
        given
        | {
            f"negative_{name}": given[name] * 0
            for name in given
            if name.startswith("p") and "mask" not in name
        }
        | {"negative_prompt_attention_mask": given["prompt_attention_mask"]}
    )


@pipeline(
    "HunyuanSkyreelsImageToVideoPipeline",
    lambda prompt, height, width: _negative(prompt, height, width) | {"image": image(height, width)},
    several=False,
)
def _hunyuan_skyreels() -> dict[str, Any]:
    return _hunyuan() | {"transformer": transformer("hunyuan_video", in_channels=8, guidance_embeds=False)}


@pipeline(
    "HunyuanVideoImageToVideoPipeline",
    lambda prompt, height, width: embedded(prompt, height, width) | {"image": image(height, width)},
    several=False,
)
def _hunyuan_i2v() -> dict[str, Any]:
    return _hunyuan() | {"transformer": transformer("hunyuan_video_i2v"), "image_processor": None}


@pipeline(
    "HunyuanVideoFramepackPipeline",
    lambda prompt, height, width: (
        embedded(prompt, height, width) | {"image": image(height, width), "latent_window_size": 5}
    ),
    several=False,
)
def _framepack() -> dict[str, Any]:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip import SiglipImageProcessorPil

    config = SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return _hunyuan() | {
        "transformer": transformer("hunyuan_framepack"),
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    }


def _hunyuan_15_text(prompt: int) -> dict[str, Any]:
    """Embeddings of both encoders, and others for guidance."""
    given = embedded(prompt, 0, 0)
    both = {
        "prompt_embeds": given["prompt_embeds"],
        "prompt_embeds_mask": given["prompt_attention_mask"],
        "prompt_embeds_2": random(1, TEXT, 8, seed=prompt),
        "prompt_embeds_mask_2": torch.tensor([[1] * (5 + prompt) + [0] * (TEXT - 5 - prompt)]),
    }
    return both | {f"negative_{name}": value.roll(1, 1) for name, value in both.items()}


@pipeline(
    "HunyuanVideo15Pipeline",
    lambda prompt, height, width: (
        _hunyuan_15_text(prompt) | {"height": height, "width": width, "num_frames": FRAMES}
    ),
    several=False,
)
def _hunyuan_15() -> dict[str, Any]:
    from diffusers import AutoencoderKLHunyuanVideo15, ClassifierFreeGuidance

    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    ).eval()
    return {
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "vae": vae,
        "scheduler": flow(),
        "guider": ClassifierFreeGuidance(),
        "transformer": transformer("hunyuan_video_15", in_channels=9),
    }


@pipeline(
    "HunyuanVideo15ImageToVideoPipeline",
    lambda prompt, height, width: (
        _hunyuan_15_text(prompt) | {"image": image(height, width), "num_frames": FRAMES}
    ),
    sizes=((112, 144), (96, 160)),
)
def _hunyuan_15_i2v() -> dict[str, Any]:
    parts = _framepack()
    return _hunyuan_15() | {
        "image_encoder": parts["image_encoder"],
        "feature_extractor": parts["feature_extractor"],
        "transformer": transformer("hunyuan_video_15", in_channels=9, target_size=128),
    }


def qwen(**named: Any) -> Callable[[int, int, int], dict[str, Any]]:
    """Arguments of a call with embeddings of a language model, and further ones as in `_sized`."""

    def call(prompt: int, height: int, width: int) -> dict[str, Any]:
        more = _sized(named, height, width)
        given = embedded(prompt, height, width)
        both = {name: given[name] for name in ("prompt_embeds", "prompt_attention_mask")}
        negative = {f"negative_{name}": value.roll(1, 1) for name, value in both.items()}
        return both | negative | {"height": height, "width": width} | more

    return call


# ---- CogVideoX

COG: dict[str, Any] = {"num_frames": FRAMES, "max_sequence_length": TEXT}


def cog_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def cog(**changes: Any) -> dict[str, Any]:
    changes = {"max_text_seq_length": TEXT, "sample_width": 18, "sample_height": 14, **changes}
    return t5() | {
        "vae": cog_vae(),
        "scheduler": ddim(),
        "transformer": transformer("cogvideox_rope", **changes),
    }


@pipeline("CogVideoXPipeline", text(**COG))
def _cog() -> dict[str, Any]:
    return cog()


@pipeline("CogVideoXImageToVideoPipeline", text(**COG, image=image), sizes=SIZES[:1])
def _cog_i2v() -> dict[str, Any]:
    return cog(in_channels=8)


@pipeline("CogVideoXVideoToVideoPipeline", text(max_sequence_length=TEXT, video=video, strength=0.9))
def _cog_v2v() -> dict[str, Any]:
    return cog()


@pipeline("CogVideoXFunControlPipeline", text(max_sequence_length=TEXT, control_video=video))
def _cog_control() -> dict[str, Any]:
    return cog(in_channels=8)


@pipeline("ConsisIDPipeline", text(**COG, image=image), sizes=SIZES[:1])
def _consisid() -> dict[str, Any]:
    return cog() | {"transformer": transformer("consisid", max_text_seq_length=TEXT, in_channels=8)}


# ---- Cosmos


class Unchecked:
    """A checker of Cosmos that finds every prompt and video safe."""

    def to(self, device: Any) -> None:
        """Stay where it is."""

    def check_text_safety(self, prompt: str) -> bool:
        return True


def cosmos(**changes: Any) -> nn.Module:
    """The model of the family Cosmos with a mask of padding among its channels, as the pipelines call it."""
    resize_without_torchvision()
    return transformer("cosmos", concat_padding_mask=True, **changes)


def resize_without_torchvision() -> None:
    """Let the model of Cosmos resize its mask of padding by torch where torchvision is missing."""
    from types import SimpleNamespace

    from diffusers.models.transformers import transformer_cosmos

    def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
        return nn.functional.interpolate(mask, size=size, mode=interpolation)

    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = SimpleNamespace(
            functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )


COSMOS: dict[str, Any] = {"num_frames": 33, "max_sequence_length": TEXT}


@pipeline("CosmosTextToWorldPipeline", text(**COSMOS))
def _cosmos() -> dict[str, Any]:
    from diffusers import AutoencoderKLCosmos, EDMEulerScheduler

    vae = AutoencoderKLCosmos(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        num_layers=1,
        attention_resolutions=(8,),
        resolution=64,
        latents_mean=None,
        latents_std=None,
    ).eval()
    scheduler = EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return t5() | {
        "vae": vae,
        "scheduler": scheduler,
        "transformer": cosmos(),
        "safety_checker": Unchecked(),
    }


@pipeline("CosmosVideoToWorldPipeline", text(**COSMOS, image=image))
def _cosmos_v2w() -> dict[str, Any]:
    return _cosmos() | {"transformer": cosmos(in_channels=5)}


@pipeline("Cosmos2VideoToWorldPipeline", text(**WAN, image=image))
def _cosmos_2() -> dict[str, Any]:
    scheduler = flow(use_karras_sigmas=True, shift=1.0)
    scheduler.register_to_config(
        sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min"
    )
    model = cosmos(in_channels=5, extra_pos_embed_type=None)
    return _cosmos() | {"vae": wan_vae(), "scheduler": scheduler, "transformer": model}


@pipeline("Cosmos2_5_PredictBasePipeline", qwen(num_frames=FRAMES, video=video))
def _cosmos_25() -> dict[str, Any]:
    model = cosmos(
        in_channels=5,
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=WIDTH,
        encoder_hidden_states_channels=WIDTH,
    )
    return _cosmos_2() | {
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": unipc(),
        "transformer": model,
    }


# ---- others


@pipeline("MochiPipeline", text(**WAN | {"num_frames": 25}))
def _mochi() -> dict[str, Any]:
    from diffusers import AutoencoderKLMochi

    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    model = transformer("mochi", in_channels=12, max_sequence_length=TEXT)
    return t5() | {"vae": vae, "scheduler": flow(), "transformer": model}


@pipeline("AllegroPipeline", text(**WAN | {"num_frames": 16, "clean_caption": False}), tokens=_tokens(4))
def _allegro() -> dict[str, Any]:
    from diffusers import AutoencoderKLAllegro

    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    vae.enable_tiling()
    return t5() | {"vae": vae, "scheduler": ddim(), "transformer": transformer("allegro")}


def easyanimate_vae() -> Any:
    from diffusers import AutoencoderKLMagvit

    return AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
        up_block_types=["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


@pipeline("EasyAnimatePipeline", qwen(num_frames=FRAMES))
def _easyanimate() -> dict[str, Any]:
    return {
        "text_encoder": None,
        "tokenizer": None,
        "vae": easyanimate_vae(),
        "scheduler": flow(),
        "transformer": transformer("easyanimate"),
    }


@pipeline(
    "EasyAnimateInpaintPipeline",
    qwen(num_frames=FRAMES, video=pixels, mask_video=mask),
    several=False,
)
def _easyanimate_inpaint() -> dict[str, Any]:
    model = transformer("easyanimate", in_channels=12, resize_inpaint_mask_directly=False)
    return _easyanimate() | {"transformer": model}


@pipeline("MotifVideoPipeline", qwen(num_frames=FRAMES))
def _motif() -> dict[str, Any]:
    from diffusers import ClassifierFreeGuidance

    return {
        "text_encoder": None,
        "tokenizer": words(),
        "vae": wan_vae(),
        "scheduler": flow(),
        "guider": ClassifierFreeGuidance(),
        "transformer": transformer("motif_video", in_channels=9),
    }


@pipeline("MotifVideoImage2VideoPipeline", qwen(prompt=None, num_frames=FRAMES, image=image), several=False)
def _motif_i2v() -> dict[str, Any]:
    from transformers.models.siglip import SiglipImageProcessorPil

    return _motif() | {"feature_extractor": SiglipImageProcessorPil(size={"height": 8, "width": 8})}


def _kandinsky(**named: Any) -> Callable[[int, int, int], dict[str, Any]]:
    def call(prompt: int, height: int, width: int) -> dict[str, Any]:
        more = _sized(named, height, width)
        lengths = torch.tensor([0, TEXT], dtype=torch.int32)
        return {
            "prompt_embeds_qwen": random(1, TEXT, WIDTH, seed=prompt),
            "prompt_embeds_clip": random(1, POOLED, seed=prompt),
            "negative_prompt_embeds_qwen": random(1, TEXT, WIDTH, seed=9),
            "negative_prompt_embeds_clip": random(1, POOLED, seed=9),
            "prompt_cu_seqlens": lengths,
            "negative_prompt_cu_seqlens": lengths,
            "height": height,
            "width": width,
            "num_frames": FRAMES,
        } | more

    return call


@pipeline("Kandinsky5T2VPipeline", _kandinsky())
def _kandinsky5() -> dict[str, Any]:
    return _hunyuan() | {"transformer": transformer("kandinsky5")}


@pipeline("Kandinsky5I2VPipeline", _kandinsky(image=image))
def _kandinsky5_i2v() -> dict[str, Any]:
    return _hunyuan() | {"transformer": transformer("kandinsky5", visual_cond=True)}


def _kandinsky6(**named: Any) -> Callable[[int, int, int], dict[str, Any]]:
    def call(prompt: int, height: int, width: int) -> dict[str, Any]:
        return {
            "prompt_embeds": random(1, TEXT, WIDTH, seed=prompt),
            "pooled_prompt_embeds": random(1, POOLED, seed=prompt),
            "negative_prompt_embeds": random(1, TEXT, WIDTH, seed=9),
            "negative_pooled_prompt_embeds": random(1, POOLED, seed=9),
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "sample_audio": False,
        } | _sized(named, height, width)

    return call


@pipeline("Kandinsky6TI2VAPipeline", _kandinsky6())
def _kandinsky6_t2va() -> dict[str, Any]:
    model = transformer("kandinsky6", visual_cond=True, visual_token_type_num_embeddings=2)
    return _hunyuan() | {"transformer": model}


@pipeline("Kandinsky6TI2VAPipeline, from an image", _kandinsky6(image=image), tokens=_tokens(6))
def _kandinsky6_i2va() -> dict[str, Any]:
    return _kandinsky6_t2va()
