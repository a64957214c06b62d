"""The C++ kernels (`csrc`): their build, on first use with the machine's compiler, and their views of tensors.

The kernels have a plain C interface and include no header of torch. So they build in a few seconds, need only a
C++17 compiler, and one build works with every version of torch. Libraries lie in torch's cache directory under a
hash of the sources, the flags and the compiler's predefined macros, which name the compiler's version and the
instructions of this CPU.

A library ends with the digest of all bytes before, which the system's loader does not read. A file that a full
disk cut short, or that was changed, fails the check and is built again: loading it could kill the process.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsify_compiler.outputs import cache_folder

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Data types in the order of `enum Dtype` in csrc/view.h."""

_SOURCES = Path(__file__).parent / "csrc"
_TORCH_OPS = "torch_op.cpp"
"""The only source that includes headers of torch. It has a library of its own."""
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-strict-aliasing"),
]

logger = logging.getLogger("sparsify_compiler")


class View(ctypes.Structure):
    """`struct View`: strides in elements of batch, head and row."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


def view(tensor: Tensor | None) -> View:
    """A view of a tensor [B|1, H|1, N] or [B|1, H|1, N, D]. A batch or head dimension of size 1 gets stride 0."""
    if tensor is None:
        return View()
    shape, (batch, head, row, *_) = tensor.shape, tensor.stride()
    return View(tensor.data_ptr(), batch if shape[0] != 1 else 0, head if shape[1] != 1 else 0, row)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildInfo:
    """The result of a build."""

    compiler: str | None
    """The compiler's path, or None if there is no compiler."""
    library: Path | None
    """The built library, or None if packed SDPA runs instead."""
    cached: bool
    """True if the library was there already."""
    seconds: float
    """Time to find or build the library."""
    reason: str
    """The result in words: the compiler, or the error."""


@functools.cache
def build_info() -> BuildInfo:
    """Build the kernel if it is not built yet, log it, and return the result. Never raises."""
    start = time.perf_counter()
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    library, cached = None, False
    try:
        if compiler is None:
            raise OSError(f"no C++ compiler found (looked for {', '.join(_COMPILERS)})")
        library, cached = _build(compiler)
        ctypes.CDLL(str(library))
        reason = f"{'found' if cached else 'built'} with {compiler}"
    except (OSError, subprocess.SubprocessError) as error:
        library = None
        reason = words(error)
    seconds = time.perf_counter() - start
    if library is None:
        logger.warning("the CPU kernel could not be built, packed SDPA runs instead: %s", reason)
    elif not cached:
        logger.warning("built the CPU attention kernel in %.1f s: %s", seconds, library)
    return BuildInfo(compiler=compiler, library=library, cached=cached, seconds=seconds, reason=reason)


@functools.cache
def symbol(name: str, *structures: type[ctypes.Structure]) -> Callable[..., bool] | None:
    """The C function `name`, which takes pointers to `structures`; None if nothing could be built.

    The function returns False, and computes nothing, if an index lies outside the tensor that it indexes.
    """
    library = build_info().library
    if library is None:
        return None
    function = getattr(ctypes.CDLL(str(library)), name)
    function.argtypes, function.restype = [ctypes.POINTER(one) for one in structures], ctypes.c_bool
    return function


def launch(
    kernel: Callable[..., bool], *structures: ctypes.Structure | None, check: Callable[[], None]
) -> None:
    """Run a kernel. If it refuses its index tensors, `check` raises with the reason."""
    if not kernel(*(None if one is None else ctypes.byref(one) for one in structures)):
        check()
        raise AssertionError("the kernel refused tensors that fit")


def _build(compiler: str) -> tuple[Path, bool]:
    """(library, whether it was there already). Raises OSError, or CalledProcessError with its stderr."""

    def run(*arguments: str) -> bytes:
        return subprocess.run([compiler, *_FLAGS, *arguments], capture_output=True, check=True).stdout

    sources = sorted(source for source in _SOURCES.iterdir() if source.name != _TORCH_OPS)
    predefined = run("-dM", "-E", "-x", "c++", os.devnull)
    parts = [compiler.encode(), " ".join(_FLAGS).encode(), predefined, *(s.read_bytes() for s in sources)]

    def make(built: Path) -> None:
        objects = {f"{built.parent}/{s.stem}.o": str(s) for s in sources if s.suffix == ".cpp"}
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda to: run("-c", objects[to], "-o", to), objects))
        run(*objects, "-o", str(built))

    return _cached(cache_folder() / f"attention-{_key(parts)}.so", "the CPU attention kernel", compiler, make)


def torch_ops() -> Path:
    """The library of the ops for PyTorch without Python, next to the library of the kernels, which it needs.

    Raises:
        OSError: there is no compiler, or no library of the kernels.
        CalledProcessError: the compiler fails; with its stderr.
    """
    kernels = build_info()
    if kernels.library is None or kernels.compiler is None:
        raise OSError(kernels.reason)
    source, torch_folder = _SOURCES / _TORCH_OPS, Path(torch.__file__).parent
    command = [
        *(
            kernels.compiler,
            *_FLAGS,
            "-O1",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ),
        *(f"-I{torch_folder}/include", str(source), f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10"),
        *(f"-L{kernels.library.parent}", f"-l:{kernels.library.name}", "-Wl,-rpath,$ORIGIN"),
    ]

    def make(built: Path) -> None:
        subprocess.run([*command, "-o", str(built)], capture_output=True, check=True)

    parts = [kernels.library.name.encode(), torch.__version__.encode(), source.read_bytes()]
    library = kernels.library.with_name(f"torch-{_key(parts)}.so")
    return _cached(library, "the CPU kernels' ops for PyTorch", kernels.compiler, make)[0]


def _key(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cached(library: Path, what: str, compiler: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
    """(library, whether it was there already). `make` writes it to a path in a new folder."""
    if _is_whole(library):
        return library, True
    with _alone(library.parent):
        if _is_whole(library):  # another process built it meanwhile
            return library, True
        if library.exists():
            logger.warning(
                "the cached %s is damaged and is built again: %s", what.removeprefix("the "), library
            )
        logger.warning("building %s with %s, once for this machine", what, compiler)
        # Built in the same folder and moved in one step: no process reads a part of it.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch, "built.so")
            make(built)
            with built.open("ab") as file:
                file.write(_digest(built.read_bytes()))
            os.replace(built, library)
    return library, False


def _is_whole(library: Path) -> bool:
    """Whether the file exists and ends with the digest of its other bytes."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    size = hashlib.sha256().digest_size
    return content[-size:] == _digest(content[:-size])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes from building in the folder. The lock ends with the process, even if it is killed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("another process builds the CPU attention kernel: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks: two processes may build, and both succeed
            logger.info("%s cannot be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)


def words(error: OSError | subprocess.SubprocessError) -> str:
    """The compiler's own message if there is one, else the error's."""
    said = getattr(error, "stderr", None) or b""
    return said.decode(errors="replace").strip() or str(error)
