"""Process groups of one: of the fifteen that an engine on a CPU makes, each had a thread of gloo's; they share one.

vLLM makes a group of every kind of parallelism whether or not there is any. Each opens a device of gloo's, whose
thread looks for messages a hundred times a second, of which none can come: an engine that has nothing to do takes 1.5%
of a core, and one that has is interrupted 1,500 times a second.

Checked against torch 2.13 and vLLM 0.32.0. It can go when
`tests/plugins/test_processes.py::test_stock_groups_of_one_have_a_thread_each` fails.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import Any

# As torch's own default of a group.
THREADS = 2


def share_devices() -> None:
    """Make groups of one share a device of gloo's; calling it again changes nothing."""
    from torch import distributed

    gloo: Any = distributed.ProcessGroupGloo  # of whose options its stub says nothing
    stock = gloo.__init__
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def init(self: Any, store: Any, rank: int, size: int, *given: Any, **named: Any) -> None:
        timeout = given[0] if given else named.get("timeout")
        if size != 1 or not isinstance(timeout, timedelta):  # options of the caller's own
            stock(self, store, rank, size, *given, **named)
            return
        options = gloo._Options()
        options._devices = [open_device(os.getpid())]
        options._threads = THREADS
        options._timeout = timeout
        stock(self, store, rank, size, options)

    gloo.__init__ = init


@functools.cache
def open_device(_process: int) -> Any:
    """Open the device of a process: a fork has none of its parent's threads."""
    from torch.distributed import ProcessGroupGloo

    return ProcessGroupGloo.create_default_device()
