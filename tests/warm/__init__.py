"""Programs that need vLLM, forked from a process that has imported it: its 5,000 modules are read once, not each time.

So are those of other environments, for what imports TRL.

What runs is what `python PROGRAM` and `python -m MODULE` run, in a process of its own with arguments, environment,
folder and output of its own; only the import is shared. The tests of `laguna serve` itself and the demo start their
engines as users do.
"""

from warm.client import run_warm, start_warm
from warm.engines import WarmPrograms, WarmServe, start_engines_warm

__all__ = ["WarmPrograms", "WarmServe", "run_warm", "start_engines_warm", "start_warm"]
