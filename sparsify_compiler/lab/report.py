"""Results of `sparsify bench`, as tables and pictures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from sparsify_compiler import pictures
from sparsify_compiler.lab.pictures import strip

Point = tuple[float, float]
"""Density and PSNR."""

FAR_FIELD_STYLES = {"drop": ("o", ":"), "mean": ("s", "--"), "linear": ("^", "-")}
"""Marker and line."""
METHOD_COLOURS = {"tile": "C0", "svg2": "C1", "cubes": "C2", "dsv": "C3", "keys": "C4"}


def least_density(points: Iterable[Point], level: float) -> float | None:
    """Density at which the line through points first reaches a level; None if it does not reach it."""
    before: Point | None = None
    for density, height in sorted(points):
        if height >= level:
            if before is None:
                return density
            x, y = before
            return x + (density - x) * (level - y) / (height - y)
        before = density, height
    return None


def least_densities(rows: Sequence[Mapping[str, Any]], levels: Sequence[float]) -> dict[str, Any]:
    """For every level of PSNR the least density of each line, None if it does not reach it, and the best line."""
    lines = points_of(rows)
    found: dict[str, Any] = {}
    for level in levels:
        reached = {name: least_density(points, level) for name, points in lines.items()}
        best = min(((d, name) for name, d in reached.items() if d is not None), default=None)
        found[f"{level:g}"] = {
            "best": best and {"line": best[1], "density": round(best[0], 5)},
            "lines": {name: d and round(d, 5) for name, d in reached.items()},
        }
    return found


def points_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Line -> density and PSNR of its rows."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        if row["line"] is not None:
            lines.setdefault(row["line"], []).append((row["density"], row["psnr"]))
    return lines


def table(record: Mapping[str, Any]) -> Table:
    """A table with a row for each configuration."""
    settings = record["settings"]
    drawn = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=f"{settings['seeds']} videos of {settings['frames']} frames, {settings['steps']} steps of which "
        f"{settings['dense_steps']} dense; weights of {settings['trained_steps']} steps of training. "
        "Dense is to the right of a slash.",
    )
    drawn.add_column("configuration", no_wrap=True)
    for heading in ("density", "kept", "PSNR dB", "SSIM", "motion", "loss", "seconds a call", "times"):
        drawn.add_column(heading, justify="right")
    for row in record["rows"]:
        drawn.add_row(
            row["name"],
            f"{row['density']:.3f}",
            f"{row['recall']:.3f}",
            _spread(row["psnr"], row["psnr_spread"], 2),
            _spread(row["ssim"], row["ssim_spread"], 4),
            f"{row['motion']:.4f}/{row['dense_motion']:.4f}",
            f"{row['loss']:.4f}/{row['dense_loss']:.4f}",
            f"{row['seconds']:.3f}/{row['dense_seconds']:.3f}",
            f"{row['dense_seconds'] / row['seconds']:.2f}x",
        )
    return drawn


def _spread(mean: float, spread: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def least_density_lines(found: Mapping[str, Any]) -> list[str]:
    """A line of text for each level."""
    lines = []
    for level, one in found.items():
        best = one["best"]
        least = "not reached" if best is None else f"at density {best['density']:.3f} by {best['line']}"
        lines.append(f"PSNR {level} dB: {least}")
    return lines


def draw_videos(videos: Mapping[str, Tensor], path: Path) -> Path:
    """Draw a row for each video [3, frames, height, width], RGB from 0 to 1, with its name."""
    strip(torch.stack(list(videos.values())), labels=list(videos)).save(path)
    return path


def draw_pareto(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw PSNR against density and against the time of a call, a line for each method and far field.

    Times are relative to the dense calls of the same rounds, so rows of different runs compare.
    """
    drawn = pictures.figure(13, 5.5)
    panels = drawn.subplots(1, 2, sharey=True)
    for line, points in points_of(rows).items():
        times = [(row["seconds"] / row["dense_seconds"], row["psnr"]) for row in rows if row["line"] == line]
        for axes, own in zip(panels, (points, times), strict=True):
            axes.plot(*zip(*sorted(own), strict=True), label=line, **_style(line))
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="density: share of the query-key pairs", ylabel="PSNR to dense, dB", xlim=(0, None))
    panels[1].axvline(1, color="black", linewidth=1, label="dense")
    panels[1].set(xlabel="time of a call of the model, dense = 1", xlim=(0, None))
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return pictures.save(drawn, path)


def _style(name: str) -> dict[str, Any]:
    method, _, far_field = name.partition(" ")
    if method not in METHOD_COLOURS:
        return {"marker": "*", "markersize": 12, "linestyle": ""}
    marker, line = FAR_FIELD_STYLES[far_field]
    return {"marker": marker, "color": METHOD_COLOURS[method], "linestyle": line}


def sparsity_table(shares: Tensor) -> Table:
    """A table of critical shares [layers, heads], with a row for each layer."""
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("layer", *(f"head {head}" for head in range(shares.shape[1])), "mean"):
        drawn.add_column(heading, justify="right")
    for layer, row in enumerate(shares):
        drawn.add_row(str(layer), *(f"{share:.3f}" for share in (*row.tolist(), row.mean().item())))
    return drawn


def draw_sparsity(shares: Tensor, path: Path) -> Path:
    """Draw critical shares [layers, heads] as a heat map with numbers."""
    layers, heads = shares.shape
    drawn = pictures.figure(2.5 + 0.8 * heads, 1.5 + 0.5 * layers)
    axes = drawn.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, aspect="auto")
    for layer in range(layers):
        for head in range(heads):
            share = shares[layer, head].item()
            axes.text(
                head,
                layer,
                f"{share:.2f}",
                ha="center",
                va="center",
                color="black" if share > 0.6 else "white",
            )
    axes.set_xticks(range(heads))
    axes.set_yticks(range(layers))
    axes.set(xlabel="head", ylabel="layer", title="share of the keys with 90 % of the attention")
    drawn.colorbar(image, ax=axes)
    return pictures.save(drawn, path)
