"""`sparsify run` under torchrun, on one host and on two."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sparsify_compiler.testing.videos import Video, latents, steps

OPTIONS = {
    "method": "tile",
    "reference_frames": 2,
    "dense_steps": 1,
    "dense_layers": 0,
    "inner_backend": "eager",
}
GRID = (3, 4, 5)
SCRIPT = f"""
import atexit, sys
import torch.distributed as dist
from sparsify_compiler.testing.videos import Video, latents, steps

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # in one piece, so that ranks do not mix
    sys.stdout.flush()

atexit.register(lambda: say("group", dist.is_initialized()))
model = Video(layers=2)
for output in steps(model, latents({GRID}), 2):
    say("sum", float(output.double().abs().sum()))
say("rank", dist.get_rank(), "of", dist.get_world_size())
raise ValueError("an error of " + sys.argv[1])
"""


def under_torchrun(words: Sequence[str], script: Path, *arguments: str) -> list[str]:
    """The command that runs the script on ranks that share its model."""
    given = [f"--option={name}={value}" for name, value in {**OPTIONS, "parallel": "auto"}.items()]
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *words]
    return [*torchrun, "-m", "sparsify_compiler.run", *given, str(script), *arguments]


def check_output(stdout: str) -> None:
    """Both ranks have the outputs of one process, and leave the group."""
    torch._dynamo.reset()
    model = torch.compile(Video(layers=2), backend="sparsify", options=dict(OPTIONS), dynamic=False)
    sums = [float(output.double().abs().sum()) for output in steps(model, latents(GRID), 2)]
    words = [line.split() for line in stdout.splitlines()]
    found = [float(line[1]) for line in words if line[0] == "sum"]
    assert sorted(found) == pytest.approx(sorted(sums * 2), rel=1e-5)
    assert sums[0] != pytest.approx(sums[1], rel=1e-3)
    assert sorted(" ".join(line) for line in words if line[0] != "sum") == [
        *("group False", "group False"),
        *("rank 0 of 2", "rank 1 of 2"),
    ]


HOSTS = """
set -e
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
until [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
on_the_other() { nsenter --net=/proc/$other/ns/net "$@"; }
ip link add host0 type veth peer name host1 netns $other
ip addr add 10.77.0.1/24 dev host0
on_the_other ip addr add 10.77.0.2/24 dev host1
for one in host0 lo; do ip link set $one up; done
for one in host1 lo; do on_the_other ip link set $one up; done
on_the_other env PET_LOCAL_ADDR=10.77.0.2 PET_RDZV_CONF=is_host=0 GLOO_SOCKET_IFNAME=host1 "$@" & second=$!
env PET_LOCAL_ADDR=10.77.0.1 PET_RDZV_CONF=is_host=1 GLOO_SOCKET_IFNAME=host0 "$@" || code=$?
wait $second && exit $code
"""
"""Two network namespaces that only a pair of virtual interfaces joins; a command runs in both."""


def refusal() -> str:
    """The reason why this machine cannot run two hosts; empty if it can."""
    missing = [tool for tool in ("unshare", "nsenter", "ip", "bash") if shutil.which(tool) is None]
    if missing:
        return f"two hosts need the commands {', '.join(missing)}"
    command = "unshare --map-root-user --net --pid --fork ip link add one type veth peer name two"
    tried = subprocess.run(command.split(), capture_output=True, text=True)
    return f"two hosts need network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def check(done: subprocess.CompletedProcess[str], script: Path) -> None:
    """Both ranks shared the model, and the script ended as it does alone."""
    assert done.returncode == 1, done.stderr
    check_output(done.stdout)
    assert done.stderr.count("2 ranks share 60 tokens, and the heads of 2 attention calls") >= 2
    trace = f'Traceback (most recent call last):\n  File "{script}", line 15'
    for rank in (0, 1):
        assert trace in done.stderr.replace(f"[rank{rank}]: ", "")  # PyTorch puts the rank in front
    assert done.stderr.count("ValueError: an error of words") == 2


def test_a_script_runs_on_two_hosts_and_keeps_its_error(tmp_path: Path) -> None:
    if why := refusal():
        pytest.skip(why)
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400"]
    command = under_torchrun(torchrun, tmp_path / "script.py", "words")
    apart = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    hosts = [*apart, "bash", "-c", HOSTS, "hosts", *command]
    check(subprocess.run(hosts, capture_output=True, text=True, timeout=300), tmp_path / "script.py")


@pytest.mark.nightly
def test_a_script_runs_on_one_host_and_keeps_its_error(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = under_torchrun(["--standalone", "--nproc-per-node=2"], tmp_path / "script.py", "words")
    check(subprocess.run(command, capture_output=True, text=True, timeout=300), tmp_path / "script.py")
