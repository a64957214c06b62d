"""Attention by hand: what is read as attention computes the same, and what is not stays as it is and says why."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    BIAS,
    NO,
    SEEN,
    B,
    D,
    Function,
    H,
    Outcome,
    S,
    X,
    flat,
    heads,
    is_rewritten,
    multiplied,
    outcomes,
    project,
    rows,
    spelled,
    stays,
)
from torch import Tensor

from sparsify_compiler.passes import replay, unfused

FLAT_BIAS = BIAS.view(B, 1, S).repeat_interleave(H, 0)
"""[B H, 1, S]"""
MEMORY = torch.arange(7.0 * D).view(7, D).sin()


def in_operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores *= 0.5
    scores += BIAS
    return scores.softmax(-1) @ v


def regrouped_for_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q, k.mT).view(B, H, S, S) + BIAS
    return torch.bmm(scores.view(B * H, S, S).softmax(-1), v).view(B, H, S, D)


HALF = torch.finfo(torch.float16).min
ATTENTION: dict[str, Function] = {
    "scale, then mask": spelled(lambda s: s * 0.5 + BIAS),
    "mask first, expanded": spelled(lambda s: BIAS.expand(B, H, S, S) + s / 2),
    "two scales": spelled(lambda s: torch.multiply(s, 0.5).div_(3)),
    "negative scale": spelled(lambda s: s * -0.5),
    "zero scale": spelled(lambda s: s * 0),
    "hidden by -inf": spelled(lambda s: s.masked_fill(mask=~SEEN, value=NO)),
    "hidden by a number": spelled(lambda s: s.masked_fill(SEEN.logical_not(), -1e9)),
    "hidden by the least number": spelled(lambda s: s.masked_fill(~SEEN, torch.finfo(s.dtype).min)),
    "hidden by the least number, fp16": spelled(lambda s: s.masked_fill(~SEEN, HALF), dtype=torch.float16),
    "all hidden by a number": spelled(lambda s: (30 * s).masked_fill(SEEN >= SEEN, -1e9)),
    "hidden where 0": spelled(lambda s: s.masked_fill((2.0 * SEEN).logical_not(), NO)),
    "chosen where seen": spelled(lambda s: torch.where(SEEN, s, NO)),
    "chosen where seen, by a method": spelled(lambda s: (s * 0.3).where(SEEN, NO)),
    "chosen where not hidden": spelled(lambda s: torch.where(~SEEN, -1e10, s)),
    "chosen where seen is hidden": spelled(lambda s: torch.where(SEEN, -1e10, s)),
    "wider scores": spelled(lambda s: s.double(), lambda w: w.float()),
    "wider weights": spelled(weights=lambda w: w.float().to(torch.bfloat16), dtype=torch.bfloat16),
    "wider softmax": multiplied(lambda q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float64).to(v) @ v),
    "in operators": multiplied(in_operators),
    "added by baddbmm": multiplied(
        lambda q, k, v: torch.bmm(torch.baddbmm(FLAT_BIAS, q, k.mT, alpha=0.5).softmax(-1), v), flat
    ),
    "added by baddbmm, then regrouped": multiplied(
        lambda q, k, v: torch.baddbmm(FLAT_BIAS, q, k.mT).view(B, H, S, S).softmax(-1) @ v.view(B, H, S, D),
        flat,
    ),
    "nothing added by baddbmm": multiplied(
        lambda q, k, v: torch.baddbmm(FLAT_BIAS * NO, q, k.mT, beta=0, alpha=0.3).softmax(-1) @ v, flat
    ),
    "regrouped for the softmax": multiplied(regrouped_for_the_softmax, flat),
    "einsum": multiplied(
        lambda q, k, v: torch.einsum(
            "bhij,bjhd->bihd", (torch.einsum("bihd,bjhd->bhij", q, k) * 0.3).softmax(-1), v
        ),
        rows,
    ),
    "einsum, value first": multiplied(
        lambda q, k, v: torch.einsum("bjhd,bhij->bihd", v, torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)),
        rows,
    ),
}


@pytest.fixture(scope="module")
def rewritten() -> dict[str, Outcome]:
    return outcomes(ATTENTION)


@pytest.mark.parametrize("name", ATTENTION)
def test_spellings_of_attention(name: str, rewritten: dict[str, Outcome]) -> None:
    is_rewritten(rewritten[name])


def mask_added_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = BIAS.expand(B, H, S, S).clone()
    mask += q @ k.mT
    return mask.softmax(-1) @ v


def in_statements(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.mul_(0.5)
    return scores.softmax(-1) @ v


def clamped_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.view(-1).clamp_(-3, 3)
    return scores.softmax(-1) @ v


def cut_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    weights[..., 0] = 0
    return weights @ v


def returned_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.sum()


def returned_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.sum()


def twice_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores + scores).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def squared_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights


NOT_READ: dict[str, tuple[Function, str]] = {
    # scale and mask in another order
    "mask scaled": (spelled(lambda s: (s + BIAS) * 0.5), "its mask is scaled"),
    "mask scaled, of baddbmm": (
        multiplied(lambda q, k, v: (torch.baddbmm(FLAT_BIAS, q, k.mT) / 2).softmax(-1) @ v, flat),
        "its mask is scaled",
    ),
    "mask with a factor": (
        multiplied(lambda q, k, v: torch.baddbmm(FLAT_BIAS, q, k.mT, beta=2).softmax(-1) @ v, flat),
        "a factor for its mask",
    ),
    "hidden, then scaled": (spelled(lambda s: s.masked_fill(~SEEN, -1e9) * 1e-3), "its mask is scaled"),
    "two masks": (spelled(lambda s: s.masked_fill(~SEEN, NO) + BIAS), "two masks"),
    "alpha": (spelled(lambda s: torch.add(s, BIAS, alpha=2)), "go through add"),
    "mask subtracted": (spelled(lambda s: s - BIAS), "go through sub"),
    "boolean mask added": (spelled(lambda s: s + SEEN), "go through add"),
    "hidden by a small number": (spelled(lambda s: s.masked_fill(~SEEN, -3.0)), "go through masked_fill"),
    "filled by a large number": (spelled(lambda s: s.masked_fill(~SEEN, 1e9)), "go through masked_fill"),
    "chosen from a tensor": (spelled(lambda s: torch.where(SEEN, s, BIAS)), "go through where"),
    "scores twice": (multiplied(twice_scores), "go through add"),
    "mask of more batches": (
        lambda x: (heads(x[:1]) @ heads(x[:1]).mT + BIAS).softmax(-1) @ heads(x),
        "go through add",
    ),
    "keys without a batch": (
        multiplied(lambda q, k, v: (q @ k[0].mT).softmax(-1) @ v[0]),
        "its key has the sizes",
    ),
    "keys without a batch, by SDPA": (
        multiplied(lambda q, k, v: F.scaled_dot_product_attention(q, k[0], v[0])),
        "query, key and value differ in dimensions",
    ),
    # other types
    "to integers": (spelled(lambda s: s.to(torch.int32).float()), "cast from torch.float32 to torch.int32"),
    "to fewer digits": (spelled(lambda s: s.bfloat16(), lambda w: w.float()), "to torch.bfloat16"),
    "to eight bits": (spelled(lambda s: s.to(torch.float8_e4m3fn).float()), "to torch.float8_e4m3fn"),
    "weights to eight bits": (spelled(weights=lambda w: w.to(torch.float8_e5m2).float()), "weights are cast"),
    "bfloat16 to float16": (
        spelled(lambda s: s.half(), lambda w: w.bfloat16(), torch.bfloat16),
        "from torch.bfloat16 to torch.float16",
    ),
    "softmax in fewer digits": (
        multiplied(lambda q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float16).float() @ v),
        "to torch.float16",
    ),
    "weights to fewer digits": (spelled(weights=lambda w: w.half().float()), "weights are cast"),
    "weights to integers": (spelled(weights=lambda w: (255 * w).byte().float()), "weights are cast"),
    "other bits": (spelled(lambda s: s.view(torch.int32).view(torch.float32)), "to torch.int32"),
    # other functions of the scores
    "clamped": (spelled(lambda s: s.clamp(-5, 5)), "go through clamp"),
    "capped": (spelled(lambda s: 20 * torch.tanh(s / 20)), "go through tanh"),
    "without sign": (spelled(lambda s: s.abs()), "go through abs"),
    "less their largest": (spelled(lambda s: s - s.amax(-1, keepdim=True)), "go through sub"),
    "times a tensor": (spelled(lambda s: s * torch.tensor([1.0, 2.0]).view(H, 1, 1)), "go through mul"),
    "divisor of a number": (spelled(lambda s: 2 / s), "go through truediv"),
    "rounded": (spelled(lambda s: torch.div(s, 2, rounding_mode="trunc")), "go through div"),
    # other weights
    "weights hidden": (spelled(weights=lambda w: w * SEEN), "weights go through mul"),
    "weights of weights": (spelled(weights=lambda w: w.softmax(-1)), "weights go through softmax"),
    "weights detached": (spelled(weights=lambda w: w.detach()), "weights go through detach"),
    "logarithm": (multiplied(lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v), "those of log_softmax"),
    "written out": (multiplied(written_out), "its softmax is written out"),
    "divided after": (
        multiplied(lambda q, k, v: (lambda e: (e @ v) / e.sum(-1, keepdim=True))((q @ k.mT).exp())),
        "its softmax is written out",
    ),
    "written out in place": (
        multiplied(lambda q, k, v: (q @ k.mT).sub_(4).exp_() @ v),
        "its softmax is written out",
    ),
    "softmin": (multiplied(lambda q, k, v: F.softmin(q @ k.mT, -1) @ v), "those of softmin"),
    "weights squared": (multiplied(squared_weights), "weights on the left"),
    "weights transposed": (
        multiplied(lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).permute(0, 1, 3, 2)),
        "weights go through permute",
    ),
    "keys first": (multiplied(lambda q, k, v: (k @ q.mT).mT.softmax(-1) @ v), "go through .mT"),
    "softmax in the middle": (
        multiplied(
            lambda q, k, v: torch.einsum(
                "bijh,bjhd->bihd", torch.einsum("bihd,bjhd->bijh", q, k).softmax(2), v
            ),
            rows,
        ),
        "",
    ),
    "heads summed": (
        multiplied(lambda q, k, v: torch.einsum("bhij,bgjd->bhid", (q @ k.mT).softmax(-1), v)),
        "sums over more",
    ),
    "added to the output": (
        multiplied(lambda q, k, v: torch.baddbmm(q, (q @ k.mT).softmax(-1), v), flat),
        "second product",
    ),
    # other sizes
    "memory bank": (lambda x: (heads(x) @ MEMORY.t()).softmax(-1) @ MEMORY, "its key has the sizes (7, 8)"),
    "keys of two dimensions": (
        lambda x: (x[..., :D] @ MEMORY.t()).softmax(-1) @ MEMORY,
        "its key has the sizes (7, 8)",
    ),
    "values of two dimensions": (
        multiplied(lambda q, k, v: (q @ k.mT).softmax(-1) @ v[0, 0]),
        "its value has the sizes (15, 8)",
    ),
    "keys of three dimensions": (
        multiplied(lambda q, k, v: (q @ k[0].mT).softmax(-1) @ v),
        "its key has the sizes (2, 15, 8)",
    ),
    "one batch of queries": (
        multiplied(lambda q, k, v: (q[:1] @ k.mT).softmax(-1) @ v),
        "its query has the sizes (1,",
    ),
    "one batch of values": (
        multiplied(lambda q, k, v: (q @ k.mT).softmax(-1) @ v[:1]),
        "its value has the sizes (1,",
    ),
    "one value": (
        multiplied(lambda q, k, v: torch.einsum("bhij,bhjd->bhid", (q @ k.mT).softmax(-1), v[:, :, :1])),
        "tokens or channels are broadcast",
    ),
    "one channel": (
        multiplied(lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q[..., :1], k).softmax(-1) @ v),
        "tokens or channels are broadcast",
    ),
    "two dimensions": (
        multiplied(lambda q, k, v: (q[0, 0] @ k[0, 0].T).softmax(-1) @ v[0, 0]),
        "its scores have 2 dimensions",
    ),
    "five dimensions": (
        multiplied(lambda q, k, v: (q[None] @ k[None].mT).softmax(-1) @ v[None]),
        "its scores have 5 dimensions",
    ),
    # seen from elsewhere
    "weights returned": (multiplied(returned_weights), "its weights are used elsewhere"),
    "scores returned": (multiplied(returned_scores), "its scores are used elsewhere"),
    "weights cut": (multiplied(cut_weights), "its weights are used elsewhere"),
    "changed by statements": (multiplied(in_statements), "its scores are used elsewhere"),
    "clamped through a view": (multiplied(clamped_in_place), "its scores are used elsewhere"),
    "added to the mask": (multiplied(mask_added_to), "its mask is written to"),
}
"""Function -> it and a part of the reason."""


@pytest.fixture(scope="module")
def unread() -> dict[str, Outcome]:
    return outcomes({name: function for name, (function, _) in NOT_READ.items()})


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_attention_says_why(name: str, unread: dict[str, Outcome]) -> None:
    stays(unread[name], NOT_READ[name][1])


# ---- Types, gradients, sizes -------------------------------------------------------------------------------------


def scores_in_full(x: Tensor) -> Tensor:
    q, k, v = project(x)
    with torch.autocast("cpu", enabled=False):
        scores = q @ k.mT
    return scores.softmax(-1) @ v


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = outcomes({"all": ATTENTION["scale, then mask"], "scores in full": scores_in_full})
    is_rewritten(found["all"])
    assert found["all"][2].site.dtype == "bfloat16"
    stays(found["scores in full"], "autocast is not the same")


def test_gradients_that_end_between_the_products() -> None:
    def without(x: Tensor) -> Tensor:
        q, k, v = project(x)
        with torch.no_grad():
            weights = (q @ k.mT).softmax(-1)
        return weights @ v

    found = outcomes({"without": without, "with": spelled()}, X.clone().requires_grad_())
    stays(found["without"], "gradients are switched off")
    is_rewritten(found["with"])
    with torch.no_grad():
        is_rewritten(outcomes({"without": without})["without"])


def test_free_sizes() -> None:
    is_rewritten(outcomes({"free": ATTENTION["scale, then mask"]}, dynamic=True)["free"])


def test_transforms() -> None:
    """Their tensors have other sizes outside, and our operators no rule for them."""

    def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    by_hand = spelled()
    functions: dict[str, Function] = {
        "vmap": lambda x: torch.vmap(multiplied(called))(x[None])[0],
        "vmap by hand": lambda x: torch.vmap(by_hand)(x[None])[0],
        "grad": lambda x: torch.func.grad(lambda x: multiplied(called)(x).sum())(x),
        "grad by hand": lambda x: torch.func.grad(lambda x: by_hand(x).sum())(x),
    }
    for outcome in outcomes(functions).values():
        stays(outcome, "inside a transform of torch.func")


# ---- The second look ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("clamp", spelled(lambda s: s.clamp(-60, 60))),
        ("tanh", spelled(lambda s: 4 * s.tanh())),
        ("abs", spelled(lambda s: s.abs())),
        ("exp", spelled(weights=lambda w: w.exp())),
        ("bfloat16", spelled(lambda s: s.bfloat16().float())),
    ],
)
def test_what_a_wrong_reading_lets_pass_is_seen_by_running_it(
    name: str, function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfused, "_CASTS", {*unfused._CASTS, name})
    monkeypatch.setattr(unfused, "_check_types", lambda *_: None)
    stays(outcomes({name: function})[name], "on random tensors it is not the attention")


def test_alike_layers_are_run_once_and_draw_no_random_numbers() -> None:
    replay._difference.cache_clear()
    before = torch.get_rng_state()
    layers = {str(i): partial(ATTENTION["hidden by a number"]) for i in range(4)}
    found = outcomes({**layers, "another": ATTENTION["hidden by -inf"]})
    for outcome in found.values():
        is_rewritten(outcome)
    assert replay._difference.cache_info().misses == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_too_many_scores_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_SCORES", B * H * S * S - 1)
    monkeypatch.setattr(replay, "_difference", None)
    is_rewritten(outcomes({"plain": spelled()})["plain"])
