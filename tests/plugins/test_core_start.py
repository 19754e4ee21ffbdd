"""The engine core is forked from a server that has had no parallel region, and from no other."""

from __future__ import annotations

import os

import pytest
from warm import run_warm

pytestmark = pytest.mark.vllm
# As many threads as torch is asked for, on a machine of one core, too.
CODE = """
import sys, torch
from laguna_serve.plugins import core_start
from laguna_serve.plugins.register import register
core_start.TRIAL_S = 1
register()
register()
from vllm.v1.engine import utils
torch.set_num_threads(2)
if "team" in sys.argv:
    torch.ones(1 << 20).sum()
print(core_start.can_fork(), utils.get_mp_context().get_start_method())
"""


@pytest.mark.parametrize(("threads", "answer"), [("none", "True fork"), ("team", "False spawn")])
def test_core_is_forked_only_before_threads_of_openmp(threads: str, answer: str) -> None:
    """When the second one forks, too, OpenMP's teams survive it, and there is nothing to be asked."""
    environment = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    done = run_warm(CODE, threads, environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == answer
