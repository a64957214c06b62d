"""Training with method `dsv`: two stages, after DSV (arXiv 2502.07590).

    model = torch.compile(transformer, backend="sparsify", options={"method": "dsv"})
    dsv = DSVTrainer(model)
    for batch in data:
        loss(model, batch).backward()
        optimizer.step(); optimizer.zero_grad()
        dsv.step()

In stage 1 attention is dense, and a low-rank predictor at every site learns from its queries and keys. When the
mean loss of the predictors is below `threshold`, stage 2 begins. There a head reads only the keys that are
predicted for it, if this costs less than dense attention, as measured on this machine. Heads are still profiled,
so a head may become dense again. The predictors continue to learn at a lower rate.

All decisions use means over all ranks, so all ranks decide the same.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsify_compiler import _torch
from sparsify_compiler.config import integer, share
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.methods.dsv import OBSERVED, Choice, FittedDsv, most_share
from sparsify_compiler.methods.grid import Cube
from sparsify_compiler.methods.predictor import SHARES, Trained, save_predictor, shares_to_keep
from sparsify_compiler.methods.single_keys import share_of
from sparsify_compiler.names import ROOT, align, without_wrappers
from sparsify_compiler.plan import AttentionPlan
from sparsify_compiler.runtime.cost import HeadCost
from sparsify_compiler.runtime.rates import measured_cost
from sparsify_compiler.runtime.state import Learning, share_state

FORMAT = "sparsify-dsv-training-2"
ENOUGH_OVERLAP = 0.8
"""Least share of the critical keys of a group's middle query that must be critical for its other queries."""
LOWER = 0.9
"""Another group is taken only if its cost is below this share of the cost of the group in use."""
KEEP = 0.9
"""Share of the old profile in the running mean with a new one."""
PARTS = ("weights", "shares", "gradients", "observed")
"""Trained and observed tensors of a site."""
STATE = ("format", "steps", "sparse", "learned", "profiles", "choices", "optimizer")
"""The keys of `DSVTrainer.state_dict`."""


@dataclass(slots=True)
class Profile:
    """Measurements of a site: running means on the CPU, [H] for heads, or [groups, H] for candidate groups."""

    critical: Tensor
    """Share of the keys that hold `mass` of a query's attention."""
    missed: Tensor
    """Mean square of the attention mass that queries would miss with each of `predictor.SHARES`, [groups, H,
    SHARES]. The mean of these curves decides the share: a mean of the shares that calls need would miss more."""
    overlap: Tensor
    """Share of the critical keys of a group's middle query that are critical for its other queries."""
    kept: Tensor
    """Attention mass kept with the shares in use."""

    def update(self, new: "Profile") -> None:
        """Move a tenth of the way to a new profile. `kept` is replaced, since it is for the shares in use now."""
        for name in ("critical", "missed", "overlap"):
            setattr(self, name, torch.lerp(getattr(new, name), getattr(self, name), KEEP))
        self.kept = new.kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """The progress of training after a profile."""

    step: int
    stage: Literal[1, 2]
    loss: float
    """Loss of the predictor, mean over sites, heads and the steps since the last profile."""
    critical: float
    """Mean share of the keys that hold `mass` of the attention; DSV's sparsity is 1 less this."""
    share: float
    """Mean share of the video's keys that are read; 1 for a dense head."""
    kept: float
    """Mean attention mass of these keys."""
    sparse_heads: float
    """Share of the heads that are sparse."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Measurements of one head, and the choices for it."""

    site: str
    head: int
    critical: float
    """Share of the keys that hold `mass` of a query's attention: an oracle would read this share for each query."""
    needed: float
    """Share of the video's keys with which queries keep `mass`, if keys are predicted for their group."""
    share: float
    """Share of the video's keys that is read; 1 for a dense head."""
    kept: float
    """Attention mass of these keys."""
    group: Cube
    """Cube of queries that select keys together."""
    overlap: float
    """Share of the critical keys of the group's middle query that are critical for its other queries."""


