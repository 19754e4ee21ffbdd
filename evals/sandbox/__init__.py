"""The sandbox for model-written code: `run_trial` runs a program against a problem's tests, in processes of their own.

supervisor.py starts the two processes and listens to them; child.py is one of them, which a fork server forks
(servers.py, forkserver.py) or bubblewrap encloses (bubblewrap.py, enclosed.py), and roles.py says what each is told.
choice.py says how they are walled in, library.py what a program may read, scratch.py where it may write; trial.py has
what all speak of, limits and outcome. Three rooms: `walls`, what a
process puts up around itself; `inside`, the program in the one process and its tests in the other; `messages`, the pipe
between these two.
docs/threat-model.md: who is kept out of what.
"""

from laguna_serve.evals.sandbox.choice import NO_WALLS_WARNING, WANTED, Wanted, choose_walls
from laguna_serve.evals.sandbox.servers import stop_servers
from laguna_serve.evals.sandbox.supervisor import find_obstacle, run_trial
from laguna_serve.evals.sandbox.trial import JailError, Limits, Trial, Walls
from laguna_serve.evals.sandbox.walls.config import RunRecord

__all__ = [
    "NO_WALLS_WARNING",
    "WANTED",
    "JailError",
    "Limits",
    "RunRecord",
    "Trial",
    "Walls",
    "Wanted",
    "choose_walls",
    "find_obstacle",
    "run_trial",
    "stop_servers",
]
