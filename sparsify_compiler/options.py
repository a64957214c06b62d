"""The options of the backend: checked, without the import of its passes."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsify_compiler import _torch
from sparsify_compiler.config import GENERAL, PRESETS, SparsifyConfig, option_names, split_options
from sparsify_compiler.errors import OptionError, unknown_choice
from sparsify_compiler.kernels import providers
from sparsify_compiler.methods import METHODS
from sparsify_compiler.policy import Policy, all_options, entry_of

DEFAULT_METHODS = ("keys", "svg2")
"""The methods where options name none: the first that has all options of methods that were given."""
_FIXED = ("policy", "preset", "method", "far_field", "dense_layers")
WITH_A_POLICY = tuple(name for name in GENERAL if name not in _FIXED)
"""Options that may be given with a policy."""


def configure(options: Mapping[str, Any] | None) -> SparsifyConfig:
    """Check the options of torch.compile and turn them into a config.

    Keys: `preset`, the fields of `SparsifyConfig` (`method` by its name), and those of the method, e.g. `top_p`. Or
    `policy`, the path of a file or a `Policy`, instead of the options that decide what sites do.

    Raises:
        OptionError: a name or value is unknown. The error names the option, the choices and the nearest one.
        PolicyError: the policy cannot be read.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be a dict such as {{'method': 'tile'}}, got {options!r}")
    general, own = split_options(options or {})
    providers.check_name(general.get("provider", "auto"))
    _torch.check_backend(general.get("inner_backend", "inductor"))
    if options and options.get("policy") is not None:
        return SparsifyConfig(method=None, **{**general, "policy": _policy(options)})
    name = general.pop("method", _default_method(own))
    if options and options.get("preset") is not None and name != (of := PRESETS[options["preset"]]["method"]):
        raise OptionError(
            f"preset {options['preset']!r} has method {of!r}, got method={name!r}: leave out one"
        )
    for option in own:
        if option not in all_options():
            raise unknown_choice("option", option, (*GENERAL, *all_options()))
    entry = entry_of({**own, "method": name, "far_field": general.get("far_field")})
    return SparsifyConfig(method=entry.method, **general)


def _default_method(own: Mapping[str, Any]) -> str:
    """The default method for options of methods."""
    having = [name for name in DEFAULT_METHODS if own.keys() <= set(option_names(METHODS[name]))]
    return (*having, DEFAULT_METHODS[0])[0]


def _policy(options: Mapping[str, Any]) -> Policy:
    """The requested policy. No other option may decide what sites do."""
    for option in options:
        if option not in (*GENERAL, *all_options()):
            raise unknown_choice("option with a policy", option, WITH_A_POLICY)
        if option not in ("policy", *WITH_A_POLICY):
            raise OptionError(
                f"a policy sets option {option!r} for every site: leave out one. "
                f"With a policy you may give {', '.join(WITH_A_POLICY)}"
            )
    asked = options["policy"]
    if not isinstance(asked, (str, Path, Policy)):
        raise OptionError(f"policy must be the path of a file or a Policy, got {asked!r}")
    return asked if isinstance(asked, Policy) else Policy.load(asked)


def assignments(words: Iterable[str], what: str) -> dict[str, str]:
    """Arguments of the form `name=value` as a dict."""
    pairs = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name and value):
            raise OptionError(f"{what} must be written name=value, got {word!r}")
        pairs[name] = value
    return pairs


def parse_option(text: str) -> Any:
    """A JSON value, with lists as tuples. Values separated by commas become a tuple; other text stays a string."""
    try:
        value = json.loads(f"[{text}]")
    except json.JSONDecodeError:
        return text
    values = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return values[0] if len(values) == 1 else values
