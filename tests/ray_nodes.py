"""A Ray cluster of several nodes on this machine: a raylet for each, with resources of its own, that can be killed.

with nodes() as cluster:                       # node A: the head, 1 CPU and {"train": 1}
    b = cluster.add(1, sample=1)
    ... `align run --address cluster.address` ...
    cluster.kill(b)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

NOTICED_S = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 1000, "failure_threshold": 3}
"""Of Ray's health check: a killed node is given up after two seconds, not after fifteen."""
STORE_BYTES = 80 << 20
GONE_S = 20.0


class Nodes:
    """Nodes of one cluster; the first is its head. Nothing here connects to Ray: that is for the runs."""

    def __init__(self, folder: str):
        self._folder = folder
        self._nodes: list[Any] = []
        self._seen: dict[int, psutil.Process] = {}
        self.address = ""

    def add(self, cpus: float, **resources: float) -> Any:
        """Start a node and wait until the cluster knows it."""
        from ray._private.node import Node
        from ray._private.parameter import RayParams
        from ray._private.services import wait_for_node
        from ray._private.utils import write_ray_address

        common = {
            "num_cpus": cpus,
            "num_gpus": 0,
            "resources": resources,
            "object_store_memory": STORE_BYTES,
            "min_worker_port": 0,
            "max_worker_port": 0,
        }
        if not self._nodes:
            checks = {f"health_check_{name}": value for name, value in NOTICED_S.items()}
            own = {"temp_dir": self._folder, "include_dashboard": False, "_system_config": checks}
        else:
            own = {"gcs_address": self.address, "include_log_monitor": False, "node_manager_port": 0}
        head = not self._nodes
        # TMPDIR: for what workers of a killed node leave; PATH: jobs call `python`
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with mock.patch.dict(os.environ, TMPDIR=self._folder, PATH=path):
            node = Node(RayParams(**common, **own), head=head, shutdown_at_exit=False, spawn_reaper=False)
        self._nodes.append(node)
        self.address = self._nodes[0].gcs_address
        if head:  # as `ray start` does: a job of this cluster must not find another one on this machine
            write_ray_address(self.address, self._folder)
        wait_for_node(node.gcs_address, node.plasma_store_socket_name, 30)
        return node

    @property
    def head(self) -> Any:
        return self._nodes[0]

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def workers(self, node: Any, name: str) -> list[psutil.Process]:
        """Actors of class `name` on a node (Ray names a process after what runs in it)."""
        found = []
        for child in self.raylet(node).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def kill(self, node: Any) -> None:
        """SIGKILL to the node's raylet, as when the machine is gone; its workers die with it."""
        self._note()
        self.raylet(node).send_signal(signal.SIGKILL)
        node.all_processes["raylet"][0].process.wait()
        self._nodes.remove(node)

    def close(self) -> None:
        self._note()
        for node in reversed(self._nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        _, left = psutil.wait_procs(list(self._seen.values()), timeout=GONE_S / 4)
        for process in left:  # a killed raylet's agents look for it for another minute
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=GONE_S)

    def _note(self) -> None:
        """Remember what runs below the nodes: orphans of a killed one must be ended by name."""
        for node in self._nodes:
            for kind in node.all_processes.values():
                for info in kind:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process = psutil.Process(info.process.pid)
                        self._seen |= {p.pid: p for p in [process, *process.children(recursive=True)]}


@contextmanager
def nodes(cpus: float = 1, **resources: float) -> Iterator[Nodes]:
    """A cluster with its head: node A."""
    folder = tempfile.mkdtemp(prefix="align-ray-")  # short: paths of sockets end at 107 bytes
    cluster = Nodes(folder)
    try:
        cluster.add(cpus, **resources)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[tuple[Nodes, Any]]:
    """Node A, which trains, and node B, which trains too, samples and scores: the cluster, and B."""
    with nodes(1, train=1, home=1) as cluster:
        yield cluster, cluster.add(1, train=1, sample=2)
