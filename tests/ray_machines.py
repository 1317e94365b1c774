"""A Ray cluster of machines that share nothing: nodes on this one, each with a Hub cache and a folder for temporary files of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
from hub_clients import LoopbackHub
from ray.cluster_utils import Cluster

_ATTEMPTS = 3


class Machines:
    """Give orders to it with RAY_ADDRESS=`address`. Close it, or use it in a `with` statement."""

    def __init__(self, hub: LoopbackHub, folder: Path, count: int = 2, token: str = "owner-token") -> None:
        self.folders = [folder / f"machine{number}" for number in range(count)]
        for place in self.folders:
            (place / "tmp").mkdir(parents=True)
        for attempt in range(_ATTEMPTS):
            self._cluster = Cluster()
            try:
                self._start(hub, token)
                break
            except Exception:  # ray gives a node 30 seconds to start, which is little on a busy machine
                self._cluster.shutdown()
                if attempt == _ATTEMPTS - 1:
                    raise
        self.address = str(self._cluster.address)

    def _start(self, hub: LoopbackHub, token: str) -> None:
        for place in self.folders:
            own = {"HF_HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
            settings = {key: value for key, value in hub.environment(place / "home", token=token).items() if key.startswith(("HF_", "NO_PROXY"))}
            node: dict[str, Any] = {"env_vars": settings | own, "num_cpus": 1, "include_dashboard": False}
            self._cluster.add_node(wait=False, **node)
        self._cluster.wait_for_nodes()

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *details: object) -> None:
        self._cluster.shutdown()

    def workers(self) -> list[psutil.Process]:
        """Processes that hold a worker."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if "RemoteWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def left_behind(self) -> list[Path]:
        """Files in the folders of workers."""
        return [path for place in self.folders for path in place.glob("tmp/lox-merge-*/worker-*/**/*") if path.is_file()]
