"""The sandbox for model-written code: `run_trial` runs a program against a problem's tests, in processes of their own.

supervisor.py starts and kills the two processes, which fork servers fork (servers.py, forkserver.py). jail.py walls
them in, by landlock.py, other_user.py, seccomp.py and system_calls.py, or within bubblewrap.py and enclosed.py;
choice.py says how, library.py what a program may read, scratch.py where it may write. worker.py runs the program;
grader.py runs the tests (rewritten by instrument.py, watched by observe.py) and reports by report.py; rpc.py,
values.py, objects.py and proxies.py are the pipe between them; trial.py has what all speak of, limits and outcome.
docs/threat-model.md: who is kept out of what.
"""

from laguna_serve.evals.sandbox.choice import UNWALLED, WANTED, Wanted, choose_walls
from laguna_serve.evals.sandbox.servers import stop_servers
from laguna_serve.evals.sandbox.supervisor import find_obstacle, run_trial
from laguna_serve.evals.sandbox.trial import JailError, Limits, Trial, Walls

__all__ = [
    "UNWALLED",
    "WANTED",
    "JailError",
    "Limits",
    "Trial",
    "Walls",
    "Wanted",
    "choose_walls",
    "find_obstacle",
    "run_trial",
    "stop_servers",
]
