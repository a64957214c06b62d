"""An attention backend in the style of vLLM-omni: a host gives it query, key and value of one attention.

The metadata of a call has the geometry of the video (`video_layout`), which models publish for sparse backends.
Calls without it, with masks, or causal ones are those of PyTorch. It was tested with an imitation of the host's
interface, and has not run inside vLLM-omni. There the classes also inherit `AttentionImpl` and `AttentionBackend`.

Where you can reach the host's transformer, `sparsify_compiler.apply(transformer)` needs none of this and sees more.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import sparsify_compiler


class _Attention(nn.Module):
    """One attention over [B, S, H, D], as a module that `apply` can change."""

    def __init__(self, scale: float, *, causal: bool) -> None:
        super().__init__()
        self.scale, self.causal = scale, causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)


class SparseAttentionImpl:
    """The attention of one layer, applied once for each geometry of a video."""

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False,
        num_kv_heads: int | None = None, prefix: str = "", backend_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        self.options = {"method": "cubes", "dense_steps": 0, "dense_layers": 0, **(backend_kwargs or {})}
        self.plain = _Attention(softmax_scale, causal=causal)
        self.sparse: dict[Any, _Attention] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """query [B, S, H, D], key and value [B, Sk, Hkv, D] -> [B, S, H, D]."""
        mask = getattr(attn_metadata, "attn_mask", None)
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()[:, None, None]
        layout = getattr(attn_metadata, "video_layout", None)
        grid = getattr(layout, "latent_grid", None)
        if self.plain.causal or mask is not None or grid is None or query.shape[1] != key.shape[1]:
            return self.plain(query, key, value, mask)
        before, video = layout.prefix_len or 0, grid[0] * grid[1] * grid[2]
        place = grid, before, query.shape[1] - before - video
        if place not in self.sparse:
            module = self.sparse[place] = _Attention(self.plain.scale, causal=False)
            sparsify_compiler.apply(module, grid=grid, text=place[1:], **self.options)
        return self.sparse[place](query, key, value)

    forward_cuda = forward_hip = forward_xpu = forward


class SparseAttentionBackend:
    """The class that the host's registry names."""

    @staticmethod
    def get_name() -> str:
        return "SPARSIFY"

    @staticmethod
    def get_impl_cls() -> type[SparseAttentionImpl]:
        return SparseAttentionImpl
