"""Policies: an entry of a menu for each site of a model. A search chooses them.

A policy is a JSON file that people can read. It has the menu, and for every site the features by which it is
recognised, the loss and the time of every entry, and the choice, which may be edited by hand.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_compiler.config import integer, option_names
from sparsify_compiler.errors import OptionError, PolicyError, SparsifyError, unknown_choice
from sparsify_compiler.kernels.far_field import FAR_FIELDS
from sparsify_compiler.methods import METHODS
from sparsify_compiler.names import align
from sparsify_compiler.plan import AttentionSite, Entry, TokenLayout

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMAT = "sparsify-policy-2"
WIDTH = 100
"""The characters of a line of the file, where a line can be broken."""
DENSE = "dense"
"""The label of full attention, which every menu has."""
LOSS = (
    "||v - v_dense||^2 / ||v_dense||^2 of the model's output v with this site alone sparse, "
    "mean over the calibration inputs"
)
SEARCH_AGAIN = (
    "search for this one: sparsify search, or sparsify_compiler.training.search(model, inputs, ...)"
)


def entry_of(options: Mapping[str, Any]) -> Entry:
    """The entry that `method`, `far_field` and options of the method describe.

    Raises:
        OptionError: a name or value is unknown. The error names the option, the choices and the nearest one.
    """
    own = {name: value for name, value in options.items() if name not in ("method", "far_field")}
    name, far_field = options.get("method"), options.get("far_field")
    if not isinstance(name, str) or name not in METHODS:
        raise unknown_choice("method", name, METHODS)
    kind = METHODS[name]
    for option in own:
        if option not in option_names(kind):
            others = [other for other, kind in METHODS.items() if option in option_names(kind)]
            if others:
                raise OptionError(
                    f"option {option!r} belongs to method {' and '.join(map(repr, others))}, got method={name!r}: "
                    f"try {{'method': {others[0]!r}, {option!r}: ...}}"
                )
            raise unknown_choice("option", option, ("method", "far_field", *all_options()))
    if far_field not in (None, *FAR_FIELDS):
        raise unknown_choice("far_field", far_field, FAR_FIELDS)
    far_field = far_field or kind.far_field
    if own.get("min_gain") is not None and far_field != "linear":
        raise OptionError(f"min_gain needs the linear far field, got far_field={far_field!r}: try top_p")
    if own.get("max_error") is not None:
        if far_field != "linear":
            raise OptionError(
                f"max_error needs the linear far field, got far_field={far_field!r}: the others do not estimate "
                "the error of what they do not read"
            )
        if others := [other for other in ("top_p", "min_gain", "kv_budget") if own.get(other) is not None]:
            raise OptionError(f"max_error takes the place of {', '.join(others)}: leave out one of them")
    return Entry(method=kind(**{**kind.otherwise.get(far_field, {}), **own}), far_field=far_field)


def all_options() -> frozenset[str]:
    """The options of all methods, with those that a user added to `METHODS`."""
    return frozenset(option for kind in METHODS.values() for option in option_names(kind))


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The features by which a site is recognised: on any device, in any batch, with a prompt of any length."""

    site: str
    module: str
    """Class of the module that contains it."""
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    grid: tuple[int, int, int]

    def differs_in(self, other: "Mark") -> list[str]:
        """The fields in which two sites of one name differ. The class of the model itself may be unknown."""
        names = [f.name for f in fields(Mark) if f.name != "site"]
        unknown = () if self.module and other.module else ("module",)
        return [name for name in names if name not in unknown and getattr(self, name) != getattr(other, name)]


def mark(site: AttentionSite, layout: TokenLayout) -> Mark:
    """The mark of a site with a grid."""
    assert layout.grid is not None
    return Mark(
        site=site.name,
        module=site.module,
        kind=site.kind,
        heads=site.heads,
        kv_heads=site.kv_heads,
        head_dim=site.head_dim,
        grid=layout.grid,
    )


