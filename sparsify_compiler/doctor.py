"""`sparsify doctor`: versions, devices, and the providers that run, with reasons for those that do not."""

import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from sparsify_compiler import __version__
from sparsify_compiler.kernels import providers
from sparsify_compiler.kernels.attention import block_sparse_attention
from sparsify_compiler.kernels.cpu import library
from sparsify_compiler.methods.tile import FittedTile
from sparsify_compiler.plan import TokenLayout
from sparsify_compiler.runtime.rates import cpu_model
from sparsify_compiler.testing.oracles import assert_close_to_float64

PACKAGES = ("torch", "triton", "diffusers", "matplotlib")


def run(console: Console | None = None) -> None:
    """Print the report. Every provider is run to check it."""
    console = console or Console()
    table = Table("what", title="sparsify doctor", title_justify="left", highlight=True)
    table.add_column("state", overflow="fold")
    for what, state in (*versions(), *devices(), compiler()):
        table.add_row(what, state)
    table.add_section()
    for device in ("cpu", "cuda"):
        for name in providers.PROVIDERS:
            table.add_row(f"provider {name} on {device}", proof(name, device))
    table.add_row("Triton's interpreter", interpreter())
    console.print(table)


def versions() -> Iterator[tuple[str, str]]:
    """(package, version), Python and this package first."""
    yield "sparsify-compiler", __version__
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"


def devices() -> Iterator[tuple[str, str]]:
    """(device, description)."""
    capability = torch.backends.cpu.get_cpu_capability()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    yield "cpu", f"{cpu_model()}, {platform.machine()}, {capability}, {threads}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield (
            "cuda",
            f"torch is built for CUDA {built}, but finds no device"
            if built
            else "torch is built without CUDA",
        )
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}",
        )


def compiler() -> tuple[str, str]:
    """(`C++ compiler`, result of the CPU kernel's build)."""
    build = library.build_info()
    if build.library is None:
        return (
            "C++ compiler",
            f"{build.compiler or 'none'}; packed SDPA runs instead: {build.reason}",
        )
    return "C++ compiler", f"kernel {build.reason} in {build.seconds:.1f} s: {build.library}"


def proof(name: str, device: str) -> str:
    """`works` if the provider's result for a small attention is close to float64; else the reason."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no: there is no CUDA device"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    why = providers.refusal(name, device=device, dtype=dtype, head_dim=64, value_dim=64)
    if why:
        return f"no: {why}"
    layout = TokenLayout(tokens=5 * 6 * 7 + 3, grid=(5, 6, 7), after=3)
    table = FittedTile(reference_frames=2).table(layout).to(device)
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, layout.tokens, 64, generator=generator, dtype=torch.float32).to(
        device, dtype
    )
    # A broken driver or compiler may raise anything: the report shows the error and continues.
    try:
        out, lse = block_sparse_attention(query, key, value, table, provider=name)
        assert_close_to_float64(out, lse, query, key, value, table.mask())
    except Exception as error:
        return f"BROKEN: {type(error).__name__}: {error}"
    return f"works (checked against float64 in {str(dtype).removeprefix('torch.')})"


def interpreter() -> str:
    """Whether Triton kernels are interpreted in this process."""
    try:
        import triton
    except ImportError as error:
        return f"no: triton cannot be imported ({error})"
    if triton.knobs.runtime.interpret:
        return "on: Triton kernels run on the CPU, slowly"
    return "off: set TRITON_INTERPRET=1 before Python starts to try Triton kernels without a GPU"
