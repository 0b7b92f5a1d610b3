"""Two machines, as two network namespaces of one: each has its own interface and its own loopback, and reaches the other by address only.

docs/multi_node.md has the same commands. Namespaces need root and iproute2; where they cannot be made the tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launch import REPO, one_thread, records
from tests.integration.test_processes import CURVE as TWENTY_STEPS

BIN = Path(sys.executable).parent
ADDRESSES = ("10.77.31.1", "10.77.31.2")
STEPS = 8
CURVE = [*TWENTY_STEPS, f"--slow.steps={STEPS}"]
PORT = 29500  # in namespaces of their own: nobody else's

pytestmark = pytest.mark.chaos


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces, joined by a cable."""
    if shutil.which("ip") is None:
        pytest.skip("two nodes are two network namespaces: needs `ip` of iproute2")
    names = [f"fst-{os.getpid()}-{node}" for node in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "-n",
                names[0],
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                names[1],
            )
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(
                f"two nodes are two network namespaces, which cannot be made here: {error.stderr.strip()}"
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    done = subprocess.run(
        [sys.executable, "train.py", "--run-dir", str(folder), *CURVE],
        capture_output=True, text=True, cwd=REPO, env=one_thread(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def command(launcher: str, node: int, folder: Path) -> list[str]:
    """What is typed on a node."""
    words = {
        "torchrun": f"--nnodes 2 --nproc-per-node 1 --node-rank {node} --master-addr {ADDRESSES[0]} --master-port {PORT}",
        "deepspeed": f"--hostfile {folder.parent / 'hosts'} --no_ssh --node_rank {node} --master_addr {ADDRESSES[0]} --master_port {PORT}",
    }
    return [launcher, *words[launcher].split(), "train.py", "--run-dir", str(folder), *CURVE]


def launch(
    nodes: list[str], launcher: str, folder: Path, *more: str, **env: str
) -> list[subprocess.CompletedProcess[str]]:
    (folder.parent / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command(launcher, node, folder), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO,
            env={**one_thread(), "PATH": path, "GLOO_SOCKET_IFNAME": "cable", **env},
        )
        for node, name in enumerate(nodes)
    ]  # fmt: skip
    done = []
    for process in started:
        out, err = process.communicate()
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", 1), ("deepspeed", 3)])
def test_two_nodes_give_the_curve_of_one(
    launcher: str, stage: int, nodes: list[str], one_node: Path, tmp_path: Path
) -> None:
    done = launch(nodes, launcher, tmp_path / "run", f"--policy.zero_stage={stage}")
    assert [d.returncode for d in done] == [0, 0], "".join(d.stdout + d.stderr for d in done)[-4000:]
    two, one = records(tmp_path / "run", "step"), records(one_node, "step")
    assert len(two) == len(one) == STEPS
    assert [s["reward"] for s in two] == [s["reward"] for s in one]
    for key in ("loss", "grad_norm"):
        assert [s[key] for s in two] == pytest.approx([s[key] for s in one], rel=1e-4, abs=1e-5), key
    assert sum(bool(s["loss"]) for s in one) > STEPS // 2


def test_where_a_node_is_lost_the_other_says_so_and_the_run_goes_on_with_both(
    nodes: list[str], one_node: Path, tmp_path: Path
) -> None:
    every = "--checkpoint.every=2"
    done = launch(nodes, "torchrun", tmp_path / "run", every, FST_FAULT="backward:5:1")
    assert all(d.returncode != 0 for d in done)
    [line] = re.findall(r"^fst: .*$", done[0].stderr, re.MULTILINE)
    assert re.match(r"fst: process 1 has ended \(step \d+, update\); this one stops\.", line)
    done = launch(nodes, "torchrun", tmp_path / "run", every, "--resume")
    assert [d.returncode for d in done] == [0, 0], "".join(d.stdout + d.stderr for d in done)[-4000:]
    two, one = records(tmp_path / "run", "step"), records(one_node, "step")
    assert [s["loss"] for s in two] == pytest.approx([s["loss"] for s in one], rel=1e-4, abs=1e-5)
