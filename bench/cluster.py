"""A Ray cluster of two nodes on this machine, and accidents to happen to it at the right moment."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

_STORE_BYTES = 80 << 20  # images do not pass through Ray
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody
    "RAY_AUTH_MODE": "disabled",  # keeps no token in a home folder
    "RAY_worker_niceness": "0",  # beside other programs, workers with Ray's own 15 hardly move
}


class Nodes:
    """A running cluster whose second node can be lost and come back; this process is connected to it."""

    def __init__(self) -> None:
        self._before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": _STORE_BYTES, "include_dashboard": False},
        )
        self.second: Any = None
        try:
            self.add()
            ray.init(address=self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except BaseException:
            self.close()
            raise

    def add(self) -> None:
        """The second node comes, if it is not there."""
        if self.second is None:
            self.second = self.cluster.add_node(num_cpus=2, object_store_memory=_STORE_BYTES)

    def lose(self) -> None:
        """The second node dies, with all that runs on it."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    @property
    def second_process(self) -> int:
        """The process that the second node's others descend from."""
        return int(self.second.all_processes["raylet"][0].process.pid)

    def close(self) -> None:
        """End all of its processes."""
        ray.shutdown()
        self.cluster.shutdown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def descendants(pid: int) -> list[int]:
    """Processes that descend from one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return sorted(found)


def command_of(pid: int) -> str:
    """Its command line; "" where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def writers(out: Path, below: int) -> list[int]:
    """Descendants of a process that have an unfinished part of the folder ``out`` open."""
    found = []
    for pid in descendants(below):
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        if any(link.startswith(f"{out}/") and link.endswith(".tmp") for link in links):
            found.append(pid)
    return found


@contextmanager
def once(condition: Callable[[], Any], act: Callable[[Any], object]) -> Iterator[list[Any]]:
    """Beside the block, wait for ``condition`` to hold and ``act`` on its value; the list then has it."""
    left, seen = threading.Event(), []

    def watch() -> None:
        while not left.is_set():
            if value := condition():
                seen.append(value)
                act(value)
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        left.set()
        watcher.join(60)