@dataclass(slots=True, eq=False)
class _Site:
    """A site that learns: its plan, its tensors in the state of the model, its profile and its choice."""

    plan: AttentionPlan
    weights: Tensor
    shares: Tensor
    gradients: Tensor
    observed: Tensor
    profile: Profile | None = None
    choice: Choice | None = None

    @property
    def method(self) -> FittedDsv:
        """The method of the plan, without the choices of training."""
        assert isinstance(self.plan.settings, FittedDsv)
        return self.plan.settings

    def take_profile(self, observed: Tensor) -> None:
        """Update the profile with the observations since the last profile, [rows, H] on the CPU."""
        count = observed[2]
        groups = len(self.method.groups)
        rows = [groups * len(SHARES), groups, groups]
        missed, overlap, kept = (observed[len(OBSERVED) :] / count).split(rows)
        new = Profile(observed[3] / count, missed.unflatten(0, (groups, -1)).mT, overlap, kept)
        if self.profile is None:
            self.profile = new
        else:
            self.profile.update(new)

    def choose(self, cost_of: Callable[[Cube], HeadCost]) -> None:
        """Choose group and shares by the profile; `cost_of` returns the cost of a group.

        With a fixed budget the group is the paper's: the largest whose queries attend to similar keys. Otherwise it
        is the group of least cost: less similar queries need more keys to keep `mass`. Groups only get smaller,
        since a change of group is a new program.
        """
        assert self.profile is not None
        method, video = self.method, self.plan.layout.video_tokens
        groups, needed = method.groups, shares_to_keep(method.mass, self.profile.missed)
        now = 0 if self.choice is None else groups.index(self.choice.group)
        candidates = range(now, len(groups))
        if method.kv_budget is None:
            costs = {i: cost_of(groups[i]).of(needed[i]).clamp(max=1.0) for i in candidates}
            place = min(candidates, key=lambda i: costs[i].sum().item())
            if self.choice is not None and costs[place].sum() > LOWER * costs[now].sum():
                place = now
            shares = torch.where(costs[place] < 1, needed[place], torch.ones_like(needed[place]))
        else:
            overlaps = self.profile.overlap.mean(-1).tolist()
            place = next((i for i in candidates if overlaps[i] >= ENOUGH_OVERLAP), len(groups) - 1)
            shares = torch.full_like(needed[place], share_of(method.kv_budget, video))
        sparse = shares[shares < 1]
        most = most_share(float(sparse.max()) if sparse.numel() else 0.0)
        self.shares.copy_(shares)
        self.choice = Choice(groups[place], most, method.chosen_by)


