"""vLLM's engine core on a CPU: forked from its server, which has imported everything already.

Before it makes the core, the server has imported 5,000 modules. On a GPU vLLM then forks; on a CPU it starts a second
interpreter, which imports them all again: on two cores that is half of the time until the engine answers. The reason
is OpenMP. A fork copies one thread, and of a team of OpenMP's threads only what waits for them, so that the first
parallel region of such a child never ends. A server that has had no parallel region yet has no team, and forks safely;
whether it has had one is asked of a child made for the purpose.

Checked against vLLM 0.32.0. It can go when vLLM's own CPU platform leaves VLLM_WORKER_MULTIPROC_METHOD alone.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
from typing import Any

from laguna_serve.plugins.processes.stack import give_room

logger = logging.getLogger(__name__)

# More numbers than torch adds up in one thread (32,768).
PARALLEL = 1 << 20
# A team that is not there is waited for for ever; one that is takes milliseconds. On a machine so busy that it takes
# longer, the core is started as vLLM does it.
TRIAL_S = 5


def fork_core() -> None:
    """Make engine cores fork where that is safe; calling it again changes nothing."""
    try:
        from vllm.v1.engine import utils

        stock = utils.get_mp_context
    except (ImportError, AttributeError) as error:
        logger.warning("start of the engine core: expected the modules of vLLM 0.32, got %s; it is vLLM's own", error)
        return
    if isinstance(stock, functools.partial):
        return
    utils.get_mp_context = functools.partial(_choose_context, stock)


def _choose_context(stock: Any) -> Any:
    give_room()
    return multiprocessing.get_context("fork") if can_fork() else stock()


@functools.cache
def can_fork() -> bool:
    """Say whether a child of this process gets through a parallel region; answered once per process."""
    import torch

    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(TRIAL_S)
        torch.ones(PARALLEL).sum()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0
