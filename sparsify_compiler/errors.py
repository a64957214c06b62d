"""What can go wrong for a user, and what the user is told once.

Every error says what was expected, what was got and what to try. `SparsifyError` is a `ValueError`, so a
caller that knows nothing of this package still catches it.
"""

import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable


class SparsifyError(ValueError):
    """Base of everything this package raises on purpose."""


class OptionError(SparsifyError):
    """An option, or its value, that the compiler cannot take."""


class GridError(OptionError):
    """A token grid that does not fit the tokens of the model."""


class PolicyError(OptionError):
    """A policy that cannot be read, or is for another model or grid."""


class ProviderError(SparsifyError):
    """A provider was asked for by name and cannot run here."""


class OperandError(SparsifyError):
    """Tensors that do not fit together, or a table that points outside of the tensors it speaks of."""

    site: str | None = None
    """The attention that the op belongs to, once it is known; its name stands in the message."""


class SparsifyWarning(UserWarning):
    """Category of every warning of this package."""


@functools.cache
def warn_once(message: str) -> None:
    """Warn with `SparsifyWarning`, once per process and message."""
    warnings.warn(message, SparsifyWarning, stacklevel=3)


def run_command(command: Callable[[], object]) -> None:
    """Run a command of the shell: a `SparsifyError` is one line on stderr and exit code 2."""
    try:
        command()
    except SparsifyError as error:
        print(f"sparsify: {error}", file=sys.stderr)
        sys.exit(2)


def unknown_choice(what: str, got: object, choices: Iterable[str]) -> OptionError:
    """The error for a name that is not among `choices`: names it, the choices and the nearest one."""
    known = sorted(choices)
    near = difflib.get_close_matches(str(got), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {what} {got!r}: must be one of {', '.join(known)}.{hint}")
