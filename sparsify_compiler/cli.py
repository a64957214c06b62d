"""The command `sparsify`."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify_compiler.errors import SparsifyError

app = typer.Typer(
    help="Block-sparse attention for video diffusion transformers, by torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder for the picture of the masks")] = Path("demo_out"),
) -> None:
    """One video model, dense and sparse: what is done, how fast it is, and that it is right."""
    from sparsify_compiler import demo

    if not demo.run(device, out).passed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Versions, devices and compilers; which providers work, and why the others do not."""
    from sparsify_compiler import doctor

    doctor.run()


@app.command()
def explain(
    class_name: Annotated[str, typer.Argument(metavar="CLASS", help="e.g. WanTransformer3DModel")],
    config: Annotated[
        str, typer.Option(help="JSON, or a file of it such as a checkpoint's config.json")
    ] = "{}",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="name=SHAPE[:dtype], e.g. timestep=1:int64")
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--value", help="name=JSON: an input that is no tensor")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="key=value of torch.compile's options")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda, to plan for")] = "cuda",
    picture: Annotated[
        Path | None, typer.Option(help="draw the masks there, or with --run the densities, e.g. masks.png")
    ] = None,
    run: Annotated[
        int,
        typer.Option(help="steps of a generation to run on the CPU, with random weights and inputs", min=0),
    ] = 0,
) -> None:
    """What would be done with a diffusers model, and why. Takes neither weights nor memory, but for --run."""
    from sparsify_compiler import diffusers_model, explanation
    from sparsify_compiler.measured import RunStats

    model = diffusers_model.build(class_name, config)
    arguments = {
        name: diffusers_model.parse_input(name, text)
        for name, text in diffusers_model.assignments(inputs or (), "--input").items()
    }
    for name, text in diffusers_model.assignments(values or (), "--value").items():
        arguments[name] = diffusers_model.parse_value(name, text)
    chosen = {
        name: diffusers_model.parse_option(text)
        for name, text in diffusers_model.assignments(options or (), "--option").items()
    }
    diffusers_model.try_out(model, arguments)
    explained = explanation.explain(model, **arguments, options=chosen, device=device)
    Console().print(explained)
    drawn: explanation.Explanation | RunStats = explained
    if run:
        drawn = diffusers_model.generate(class_name, config, arguments, chosen, steps=run)
        Console().print(drawn)
    if picture is not None:
        Console().print(f"Drawn in {drawn.save_picture(picture)}.")


def main() -> None:
    """The console script: a `SparsifyError` is one line and exit code 2."""
    try:
        app()
    except SparsifyError as error:
        print(f"sparsify: {error}", file=sys.stderr)
        sys.exit(2)
