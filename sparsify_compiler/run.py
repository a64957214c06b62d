"""`sparsify run [options] script.py args...`: run a script as it is, with sparse attention in its video models.

    sparsify run --option method=svg2 --stats generate.py --steps 30
    python -m sparsify_compiler.run -m my_package.generate

The script sees what `python script.py args...` would show it: arguments, `__main__`, `sys.path`, the working
folder, standard output, exit code and traceback. This module imports nothing beyond the standard library, and waits
until the script imports torch. Options are checked before the script starts, which takes an import of torch.
"""

import atexit
import builtins
import io
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from optparse import OptionParser
from types import CodeType, ModuleType, TracebackType
from typing import Any, NoReturn

from sparsify_compiler.errors import OptionError, run_command

STANDARD_INPUT = "-"
_USAGE = "sparsify run [options] SCRIPT [arguments of the script]"


@dataclass(slots=True)
class Command:
    """The words of a command line."""

    script: str
    arguments: list[str]
    is_module: bool
    options: dict[str, Any]
    """The options of the backend."""
    regional: bool | None
    mode: str | None
    stats: bool
    report: str | None
    """The absolute path of the page to write at the end."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command `sparsify run`. Options end at the script's name; the rest belongs to the script."""
    found: list[tuple[Command, Program | None]] = []

    def read() -> None:
        command = parse(sys.argv[1:] if words is None else words)
        found.append((command, None if command.is_module else find(command.script)))

    run_command(read)
    execute(*found[0])


class _Parser(OptionParser):
    def error(self, msg: str) -> NoReturn:
        raise OptionError(f"{msg}. Usage: {_USAGE}; sparsify run --help lists the options")


def parser() -> OptionParser:
    """The options of `sparsify run`. They end at the script's name."""
    parser = _Parser(
        usage=_USAGE, description="Run a script with sparse attention in its video transformers."
    )
    parser.disable_interspersed_args()
    add = parser.add_option
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of torch.compile")
    add("--whole", action="store_false", dest="regional", help="compile each model as a whole")
    add("--regional", action="store_true", dest="regional", help="compile the repeated blocks of each model")
    add("--mode", help="mode of torch.compile; that of the script's own torch.compile by default")
    add("--stats", action="store_true", default=False, help="print the densities at the end, to stderr")
    add("--report", metavar="PAGE.html", help="write a page on the last video of each model at the end")
    add("-m", action="store_true", default=False, dest="is_module", help="SCRIPT is the name of a module")
    return parser


def parse(words: Sequence[str]) -> Command:
    """Read the command line, and check the options.

    Raises:
        OptionError: an option is unknown or wrong, or no script is given.
    """
    reader = parser()
    given, rest = reader.parse_args(list(words))
    if not rest:
        reader.error("a script must be given")
    options: dict[str, Any] = {}
    if given.option:
        from sparsify_compiler.options import assignments, configure, parse_option

        options = {name: parse_option(text) for name, text in assignments(given.option, "--option").items()}
        parallel = configure(options).parallel
        if parallel is not None:
            parallel.check_mode(given.mode, regional=given.regional)
    if given.mode is not None:
        from sparsify_compiler._torch import check_mode

        check_mode(given.mode)
    report = None
    if given.report is not None:
        from sparsify_compiler.outputs import check_page

        report = os.path.abspath(check_page(given.report))
    return Command(
        rest[0], rest[1:], given.is_module, options, given.regional, given.mode, given.stats, report
    )


@dataclass(slots=True)
class Program:
    """The code of a script, and the way in which Python would start it."""

    code: Callable[[], CodeType]
    """Reads and compiles the code."""
    argument: str
    """`sys.argv[0]`."""
    folder: str
    """`sys.path[0]`."""
    variables: dict[str, Any]
    """The variables of its `__main__` at the start."""


def find(name: str) -> Program:
    """Find a script: a file, a folder or zip file with a `__main__.py`, or `-` for standard input.

    Raises:
        OptionError: there is no such script.
    """
    if name == STANDARD_INPUT:
        return Program(
            lambda: compile(sys.stdin.read(), "<stdin>", "exec", dont_inherit=True),
            name,
            "",
            {"__file__": "<stdin>"},
        )
    path = os.path.abspath(name)
    spec = PathFinder.find_spec("__main__", [path])
    if spec is not None and spec.loader is not None:
        return Program(partial(_code_of, spec), name, path, _variables(spec))
    if os.path.isdir(path):
        raise OptionError(f"can't find '__main__' module in {path!r}")
    try:
        with io.open_code(path) as file:
            text = file.read()
    except OSError as error:
        raise OptionError(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}") from None
    variables = {"__file__": path, "__loader__": SourceFileLoader("__main__", path)}
    return Program(partial(_compiled, text, path), name, os.path.dirname(os.path.realpath(path)), variables)