@dataclass(frozen=True, slots=True)
class Trial:
    """The measurements of an entry at a site."""

    loss: float
    """See `LOSS`."""
    milliseconds: float
    """The time of one call of the attention, with the selection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySite:
    """One site of a policy: its mark, its choice, and the trials of all entries."""

    mark: Mark
    graph: int
    """The number of its graph in the model, from 0."""
    choice: str
    """A label of the menu."""
    trials: Mapping[str, Trial]
    """Label -> measurements, also of `dense`."""

    @property
    def chosen(self) -> Trial:
        return self.trials[self.choice]

    def why(self, r: float, total: float) -> str:
        """The choice and its reason, in words."""
        dense, chosen = self.trials[DENSE], self.chosen
        if self.choice != DENSE:
            return (
                f"policy: {self.choice}, loss {chosen.loss:.3g} of at most {_limits(r, total)}, "
                f"{chosen.milliseconds:.3g} ms for {dense.milliseconds:.3g} ms dense"
            )
        cheaper = {
            label: trial
            for label, trial in self.trials.items()
            if trial.milliseconds < dense.milliseconds and label != DENSE
        }
        if not cheaper:
            return f"policy: dense, {dense.milliseconds:.3g} ms, and no entry of the menu is faster"
        least = min(cheaper, key=lambda label: cheaper[label].loss)
        lost = f"at least {cheaper[least].loss:.3g}, by {least}"
        if cheaper[least].loss <= r:
            return f"policy: dense, faster entries lose {lost}; all layers may lose {total:g}"
        return f"policy: dense, faster entries lose more than {r:g}: {lost}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The entry of each site of one model at one grid, with the measurements of all entries."""

    model: str
    """Class of the model."""
    r: float
    """The largest loss of a site."""
    total: float
    """The largest sum of the losses of all sites."""
    menu: Mapping[str, Entry]
    """Label -> entry."""
    layers: tuple[PolicySite, ...]
    """The sites, in the order in which the model calls them."""
    together: float
    """The loss with the choices of all sites at once."""
    inputs: int
    """The number of calls of the model on which losses were measured."""
    machine: str
    """The machine on which times were measured, in words."""
    source: str = field(default="the policy", compare=False)
    """The origin of the policy, for messages."""

    @property
    def milliseconds(self) -> float:
        """The time of all these attentions."""
        return math.fsum(layer.chosen.milliseconds for layer in self.layers)

    @property
    def dense_milliseconds(self) -> float:
        """The time of all these attentions, dense."""
        return math.fsum(layer.trials[DENSE].milliseconds for layer in self.layers)

    @property
    def advice(self) -> str:
        """The advice where every site stays dense; empty where one is sparse."""
        if any(layer.choice != DENSE for layer in self.layers):
            return ""
        faster = [
            trial.loss
            for layer in self.layers
            for label, trial in layer.trials.items()
            if label != DENSE and trial.milliseconds < layer.trials[DENSE].milliseconds
        ]
        if not faster:
            advice = "nothing on the menu is faster: search on a video of more tokens, or with another menu"
        elif limits := [name for name in ("r", "total") if getattr(self, name) < min(faster)]:
            advice = f"search with {' and '.join(limits)} above {min(faster):.3g}, the least loss of a faster entry"
        else:
            advice = "edit the choices in the file, or search again"
        return f"{self.source} keeps every attention dense, so nothing gets faster: {advice}"

    def of(self, sites: Sequence[tuple[AttentionSite, TokenLayout]]) -> list[tuple[Entry, str]]:
        """(entry, reason) of each site of a graph that may be sparse.

        Raises:
            PolicyError: the sites are those of another model or another grid.
        """
        found = [mark(site, layout) for site, layout in sites]
        if not found:
            return []
        graphs = [list(layers) for _, layers in groupby(self.layers, key=lambda layer: layer.graph)]
        cuts = [(cut, layers) for layers in graphs if (cut := _cut(found, layers)) is not None]
        if not cuts:
            raise PolicyError(f"{self.source} is for another model or grid: {self._difference(found)}")
        least = min(cuts, key=itemgetter(0))[0]
        layers, *others = (layers for cut, layers in cuts if cut == least)
        if any([one.choice for one in other] != [one.choice for one in layers] for other in others):
            raise PolicyError(
                f"{self.source} has several models with the attentions {_few([got.site for got in found])}, and "
                f"they differ; {SEARCH_AGAIN}"
            )
        return [(self.menu[layer.choice], layer.why(self.r, self.total)) for layer in layers]

    def _difference(self, found: Sequence[Mark]) -> str:
        """The difference between the sites of a graph and those of the policy, in words."""
        known = {layer.mark.site: layer.mark for layer in self.layers}
        aligned = align([got.site for got in found], known)
        same = {} if aligned is None else aligned.names
        for got in found:
            expected = known.get(same.get(got.site, got.site))
            if expected is not None and (different := got.differs_in(expected)):
                name = different[0]
                want, have = (_text(getattr(one, name)) for one in (expected, got))
                return f"{got.site} of {self.model} must have {name} {want}, got {have}; {SEARCH_AGAIN}"
        names = [got.site for got in found]
        if {same.get(name, name) for name in names} == known.keys():
            return (
                f"the graph calls {_few(names)} in this order, each once, but the policy lists them twice, in "
                f"another order or as of several graphs; {SEARCH_AGAIN}"
            )
        return (
            f"{self.model} must have the attentions {_few([*known])}, got {_few(names)}; {SEARCH_AGAIN}. "
            "Blocks compiled one by one are not recognised: compile the model as a whole"
        )

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """The policy in a file that `save` wrote.

        Raises:
            PolicyError: the file cannot be read, or is no policy; names the fault.
        """
        try:
            content = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise PolicyError(
                f"policy must be a file that a search wrote, got {str(path)!r}: {error.strerror}; {SEARCH_AGAIN}"
            ) from error
        except ValueError as error:  # neither text nor JSON
            raise PolicyError(f"policy {str(path)!r} must hold JSON: {error}; {SEARCH_AGAIN}") from error
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        if kind != FORMAT:
            raise PolicyError(
                f"policy {str(path)!r} must have the format {FORMAT!r}, got {kind!r}; {SEARCH_AGAIN}"
            )
        try:
            menu = {label: entry_of(options) for label, options in content["menu"].items()}
            if not content["layers"]:
                raise ValueError("there are no layers")
            for name in ("r", "total"):
                if not float(content[name]) >= 0:
                    raise ValueError(f"{name} must be at least 0, got {content[name]!r}")
            return cls(
                model=content["model"],
                r=float(content["r"]),
                total=float(content["total"]),
                menu=menu,
                layers=tuple(_layer(layer, menu) for layer in content["layers"]),
                together=float(content["loss of all together"]),
                inputs=_whole("calibration inputs", content["calibration inputs"]),
                machine=content["machine"],
                source=f"policy {str(path)!r}",
            )
        except SparsifyError as error:
            raise PolicyError(f"policy {str(path)!r}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PolicyError(
                f"policy {str(path)!r} is damaged ({type(error).__name__}: {error}); {SEARCH_AGAIN}"
            ) from error

    def save(self, path: str | Path) -> Path:
        """Write the file that options={"policy": path} reads.

        Raises:
            PolicyError: the path cannot be written to.
        """
        path = Path(path)
        try:
            path.write_text(_lines(self._to_json()) + "\n")
        except OSError as error:
            raise PolicyError(f"cannot write the policy to {path}: {error}") from error
        return path

    def _to_json(self) -> dict[str, Any]:
        def trial(one: Trial) -> dict[str, Any]:
            return {"loss": _number(one.loss), "ms": round(one.milliseconds, 4)}

        return {
            "format": FORMAT,
            "model": self.model,
            "r": _number(self.r),
            "total": _number(self.total),
            "loss": LOSS,
            "loss of all together": _number(self.together),
            "calibration inputs": self.inputs,
            "machine": self.machine,
            "menu": {label: entry.options for label, entry in self.menu.items()},
            "layers": [
                {
                    **{f.name: getattr(layer.mark, f.name) for f in fields(Mark)},
                    "graph": layer.graph,
                    "choice": layer.choice,
                    "trials": {label: trial(one) for label, one in layer.trials.items()},
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=120, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        """A row for each site."""
        from sparsify_compiler.tables import fitting

        names = [layer.mark.site for layer in self.layers]
        rows = [
            (
                _text(layer.mark.grid),
                layer.choice,
                f"{layer.chosen.loss:.2e}",
                f"{layer.chosen.milliseconds:.2f}",
                f"{layer.trials[DENSE].milliseconds:.2f}",
            )
            for layer in self.layers
        ]
        yield from fitting(console, options, names, ("grid", "choice", "loss", "ms", "dense ms"), rows)
        yield (
            f"{self.model}, losses at most {_limits(self.r, self.total)}: attention takes "
            f"{self.milliseconds:.1f} ms a call for {self.dense_milliseconds:.1f} ms dense, on {self.machine}; "
            f"loss of all together {self.together:.2e}, {self.inputs} calibration inputs."
        )
        if self.advice:
            yield f"Hint: {self.advice}."


def _cut(found: Sequence[Mark], layers: Sequence[PolicySite]) -> int | None:
    """The number of parts of a wrapper's path in which sites differ from layers; None if they are other sites."""
    marks = [layer.mark for layer in layers]
    aligned = align([one.site for one in found], [one.site for one in marks])
    if aligned is None or [aligned.names[one.site] for one in found] != [one.site for one in marks]:
        return None
    differ = any(one.differs_in(other) for one, other in zip(found, marks, strict=True))
    return None if differ else aligned.cut


def _layer(content: Mapping[str, Any], menu: Mapping[str, Entry]) -> PolicySite:
    known = {f.name: content[f.name] for f in fields(Mark)}
    for name in ("heads", "kv_heads", "head_dim"):
        _whole(name, known[name])
    grid = tuple(_whole("each size of grid", size) for size in known["grid"])
    trials = {label: Trial(float(one["loss"]), float(one["ms"])) for label, one in content["trials"].items()}
    for label in (content["choice"], DENSE):
        if label not in trials or label not in menu:
            raise unknown_choice(f"choice of {known['site']}", label, trials.keys() & menu.keys())
    return PolicySite(
        mark=Mark(**{**known, "grid": grid}),
        graph=_whole("graph", content["graph"]),
        choice=content["choice"],
        trials=trials,
    )


def _whole(name: str, value: object) -> int:
    number = integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return number


def _lines(content: Any, indent: str = "") -> str:
    """JSON with a line for every part that fits on one."""
    line = json.dumps(content)
    if len(line) <= WIDTH or not isinstance(content, (dict, list)):
        return line
    inner = indent + "  "
    named = content.items() if isinstance(content, dict) else (("", one) for one in content)
    parts = [(f"{json.dumps(name)}: " if name else "") + _lines(one, inner) for name, one in named]
    left, right = "{}" if isinstance(content, dict) else "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{right}"


def _limits(r: float, total: float) -> str:
    return f"{r:g}" if total == math.inf else f"{r:g} each and {total:g} in all"


def _number(value: float) -> float | str:
    """The value, or the name of infinity, which JSON does not have. `float` reads it back."""
    return value if math.isfinite(value) else str(value)


def _text(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _few(names: Sequence[str]) -> str:
    """A few names, or the first and the last of many."""
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"
