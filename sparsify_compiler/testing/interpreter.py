"""Triton's interpreter, made fit for tests.

It runs kernels on the CPU where `TRITON_INTERPRET=1` is set before Python starts. The module imports Triton.
"""

import inspect
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def prepare_once_a_launch() -> None:
    """Make the interpreter prepare `triton.language` once a launch.

    It prepares the language anew for every call of a jitted helper, which is two fifths of the time of our kernels.
    Applies to the process; a second call changes nothing.
    """
    if hasattr(interpreter.GridExecutor.__call__, "prepares_once"):
        return
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[frozenset[int]] = set()

    def prepare_if_new(function: Any) -> Any:
        modules = filter(inspect.ismodule, list(function.__globals__.values()))
        languages = frozenset(id(module) for module in modules if module in (tl, tl.core))
        if languages in prepared:
            return None
        prepared.add(languages)
        return prepare(function)

    def launch_prepared(self: Any, *arguments: Any, **keywords: Any) -> None:
        prepared.clear()
        launch(self, *arguments, **keywords)

    launch_prepared.prepares_once = True  # type: ignore[attr-defined]
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_if_new, launch_prepared
