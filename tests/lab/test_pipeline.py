"""Efficient-vDiT as a run: it continues exactly after a kill, repeats nothing and reports its measurements."""

import copy
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import needs_diffusers, no_warnings
from torch import Tensor, nn
from typer.testing import CliRunner

from sparsify_compiler import OptionError, SparsifyError, cli
from sparsify_compiler.lab import classifier, comparison, pipeline, resumable, students, world
from sparsify_compiler.lab import model as evaluated
from sparsify_compiler.lab.files import DamagedError
from sparsify_compiler.lab.pipeline import Report, distill
from sparsify_compiler.lab.quality import EXACT, motion, mse, psnr
from sparsify_compiler.lab.sampling import times
from sparsify_compiler.lab.students import Settings
from sparsify_compiler.lab.world import Scene
from sparsify_compiler.policy import DENSE, Policy

pytestmark = [no_warnings, needs_diffusers]
FRAMES = 4
SETTINGS = Settings(
    consistency_steps=3, distillation_steps=3, segments=2, r=math.inf, total=math.inf, frames=FRAMES
)
TINY = {
    **evaluated.CONFIG,
    "num_attention_heads": 1,
    "attention_head_dim": 16,
    "num_layers": 2,
    "ffn_dim": 32,
    "freq_dim": 32,
}
TILE = "tile reference_frames=1"
search = students.search


class Killed(Exception):
    pass


