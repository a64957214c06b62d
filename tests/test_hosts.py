"""The examples for other hosts, with imitations of the hosts' interfaces."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparsify_compiler
from sparsify_compiler.testing.oracles import TileAttention
from sparsify_compiler.testing.videos import Video, latents, steps

HOSTS = Path(__file__).resolve().parent.parent / "examples" / "hosts"
GRID = (5, 3, 4)

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
]


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, HOSTS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dynamo looks it up
    spec.loader.exec_module(module)
    return module


def test_examples_are_thin() -> None:
    files = sorted(HOSTS.glob("*.py"))
    assert [one.stem for one in files] == ["comfyui_node", "vllm_omni_attention"]
    for one in files:
        assert one.read_text().count("\n") < 80, one
        assert "has not run inside" in one.read_text()


class ModelPatcher:
    """What ComfyUI calls a MODEL: clones share the model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def clone(self) -> "ModelPatcher":
        return copy.copy(self)


def test_the_node_of_comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workflow runs the node, samples, changes the node, samples again, and takes it out."""
    node = example("comfyui_node")
    apply = sparsify_compiler.apply
    monkeypatch.setattr(
        sparsify_compiler, "apply", lambda *args, **named: apply(*args, **named, inner_backend="eager")
    )
    (name,) = node.NODE_CLASS_MAPPINGS
    assert node.NODE_DISPLAY_NAME_MAPPINGS.keys() == {name}
    kind = node.NODE_CLASS_MAPPINGS[name]
    inputs = kind.INPUT_TYPES()["required"]
    methods, default = inputs["method"]
    assert default["default"] in methods
    given = {
        key: options["default"] for key, (_, options) in (one for one in inputs.items() if len(one[1]) > 1)
    }
    assert set(methods) <= set(sparsify_compiler.methods.METHODS)
    model = ModelPatcher(SimpleNamespace(diffusion_model=Video(2)))
    expected = steps(Video(2), latents(GRID), 2)
    run = getattr(kind(), kind.FUNCTION)
    assert inputs.keys() == {"model", *given}

    def sampled(**settings: Any) -> list[Tensor]:
        (patched,) = run(model, **(given | settings))
        assert patched is not model
        return steps(patched.model.diffusion_model, latents(GRID), 2)

    with TileAttention(5, 2, 12):
        sparse = steps(Video(2), latents(GRID), 2)
    for _ in range(2):
        found = sampled(method="tile", dense_steps=0.0)
        # `tile` has half of the frames as references by default: 2 of 5.
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, sparse, strict=True))
    assert not torch.allclose(sampled(dense_steps=0.0, min_gain=1.0)[0], expected[0], atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(sampled(method="dense"), expected, strict=True))


def tokens(count: int, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, count, heads, 16, generator=generator)
    return 3 * query, key, value


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def test_the_attention_of_vllm_omni() -> None:
    """Sparse where the call has the geometry of a video, PyTorch's attention elsewhere."""
    backend = example("vllm_omni_attention").SparseAttentionBackend
    options = {"method": "tile", "reference_frames": 2, "inner_backend": "eager"}
    layer = backend.get_impl_cls()(
        2, 16, 16**-0.5, prefix="blocks.0", backend_kwargs=options, qkv_layout="BSND"
    )

    def metadata(**given: Any) -> SimpleNamespace:
        layout = {"prefix_len": None, "latent_grid": None, **given.pop("layout", {})}
        return SimpleNamespace(**{"attn_mask": None, "video_layout": SimpleNamespace(**layout), **given})

    query, key, value = tokens(3 + 60 + 2)
    frame = torch.full((65,), -1)
    frame[3:63] = torch.arange(60) // 12
    read = (
        (frame[:, None] == frame)
        | ((frame % 3 == 0) | (frame < 0))[None]
        | ((frame % 3 == 0) | (frame < 0))[:, None]
    )
    video = {"latent_grid": GRID, "prefix_len": 3}
    with torch.no_grad():
        found = layer.forward_cuda(query, key, value, metadata(layout=video))
        assert torch.allclose(found, plain(query, key, value, read), atol=1e-5)
        assert not torch.allclose(found, plain(query, key, value), atol=1e-2)
        assert torch.equal(layer.forward(query, key, value, metadata()), plain(query, key, value))
        assert torch.equal(layer.forward(query, key, value), plain(query, key, value))
        mask = torch.ones(1, 65)
        mask[:, 60:] = 0
        masked = layer.forward(query, key, value, metadata(attn_mask=mask, layout=video))
        assert torch.equal(masked, plain(query, key, value, mask.bool()[:, None, None]))
        again = layer.forward(*tokens(60), metadata(layout={"latent_grid": GRID}))
        assert torch.allclose(again, plain(*tokens(60), read[3:63, 3:63]), atol=1e-5)
    assert len(layer.sparse) == 2
