"""The start of a process that a script under `sparsify run` spawns, in place of the script's own `__mp_main__`."""

import runpy
import sys
from typing import Any

from sparsify_compiler.run import watch

if __name__ == "__mp_main__":
    _given: Any = sys.argv.pop()
    _command, _kind, _main = _given
    watch(_command)
    if _kind == "init_main_from_path":
        globals().update(runpy.run_path(_main, run_name=__name__))
    else:
        globals().update(runpy.run_module(_main, run_name=__name__, alter_sys=True))
