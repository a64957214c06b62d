"""The errors and warnings for users.

Every error says what was expected, what was got and what to try. `SparsifyError` is a `ValueError`, so callers that
do not know this package catch it too.
"""

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable


class SparsifyError(ValueError):
    """Base class of all errors that this package raises on purpose."""


class OptionError(SparsifyError):
    """An option or its value is wrong."""


class GridError(OptionError):
    """A token grid does not fit the tokens of the model."""


class PolicyError(OptionError):
    """A policy cannot be read, or is for another model or grid."""


class ProviderError(SparsifyError):
    """A provider was requested by name and cannot run here."""


class OperandError(SparsifyError):
    """Tensors do not fit together, or a table has indices outside of its tensors."""

    site: str | None = None
    """The name of the attention that the op belongs to, if known; it is part of the message."""


class RankError(SparsifyError):
    """Ranks that share a model do not agree, or one of them failed."""


class SparsifyWarning(UserWarning):
    """The category of every warning of this package."""


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `SparsifyWarning`, once per process and message."""
    warnings.warn(message, SparsifyWarning, stacklevel=3)


def run_command(command: Callable[[], object]) -> None:
    """Run a shell command. A `SparsifyError` becomes one line on stderr and exit code 2."""
    try:
        command()
    except SparsifyError as error:
        print(f"sparsify: {error}", file=sys.stderr)
        sys.exit(2)


def unknown_choice(what: str, got: object, choices: Iterable[str]) -> OptionError:
    """The error for a name that is not among `choices`. It has the name, the choices and the nearest one."""
    known = sorted(choices)
    near = difflib.get_close_matches(str(got), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {what} {got!r}: must be one of {', '.join(known)}.{hint}")
