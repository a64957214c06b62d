"""The quality bench: densities that are matched, rows that are made once, and figures that mean what they say."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsify_compiler import OptionError, SparsifyError, cli
from sparsify_compiler.lab import benchmark, predictor, report
from sparsify_compiler.lab import configurations as compared
from sparsify_compiler.lab import model as evaluated
from sparsify_compiler.lab.benchmark import Bench
from sparsify_compiler.lab.calibration import calibration_inputs
from sparsify_compiler.lab.configurations import TRIES, Settings, configurations, find_reading, nearest_tile
from sparsify_compiler.lab.quality import ssim
from sparsify_compiler.lab.sparsity import Listen
from sparsify_compiler.training import search

pytestmark = [
    pytest.mark.filterwarnings("ignore::sparsify_compiler.errors.SparsifyWarning"),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("diffusers", "matplotlib", "skimage")), reason="needs demo"
    ),
]
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 64}
WORDS = ("--seeds", "1", "--steps", "2", "--dense-steps", "1", "--frames", "4", "--density", "0.5")
FAR_FIELDS = ("linear",)
FEW = partial(predictor.learn_predictor, steps=2, profile_every=1)


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """In place of the model whose weights are shipped; and less of all that takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluated, "build", partial(evaluated.build, evaluated.CONFIG | SMALL))
        patch.setattr(predictor, "learn_predictor", FEW)
        patch.setattr(compared, "FAR_FIELDS", FAR_FIELDS)
        patch.setattr(benchmark, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def weights(small_model, tmp_path_factory) -> Path:
    """Random weights, with which the model's output is not zero."""
    model = evaluated.build()
    torch.nn.init.normal_(model.proj_out.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    evaluated.save(model, path, step=7)
    return path


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory) -> Path:
    """The folder of a bench from the command line."""
    out = tmp_path_factory.mktemp("quality")
    result = quality(out, weights)
    assert result.exit_code == 0, result.exception
    assert "floor: another kernel" in result.stdout
    assert "PSNR 30 dB: " in result.stdout
    return out


def quality(out: Path, weights: Path, *others: str):
    words = ["bench", "quality", "--out", str(out), "--weights", str(weights), *WORDS, *others]
    return CliRunner().invoke(cli.app, words)


def rows_of(folder: Path):
    return {row["name"]: row for row in json.loads((folder / "quality.json").read_text())["rows"]}


def test_every_configuration_has_a_row_and_pictures(folder):
    rows = rows_of(folder)
    assert list(rows)[:2] == ["floor: another kernel", "floor: bfloat16"]
    far = [f"{method} {far}" for method in ("tile", "svg2", "cubes", "keys", "dsv") for far in FAR_FIELDS]
    assert [row["line"] for row in rows.values()][2:] == far
    assert all(row["seconds"] > 0 and row["dense_seconds"] > 0 for row in rows.values())
    for name in ("videos.png", "pareto.png"):
        assert (folder / name).stat().st_size > 1000


def test_densities_are_matched(folder):
    """Where it was looked for; the videos of a row are others, and how much is worth reading depends on them."""
    rows, record = rows_of(folder), json.loads((folder / "quality.json").read_text())
    for name in ("svg2", "cubes"):
        tried = {
            10.0 ** (1 - 7 * much): density for much, density in record["calibrated"][f"{name} by min_gain"]
        }
        row = rows[f"{name} 0.5 linear"]
        assert tried[row["options"]["min_gain"]] == pytest.approx(0.5, rel=0.15)
        assert row["density"] == pytest.approx(0.5, rel=0.5)
    for far_field in FAR_FIELDS:
        for name in ("keys", "dsv"):
            assert rows[f"{name} 0.5 {far_field}"]["density"] == pytest.approx(0.5, abs=1 / 384)
    # 1 of 4 frames for all: 4 + 2 * 3 pairs of 16; 2 of 4: 4 + 2 * 5.
    assert rows["tile 1:3 linear"]["density"] == pytest.approx(10 / 16)


def test_floors_differ_by_rounding_alone_and_sparsity_by_more(folder):
    rows = rows_of(folder)
    kernel, rounded = rows["floor: another kernel"], rows["floor: bfloat16"]
    assert kernel["psnr"] > 80
    assert kernel["density"] == 1
    assert kernel["recall"] == pytest.approx(1, abs=1e-4)
    assert 30 < rounded["psnr"] < kernel["psnr"]
    for row in list(rows.values())[2:]:
        assert row["psnr"] < kernel["psnr"]
        assert 0 < row["recall"] < 1


def test_attention_of_frames_is_a_distribution(weights, tmp_path):
    bench = Bench(evaluated.load(weights), tmp_path, Settings(frames=3))
    assert bench.frame_mass.shape == (2, 3, 3)
    torch.testing.assert_close(bench.frame_mass.sum(-1), torch.ones(2, 3))


def test_a_finished_row_is_not_computed_again(folder, weights, monkeypatch):
    before = rows_of(folder)
    path = folder / "quality.json"
    record = json.loads(path.read_text())
    gone = record["rows"].pop(3)["name"]
    path.write_text(json.dumps(record))
    made = []

    def row(self, one):
        made.append(one.name)
        return before[one.name]

    monkeypatch.setattr(Bench, "row", row)
    assert quality(folder, weights).exit_code == 0
    assert made == [gone]
    assert rows_of(folder) == before


def test_a_video_that_was_removed_is_made_again(folder, weights, monkeypatch):
    before = rows_of(folder)
    (video,) = folder.glob("run-*/floor_-bfloat16.pt")
    whole = video.read_bytes()
    video.write_bytes(whole[:100])
    error = quality(folder, weights).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert "remove it, and the run makes it again" in str(error)
    video.unlink()

    def row(self, one):
        video.write_bytes(whole)
        return before[one.name]

    monkeypatch.setattr(Bench, "row", row)
    assert quality(folder, weights).exit_code == 0
    assert video.exists()
    assert rows_of(folder) == before


@pytest.mark.parametrize(
    ("others", "says"),
    [(("--steps", "3"), "steps 2 there and 3 now"), (("--seeds", "2"), "seeds 1 there and 2")],
)
def test_a_run_of_other_settings_is_refused(folder, weights, others, says):
    error = quality(folder, weights, *others).exception
    assert isinstance(error, OptionError), repr(error)
    assert says in str(error)


def test_a_run_of_other_weights_is_refused(folder, weights, tmp_path):
    model = evaluated.load(weights)
    torch.nn.init.zeros_(model.proj_out.bias)
    model.proj_out.bias.data += 1
    evaluated.save(model, tmp_path / "other.safetensors", step=7)
    error = quality(folder, tmp_path / "other.safetensors").exception
    assert isinstance(error, OptionError), repr(error)
    assert "weights" in str(error)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (("--density", "0"), "density must be a share in (0, 1], got 0.0"),
        (("--density", "1.5"), "density must be a share in (0, 1], got 1.5"),
        (("--method", "svg3"), "Did you mean 'svg2'"),
        (("--method", "dense"), "unknown method 'dense'"),
        (("--seeds", "0"), "seeds must be an integer of at least 1, got 0"),
        (("--dense-steps", "2"), "dense_steps must be less than the 2 steps, got 2"),
        (("--policy", "nowhere.json"), "there is no file 'nowhere.json'"),
        (("--predictor", "nowhere"), "there is no file 'nowhere'"),
        (("--weights", "nowhere"), "no weights at nowhere"),
        (("--frames", "1"), "frames must be an integer from 2 to 64, got 1"),
        (("--frames", "65"), "frames must be an integer from 2 to 64, got 65"),
        (("--policy", __file__), "must hold JSON"),
    ],
)
def test_mistakes_are_told(weights, tmp_path, others, says):
    error = quality(tmp_path, weights, *others).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert says in str(error)


