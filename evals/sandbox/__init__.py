"""The sandbox for model-written code: `run_trial` runs a program against a problem's tests, in processes of their own.

supervisor.py starts and kills the two processes, which fork servers fork (servers.py, forkserver.py); jail.py and
seccomp.py wall them in; worker.py runs the program; grader.py runs the tests (rewritten by instrument.py, watched by
observe.py); rpc.py, values.py, objects.py and proxies.py are the pipe between them.
"""

from laguna_serve.evals.sandbox.servers import stop_servers
from laguna_serve.evals.sandbox.supervisor import JailError, Limits, Trial, find_obstacle, run_trial

__all__ = ["JailError", "Limits", "Trial", "find_obstacle", "run_trial", "stop_servers"]
