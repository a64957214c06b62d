"""The command `sparsify plan-parallel`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def plan_parallel(
    class_name: Annotated[
        str, typer.Argument(metavar="CLASS", help="e.g. WanTransformer3DModel, or package.module.Class")
    ],
    cluster: Annotated[Path, typer.Option(help="YAML or JSON: hosts, GPUs, their rates and memory")],
    config: Annotated[
        str, typer.Option(help="JSON, or a JSON file such as a checkpoint's config.json")
    ] = "{}",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="name=SHAPE[:dtype]; the first float input has the data type of the model"
        ),
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--value", help="name=JSON: an input that is not a tensor")
    ] = None,
    ranks: Annotated[
        list[int] | None, typer.Option(help="number of ranks; by default the powers of two, and all GPUs")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="share of the query-key pairs that attention computes; 1 by default")
    ] = None,
    densities: Annotated[
        Path | None,
        typer.Option(
            help="JSON or YAML: name of an attention -> its density, or a list with one for each head"
        ),
    ] = None,
    remote: Annotated[
        float, typer.Option(help="share of the remote keys that a rank reads, where the sequence is shared")
    ] = 1.0,
) -> None:
    """Predict times, bytes and memory of a model on the meshes of a cluster. Needs neither weights nor GPUs."""
    from rich.console import Console

    from sparsify_compiler import diffusers_model
    from sparsify_compiler.clusters import files, planning
    from sparsify_compiler.errors import OptionError

    if density is not None and densities is not None:
        raise OptionError("density and densities must not both be given: leave out one")
    described = files.read_cluster(cluster)
    recorded = files.read_densities(densities) if densities is not None else density
    model = diffusers_model.build(class_name, config)
    arguments: dict[str, Any] = {
        name: diffusers_model.parse_input(name, text)
        for name, text in diffusers_model.assignments(inputs or (), "--input").items()
    }
    for name, text in diffusers_model.assignments(values or (), "--value").items():
        arguments[name] = diffusers_model.parse_value(name, text)
    model = diffusers_model.in_dtype(model, diffusers_model.dtype_of([arguments]))
    diffusers_model.try_out(model, arguments)
    plan = planning.plan_parallel(
        model,
        arguments,
        described,
        sizes=ranks,
        densities=1.0 if recorded is None else recorded,
        remote=remote,
    )
    Console().print(plan)
