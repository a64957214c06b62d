"""The attentions that have a form in standard operators of constant sizes."""

from sparsify_compiler.config import SparsifyConfig
from sparsify_compiler.errors import OptionError
from sparsify_compiler.methods import StaticMethod
from sparsify_compiler.methods.cubes import Cubes
from sparsify_compiler.methods.dense import Dense
from sparsify_compiler.plan import AttentionPlan

FIXED = "'kv_budget': share"
"""The option that gives cubes a fixed number of blocks."""

REFUSED = {
    "svg2": "its k-means takes longer in standard operators than it saves",
    "keys": "its clusters of queries have no constant sizes, and to choose keys takes longer than all of 'cubes'",
    "dsv": "its choice of single keys has no constant sizes",
}
"""Methods that have no form, with the reason."""


def check(plan: AttentionPlan) -> None:
    """Raise OptionError unless a site can be written in standard operators of constant sizes."""
    where, method = f"attention {plan.site.name} has", plan.settings
    if isinstance(method, Cubes):
        _check_cubes(where, method)
    elif method is not None and not isinstance(method, StaticMethod):
        raise _without_form(where, plan.method)
    else:
        _check_far_field(where, plan.method, plan.far_field)


def check_config(config: SparsifyConfig) -> None:
    """Raise OptionError if no site of any model with these options can be written, except dense ones.

    A policy is not checked: a model may lack the sites of some of its entries.
    """
    where, method = "the options have", config.method
    if isinstance(method, Cubes):
        _check_cubes(where, method)
    elif method is not None and method.name in REFUSED:
        raise _without_form(where, method.name)
    elif method is not None and not isinstance(method, Dense):
        _check_far_field(where, method.name, config.far_field or method.far_field)


def _check_far_field(where: str, method: str, far_field: str) -> None:
    if far_field != "drop":
        raise OptionError(
            f"{where} far_field={far_field!r} with method {method!r}, which ONNX does not have: take 'drop'"
        )


def _check_cubes(where: str, method: Cubes) -> None:
    if any(one is not None for one in (method.top_p, method.min_gain, method.max_error)):
        raise OptionError(
            f"{where} method 'cubes' without a fixed number of blocks, and all sizes in ONNX are fixed: give "
            f"options={{'method': 'cubes', {FIXED}}}"
        )


def _without_form(where: str, method: str) -> OptionError:
    why = REFUSED.get(method, "it chooses what it reads at every call")
    return OptionError(
        f"{where} method {method!r}, which ONNX does not have: {why}. Take 'tile', 'sta', or 'cubes' with "
        f"{{{FIXED}}}; or format='aoti', which has every method"
    )
