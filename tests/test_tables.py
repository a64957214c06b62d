"""Tables of sites: at any width of a terminal every name and number is there, whole."""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from sparsify_compiler.measured import Measurement, RunStats
from sparsify_compiler.policy import DENSE, Mark, Policy, PolicySite, Trial, entry_of

NAMES = (
    "attn",
    "blocks.39.attn1",
    "transformer_blocks.12.attn1",
    "single_transformer_blocks.39.attn",
    "transformer.temporal_transformer_blocks.12.attentions.1.processor.attn1",
    f"{'long_' * 20}.attn",
)


def printed(what: object, width: int) -> list[str]:
    console = Console(width=width, record=True, color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.export_text().splitlines()]


def stats_of(*names: str) -> RunStats:
    """Every number of the i-th site's row is another one."""
    measurements = []
    for i, name in enumerate(names):
        density, kept, recall, far = (
            torch.tensor([[0.1 * k + 0.01 * i, 0.1 * k + 0.01 * i + 0.004]]) for k in (1, 3, 5, 7)
        )
        measurements.append(
            Measurement(
                site=name,
                method="svg2",
                call=0,
                step=0,
                stream=0,
                density=density,
                kept=kept,
                recall=recall,
                far_field=far,
                asked_error=math.nan,
                estimated_error=torch.full((1, 2), math.nan),
                measured_error=torch.full((1, 2), math.nan),
            )
        )
    return RunStats(tuple(measurements), 2)


def numbers_of(i: int) -> list[str]:
    return [
        f"{0.1 * k + 0.01 * i + more:.3f}"
        for k, more in ((1, 0.002), (1, 0), (1, 0.004), (3, 0.002), (5, 0.002), (7, 0.002))
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:3], NAMES[2:4], NAMES], ids=len)
def test_stats_have_whole_names_and_numbers(names: tuple[str, ...], width: int) -> None:
    lines = printed(stats_of(*names), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for i, name in enumerate(names):
        if len(name) < width:
            assert name in text
        else:
            assert name in "".join(lines)  # on several lines
        (row,) = [line for line in lines if numbers_of(i)[0] in line.split()]
        assert row.split()[-8:] == ["svg2", "1", *numbers_of(i)]
    for heading in (
        "site",
        "method",
        "calls",
        "density",
        "lowest",
        "highest",
        "kept",
        "recall",
        "far",
        "field",
    ):
        assert heading in text.split()


def test_names_stand_in_their_rows_where_they_fit() -> None:
    for width in (80, 120):
        (row,) = [line for line in printed(stats_of(NAMES[1]), width) if NAMES[1] in line]
        assert row.split() == [NAMES[1], "svg2", "1", *numbers_of(0)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_policy_has_whole_names_and_choices(width: int) -> None:
    options = {"method": "svg2", "far_field": "drop", "top_p": 0.5}
    label = "svg2 far_field=drop top_p=0.5 min_kv_ratio=0.03"
    trials = {DENSE: Trial(0.0, 8.0), label: Trial(0.25, 4.0)}
    known = Mark(site="", module="M", kind="self", heads=2, kv_heads=2, head_dim=8, grid=(21, 30, 52))
    layers = tuple(
        PolicySite(mark=replace(known, site=name), graph=0, choice=label, trials=trials)
        for name in NAMES[:-1]
    )
    menu = {DENSE: entry_of({"method": DENSE}), label: entry_of(options)}
    policy = Policy(
        model="M", r=1.0, total=1.0, menu=menu, layers=layers, together=0.5, inputs=1, machine="here"
    )
    text = "\n".join(printed(policy, width))
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert text.count("21x30x52") == len(layers)
    for name in NAMES[:-1]:
        assert name in text or len(name) > width
    if width > 60:
        assert text.count(label) == len(layers)
