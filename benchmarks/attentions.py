"""The attentions over a video that a model runs without sparsify: the oracle of several benchmarks."""

import sys
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

EXACT: dict[str, Any] = {
    "method": "svg2",
    "top_p": 1.0,
    "far_field": "drop",
    "dense_steps": 0,
    "dense_layers": 0,
}
"""Options that select every key, so that a sparse model gives the numbers of a dense one."""


class Attentions(TorchFunctionMode):
    """Notes the modules of a model that attend over as many tokens as the video has, with its text."""

    def __init__(self, model: nn.Module, tokens: set[int]) -> None:
        super().__init__()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.tokens, self.found = tokens, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            if {named["query"].shape[-2], named["key"].shape[-2]} <= self.tokens:
                frame: Any = sys._getframe(1)
                while frame is not None and not any(
                    id(one) in self.paths for one in frame.f_locals.values() if isinstance(one, nn.Module)
                ):
                    frame = frame.f_back
                if frame is not None:
                    owner = next(
                        one
                        for one in frame.f_locals.values()
                        if isinstance(one, nn.Module) and id(one) in self.paths
                    )
                    self.found.add(self.paths[id(owner)])
        return func(*args, **(kwargs or {}))


class AtLeast(set[int]):
    """The numbers of tokens of sequences that attend to themselves, from a least one on, for `Attentions`."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least

    def __ge__(self, others: Any) -> bool:
        return len(others) == 1 and min(others) >= self.least
