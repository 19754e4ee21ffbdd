"""The API server is vLLM's own, asks classes itself, its core is forked if that is safe, and groups of one share."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from warm import run_warm

pytestmark = pytest.mark.vllm
# As many threads as torch is asked for, on a machine of one core, too.
CODE = """
import sys, torch
from laguna_serve.plugins.processes import core
from laguna_serve.plugins.register import register
core.TRIAL_S = 1
register()
register()
from vllm.v1.engine import utils
torch.set_num_threads(2)
if "team" in sys.argv:
    torch.ones(1 << 20).sum()
print(core.can_fork(), utils.get_mp_context().get_start_method())
"""


@pytest.mark.parametrize(("threads", "answer"), [("none", "True fork"), ("team", "False spawn")])
def test_core_is_forked_only_before_threads_of_openmp(threads: str, answer: str) -> None:
    """When the second one forks, too, OpenMP's teams survive it, and there is nothing to be asked."""
    environment = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    done = run_warm(CODE, threads, environment=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == answer


DEPTHS = """
import resource
from laguna_serve.plugins.processes.stack import call_with_room

def leaf(a, b, c, d):
    return a

def count_faults(depth):
    if depth:
        return count_faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(200):
        leaf(1, 2, 3, 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def find_slow(call):
    return [depth for depth in range(400) if call(count_faults, depth) > 100]

print(bool(find_slow(lambda function, depth: function(depth))), find_slow(call_with_room))
"""


def test_no_call_maps_memory_with_room() -> None:
    """When the first one is False, CPython keeps its chunks: retire plugins/processes/stack.py."""
    done = run_warm(DEPTHS, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True []"


LOOPS = """
from laguna_serve.plugins.register import register
from laguna_serve.plugins.processes.stack import LOOPS, give_room
register()
from vllm.v1.engine import core, utils
utils.get_mp_context()
loops = [getattr(core, name).run_busy_loop for name in LOOPS]
give_room()
print([loop.has_room for loop in loops])
print(loops == [getattr(core, name).run_busy_loop for name in LOOPS])
"""


def test_engine_cores_run_with_room() -> None:
    done = run_warm(LOOPS, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[True, True]", "True"]


CLASSES = """
import os, sys
from laguna_serve.plugins.register import register
from vllm.model_executor.models import registry
if "ours" in sys.argv:
    register()
print(os.getpid() == registry._run_in_subprocess(os.getpid))
"""


@pytest.mark.parametrize(("kind", "here"), [("stock", "False"), ("ours", "True")])
def test_stock_asks_classes_in_another_interpreter(kind: str, here: str) -> None:
    """When the first one fails, vLLM asks in the process: retire plugins/processes/inspection.py."""
    done = run_warm(CLASSES, kind, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == here


SERVER = """
import gc, runpy, sys
from laguna_serve.plugins.processes import api_server
gc.enable()
runpy.run_module = lambda name, **named: print(
    name, sorted(named.items()), name in sys.modules, gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects())
)
api_server.run()
"""


def test_server_is_executed_after_its_imports_with_what_they_made_left_out_of_searches() -> None:
    done = run_warm(SERVER, timeout=120)
    assert done.returncode == 0, done.stderr
    arguments = [("alter_sys", True), ("run_name", "__main__")]
    assert done.stdout.splitlines()[-1] == f"vllm.entrypoints.openai.api_server {arguments} False True True"


GROUPS = """
import pathlib, sys, tempfile, time
import torch
from torch import distributed
if "shared" in sys.argv:
    from laguna_serve.plugins.processes.groups import share_devices
    share_devices()
    share_devices()
with tempfile.TemporaryDirectory() as folder:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for group in [distributed.new_group([0], backend="gloo") for _ in range(4)]:
        row, said = torch.ones(3), [{"said": 1}]
        distributed.all_reduce(row, group=group)
        distributed.broadcast_object_list(said, src=0, group=group)
        distributed.barrier(group=group)
        assert (row.tolist(), said) == ([1, 1, 1], [{"said": 1}])
    count = lambda: [file.read_text().strip() for file in tasks.glob("*/comm")].count("gloo_tcp_loop")
    tasks, deadline = pathlib.Path("/proc/self/task"), time.monotonic() + 30
    while count() < int(sys.argv[2]) and time.monotonic() < deadline:  # a thread names itself when it runs
        time.sleep(0.05)
    print(count())
    distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("kind", "threads"), [("stock", "5"), ("shared", "1")])
def test_stock_groups_of_one_have_a_thread_each(kind: str, threads: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUPS, kind, threads], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == threads
