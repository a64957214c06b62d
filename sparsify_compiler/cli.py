"""The command `sparsify`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sparsify_compiler import __version__, run
from sparsify_compiler.clusters.command import plan_parallel
from sparsify_compiler.errors import OptionError, run_command
from sparsify_compiler.exporting.command import export
from sparsify_compiler.outputs import check_file

app = typer.Typer(
    help="Block-sparse attention for video diffusion transformers, by torch.compile.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Measure sparse attention on the evaluation model.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.command()(export)
app.command()(plan_parallel)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sparsify-compiler {__version__}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="print the version and stop", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder for pictures and videos")] = Path("demo_out"),
) -> None:
    """Compile video models dense and sparse: show the plan, check the result, compare times and videos."""
    require_laboratory()
    from sparsify_compiler.lab import demo

    if not demo.run(device, out).passed:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show versions, devices and compilers; check which providers work, and why the others do not."""
    from sparsify_compiler import doctor

    doctor.run()


@app.command()
def explain(
    class_name: Annotated[str, typer.Argument(metavar="CLASS", help="e.g. WanTransformer3DModel")],
    config: Annotated[
        str, typer.Option(help="JSON, or a JSON file such as a checkpoint's config.json")
    ] = "{}",
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="name=SHAPE[:dtype], e.g. timestep=1:int64")
    ] = None,
    values: Annotated[
        list[str] | None, typer.Option("--value", help="name=JSON: an input that is not a tensor")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--option", help="key=value: an option of torch.compile")
    ] = None,
    device: Annotated[str, typer.Option(help="device to plan for: cpu or cuda")] = "cuda",
    picture: Annotated[
        Path | None,
        typer.Option(help="file for a picture of the masks, or with --run of the densities, e.g. masks.png"),
    ] = None,
    run: Annotated[
        int,
        typer.Option(help="steps of a generation to run on the CPU, with random weights and inputs", min=0),
    ] = 0,
) -> None:
    """Show the plan for a diffusers model, with reasons. Needs neither weights nor memory, except with --run."""
    from sparsify_compiler import diffusers_model, explanation, pictures
    from sparsify_compiler.measured import RunStats

    if picture is not None:
        pictures.check(picture)
    model = diffusers_model.build(class_name, config)
    arguments: dict[str, Any] = {
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
    explained = explanation.explain(model, options=chosen, device=device, **arguments)
    Console().print(explained)
    drawn: explanation.Explanation | RunStats = explained
    if run:
        drawn = diffusers_model.generate(class_name, config, arguments, chosen, steps=run)
        Console().print(drawn)
    if picture is not None:
        Console().print(f"Drawn in {drawn.save_picture(picture)}.")


@app.command("run", context_settings={"ignore_unknown_options": True, "help_option_names": []})
def run_script(words: Annotated[list[str], typer.Argument(metavar="[OPTIONS] SCRIPT [ARGS]...")]) -> None:
    """Run a script as it is, with sparse attention in its video transformers."""
    run.main(words)


@app.command()
def search(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="folder of a diffusers model, given with --inputs; the package's evaluation model if not given",
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="calls to calibrate on: torch.save of a list of forward's keyword arguments, or safetensors with "
            "names such as 0.hidden_states; the model is loaded in their data type"
        ),
    ] = None,
    r: Annotated[
        float, typer.Option(help="largest loss of one attention: relative squared error of the output")
    ] = 0.01,
    total: Annotated[float, typer.Option(help="largest sum of the losses of all attentions")] = 0.02,
    menu: Annotated[
        Path | None, typer.Option(help='JSON file: a list such as [{"method": "svg2", "min_gain": 0.02}]')
    ] = None,
    out: Annotated[Path, typer.Option(help="the policy's file")] = Path("policy.json"),
    options: Annotated[
        list[str] | None, typer.Option("--option", help="key=value: an option of torch.compile, e.g. grid")
    ] = None,
) -> None:
    """Find for every attention the fastest method that changes the output little; write a policy."""
    import torch

    from sparsify_compiler import diffusers_model
    from sparsify_compiler.training.search import MENU, read_menu_file
    from sparsify_compiler.training.search import search as searched

    chosen = {
        name: diffusers_model.parse_option(text)
        for name, text in diffusers_model.assignments(options or (), "--option").items()
    }
    entries = MENU if menu is None else read_menu_file(menu)
    if (checkpoint is None) != (inputs is None):
        raise OptionError("a checkpoint and --inputs for its calibration must be given together, or neither")
    try:
        check_file(out)
    except OSError as error:
        raise OptionError(
            f"out must be a file in a folder that exists, got {str(out)!r}: {error}. Try another path"
        ) from error
    if checkpoint is None or inputs is None:
        require_laboratory()
        from sparsify_compiler.lab import calibration
        from sparsify_compiler.lab import model as evaluated

        model, calls = evaluated.load(), calibration.calibration_inputs()
    else:
        calls = diffusers_model.read_calls(inputs)
        model = diffusers_model.load(checkpoint, diffusers_model.dtype_of(calls))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = [
        {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in one.items()} for one in calls
    ]
    policy = searched(model.to(device), calls, menu=entries, r=r, total=total, options=chosen)
    Console().print(policy)
    Console().print(f"Written to {policy.save(out)}.", soft_wrap=True)


