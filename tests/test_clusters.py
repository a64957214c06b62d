"""Plans for clusters: the count of a model against one by hand and against real messages, and the command."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from sparsify_compiler import SparsifyError, cli
from sparsify_compiler.clusters.counting import Counted, count
from sparsify_compiler.clusters.files import cluster_of, read_cluster, read_densities
from sparsify_compiler.clusters.planning import plan_parallel, with_densities
from sparsify_compiler.parallel import ops
from sparsify_compiler.plan import Ranks
from sparsify_compiler.runtime.cost import Mesh, Split, predict
from sparsify_compiler.testing.parallel import in_threads

TOKENS, HEADS, DIM, BLOCKS = 30, 3, 4, 4
CHANNELS = HEADS * DIM
DESCRIBED = {
    "hosts": 2, "gpus": 4, "memory": 1, "tflops": 1e-6, "memory_bandwidth": 1, "inside": 1, "between": 0.1,
    "latency": 1,
}  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.out = nn.Linear(CHANNELS, CHANNELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, DIM)).transpose(1, 2).chunk(3, 1)
        return x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self, blocks: int = BLOCKS, uneven: bool = False) -> None:
        super().__init__()
        self.embed = nn.Conv3d(2, CHANNELS, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.uneven = uneven

    def forward(self, video: Tensor) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        for place, block in enumerate(self.blocks):
            for _ in range(1 + (self.uneven and place > 1)):
                x = block(x)
        return x.sum(1)


def on_meta(**options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.device("meta"):
        return Blocks(**options).eval(), {"video": torch.randn(1, 2, 2, 3, 5)}


@pytest.fixture(scope="module")
def counted() -> Counted:
    return count(*on_meta())


@pytest.mark.parametrize("uneven", [False, True])
def test_the_count_of_a_model_is_that_of_all_its_blocks(uneven: bool, counted: Counted) -> None:
    """The last blocks of the uneven model run twice, so two blocks do not tell what all of them do."""
    found = count(*on_meta(uneven=True)) if uneven else counted
    calls = BLOCKS + uneven * (BLOCKS - 2)
    work = found.work
    assert work.tokens == TOKENS
    assert found.names[:2] == ("blocks.0", "blocks.1")
    assert len(found.names) == len(work.attentions) == calls
    assert uneven or found.names == tuple(f"blocks.{i}" for i in range(BLOCKS))
    embedding = 2 * TOKENS * 2 * CHANNELS
    assert work.flops == pytest.approx(Split(calls * 2 * TOKENS * CHANNELS * 4 * CHANNELS, embedding))
    assert {one.flops for one in work.attentions} == {(4.0 * TOKENS**2 * DIM,) * HEADS}
    assert work.weights == 4 * (2 * CHANNELS + CHANNELS + BLOCKS * 4 * CHANNELS**2)
    assert work.gathered == (4 * TOKENS * CHANNELS,)
    assert work.live[0].on(1.0) >= 4 * TOKENS * 4 * CHANNELS  # the input of a block, its query, key and value


def test_predicted_bytes_are_those_of_the_messages() -> None:
    """3 ranks run the model in threads; every tensor that one sends to another is counted."""
    torch.manual_seed(0)
    sent = [0.0] * 3

    def noting(messages: Any, shapes: Any, ranks: Ranks, what: str) -> Any:
        for each in messages:
            for peer, tensor in enumerate(each):
                sent[ranks.rank] += (peer != ranks.rank) * tensor.numel() * tensor.element_size()
        return exchange(messages, shapes, ranks, what)

    exchange = ops.exchange
    with patch.object(ops, "exchange", noting):
        in_threads(Blocks(2).eval(), {"video": torch.randn(1, 2, 2, 3, 5)}, {"method": "dense"}, 3)
    work = count(*on_meta(blocks=2)).work
    predicted = predict(work, Mesh(3, 1), cluster_of(DESCRIBED))
    assert predicted.sent == pytest.approx(max(sent))
    assert predicted.sent == pytest.approx(min(sent))  # 30 tokens and 3 heads are even


def test_recorded_densities_are_those_of_named_heads(counted: Counted) -> None:
    work = with_densities(counted, {"blocks.1": [0.1, 0.2, 0.3], "blocks.2": [0.5]})
    assert [one.densities for one in work.attentions] == [(1.0,) * 3, (0.1, 0.2, 0.3), (0.5,) * 3, (1.0,) * 3]
    with pytest.raises(SparsifyError, match=r"got 'blocks.9': this model has 4 of them \(blocks.0, blocks.1"):
        with_densities(counted, {"blocks.9": [0.1]})
    with pytest.raises(SparsifyError, match=r"a density for each of its 3 heads, or one for all, got 2"):
        with_densities(counted, {"blocks.1": [0.1, 0.2]})


def test_a_plan_has_the_best_mesh_of_each_form() -> None:
    plan = plan_parallel(*on_meta(), cluster_of(DESCRIBED), densities=0.5)
    assert {size: {one.mesh.form for one in found} for size, found in plan.predictions.items()} == {
        1: {"one"}, 2: {"hcp", "scp"}, 4: {"hcp", "scp", "hybrid"}, 8: {"hcp", "scp", "hybrid"},
    }  # fmt: skip
    for found in plan.predictions.values():
        assert [*found] == sorted(found, key=lambda one: one.seconds)
    text = " ".join(str(plan).split())
    assert "Ranks can share 30 tokens and the heads of 4 attention calls, which compute 0.5 of" in text
    assert "Predicted, not measured" in text
    assert "Graph 0 gathers all tokens for sum: " in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gpus": None}, "must have gpus, an integer of at least 1, got nothing"),
        ({"hosts": 0}, "must have hosts, an integer of at least 1, got 0"),
        ({"memory": None}, "must have memory, a number above 0: GB of a GPU, got nothing"),
        ({"inside": -1}, "must have inside, a number above 0: GB/s .* got -1"),
        ({"tflops": "fast"}, "must have tflops, a number above 0: .* got 'fast'"),
        ({"tflops": float("nan")}, "must have tflops, a number above 0: .* got nan"),
        ({"between": None}, "must have between, "),
        ({"latency": -1}, "must have latency, a number of at least 0: "),
        ({"gpu": 8}, "unknown key in the cluster 'gpu'.*Did you mean 'gpus'"),
    ],
)
def test_wrong_clusters_are_refused(changes: dict[str, Any], says: str) -> None:
    described = {key: value for key, value in {**DESCRIBED, **changes}.items() if value is not None}
    with pytest.raises(SparsifyError, match=says):
        cluster_of(described)


def test_files_are_read_in_both_formats(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    files = {"c.json": json.dumps(DESCRIBED), "c.yaml": "\n".join(f"{k}: {v}" for k, v in DESCRIBED.items())}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    first, second = (read_cluster(tmp_path / name) for name in files)
    assert first == second == cluster_of(DESCRIBED)
    assert (first.size, first.sparse, first.products, first.latency) == (8, 1e6, 1e6, 1e-6)
    (tmp_path / "d.json").write_text('{"a": 0.5, "b": [0, 1]}')
    assert read_densities(tmp_path / "d.json") == {"a": [0.5], "b": [0.0, 1.0]}
    wrong = {
        "list.yaml": ("[1]", "must hold names with values, got list"),
        "text.yaml": ("a: [", "must be YAML: "),
        "text.json": ("{", "cannot be read: "),
        "high.json": ('{"a": [0.5, 2]}', r"must have a share in \[0, 1\] for 'a'"),
        "none.json": ('{"a": []}', r"must have a share in \[0, 1\] for 'a'"),
    }
    for name, (text, says) in wrong.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(SparsifyError, match=says):
            read_densities(tmp_path / name)
    with pytest.raises(SparsifyError, match="cannot be read"):
        read_cluster(tmp_path / "missing.yaml")


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    path = tmp_path / "cluster.json"
    path.write_text(json.dumps(DESCRIBED))
    return str(path)


MODEL = ["plan-parallel", f"{__name__}.Blocks", "--input", "video=1x2x2x3x5"]


def test_the_command_plans_a_class_by_its_path(cluster: str) -> None:
    words = [*MODEL, "--config", '{"blocks": 3}', "--cluster", cluster, "--density", "0.25", "--ranks", "4"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.exception
    assert "the heads of 3 attention calls" in " ".join(result.stdout.split())
    assert "4x1" in result.stdout
    assert "2x2" in result.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*MODEL[:1], "nowhere.Model", *MODEL[2:]], "class 'nowhere.Model' cannot be imported: Module"),
        ([*MODEL[:1], "json.loads", *MODEL[2:]], "'json.loads' must be the path of a class of torch.nn.Mod"),
        ([*MODEL, "--config", '{"layers": 3}'], "cannot be made from the config: TypeError: "),
        ([*MODEL, "--ranks", "0"], "ranks must be from 1 to the cluster's 8 GPUs, got 0"),
        ([*MODEL, "--ranks", "9"], "ranks must be from 1 to the cluster's 8 GPUs, got 9"),
        ([*MODEL, "--density", "1.5"], "density must be a share in [0, 1], got 1.5"),
        ([*MODEL, "--density", "nan"], "density must be a share in [0, 1], got nan"),
        ([*MODEL, "--remote", "-0.1"], "remote must be a share in [0, 1], got -0.1"),
        ([*MODEL, "--density", "1", "--densities", "d.json"], "density and densities must not both be given"),
        ([*MODEL, "--densities", "d.json"], "density file d.json cannot be read"),
        (MODEL[:2], "Blocks needs video"),
    ],
)
def test_mistakes_are_one_line(words: list[str], says: str, cluster: str) -> None:
    error = CliRunner().invoke(cli.app, [*words, "--cluster", cluster]).exception
    assert isinstance(error, SparsifyError), repr(error)
    assert says in str(error)
    assert "\n" not in str(error)
