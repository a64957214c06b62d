"""The command `sparsify export`."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a diffusers model")],
    inputs: Annotated[
        Path,
        typer.Option(
            help="calls of the model, as for `sparsify search`; the first one is exported, and the model is loaded "
            "in its data type"
        ),
    ],
    out: Annotated[Path, typer.Option(help="a new folder; with format onnx a new .onnx file")],
    format: Annotated[str, typer.Option(help="torch, aoti, onnx or tensorrt")] = "torch",
    options: Annotated[
        list[str] | None, typer.Option("--option", help="key=value: an option of torch.compile")
    ] = None,
    device: Annotated[str, typer.Option(help="the device on which the files run")] = "cpu",
    opset: Annotated[
        int | None,
        typer.Option(help="with onnx, the version of the standard operators: 20, the default, or 23"),
    ] = None,
    check: Annotated[
        int | None,
        typer.Option(
            help="calls on random inputs in which the files are compared with PyTorch: 1 by default, and none with "
            "tensorrt, whose engines run on a GPU",
            min=0,
        ),
    ] = None,
    benchmark: Annotated[
        int, typer.Option(help="calls in which the files and the dense model are timed", min=0)
    ] = 0,
) -> None:
    """Write a diffusers model with sparse attention to files that other programs load."""
    from rich.console import Console
    from torch import Tensor
    from torch.utils._pytree import tree_map

    from sparsify_compiler import diffusers_model
    from sparsify_compiler.exporting import export as exported_as
    from sparsify_compiler.exporting.capture import device_of
    from sparsify_compiler.exporting.target import target_of

    chosen = {
        name: diffusers_model.parse_option(text)
        for name, text in diffusers_model.assignments(options or (), "--option").items()
    }
    files = target_of(out, format=format, options=chosen, opset=opset)
    checks = (0 if format == "tensorrt" else 1) if check is None else check
    files.check_ahead(runs=checks + benchmark > 0)
    place = device_of(device)
    calls = diffusers_model.read_calls(inputs)
    model = diffusers_model.load(checkpoint, diffusers_model.dtype_of(calls)).eval().to(place)
    call = tree_map(lambda leaf: leaf.to(place) if isinstance(leaf, Tensor) else leaf, calls[0])
    console = Console(soft_wrap=True)
    exported = exported_as(model, call, out, format=format, options=chosen, device=device, opset=opset)
    console.print(str(exported))
    if checks:
        console.print(str(exported.check(checks)))
    if benchmark:
        console.print(str(exported.benchmark(benchmark)))
