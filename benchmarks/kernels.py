"""The Triton kernels of the package, found by a search of its modules, so that no benchmark can forget one."""

import importlib
import pkgutil
from typing import Any

from sparsify_compiler import kernels as room


def kernels() -> dict[str, Any]:
    """Name -> kernel: every jitted function in `kernels` that is launched; helpers begin with `_`."""
    found = {}
    for info in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            defined_here = getattr(value, "__module__", None) == module.__name__
            if hasattr(value, "arg_names") and defined_here and not name.startswith("_"):
                found[name] = value
    return found
