"""The providers of the attention op, and the choice among them.

A provider is a module with two functions:

    supports(*, device, dtype, head_dim, value_dim) -> str | None   the reason it cannot run, or None
    forward(query, key, value, table, key_bias, scale) -> (out, lse)   the op's schema, see ops.py
"""

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch

from sparsify_compiler.errors import ProviderError, unknown_choice

PROVIDERS = ("reference", "cpu", "triton")
_FASTEST = {"cpu": "cpu", "cuda": "triton"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider and why it was taken."""

    name: str
    reason: str


def load(name: str) -> ModuleType:
    """The provider's module, imported on first use."""
    return importlib.import_module(f"sparsify_compiler.kernels.{name}")


def check_name(requested: str) -> str:
    """`requested` if it is `auto` or a provider's name; OptionError else."""
    if not isinstance(requested, str) or requested not in ("auto", *PROVIDERS):
        raise unknown_choice("provider", requested, ("auto", *PROVIDERS))
    return requested


def choose(requested: str, *, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> Choice:
    """The provider to run on tensors like these.

    An explicit request never falls back: it raises `ProviderError` with the provider's own reason. `auto`
    takes the device's fast provider if it can run, else `reference`, and says why.
    """
    check_name(requested)

    def refusal(name: str) -> str | None:
        return load(name).supports(device=device, dtype=dtype, head_dim=head_dim, value_dim=value_dim)

    if requested != "auto":
        if why := refusal(requested):
            raise ProviderError(f"provider {requested!r} cannot run here: {why}. Try provider='auto'.")
        return Choice(requested, "asked for")
    if why := refusal("reference"):
        raise ProviderError(f"no provider can run here: {why}.")
    fastest = _FASTEST.get(device)
    if fastest is None:
        return Choice("reference", f"no fast provider for device {device!r}")
    if why := refusal(fastest):
        return Choice("reference", f"{fastest} cannot: {why}")
    return Choice(fastest, f"fastest on {device}")
