"""Provider `cpu`: a C++ kernel built on first use with the machine's compiler, else packed SDPA.

The kernel (`csrc/attention.cpp`) has a plain C interface and includes no header of torch: it builds in a few
seconds with nothing but a C++17 compiler, and a build serves every version of torch. Libraries are kept in
torch's cache directory under a hash of the sources, the flags and all that the compiler predefines, which
names the compiler's version and the instructions of this CPU.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.kernels import reference
from sparsify_compiler.kernels.ops import empty_outputs
from sparsify_compiler.table import BlockTable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of `enum Dtype` in attention.cpp."""

_SOURCES = Path(__file__).parent / "csrc"
_COMPILERS = ("g++", "clang++", "c++")
_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-strict-aliasing"),
]

logger = logging.getLogger("sparsify_compiler")


def supports(*, device: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
    """Why the kernel cannot run, or None. Any head dimensions will do."""
    if device != "cpu":
        return f"device must be cpu, got {device}"
    if dtype not in DTYPES:
        return f"dtype must be one of {', '.join(str(d)[6:] for d in DTYPES)}, got {str(dtype)[6:]}"
    return None


def forward(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See `ops.block_sparse_attention`."""
    kernel = _kernel()
    if kernel is None:
        return packed_sdpa(query, key, value, table, key_bias, scale)
    out, lse = empty_outputs(query, value)
    batch, heads, _, head_dim = query.shape
    # The list keeps what `contiguous` may have copied alive until the kernel has run.
    tensors = [
        *(t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value)),
        out,
        lse,
        key_bias if key_bias is None else key_bias.float().contiguous(),
        *(t if t is None else t.contiguous() for t in table.tensors().values()),
    ]
    kernel(
        ctypes.byref(
            _Problem(
                *(_view(t, batch, heads) for t in tensors),
                *(batch, heads, key.shape[1], table.kv_indices.shape[-2], head_dim, value.shape[-1]),
                scale,
                DTYPES.index(query.dtype),
                torch.get_num_threads(),
            )
        )
    )
    return out, lse


def packed_sdpa(
    query: Tensor, key: Tensor, value: Tensor, table: BlockTable, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`forward` without the kernel: the keys of each query block gathered, then dense flash attention.

    That attention gives no right lse where a score is infinite or every key is hidden: the reference does.
    """
    out, lse = empty_outputs(query, value)
    group, width = query.shape[1] // key.shape[1], max(query.shape[-1], value.shape[-1])
    q, k, v = (pad(t, (0, width - t.shape[-1])) for t in (query, key, value))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    bias = key_bias if key_bias is None else key_bias.to(query.dtype).expand(*query.shape[:2], -1)
    for at, rows, columns in reference.query_blocks(table):
        if not rows.numel():
            continue
        if not columns.numel():
            out[at][:, :, rows], lse[at][:, :, rows] = 0.0, -torch.inf
            continue
        listed_bias = None if bias is None else bias[at][:, :, None, columns]
        block_out, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(q[at][:, :, rows], k[at][:, :, columns], v[at][:, :, columns]),
            attn_mask=listed_bias,
            scale=scale,
        )
        hidden = listed_bias is not None and bool((listed_bias.amax(-1) == -torch.inf).any())
        if hidden or not block_lse.isfinite().all():
            return reference.forward(query, key, value, table, key_bias, scale)
        out[at][:, :, rows], lse[at][:, :, rows] = block_out[..., : value.shape[-1]], block_lse
    return out, lse


class _View(ctypes.Structure):
    """`struct View`: strides in elements of batch, head and row."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


class _Problem(ctypes.Structure):
    """`struct Problem`."""

    _fields_ = (
        *((name, _View) for name in ("query", "key", "value", "out", "lse", "key_bias")),
        *((name, _View) for name in BlockTable.__slots__),
        *((n, ctypes.c_int64) for n in ("batch", "heads", "kv_heads", "q_blocks", "head_dim", "value_dim")),
        ("scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def _view(tensor: Tensor | None, batch: int, heads: int) -> _View:
    """Of [B|1, H|1, N] or [B|1, H|1, N, D]; what is shared has stride 0."""
    if tensor is None:
        return _View()
    lead = (
        0 if size == 1 else stride for size, stride in zip(tensor.shape[:2], tensor.stride(), strict=False)
    )
    return _View(tensor.data_ptr(), *lead, tensor.stride(2))


# ---- Build ----


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildInfo:
    """How the kernel was built, or why it was not."""

    compiler: str | None
    """The compiler's path, or None where there is none."""
    library: Path | None
    """The built library, or None where packed SDPA runs in its stead."""
    cached: bool
    """True if the library was there already."""
    seconds: float
    """What finding or building the library took."""
    reason: str
    """In words."""


@functools.cache
def build_info() -> BuildInfo:
    """Builds the kernel if that was not done yet, logs it, and tells how it went. Never raises."""
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
        reason = f"{getattr(error, 'stderr', None) or error}".strip()
    seconds = time.perf_counter() - start
    if library is None:
        logger.warning("the CPU kernel could not be built, packed SDPA runs in its stead: %s", reason)
    elif not cached:
        logger.warning("built the CPU attention kernel in %.1f s: %s", seconds, library)
    return BuildInfo(compiler=compiler, library=library, cached=cached, seconds=seconds, reason=reason)


@functools.cache
def _kernel() -> Callable[..., None] | None:
    """The kernel's entry point, or None where it could not be built."""
    library = build_info().library
    if library is None:
        return None
    kernel = ctypes.CDLL(str(library)).sparsify_attention
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Problem)], None
    return kernel


def _build(compiler: str) -> tuple[Path, bool]:
    """(library, whether it was there already). Raises OSError, or CalledProcessError with its stderr."""

    def run(*arguments: str) -> bytes:
        return subprocess.run([compiler, *_FLAGS, *arguments], capture_output=True, check=True).stdout

    sources = sorted(_SOURCES.iterdir())
    predefined = run("-dM", "-E", "-x", "c++", os.devnull)
    parts = [compiler.encode(), " ".join(_FLAGS).encode(), predefined, *(s.read_bytes() for s in sources)]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = _cache_dir() / f"attention-{key}.so"
    if library.exists():
        return library, True
    # Built beside its place and moved there at once: of two processes that build, the later one wins.
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        run(*(str(s) for s in sources if s.suffix == ".cpp"), "-o", f"{scratch}/built.so")
        os.replace(f"{scratch}/built.so", library)
    return library, False


def _cache_dir() -> Path:
    """Where libraries are kept: beside torch.hub's directory; where that is read-only, for this process."""
    path = Path(torch.hub.get_dir()).parent / "sparsify_compiler"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="sparsify_compiler-"))
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="sparsify_compiler-"))
