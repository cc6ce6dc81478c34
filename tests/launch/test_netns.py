"""The main job on two nodes: two network namespaces, each with a rank, joined by a virtual cable."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.runs import TINY, TORCHRUN, losses, started

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("ip") is None, reason="no ip command (iproute2)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

INTERFACE = "cable"


@dataclass(frozen=True)
class Node:
    """A network namespace that stands for a machine."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """`command`, to be run on this node."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def sent_bytes(self) -> int:
        """What has gone out through the cable."""
        counter = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
        return int(run_tool(*self.command("cat", counter)))


def run_tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two nodes that reach each other through one interface only."""
    made = [Node(f"dist-asgd-{os.getpid()}-{index}", f"10.213.7.{index + 1}") for index in range(2)]
    with ExitStack() as cleanup:
        for node in made:
            try:
                run_tool("ip", "netns", "add", node.namespace)
            except subprocess.CalledProcessError as failure:
                pytest.skip(f"no network namespaces here: {failure.stderr.strip()}")
            # The cable goes with its namespaces.
            cleanup.callback(run_tool, "ip", "netns", "delete", node.namespace)
        first, second = (node.namespace for node in made)
        link = ("link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        run_tool("ip", "-n", first, *link)
        for node in made:
            run_tool("ip", "-n", node.namespace, "address", "add", f"{node.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                run_tool("ip", "-n", node.namespace, "link", "set", interface, "up")
        yield made


def test_two_nodes_train_as_one(
    nodes: list[Node],
    train: Callable[..., subprocess.CompletedProcess[str]],
    text: Path,
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    shared = tmp_path / "checkpoints"
    options = ("--stage", "2", "--steps", "6")
    outs = [tmp_path / "node-0", tmp_path / "node-1"]
    with ExitStack() as running:
        processes = []
        for rank, (node, out) in enumerate(zip(nodes, outs, strict=True)):
            launch = (str(TORCHRUN), "--nproc", "1", "--nnodes", "2", "--node-rank", str(rank))
            network = ("--endpoint", f"{nodes[0].address}:29571", "--iface", INTERFACE)
            job = ("--", *TINY, "--data", str(text), *options, "--out", str(out), "--checkpoint", str(shared))
            command = node.command(*launch, *network, *job)
            # Processes of one machine share memory, whatever network they have.
            apart = {**environment, "DIST_ASGD_SHARED_MEMORY": "0"}
            processes.append(running.enter_context(started(command, apart)))
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    # A step sends at least half of the gradients out of each node and half of the parameters.
    parameter_bytes = sum(file.stat().st_size for file in shared.glob("latest/*.distcp")) // 2
    assert min(node.sent_bytes() for node in nodes) > 6 * parameter_bytes // 2
    assert not outs[1].exists()  # rank 0 alone writes there

    run = train(*options, "--out", str(tmp_path / "one-node"))
    assert run.returncode == 0, run.stdout
    assert losses(outs[0]) == losses(tmp_path / "one-node")