class DSVTrainer:
    """Trains predictors, profiles heads and switches stages, while a plain PyTorch loop trains the model."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        learning_rate: float = 1e-2,
        late_rate: float = 0.1,
        threshold: float = 0.01,
        profile_every: tuple[int, int] = (25, 100),
        early_steps: int = 1000,
        break_even: float | None = None,
    ) -> None:
        """Args:
            model: the module, compiled or not; sharded already, if FSDP2 shards it.
            learning_rate: learning rate of the predictor's AdamW. The paper uses the model's own. On a young model,
                300 steps with the default came within 4 % of the loss of the best possible projections, those of a
                singular value decomposition; with 1e-3 the loss was still 1.7 times that.
            late_rate: factor on the learning rate in stage 2.
            threshold: mean loss of the predictor below which stage 2 begins.
            profile_every: steps between profiles, in the first `early_steps` and later.
            break_even: share of the keys below which a head becomes sparse; measured on this machine if None.

        Raises:
            SparsifyError: the model is not a module, or a number is out of range.
        """
        module = _torch.uncompiled(model)
        if not isinstance(module, nn.Module):
            raise SparsifyError(f"DSVTrainer needs a module, got {type(module).__name__}")
        numbers = {"learning_rate": learning_rate, "late_rate": late_rate, "threshold": threshold}
        for name, number in numbers.items():
            if not isinstance(number, (int, float)) or not number > 0:
                raise SparsifyError(f"{name} must be a number above 0, got {number!r}")
        cadence = list(profile_every) if isinstance(profile_every, (tuple, list)) else []
        if len(cadence) != 2 or any(integer(steps) is None or steps < 1 for steps in cadence):
            raise SparsifyError(f"profile_every must be two numbers of steps, got {profile_every!r}")
        if integer(early_steps) is None or early_steps < 0:
            raise SparsifyError(f"early_steps must be a number of steps, got {early_steps!r}")
        if break_even is not None and share(break_even) is None:
            raise SparsifyError(f"break_even must be a share in [0, 1], got {break_even!r}")
        self.learning_rate, self.late_rate, self.threshold = learning_rate, late_rate, threshold
        self.profile_every, self.early_steps = profile_every, early_steps
        self.break_even = break_even
        self.steps = 0
        self.progress: Progress | None = None
        """Progress at the last profile."""
        self._modules = [without_wrappers(name) or ROOT for name, _ in module.named_modules()]
        outer = model if isinstance(model, nn.Module) else module
        self._state = share_state([module, *_torch.parameters_in_calls(outer)])
        self._learning = self._state.learning = Learning()
        self._sites: dict[str, _Site] = {}
        self._optimizer: torch.optim.AdamW | None = None
        self._loaded: Mapping[str, Any] | None = None

    @property
    def stage(self) -> Literal[1, 2]:
        """1: dense, while the predictor learns. 2: sparse."""
        return 2 if self._learning.sparse else 1

    def step(self) -> Progress | None:
        """Train the predictors for a step. Call it after every step of the optimizer.

        It returns the progress if this step was profiled. A profile moves to the next step if no site computed
        anything since the last one.

        Raises:
            SparsifyError: no attention of the model learns, the loaded state belongs to another model, or another
                trainer was made for the model.
        """
        if self._state.learning is not self._learning:
            raise SparsifyError(
                "another DSVTrainer was made for this model later: call step of that one only"
            )
        self._find_sites()
        signal = self._state.trained["signal"]
        learned, profiled, _ = signal.tolist()
        if learned:
            self._learn()
        self.steps += 1
        progress = self._look() if profiled else None
        self.progress = progress or self.progress
        overdue = bool(profiled) and progress is None
        signal.copy_(
            torch.tensor([1, overdue or self._is_profiled(self.steps), self.steps], dtype=signal.dtype)
        )
        return progress

    def save_predictor(self, path: str | Path) -> None:
        """Write the predictor for inference, as safetensors, for `options={"method": "dsv", "predictor": path}`.

        Raises:
            SparsifyError: stage 2 has not begun.
        """
        trained, learned = {}, self._state.trained
        for name, choice in self._learning.choices.items():
            assert isinstance(choice, Choice)
            parts = {part: learned[f"{name}.{part}"] for part in ("weights", "shares")}
            trained[name] = Trained(**parts, group=choice.group, chosen_by=choice.chosen_by)
        if self.stage == 1 or not trained:
            raise SparsifyError("there is no predictor to save before stage 2: every head is still dense")
        save_predictor(Path(path), trained)

    def state_dict(self) -> dict[str, Any]:
        """The whole state to resume training exactly; `torch.save` can write it.

        It is the same on every rank, and for every number of ranks: all ranks call this together.
        """
        return {
            "format": FORMAT,
            "steps": self.steps,
            "sparse": self._learning.sparse,
            "learned": {name: _saved(name, tensor) for name, tensor in self._state.trained.items()},
            "profiles": {name: site.profile and asdict(site.profile) for name, site in self._sites.items()},
            "choices": {name: tuple(site.choice) for name, site in self._sites.items() if site.choice},
            "optimizer": self._optimizer and self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, before or after the first call of the model.

        Raises:
            SparsifyError: the state is not from `state_dict`. A state of another model may raise only when the
                model is called, or at the next `step`.
        """
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise SparsifyError("state must be a result of DSVTrainer.state_dict, got something else")
        if missing := sorted({*STATE} - state.keys()):
            raise SparsifyError(
                f"the state lacks {', '.join(missing)}: give a complete result of DSVTrainer.state_dict"
            )
        state = self._renamed(state)
        self.steps, self._learning.sparse = state["steps"], state["sparse"]
        self._learning.choices = {name: Choice(*choice) for name, choice in state["choices"].items()}
        self._state.trained = {name: tensor.clone() for name, tensor in state["learned"].items()}
        self._sites, self._optimizer, self._loaded = {}, None, state

    def _renamed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state, with the names that its sites have in this model, if they differ by the path of a wrapper."""
        sites = {name: name.partition("#") for name in state["profiles"]}
        aligned = align(list(dict.fromkeys(module for module, *_ in sites.values())), self._modules)
        if aligned is None:
            return state
        names = {name: "".join((aligned.names[module], *rest)) for name, (module, *rest) in sites.items()}

        def rename(name: str) -> str:
            return names.get(name, name)

        def rename_part(name: str) -> str:
            site, dot, part = name.rpartition(".")
            return f"{rename(site)}{dot}{part}"

        return {
            **state,
            "learned": {rename_part(name): tensor for name, tensor in state["learned"].items()},
            **{
                part: {rename(name): held for name, held in state[part].items()}
                for part in ("profiles", "choices")
            },
        }

    def _find_sites(self) -> None:
        """Add the sites that programs have called."""
        plans = {
            name: plan
            for name, (plan, _) in self._state.sites.items()
            if f"{name}.gradients" in self._state.trained  # none for a program without gradients
        }
        if not plans:
            raise SparsifyError(
                "no attention of this model learns yet: call the model in training mode, compiled with "
                "backend='sparsify' and options={'method': 'dsv'}, before DSVTrainer.step(); "
                "sparsify_compiler.explain(model, ...) shows why a site stays dense"
            )
        loaded = self._loaded
        if loaded is not None and set(loaded["profiles"]) != set(plans):
            raise SparsifyError(
                f"the state belongs to another model: it has {len(loaded['profiles'])} sites "
                f"({', '.join(loaded['profiles'])}), this model has {len(plans)} ({', '.join(plans)})"
            )
        for name, plan in plans.items():
            if name in self._sites:
                self._sites[name].plan = plan
                continue
            parts: dict[str, Any] = {part: self._state.trained[f"{name}.{part}"] for part in PARTS}
            choice = self._learning.choices.get(name)
            assert choice is None or isinstance(choice, Choice)
            site = _Site(plan, **parts, choice=choice)
            if loaded is not None and loaded["profiles"][name] is not None:
                site.profile = Profile(**loaded["profiles"][name])
            self._sites[name] = site
            self._optimizer = None
        if self._optimizer is None:
            weights = [site.weights for site in self._sites.values()]
            self._optimizer = torch.optim.AdamW(weights, lr=self.learning_rate, weight_decay=0.0)
            if loaded is not None and loaded["optimizer"] is not None:
                self._optimizer.load_state_dict(loaded["optimizer"])
        self._loaded = None

    def _learn(self) -> None:
        """Do one optimizer step on the predictors."""
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate * (self.late_rate if self._learning.sparse else 1.0)
        for site in self._sites.values():
            site.weights.grad = _mean(site.gradients)
        self._optimizer.step()
        for site in self._sites.values():
            site.weights.grad = None
            site.gradients.zero_()

    def _look(self) -> Progress | None:
        """Update profiles with the observations since the last profile, and decide; None if there are none."""
        losses = []
        for site in self._sites.values():
            observed = _mean(site.observed).cpu()
            if observed[0].all() and observed[2].all():  # the site was called, learned and was profiled
                losses.append((observed[1] / observed[0]).mean())
                site.take_profile(observed)
                site.observed.zero_()
        if not losses or any(site.profile is None for site in self._sites.values()):
            return None
        loss = float(torch.stack(losses).mean())
        if self._learning.sparse or loss < self.threshold:
            for name, site in self._sites.items():
                site.choose(partial(self._cost, site))
                assert site.choice is not None
                self._learning.choices[name] = site.choice
            self._learning.sparse = True
        return self._report(loss)

    @property
    def heads(self) -> list[Head]:
        """Every head of every site, at the last profile; empty before the first."""
        found = []
        for name, site in self._sites.items():
            if (profile := site.profile) is None:
                continue
            group = site.method.groups[0] if site.choice is None else site.choice.group
            place, shares = site.method.groups.index(group), site.shares.cpu()
            columns = {
                "critical": profile.critical,
                "needed": shares_to_keep(site.method.mass, profile.missed[place]),
                "share": shares,
                "kept": torch.where(shares < 1, profile.kept[place], 1.0),
                "overlap": profile.overlap[place],
            }
            for i, numbers in enumerate(torch.stack(list(columns.values()), -1).tolist()):
                found.append(Head(site=name, head=i, group=group, **dict(zip(columns, numbers, strict=True))))
        return found

    def _report(self, loss: float) -> Progress:
        heads = self.heads

        def mean(numbers: Iterable[float]) -> float:
            return sum(numbers) / len(heads)

        return Progress(
            step=self.steps,
            stage=self.stage,
            loss=loss,
            critical=mean(head.critical for head in heads),
            share=mean(head.share for head in heads),
            kept=mean(head.kept for head in heads),
            sparse_heads=mean(head.share < 1 for head in heads),
        )

    def _is_profiled(self, step: int) -> bool:
        early, late = self.profile_every
        return step % (early if step < self.early_steps else late) == 0

    def _cost(self, site: _Site, group: Cube) -> HeadCost:
        """The cost of a group, the same on all ranks."""
        if self.break_even is not None:
            return HeadCost(0.0, 1 / self.break_even if self.break_even else math.inf)
        measured = measured_cost(site.plan, site.method, group, site.weights.shape[-1])
        numbers = torch.tensor(measured, dtype=torch.float32, device=site.weights.device)
        return HeadCost(*_mean(numbers).tolist())


def _mean(tensor: Tensor) -> Tensor:
    """The mean over all ranks."""
    if _world_size() == 1:
        return tensor.clone()
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / _world_size()


def _saved(name: str, tensor: Tensor) -> Tensor:
    """A trained or observed tensor for `state_dict`. What ranks observed is saved as the mean over ranks."""
    return _mean(tensor) if name.rpartition(".")[2] in ("gradients", "observed") else tensor.clone()


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