@app.command()
def distill(
    out: Annotated[Path, typer.Option(help="folder of the run; a run that was begun there continues")],
    consistency_steps: Annotated[int, typer.Option(help="steps of stage 1, consistency distillation")] = 300,
    distillation_steps: Annotated[
        int, typer.Option(help="steps of stage 3, distillation of the sparse student")
    ] = 100,
    segments: Annotated[int, typer.Option(help="number of steps of the student; must divide 50")] = 5,
    r: Annotated[
        float, typer.Option(help="largest loss of one attention: relative squared error of the output")
    ] = 0.015,
    total: Annotated[float, typer.Option(help="largest sum of the losses of all attentions")] = 0.035,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors of the evaluation model, instead of the shipped ones")
    ] = None,
    frames: Annotated[int, typer.Option(help="frames of a video (96 tokens each)")] = 24,
) -> None:
    """Run Efficient-vDiT on the evaluation model: train fewer steps, then sparse attention; write a report."""
    require_laboratory()
    from rich.markdown import Markdown

    from sparsify_compiler.lab import model as evaluated
    from sparsify_compiler.lab import pipeline
    from sparsify_compiler.lab.students import Settings

    settings = Settings(
        consistency_steps=consistency_steps,
        distillation_steps=distillation_steps,
        segments=segments,
        r=r,
        total=total,
        frames=frames,
    )
    report = pipeline.distill(evaluated.load(weights or evaluated.WEIGHTS), out, settings)
    Console().print(Markdown(report.markdown()))
    Console().print(f"Written to {out / 'report.md'} and report.json.", soft_wrap=True)


@bench.command()
def quality(
    out: Annotated[Path, typer.Option(help="folder of the run; a run that was begun there continues")] = Path(
        "demo_out/quality"
    ),
    densities: Annotated[
        list[float] | None,
        typer.Option("--density", help="share of the query-key pairs that methods read, in (0, 1]"),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="method to compare: tile, svg2, cubes, keys or dsv; all by default"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="videos of each configuration")] = 8,
    steps: Annotated[int, typer.Option(help="steps of a generation")] = 16,
    dense_steps: Annotated[int, typer.Option(help="number of first steps that stay dense")] = 2,
    frames: Annotated[int, typer.Option(help="frames of a video (96 tokens each)")] = 24,
    policies: Annotated[
        list[Path] | None, typer.Option("--policy", help="file of `sparsify search` to compare too")
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option(help="predictor file of DSVTrainer for dsv; trained in minutes if not given"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors of the evaluation model, instead of the shipped ones")
    ] = None,
) -> None:
    """Compare videos of sparse attention with dense ones at matched densities, and their cost."""
    require_laboratory()
    from sparsify_compiler.lab import benchmark, report
    from sparsify_compiler.lab import model as evaluated
    from sparsify_compiler.lab.configurations import COMPARED, DENSITIES, Settings

    settings = Settings(
        seeds=seeds,
        steps=steps,
        dense_steps=dense_steps,
        frames=frames,
        densities=tuple(densities or DENSITIES),
        methods=tuple(methods or COMPARED),
        policies=tuple(policies or ()),
        predictor=predictor,
    )
    record = benchmark.quality(weights or evaluated.WEIGHTS, out, settings)
    console = Console()
    console.print(report.table(record))
    for line in report.least_density_lines(record["least_density"]):
        console.print(line)
    console.print(f"Written to {out}: quality.json, videos.png, pareto.png.", soft_wrap=True)


@bench.command()
def sparsity(
    out: Annotated[Path, typer.Option(help="folder for sparsity.json and sparsity.png")] = Path(
        "demo_out/sparsity"
    ),
    videos: Annotated[int, typer.Option(help="held-out videos, at every noise level")] = 8,
    frames: Annotated[int, typer.Option(help="frames of a video (96 tokens each)")] = 24,
    weights: Annotated[
        Path | None, typer.Option(help="safetensors of the evaluation model, instead of the shipped ones")
    ] = None,
) -> None:
    """Measure the share of the keys that holds 90 % of the attention, for every layer and head."""
    require_laboratory()
    from sparsify_compiler.lab import check, report
    from sparsify_compiler.lab import model as evaluated

    shares = check.sparsity(weights or evaluated.WEIGHTS, out, videos=videos, frames=frames)
    console = Console()
    console.print(report.sparsity_table(shares))
    console.print(f"Mean {shares.mean():.3f}. Written to {out}: sparsity.json, sparsity.png.", soft_wrap=True)


def require_laboratory() -> None:
    """Check that the packages are installed that commands on the evaluation model need beyond torch.

    Raises:
        SparsifyError: a package is missing.
    """
    from sparsify_compiler.lab import require

    require()


def main() -> None:
    """Run the command `sparsify`."""
    if sys.argv[1:2] == ["run"]:  # not by typer, which would handle the exceptions of the script
        run.main(sys.argv[2:])
    else:
        run_command(app)


if __name__ == "__main__":
    main()
