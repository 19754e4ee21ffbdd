"""Workers in an outer wall by bubblewrap (bwrap), a small program that many systems allow to make namespaces.

It gives the program its namespaces and its view of the file system, in the place of the jail's own code
(walls/jail.py), and one interpreter is started for each program: no fork server may stand outside of the wall.
Landlock, limits and filter are put up inside. Version 0.5 or newer. https://github.com/containers/bubblewrap
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from laguna_serve.evals.sandbox.servers import BOOT, ENVIRONMENT, ONE_THREAD
from laguna_serve.evals.sandbox.walls.config import WallsConfig

NAME = "bwrap"
# Where the sandbox's own code lies for the program; it holds no secret.
CODE = "/sandbox"
ENTRY = BOOT.replace("sandbox.forkserver", "sandbox.enclosed")
# When memory runs out, the program goes first; inside there is no /proc to say so.
FIRST_TO_GO = ["/bin/sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sh"]
NAMESPACES = ("pid", "net", "ipc", "uts")
# As root: to become the program's user, who then has none of them.
KEPT = ("CAP_CHOWN", "CAP_SETUID", "CAP_SETGID")


def is_installed() -> bool:
    """Whether there is a bwrap to run."""
    return shutil.which(NAME) is not None


class Enclosed:
    """A worker in bubblewrap, to the host what a fork server's process is."""

    def __init__(self, config: WallsConfig, scratch: str, fds: list[int]) -> None:
        """`fds`: configuration, output, ready and wire; `scratch` is the program's /tmp.

        Raises:
            OSError: bwrap cannot be run.
        """
        stdin, output, *rest = fds
        self._process = subprocess.Popen(
            [*FIRST_TO_GO, *make_command(config, scratch), *map(str, rest), CODE],
            stdin=stdin,
            stdout=output,
            stderr=output,
            env=ENVIRONMENT | ONE_THREAD,
            cwd="/",
            pass_fds=rest,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: it still runs.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error

    def send_signal(self, number: int) -> None:
        """Signal bwrap, with whose end everything inside ends."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Take its exit status, if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0)


def make_command(config: WallsConfig, scratch: str) -> list[str]:
    """bwrap with the walls of a configuration, up to the interpreter's own arguments."""
    command = [shutil.which(NAME) or NAME, "--die-with-parent", "--cap-drop", "ALL", "--unshare-cgroup-try"]
    command += [f"--unshare-{name}" for name in NAMESPACES]
    if config["as_root"]:
        command += [part for name in KEPT for part in ("--cap-add", name)]
    else:
        command.append("--unshare-user")
    python = os.path.realpath(sys.executable)  # without the project's environment: what that was made of
    bound = [*config["readable"], (python, python), (CODE, str(Path(__file__).resolve().parent))]
    # Folders on the way are bwrap's own, for its user alone.
    for parent in sorted({str(each) for path, _ in bound for each in Path(path).parents} - {"/"} | {"/dev"}):
        command += ["--perms", "0755", "--dir", parent]
    for path, real in bound:
        command += ["--ro-bind", real, path]
    for path in config["hidden"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    command += ["--bind", scratch, "/tmp", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*command, python, "-P", "-s", "-S", "-c", ENTRY]