def test_learning_a_predictor_leaves_the_model_alone(weights, tmp_path):
    model = evaluated.load(weights)
    before = evaluated.digest(model)
    FEW(model, tmp_path / "predictor", 2)
    assert evaluated.digest(model) == before
    assert all(value.grad is None for value in model.parameters())
    assert (tmp_path / "predictor").stat().st_size > 0


heights = st.floats(0, 60, allow_nan=False)
points = st.lists(st.tuples(st.integers(1, 100), heights), min_size=1, max_size=6, unique_by=lambda p: p[0])


@given(points=points, level=heights)
def test_least_density_is_where_the_line_first_reaches_the_level(points, level):
    """Compared with the line itself, at many places."""
    found = report.least_density(points, level)
    xs, ys = np.array(sorted(points), dtype=float).T
    places = np.linspace(xs[0], xs[-1], 4001)
    line = np.interp(places, xs, ys)
    if found is None:
        assert ys.max() < level
        return
    assert np.interp(found, xs, ys) >= level - 1e-6
    assert (line[places < found - 1e-6] < level + 1e-6).all()


def test_the_best_line_is_told_and_what_is_not_reached():
    rows = [
        {"line": "a", "density": 0.1, "psnr": 20.0},
        {"line": "a", "density": 0.3, "psnr": 40.0},
        {"line": "b", "density": 0.15, "psnr": 31.0},
        {"line": None, "density": 1.0, "psnr": 90.0},
    ]
    found = report.least_densities(rows, (30.0, 35.0, 50.0))
    assert found["30"] == {"best": {"line": "b", "density": 0.15}, "lines": {"a": 0.2, "b": 0.15}}
    assert found["35"] == {"best": {"line": "a", "density": 0.25}, "lines": {"a": 0.25, "b": None}}
    assert report.least_density_lines(found)[2] == "PSNR 50 dB: not reached"


