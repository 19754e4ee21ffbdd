"""A Ray cluster of this machine alone, with a model on it, and what can be asked of its replicas."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from laguna_serve.serving.cluster.messages import NewWeights, ReplicaState, UpdateReport
from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.results import JsonObject
from laguna_serve.serving.ray_app import KEEPER, build
from laguna_serve.serving.supervision.reaper import adopt_orphans

HOST = "127.0.0.1"
# Logical: a replica of the toy takes a fraction, and so do Ray's own parts.
CPUS = 8
OBJECT_STORE_BYTES = 200_000_000
POLL_S = 0.25
ANSWER_S = 20.0
END_S = 30.0
# Ray gives its workers, and so the engines, the priority of what may wait (nice 15): beside busy processes of the usual
# one they get a fiftieth of a core, and nothing starts in time.
NICENESS = {"RAY_worker_niceness": "0"}
# Ray kills a front end that is not ready within 5 s of its start, which is less than an import of it takes on a
# crowded machine; it must stay under the 60 s for which Ray itself waits for the first one.
PROXY_LIMITS = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "55", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "55"}
T = TypeVar("T")


class ClusterError(CommandError):
    """The cluster did not do in time what it was to do."""


class Application:
    """A model on the cluster. `url` is where its ingress answers."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self._replicas: DeploymentHandle = serve.get_deployment_handle(f"engine-0-{name}", "default")
        self._keeper: DeploymentHandle = serve.get_deployment_handle(KEEPER, "default")

    def list_replicas(self) -> list[ReplicaState]:
        """List the replicas that answer now."""
        try:
            found = self._replicas.broadcast("describe").results(timeout_s=ANSWER_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):  # there may be none at all
            return []
        return [state for state in found if isinstance(state, ReplicaState)]

    def update(self, new: NewWeights) -> UpdateReport:
        """Give all replicas new weights, or none."""
        report: UpdateReport = self._keeper.update.remote(self.name, new).result()
        return report

    def wait_for(self, what: str, ready: Callable[[list[ReplicaState]], bool], limit_s: float) -> list[ReplicaState]:
        """Wait until the replicas are as they should be. Raises ClusterError after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        while not ready(found := self.list_replicas()):
            if time.monotonic() > deadline:
                got = f"{len(found)} replicas"
                raise ClusterError(f"cluster: expected {what} within {limit_s:.0f} s, got {got}; see /tmp/ray")
            time.sleep(POLL_S)
        return found


@contextlib.contextmanager
def local_cluster(tables: JsonObject, port: int) -> Iterator[Application]:
    """Start a Ray of this process and an application whose HTTP is on the loopback address; end both afterwards.

    Their processes stay this one's descendants, whatever dies in between: see `count_left`.
    """
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"} | NICENESS
    adopt_orphans()
    ray.init(
        num_cpus=CPUS,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        runtime_env={"env_vars": PROXY_LIMITS | {"OMP_NUM_THREADS": "1"}},
    )
    try:
        serve.start(http_options={"host": HOST, "port": port})
        deploy(tables)
        yield Application(tables["models"][0]["name"], f"http://{HOST}:{port}")
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(tables: JsonObject) -> None:
    """Deploy a configuration, or change what is deployed to it; returns when it serves."""
    serve.run(build(tables), blocking=False)


def find_engine_core(replica: int) -> psutil.Process:
    """Find the process of a replica's engine that computes. Raises ClusterError: it has none."""
    for process in psutil.Process(replica).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "EngineCore" in " ".join(process.cmdline()):
                return process
    raise ClusterError(f"replica {replica}: expected an engine core among its processes, got none")


def count_left(before: set[psutil.Process]) -> int:
    """Count the descendants that still run and are not of `before`; waits for the last of them."""
    deadline = time.monotonic() + END_S
    while (left := list_descendants() - before) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return len(left)


def list_descendants() -> set[psutil.Process]:
    """List this process's descendants that run: those that have ended, but were never waited for, do not."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found