def tiny(seed: int = 0) -> nn.Module:
    model = evaluated.build(TINY, seed=seed).eval()
    weight = model.get_parameter("proj_out.weight")
    nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def first_attention_by_tiles(*args: Any, **kwargs: Any) -> Policy:
    """A search whose choices do not depend on the clock."""
    policy = search(*args, **kwargs)
    first, second = policy.layers
    return replace(policy, layers=(replace(first, choice=TILE), replace(second, choice=DENSE)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few short videos, dense models as they are, sparse ones without Inductor, a checkpoint after every step."""
    for module in (students, pipeline):
        monkeypatch.setattr(module, "dense_model", lambda model: model)
    monkeypatch.setattr(pipeline, "STEPS", 3)
    monkeypatch.setattr(pipeline, "ROUNDS", 1)
    monkeypatch.setattr(students, "INNER", "eager")
    monkeypatch.setattr(students, "BATCH", 2)
    monkeypatch.setattr(students, "MENU", [{"method": "tile", "reference_frames": 1}])
    monkeypatch.setattr(students, "search", first_attention_by_tiles)
    for name, value in {"EXACT_STEPS": 4, "VIDEOS": 2, "BATCH": 1}.items():
        monkeypatch.setattr(comparison, name, value)
    monkeypatch.setattr(resumable, "SAVE_EVERY", 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return out, distill(tiny(), out, SETTINGS)


def losses(out: Path) -> list[list[float]]:
    return [
        torch.load(out / f"{name}.pt", weights_only=True)["losses"]
        for name in ("consistency", "distillation")
    ]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this was done before")

    for name in ("search", "_own_states", "_videos"):
        monkeypatch.setattr(students, name, never)
    monkeypatch.setattr(pipeline, "generate", never)
    for name in ("generate", "_way", "_step_errors"):
        monkeypatch.setattr(comparison, name, never)


@pytest.mark.parametrize("every", [0.0, math.inf], ids=["a checkpoint a step", "no checkpoint"])
def test_a_killed_run_goes_on_with_the_same_losses_and_weights(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    out, _ = finished
    assert [len(some) for some in losses(out)] == [3, 3]
    assert len({loss for some in losses(out) for loss in some}) == 6
    monkeypatch.setattr(resumable, "SAVE_EVERY", every)
    policy = Policy.load(out / "policy.json")
    monkeypatch.setattr(students, "search", lambda *args, **kwargs: policy)
    take, taken = students._step, [0]

    def killed(*args: Any) -> None:
        taken[0] += 1
        if taken[0] == 3:
            raise Killed
        take(*args)

    for _ in range(2 if every == 0.0 else 1):  # in stage 1, and in stage 3
        taken[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(students, "_step", killed)
            with pytest.raises(Killed):
                students.students(tiny(), tmp_path, SETTINGS)
        if not (tmp_path / "policy.json").exists():
            assert (tmp_path / "consistency.pt").exists() == (every == 0.0)
    students.students(tiny(), tmp_path, SETTINGS)
    assert losses(tmp_path) == losses(out)
    for name in ("dense", "sparse"):
        theirs, _ = evaluated.read(out / f"{name}.safetensors")
        ours, _ = evaluated.read(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_is_finished_is_not_repeated(
    finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = finished
    forbid(monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert distill(tiny(), out, SETTINGS) == report
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before
    assert not list(out.rglob("*.partial"))


def test_a_policy_that_leaves_all_dense_leaves_nothing_to_bring_back(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("settings.json", "consistency.pt"):
        shutil.copy(finished[0] / name, tmp_path)
    policy = Policy.load(finished[0] / "policy.json")
    dense = replace(policy, layers=tuple(replace(layer, choice=DENSE) for layer in policy.layers))
    monkeypatch.setattr(students, "search", lambda *args, **kwargs: dense)
    report = distill(tiny(), tmp_path, SETTINGS)
    assert not (tmp_path / "distillation.pt").exists()
    assert report.density == 1
    assert report.quality[-1].mse_to_dense == pytest.approx(0, abs=1e-6)


def test_students_differ_from_the_model_and_the_model_stays(finished: tuple[Path, Report]) -> None:
    out, _ = finished
    weights = [evaluated.read(out / f"{name}.safetensors")[0] for name in ("dense", "sparse")]
    for name, value in tiny().named_parameters():
        assert all(one[name].shape == value.shape for one in weights)
    name = "blocks.0.attn1.to_q.weight"
    base = tiny().get_parameter(name).detach().bfloat16()
    assert not torch.equal(weights[0][name], base)
    assert not torch.equal(weights[1][name], weights[0][name])
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    distill(model, out, SETTINGS)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_search_sees_the_students_own_states(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls at its own times, batch 1; the first from noise, the second one step of its own further."""
    out, _ = finished
    seen: list[tuple[nn.Module, list[dict[str, Any]]]] = []

    def note(model: nn.Module, calls: list[dict[str, Any]], **kwargs: Any) -> Policy:
        seen.append((model, calls))
        raise Killed

    for name in ("settings.json", "consistency.pt"):
        shutil.copy(out / name, tmp_path)
    monkeypatch.setattr(students, "search", note)
    with pytest.raises(Killed):
        distill(tiny(), tmp_path, SETTINGS)
    ((model, calls),) = seen
    told = torch.cat([call["timestep"] for call in calls]) / 1000
    torch.testing.assert_close(told, times(50)[[0, 25]])
    assert all(len(call["hidden_states"]) == 1 for call in calls)
    start = torch.randn(3, FRAMES, 32, 48, generator=torch.Generator().manual_seed(1000))
    assert torch.equal(calls[0]["hidden_states"][0], start)
    start = torch.randn(3, FRAMES, 32, 48, generator=torch.Generator().manual_seed(1001))[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        text = calls[1]["encoder_hidden_states"]
        (velocity,) = model(start, calls[0]["timestep"], text, return_dict=False)
    expected = start + (told[1] - told[0]) * velocity.float()
    torch.testing.assert_close(calls[1]["hidden_states"], expected, atol=1e-2, rtol=1e-2)


def test_the_third_stage_sees_the_dense_students_own_states(
    finished: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of one video at each step: the first noise, each other one step of the dense student further."""
    out, _ = finished
    seen: list[tuple[nn.Module, dict[str, Tensor]]] = []

    class Noted(students.Distillation):
        def __call__(self, **inputs: Tensor) -> Any:
            assert isinstance(self.teacher, nn.Module)
            seen.append((self.teacher, inputs))
            return super().__call__(**inputs)

    for name in ("settings.json", "consistency.pt", "policy.json"):
        shutil.copy(out / name, tmp_path)
    monkeypatch.setattr(students, "Distillation", Noted)
    students.students(tiny(), tmp_path, SETTINGS)
    assert len(seen) == SETTINGS.distillation_steps
    prompts = set()
    for teacher, call in seen:
        states, told, text = (call[name] for name in ("hidden_states", "timestep", "encoder_hidden_states"))
        torch.testing.assert_close(told, 1000 * times(50)[[0, 25]])
        prompts.add(text.numpy().tobytes())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            (velocity,) = teacher(states[:1], told[:1], text[:1], return_dict=False)
        expected = states[:1] + (told[1] - told[0]) / 1000 * velocity.float()
        torch.testing.assert_close(states[1:], expected, atol=1e-2, rtol=1e-2)
    assert len(prompts) == len(seen)


def test_the_error_of_a_step_is_from_the_exact_way(finished: tuple[Path, Report]) -> None:
    out, report = finished
    way = torch.cat([torch.load(out / "videos" / f"exact-{first}.pt") for first in (0, 1)]).double()
    text = evaluated.encode([world.scene(world.HELD_OUT, number).prompt for number in range(2)])
    moments = times(50)[[0, 25, 50]].tolist()
    student = evaluated.build(TINY)
    student.load_state_dict(evaluated.read(out / "dense.safetensors")[0], strict=False)
    for model, guidance, found in ((tiny(), 3, report.quality[1]), (student.eval(), 1, report.quality[2])):
        errors = []
        for video in range(2):
            for place in range(2):
                begin, end = way[video, place], way[video, place + 1]
                inputs = begin.float()[None], torch.tensor([1000 * moments[place]])
                with torch.no_grad():
                    (told,) = model(*inputs, text[video : video + 1], return_dict=False)
                    (untold,) = model(*inputs, torch.zeros(1, 4, 64), return_dict=False)
                velocity = untold + guidance * (told - untold)
                landed = begin + (moments[place + 1] - moments[place]) * velocity[0].double()
                errors.append(float((landed - end).square().sum() / (begin - end).square().sum()))
        assert found.step_error == pytest.approx(sum(errors) / len(errors), rel=0.05)
    assert report.quality[0].step_error is None
    assert all(one.step_error is not None for one in report.quality[1:])


def test_the_report_is_of_the_videos(finished: tuple[Path, Report]) -> None:
    out, report = finished

    def videos(name: str) -> Tensor:
        kept = rf"{name}(-[0-9a-f]{{16}})*-[01]\.pt"
        files = sorted(path for path in (out / "videos").iterdir() if re.fullmatch(kept, path.name))
        assert len(files) == 2
        return torch.cat([torch.load(path) for path in files])

    assert report.density == pytest.approx((10 / 16 + 1) / 2), "tile 1:3 keeps 3 F - 2 of F^2"
    assert report.choices == {"blocks.0.attn1": TILE, "blocks.1.attn1": DENSE}
    way, dense = videos("exact"), videos("dense")
    assert way.shape == (2, 3, 3, FRAMES, 32, 48)
    exact = evaluated.to_pixels(way[:, -1])
    names = ("base", "base-few", "dense", "searched", "sparse")
    for name, found in zip(names, report.quality, strict=True):
        errors = [float((videos(name)[i] - exact[i]).double().square().mean()) for i in range(2)]
        assert found.mse == pytest.approx(sum(errors) / 2, rel=1e-3)
        assert found.psnr == pytest.approx(sum(-10 * math.log10(e) for e in errors) / 2, rel=1e-3)
        if name in ("searched", "sparse"):
            beside = float((videos(name) - dense).double().square().mean())
            assert beside > 0
            assert found.mse_to_dense == pytest.approx(beside, rel=1e-3)
        else:
            assert found.psnr_to_dense is found.mse_to_dense is None
    assert [one.calls for one in report.quality] == [6, 4, 2, 2, 2]
    assert report.exact_motion == pytest.approx(motion(exact).mean().item())
    seconds = report.seconds
    assert report.fewer_steps * report.sparsity == pytest.approx(seconds["base"] / seconds["sparse"])
    content = json.loads((out / "report.json").read_text())
    assert content["speed-up"]["sparsity"] == pytest.approx(seconds["dense"] / seconds["sparse"])
    text = (out / "report.md").read_text()
    assert f"| blocks.0.attn1 | {TILE} |" in text
    assert f"{report.density:.1%}" in text


def test_attributes_are_counted_over_all_batches() -> None:
    scenes = [world.scene(world.HELD_OUT, number) for number in range(3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = classifier.Classifier().eval()

    def real(scenes: Sequence[Scene], start: Tensor) -> Tensor:
        return world.videos(scenes)

    batches = [
        comparison._hits(lambda: judge, real, some, torch.empty(0)) for some in (scenes[:2], scenes[2:])
    ]
    hits = torch.cat(batches)
    assert len(hits) == sum(5 * len(scene.things) + 3 for scene in scenes)
    assert 0 < hits.sum() < len(hits)
    assert hits.float().mean().item() == pytest.approx(
        classifier.found(judge, world.videos(scenes), scenes)["all"]
    )


def test_other_settings_or_weights_are_told(finished: tuple[Path, Report]) -> None:
    out, _ = finished
    with pytest.raises(OptionError, match=r"segments 2 there and 5 now, frames 4 there and 6 now\. Give"):
        distill(tiny(), out, replace(SETTINGS, segments=5, frames=6))
    with pytest.raises(OptionError, match=r"weights '[0-9a-f]{16}' there"):
        distill(tiny(1), out, SETTINGS)


@pytest.mark.parametrize("damage", ["cut off", "a byte", "another stage", "text"])
def test_a_damaged_checkpoint_is_told(finished: tuple[Path, Report], tmp_path: Path, damage: str) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    path = out / "consistency.pt"
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        del content[len(content) // 2 :]
    elif damage == "a byte":
        content[len(content) // 2] ^= 1
    elif damage == "another stage":
        content = bytearray((out / "distillation.pt").read_bytes())
    else:
        content = bytearray(b"no checkpoint")
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"consistency\.pt is .*: remove it"):
        distill(tiny(), out, SETTINGS)


@pytest.mark.parametrize("name", ["settings.json", "report.json"])
def test_damaged_json_is_told(finished: tuple[Path, Report], tmp_path: Path, name: str) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / name).write_text("{")
    with pytest.raises(DamagedError, match=f"{name} is damaged"):
        distill(tiny(), out, SETTINGS)
    (out / name).write_text("[]")
    with pytest.raises(DamagedError, match="must hold a JSON object"):
        distill(tiny(), out, SETTINGS)


def test_another_policy_than_the_third_stage_began_with_is_told(
    finished: tuple[Path, Report], tmp_path: Path
) -> None:
    out = shutil.copytree(finished[0], tmp_path / "run")
    path = out / "policy.json"
    path.write_text(path.read_text().replace(f'"choice": "{TILE}"', f'"choice": "{DENSE}"'))
    with pytest.raises(DamagedError, match="json chooses otherwise"):
        distill(tiny(), out, SETTINGS)
    # The remedy of the message: nothing of the old choice is reported again.
    (out / "distillation.pt").unlink()
    report = distill(tiny(), out, SETTINGS)
    assert set(report.choices.values()) == {DENSE}
    assert report.density == 1.0
    _, _, dense, searched, sparse = report.quality
    assert searched.mse == sparse.mse == dense.mse != finished[1].quality[3].mse
    assert searched.psnr_to_dense == EXACT
    assert searched.mse_to_dense == 0
    json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert distill(tiny(), out, SETTINGS) == report


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"segments": 3}, "segments must divide the 50 solver steps"),
        ({"r": -1.0}, "r must be a number of at least 0"),
        ({"r": math.nan}, "r must be a number of at least 0"),
        ({"total": -0.1}, "total must be a number of at least 0"),
        ({"frames": 1}, "frames must be an integer from 2 to 64, got 1"),
        ({"consistency_steps": 0}, "consistency_steps must be an integer of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_told_before_anything_runs(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(SparsifyError, match=says):
        Settings(**options)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    stage = resumable.Stage(
        name="bad", steps=3, parts={"model": model}, advance=lambda step: [0.5, math.nan][step]
    )
    with pytest.raises(SparsifyError, match="got nan at step 1 of bad"):
        resumable.train(stage, tmp_path / "bad.pt")
    assert torch.load(tmp_path / "bad.pt", weights_only=True)["losses"] == [0.5]


def test_the_command_is_the_function(finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    out, report = finished
    monkeypatch.setattr(evaluated, "load", lambda path: tiny())
    words = "--consistency-steps 3 --distillation-steps 3 --segments 2 --r inf --total inf --frames 4"
    result = CliRunner().invoke(cli.app, ["distill", "--out", str(out), *words.split()])
    assert result.exit_code == 0, result.exception
    assert "Few steps and sparse attention" in result.stdout
    assert f"{report.density:.1%}" in result.stdout


def test_quality_of_known_videos() -> None:
    ramp = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(2, 3, 3, 4, 4) / 10
    assert motion(ramp).tolist() == pytest.approx([0.1] * len(ramp))
    off = ramp + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1)
    assert mse(off, ramp).tolist() == pytest.approx([1e-2, 1e-4], rel=1e-4)
    assert psnr(off, ramp).tolist() == pytest.approx([20, 40], rel=1e-4)
    assert Settings().frames == world.FRAMES
