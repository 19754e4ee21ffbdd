"""Run a program with FSDP2 on CPUs, which Accelerate, asked for it, leaves out without a word, though torch has it.

    accelerate launch --use_fsdp --fsdp_version 2 … fsdp_on_cpu.py PROGRAM …

Checked against Accelerate 1.15.0.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

stock = AcceleratorState.__init__


def initialise(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
    stock(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = initialise
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
