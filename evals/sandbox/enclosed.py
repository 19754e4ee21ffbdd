"""The entry of a worker that bubblewrap has started (bubblewrap.py), in the place of a fork server's fork."""

from __future__ import annotations

import os
import sys

from laguna_serve.evals.sandbox.inside.worker import play
from laguna_serve.evals.sandbox.walls import jail
from laguna_serve.evals.sandbox.walls.config import WorkerConfig


def main() -> None:
    """argv: the descriptors of its pipes, ready and wire; stdin holds the configuration."""
    ready, wire = map(int, sys.argv[1:3])
    jail.main(os.getppid(), _work, ready, wire, -1)


def _work(config: WorkerConfig, wire: int, _report: int) -> None:
    play(config, wire)
