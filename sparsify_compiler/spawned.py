"""The start of a process that a script under `sparsify run` spawns, in place of the script's own `__mp_main__`."""

import runpy
import sys

from sparsify_compiler.run import watch

if __name__ == "__mp_main__":
    _first: tuple = sys.argv.pop(0)  # type: ignore[assignment]
    _command, _kind, _main = _first
    watch(_command)
    if _kind == "init_main_from_path":
        globals().update(runpy.run_path(_main, run_name=__name__))
    else:
        globals().update(runpy.run_module(_main, run_name=__name__, alter_sys=True))
