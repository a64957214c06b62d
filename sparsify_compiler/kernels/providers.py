"""The providers of the ops, and the choice among them.

A provider has a module in every family of ops, with the functions of the family's `Provider`, and a module of the
same name here (`cpu`, `reference`, `triton`), with one function:

    supports(*, device, dtype, head_dim, value_dim) -> str | None   the reason it cannot run, or None
"""

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from sparsify_compiler import config
from sparsify_compiler.errors import ProviderError, unknown_choice

if TYPE_CHECKING:  # the ops import this file
    from sparsify_compiler.kernels import attention, clustering, far_field, prediction, statistics

PROVIDERS = ("reference", "cpu", "triton")
_FASTEST = {"cpu": "cpu", "cuda": "triton"}


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context without autocast; one that does nothing where it is off, and while a model is exported.

    Export refuses autocast, and a file cannot hold this context: it saves the operator, and does not load it.
    """
    off = torch.compiler.is_exporting() or not torch.is_autocast_enabled(device)
    return nullcontext() if off else torch.autocast(device, enabled=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """A provider and the reason for it."""

    name: str
    reason: str


@overload
def load(provider: str, family: Literal["attention"]) -> "attention.Provider": ...
@overload
def load(provider: str, family: Literal["clustering"]) -> "clustering.Provider": ...
@overload
def load(provider: str, family: Literal["far_field"]) -> "far_field.Provider": ...
@overload
def load(provider: str, family: Literal["prediction"]) -> "prediction.Provider": ...
@overload
def load(provider: str, family: Literal["statistics"]) -> "statistics.Provider": ...
def load(provider: str, family: str) -> Any:
    """A provider's module for a family of ops, imported on first use."""
    return importlib.import_module(f"sparsify_compiler.kernels.{family}.{provider}")


def fuses(provider: str) -> bool:
    """Whether a provider has ops that do the work of several. On its devices launches may cost more than work."""
    return provider == "triton"


def reads_values(device: torch.device) -> bool:
    """Whether every element of index tensors is checked before a kernel uses it as an address.

    On the CPU it is. On a GPU the check waits for the device, so it runs only if SPARSIFY_CHECK_TABLES is set.
    """
    return device.type == "cpu" or config.CHECK_TABLES


def checks_values(provider: str, device: torch.device) -> bool:
    """Whether the op must make this check itself. The kernels of `cpu` make it before anything else."""
    if provider == "cpu":
        from sparsify_compiler.kernels.cpu import library

        return library.build_info().library is None
    return reads_values(device)


def refusal(provider: str, *, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """The reason why a provider cannot run on tensors of this type and size, or None."""
    # Not through importlib, which Dynamo does not trace.
    from sparsify_compiler.kernels import cpu, reference, triton

    package = {"cpu": cpu, "reference": reference, "triton": triton}[provider]
    return package.supports(device=device, dtype=dtype, head_dim=head_dim, value_dim=value_dim)


def check_name(requested: str) -> str:
    """`requested`, if it is `auto` or a provider's name; otherwise raise OptionError."""
    if not isinstance(requested, str) or requested not in ("auto", *PROVIDERS):
        raise unknown_choice("provider", requested, ("auto", *PROVIDERS))
    return requested


def choose(requested: str, *, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> Choice:
    """The provider to run on tensors of this type and size.

    An explicit request never falls back: it raises `ProviderError` with the provider's own reason. `auto`
    takes the device's fast provider if it can run, else `reference`; the choice has the reason.
    """
    check_name(requested)

    def why_not(name: str) -> str | None:
        return refusal(name, device=device, dtype=dtype, head_dim=head_dim, value_dim=value_dim)

    if requested != "auto":
        if why := why_not(requested):
            raise ProviderError(f"provider {requested!r} cannot run here: {why}. Try provider='auto'.")
        return Choice(requested, "requested")
    if why := why_not("reference"):
        raise ProviderError(f"no provider can run here: {why}.")
    fastest = _FASTEST.get(device)
    if fastest is None:
        return Choice("reference", f"no fast provider for device {device!r}")
    if why := why_not(fastest):
        return Choice("reference", f"{fastest} cannot: {why}")
    return Choice(fastest, f"fastest on {device}")
