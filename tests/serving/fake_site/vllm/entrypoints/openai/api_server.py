"""A server that starts in milliseconds and leaves as much behind as it can.

It leaves children that ignore SIGTERM, one of them in a session of its own, one orphaned.

FAKE_VLLM picks what it does: "serve" (the default), "die" (logs as vLLM does when a worker fails, exits 1), "hang"
(never answers), "stubborn" (serves, ignores SIGTERM); several, with commas, are those of the first start, the second,
and so on, the last for all others. FAKE_VLLM_PIDS names a file that gets the process ids, one per line; that of a
start's main process begins a line in PIDS.starts.

A POST to …/completions or …/messages is answered with the number of the start and what the server was given; with
"stream" in its body by an endless stream of events. A POST to /v1/die/HOW ends the server: "segv", "kill", "exit"
(status 0), "core" (the process without which it cannot do); any other POST as if a worker had been killed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WORKER_FAILURE = """\
(APIServer pid=1) INFO 01-01 00:00:00 [api_utils.py:286] non-default args: {}
(EngineCore pid=2) INFO 01-01 00:00:00 [core.py:133] Initializing a V1 LLM engine
(Worker pid=3) ERROR 01-01 00:00:01 [multiproc_executor.py:953] WorkerProc failed to start.
(Worker pid=3) ERROR 01-01 00:00:01 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=3) ERROR 01-01 00:00:01 [multiproc_executor.py:953]   File "loader.py", line 1, in load
(Worker pid=3) ERROR 01-01 00:00:01 [multiproc_executor.py:953] RuntimeError: start (0) + length (640) exceeds 512.
(EngineCore pid=2) ERROR 01-01 00:00:02 [core.py:1510] Exception: WorkerProc initialization failed due to an exception \
in a background process. See stack trace for root cause.
(EngineCore pid=2) Process EngineCore:
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
Traceback (most recent call last):
  File "entry.py", line 1, in main
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
WORKER_DEATH = """\
(EngineCore pid=2) ERROR 01-01 00:00:03 [multiproc_executor.py:316] Worker proc VllmWorker-0 died unexpectedly \
(exit code: -9), shutting down executor.
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.
"""


CORE = ["VLLM::EngineCore", "-c", "import time; time.sleep(120)"]
core: subprocess.Popen[bytes]
start = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        print(f"POST {self.path}", flush=True)
        if not self.path.endswith(("/completions", "/messages")):
            end(self.path.rpartition("/")[2])
        elif b"stream" in body:
            self.stream()
        else:
            told = {"start": start, "argv": sys.argv, "environment": dict(os.environ), "headers": dict(self.headers)}
            answer = json.dumps(told).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        event = b'data: {"choices": [{"text": "start %d"}]}\n\n' % start
        while True:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(0.05)


def end(how: str) -> None:
    if how == "core":
        core.kill()
        core.wait()
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "segv":
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)
    elif how == "exit":
        os._exit(0)
    else:
        print(WORKER_DEATH, flush=True)
        os._exit(1)


def note(pid: int) -> None:
    if "FAKE_VLLM_PIDS" in os.environ:
        with Path(os.environ["FAKE_VLLM_PIDS"]).open("a") as file:
            file.write(f"{pid}\n")


def count_start() -> int:
    """The how-manieth start this is."""
    if "FAKE_VLLM_PIDS" not in os.environ:
        return 1
    path = Path(os.environ["FAKE_VLLM_PIDS"] + ".starts")
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())


def linger() -> None:
    """A process that only SIGKILL ends; the time limit is for a test that failed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note(os.getpid())
    time.sleep(120)
    os._exit(0)


def spawn_relatives() -> None:
    if os.fork() == 0:
        linger()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            linger()
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    args, _ = parser.parse_known_args()
    behaviours = os.environ.get("FAKE_VLLM", "serve").split(",")
    global start, core
    start = count_start()
    behaviour = behaviours[min(start, len(behaviours)) - 1]
    note(os.getpid())
    spawn_relatives()
    if behaviour == "die":
        print(WORKER_FAILURE, flush=True)
        sys.exit(1)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "hang":
        print("(Worker pid=3) INFO 01-01 00:00:00 [cpu_model_runner.py:68] Starting to load model x...", flush=True)
        time.sleep(120)
    core = subprocess.Popen(CORE, executable=sys.executable)
    note(core.pid)
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
