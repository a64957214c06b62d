"""A node of ComfyUI that makes the video model of a workflow sparse.

Copy this file into `ComfyUI/custom_nodes`. The node "Sparse attention (video)" takes a MODEL and gives a MODEL; put
it before the sampler. It was tested with an imitation of ComfyUI's interface, and has not run inside ComfyUI.

The model of a MODEL is shared by its clones, so the last run of the node decides for all of them, until `method` is
`dense`. ComfyUI's attention must be that of PyTorch: start it with `--use-pytorch-cross-attention`.
"""

from typing import Any
from weakref import WeakKeyDictionary

import sparsify_compiler

_applied: "WeakKeyDictionary[Any, sparsify_compiler.Applied]" = WeakKeyDictionary()
"""Diffusion model -> what `apply` did to it."""


class SparseVideoAttention:
    """Applies the package to the diffusion model of a MODEL, in place."""

    CATEGORY = "model_patches"
    FUNCTION = "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Block-sparse attention for video models. It changes the video a little."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs of the node, in ComfyUI's form."""
        methods = ["keys", "svg2", "cubes", "tile", "sta", "dense"]
        steps = {"default": 0.2, "min": 0.0, "max": 1.0, "step": 0.05}
        gain = {"default": 0.02, "min": 0.0, "max": 1.0, "step": 0.001}
        return {
            "required": {
                "model": ("MODEL",),
                "method": (methods, {"default": "keys"}),
                "dense_steps": ("FLOAT", steps),
                "min_gain": ("FLOAT", gain),
            }
        }

    def patch(self, model: Any, method: str, dense_steps: float, min_gain: float) -> tuple[Any]:
        """Make the model sparse and return it; `min_gain` is for `svg2` and `cubes`."""
        diffusion = model.model.diffusion_model
        if (before := _applied.pop(diffusion, None)) is not None:
            before.restore()
        if method != "dense":
            options: dict[str, Any] = {"method": method, "dense_steps": dense_steps}
            if method in ("svg2", "cubes"):
                options["min_gain"] = min_gain
            _applied[diffusion] = sparsify_compiler.apply(diffusion, **options)
        return (model.clone(),)


NODE_CLASS_MAPPINGS = {"SparseVideoAttention": SparseVideoAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"SparseVideoAttention": "Sparse attention (video)"}