def find_module(name: str) -> Program:
    """Find the module that `python -m name` runs, on the script's own `sys.path`.

    Raises:
        SystemExit: there is none.
    """
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.__main__.".startswith(f"{error.name}."):
            raise
        spec = None
    if spec is None or spec.loader is None:
        print(f"sparsify: no module named {name} that can run", file=sys.stderr)
        raise SystemExit(1)
    return Program(partial(_code_of, spec), spec.origin or name, os.getcwd(), _variables(spec))


def execute(command: Command, program: Program | None) -> None:
    """Run the script in a fresh `__main__`.

    Args:
        program: the script; None for a module, which is found on the way.
    """
    report = watch(command)
    if command.stats or command.report is not None:
        process = os.getpid()
        atexit.register(lambda: report() if os.getpid() == process else None)
    module = ModuleType("__main__")
    variables = module.__dict__
    variables.update({"__builtins__": builtins, "__annotations__": {}, "__cached__": None})
    sys.argv[:] = ["-m" if program is None else program.argument, *command.arguments]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if program is None else program.folder
    sys.modules["__main__"] = module
    if "__mp_main__" in sys.modules:  # multiprocessing sets it when it is imported
        sys.modules["__mp_main__"] = module
    try:
        if program is None:
            program = find_module(command.script)
            sys.argv[0] = program.argument
        variables.update(program.variables)
        exec(program.code(), variables)
    except SystemExit:
        raise
    except BaseException:
        _show_only_the_script()
        raise


def watch(command: Command) -> Callable[[], None]:
    """Make the video transformers sparse that this process makes from now on. Return what prints the report."""
    scripts: list[Any] = []

    def watch_torch(torch: ModuleType) -> None:
        from sparsify_compiler.hosts.scripts import Script

        wanted = command.stats or command.report is not None
        script = Script(command.options, command.regional, command.mode, reports=wanted)
        script.watch()
        scripts.append(script)

    def report() -> None:
        lines = ["sparsify: no sparse call: the script does not import torch"]
        if scripts:
            lines = [scripts[0].report()] if command.stats else []
            if command.report is not None and os.environ.get("RANK", "0") == "0":  # one file for all ranks
                lines.append(scripts[0].write_page(command.report))
        if lines:
            print("\n".join(lines), file=sys.stderr, flush=True)

    after_import("torch", watch_torch)
    after_import("multiprocessing.spawn", partial(_watch_children, command))
    return report


def _watch_children(command: Command, spawn: Any) -> None:
    """Watch the processes too that the script starts by spawning: `spawned.py` starts them."""
    of_python = spawn.get_preparation_data

    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = of_python(name)
        main = {key: data.pop(key) for key in ("init_main_from_path", "init_main_from_name") if key in data}
        if main:
            package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            data["sys_path"] = [*data["sys_path"], *({package} - set(data["sys_path"]))]
            data["sys_argv"] = [*data["sys_argv"], (command, *main.popitem())]
            data["init_main_from_name"] = "sparsify_compiler.spawned"
        return data

    spawn.get_preparation_data = get_preparation_data


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with a module as soon as it is imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Finds one module as the other finders do, and calls an action after its import."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        for other in sys.meta_path:
            spec = None if other is self else other.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """A loader that gives way to another one before the module's code runs."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            self.finder.action(module)


def _code_of(spec: ModuleSpec) -> CodeType:
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    assert isinstance(code, CodeType)
    return code


def _compiled(text: bytes, path: str) -> CodeType:
    if path.endswith(".pyc") and (code := pkgutil.read_code(io.BytesIO(text))) is not None:
        assert isinstance(code, CodeType)
        return code
    return compile(text, path, "exec", dont_inherit=True)


def _variables(spec: ModuleSpec) -> dict[str, Any]:
    return {
        "__spec__": spec,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__file__": spec.origin,
        "__cached__": spec.cached,
    }


def _show_only_the_script() -> None:
    """Let the traceback of the exception that ends the process begin with the script's own frames."""
    shown = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.excepthook = shown
        trace = _of_the_script(trace)
        shown(kind, error.with_traceback(trace), trace)

    sys.excepthook = show


def _of_the_script(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code is not execute.__code__:
        trace = trace.tb_next
    while trace is not None and (
        trace.tb_frame.f_globals is globals() or trace.tb_frame.f_code.co_filename.startswith("<frozen ")
    ):
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    from sparsify_compiler import run

    run.main()
