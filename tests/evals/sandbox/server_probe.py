"""Run as a script: may a program without walls read or write the fork servers through /proc? Prints what it finds.

Without capabilities, as an ordinary user's processes are: the kernel keeps a process with them from one without.
"""

from __future__ import annotations

import ctypes
import os
import sys

import psutil

from laguna_serve.evals.codegen.grading import grade
from laguna_serve.evals.problems import Problem
from laguna_serve.evals.sandbox import Limits

PR_CAPBSET_DROP, CAPABILITIES = 24, 64
ASK = Problem("x", "", "f", "def check(candidate):\n    raise RuntimeError(repr(candidate()))\n", None)
LIMITS = Limits(cpu_s=4, wall_s=30, walls="none")
PROGRAM = """
def f():
    said = set()
    for pid in {}:
        for name in ("mem", "environ", "maps"):
            for mode in ("rb", "r+b"):
                try:
                    open(f"/proc/{{pid}}/{{name}}", mode).close()
                    said.add(name)
                except OSError as error:
                    said.add(type(error).__name__)
    return said
"""


def main() -> None:
    if "dropped" not in sys.argv:
        for capability in range(CAPABILITIES):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        os.execv(sys.executable, [sys.executable, __file__, "dropped"])
    grade(ASK, "def f():\n    pass\n", LIMITS)
    pids = [child.pid for child in psutil.Process().children()]
    assert len(pids) == 2
    print(grade(ASK, PROGRAM.format(pids), LIMITS).detail)


if __name__ == "__main__":
    main()