@given(target=st.floats(0.05, 1.0), power=st.floats(1.0, 4.0), floor=st.floats(0.001, 0.02))
def test_how_much_to_read_is_found_in_few_tries(target, power, floor):
    """Densities are convex: the blocks that are read first hold most of the attention."""
    tried = []

    def density(much):
        assert 0 < much <= 1
        tried.append(much)
        return floor + (1 - floor) * much**power

    known: dict[float, float] = {}
    much = find_reading(density, target, known)
    assert abs(density(much) / target - 1) < 0.1
    assert len(tried) - 1 == len(known) <= TRIES
    before = len(tried)
    find_reading(density, known[much], known)
    assert len(tried) == before, "a known density must not be measured again"


def test_methods_can_be_compared_by_themselves(tmp_path):
    settings = Settings(frames=4, densities=(0.3, 0.5), methods=("keys", "tile"))
    lines = {one.line for one in configurations(settings, tmp_path)}
    assert lines == {None, *(f"{name} {far}" for name in ("keys", "tile") for far in FAR_FIELDS)}


def test_the_nearest_tile_is_nearest():
    densities = {k: ((2 * k + 1) * 24 - k * (k + 1)) / 24**2 for k in range(1, 25)}
    for target in (0.05, 0.1, 0.2, 0.3, 0.9, 1.0):
        off = [abs(density - target) for density in densities.values()]
        assert off[nearest_tile(24, target) - 1] == pytest.approx(min(off), abs=1e-6)


def test_ssim_is_of_each_video():
    videos = torch.rand(2, 3, 2, 16, 24)
    noisy = torch.stack([videos[0], (videos[1] + 0.5 * torch.rand_like(videos[1])).clamp(0, 1)])
    exact, other = ssim(noisy, videos).tolist()
    assert exact == pytest.approx(1)
    assert 0 < other < 0.95


def test_a_policy_has_a_row(folder, weights, tmp_path):
    """A policy with one dense attention and one tile: its density counts both."""
    model = evaluated.load(weights)
    menu = [{"method": "tile", "reference_frames": 1}]
    policy = search(model, calibration_inputs(4)[:1], menu=menu, r=1.0)
    path = policy.save(tmp_path / "mixed.json")
    content = json.loads(path.read_text())
    tile = next(label for label in content["menu"] if label != "dense")
    for layer, choice in zip(content["layers"], ("dense", tile), strict=True):
        layer["choice"] = choice
    path.write_text(json.dumps(content))
    settings = Settings(seeds=1, steps=2, dense_steps=1, frames=4, densities=(), policies=(path,))
    with pytest.raises(OptionError, match=r"mixed.json must be of 5 frames, as the videos are, got 4"):
        Settings(frames=5, policies=(path,))
    (tmp_path / "other").mkdir()
    two = Settings(frames=4, policies=(path, policy.save(tmp_path / "other" / "mixed.json")))
    assert len({one.name for one in configurations(two, tmp_path)[-2:] if one.policy}) == 2
    bench = Bench(model, folder, settings)
    bench.open(7)
    row = bench.row(configurations(settings, tmp_path)[-1])
    assert row["name"] == row["line"] == "policy mixed"
    assert row["density"] == pytest.approx((1 + 10 / 16) / 2)
    masses = []

    def hear(query, key, _):
        weights = (query.double() @ key.double().mT / query.shape[-1] ** 0.5).softmax(-1)
        frame = torch.arange(4).repeat_interleave(96)
        kept = (frame[:, None] == frame) | (frame[:, None] == 0) | (frame == 0)
        masses.append((weights * kept).sum(-1).mean().item())

    with torch.no_grad(), Listen(hear):
        for call in calibration_inputs(4):
            model(**call)
    assert row["recall"] == pytest.approx((1 + sum(masses[1::2]) / 5) / 2, abs=0.005)


def test_critical_shares_are_told_written_and_drawn(weights, tmp_path):
    words = ["bench", "sparsity", "--videos", "1", "--frames", "2", "--weights", str(weights)]
    result = CliRunner().invoke(cli.app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.exception
    record = json.loads((tmp_path / "sparsity.json").read_text())
    shares, levels = torch.tensor(record["critical_share"]), torch.tensor([*record["of_levels"].values()])
    assert shares.shape == (2, 2)
    assert ((shares > 0) & (shares <= 1)).all()
    torch.testing.assert_close(levels.mean(0), shares)
    assert (tmp_path / "sparsity.png").stat().st_size > 1000
    assert f"{shares[0, 0]:.3f}" in result.stdout
