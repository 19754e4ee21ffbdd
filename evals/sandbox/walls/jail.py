"""The child's side of the sandbox: this process walls itself in, then works or grades.

With namespaces: a user, mount, process, network, IPC and host-name namespace of its own; the file system is Python's
library and the system's shared ones, read-only, and a bounded /tmp in memory; there is no /proc; the program is not
process 1, and with that one everything else inside dies. Linux ≥ 5.12. Under bubblewrap that program has made the same.
Without namespaces: Landlock leaves the same files (landlock.py), and started by root the program becomes a user of its
own (other_user.py). In every mode: limits, no capabilities, no new privileges, a filter of system calls (seccomp.py),
and Landlock as a second wall where the kernel has it. Which is which, and what is left open: docs/threat-model.md.

The interpreter is forked (forkserver.py), not started anew: nothing in its memory is secret.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
from collections.abc import Callable
from typing import NoReturn, TypeVar

from laguna_serve.evals.sandbox.walls.config import JailConfig, WallsConfig
from laguna_serve.evals.sandbox.walls.landlock import LIST, READ, WRITE, WRITE_FILE, Ruleset
from laguna_serve.evals.sandbox.walls.other_user import (
    FIRST_ID,
    call,
    change_user,
    find_reading_capability,
    is_open_to_others,
    set_capabilities,
)
from laguna_serve.evals.sandbox.walls.seccomp import install_filter

# Exit status of a child that could not wall itself in.
NOT_WALLED = 97
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 1, 2, 4, 0x1000, 0x4000, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = -100, 0x8000, 1, 2
SYS_PIVOT_ROOT, SYS_MOUNT_SETATTR = {"x86_64": 155, "aarch64": 41}, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
MAX_FILES = 4096
# How many threads the user's other programs may start while a program runs that counts as theirs.
OTHERS_THREADS = 256
# Queued signals and timers, of which the user has a number in all.
MAX_SIGNALS = 256
OLD = "/old"
C = TypeVar("C", bound=JailConfig)


def main(parent: int, work: Callable[[C, int, int], None], ready: int, wire: int, report: int) -> NoReturn:
    """Entry of the child, a fork of `parent`: stdin holds the configuration as JSON, `work` is done inside.

    Dumpable while the walls are built: others' files in /proc/self cannot be written, as of the server that it is from.
    """
    with open(0, "rb") as file:
        config: C = json.load(file)
    os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
    try:
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            raise OSError("the fork server has ended")
        call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)
        if config["mode"] != "bubblewrap":  # whose command has done it
            _write_outside("/proc/self/oom_score_adj", "1000")  # when memory runs out, these two go first
        if config["mode"] == "namespaces":
            isolate(config, [fd for fd in (ready, wire, report) if fd >= 0])
        walls = restrict(config)
    except OSError as error:
        os.write(2, str(error).encode())
        os._exit(NOT_WALLED)
    os.write(ready, " ".join(walls).encode())
    os.close(ready)
    work(config, wire, report)
    # Not by way of atexit and threads, which the program may have left behind.
    os._exit(0)


def isolate(config: WallsConfig, fds: list[int]) -> None:
    """Go on in a process inside of new namespaces, the others keep watch. `fds` are the program's alone.

    Raises:
        OSError: the system allows no such namespaces; the message says which step failed.
    """
    _enter_user_namespace()
    _watch(os.fork(), fds)
    # From here on process 1 of the new namespace. When the watcher is killed, it goes, and with it everything inside.
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(config)
    _watch(os.fork(), fds)
    if config["as_root"]:
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)


def _enter_user_namespace() -> None:
    """Unshare, with ids mapped by a helper outside: as root a second, powerless id can be mapped for the program."""
    asked, ask = os.pipe()
    replied, reply = os.pipe()
    parent, uid, gid = os.getpid(), os.getuid(), os.getgid()
    helper = os.fork()
    if not helper:
        try:
            os.close(ask)
            if os.read(asked, 1):
                extra = f"1 {FIRST_ID} 1\n" if uid == 0 else ""
                _write_outside(f"/proc/{parent}/setgroups", "deny")
                _write_outside(f"/proc/{parent}/gid_map", f"0 {gid} 1\n{extra}")
                _write_outside(f"/proc/{parent}/uid_map", f"0 {uid} 1\n{extra}")
                os.write(reply, b"+")
        except OSError as error:
            os.write(reply, str(error).encode())
        os._exit(0)
    os.close(asked)
    os.close(reply)
    call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    os.write(ask, b"+")
    answer = os.read(replied, 500)
    os.waitpid(helper, 0)
    os.close(ask)
    os.close(replied)
    if answer != b"+":
        raise OSError(f"mapping user ids: {answer.decode()}")


def _watch(pid: int, fds: list[int]) -> None:
    """Wait for a fork's child and end as it did, kill it on SIGTERM. Returns in the child alone."""
    if not pid:
        return
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
    # Whoever is at the other end must see the program end.
    for fd in fds:
        os.close(fd)
    while True:
        ended, status = os.wait()
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def build_root(config: WallsConfig) -> None:
    """Make a file system of read-only libraries and a bounded /tmp, and leave the old one."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=1k,mode=755")
    os.mkdir("/tmp" + OLD)
    call("syscall", SYS_PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp" + OLD.encode())
    os.chdir("/")
    for path, real in config["readable"]:
        _bind(OLD + real, path)
    for path in config["hidden"]:
        _mount("tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k,mode=555")
    for device in ("/dev/null", "/dev/urandom"):
        _bind(OLD + device, device)
    os.mkdir("/tmp")
    size = f"size={config['temporary_bytes']},nr_inodes={MAX_FILES},mode=1777"
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    call("umount2", OLD.encode(), MNT_DETACH)
    os.rmdir(OLD)
    _set_read_only("/", 0)
    os.chdir("/tmp")


def _bind(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, None, MS_BIND | MS_REC)
    _set_read_only(target, AT_RECURSIVE)


def _set_read_only(path: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, size)


def restrict(config: JailConfig) -> list[str]:
    """Limits, Landlock, no capabilities, the filter; the environment is emptied. Returns which walls are up.

    Raises:
        OSError: one of them cannot be had.
    """
    mode, kept = config["mode"], 0
    walls: list[str] = [mode] if mode in ("namespaces", "bubblewrap") else []
    os.chdir(config["directory"])
    ruleset = make_ruleset(config) if config["landlock"] else None
    threads = config["threads"]
    if mode not in ("namespaces", "grader"):
        needed = [*list_readable(config), os.path.dirname(config["directory"])]
        within_reach = mode == "bubblewrap" or all(map(is_open_to_others, needed))
        # A library in root's own folder is out of another user's reach otherwise; Landlock still says what is read.
        reading = 0 if within_reach or config["user"] is None else find_reading_capability()
        if config["user"] is None:
            threads += 0 if mode == "bubblewrap" else count_threads(os.getuid()) + OTHERS_THREADS
        elif (within_reach or ruleset) and change_user(config["user"], config["directory"]):
            walls.append("own-user")
            kept = reading
            call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # changing users has cleared it
    limits = {
        resource.RLIMIT_CPU: config["cpu_s"],
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["file_bytes"],
        resource.RLIMIT_NOFILE: config["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: MAX_SIGNALS,
    }
    if mode != "grader":  # numpy's threads are its own affair
        limits[resource.RLIMIT_NPROC] = threads
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))
    if ruleset:
        ruleset.enforce()
        walls.append(f"landlock-{config['landlock']}")
    set_capabilities(kept)
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    install_filter(os.getpid(), own_files=mode not in ("landlock", "none"))
    os.environ.clear()
    os.environ.update(config["environment"])
    return [*walls, "filter"]


def make_ruleset(config: JailConfig) -> Ruleset:
    """Make the rules for the files that a program may open.

    Raises:
        OSError: there is no Landlock, or one of the paths.
    """
    ruleset = Ruleset(config["landlock"])
    if config["mode"] == "landlock":
        for path in list_readable(config):
            ruleset.allow_except(path, config["hidden"])
        for path in config["packages"]:  # an import looks for its name there
            ruleset.allow(path, LIST)
    else:
        ruleset.allow("/", READ)
    ruleset.allow("/dev/null", READ | WRITE_FILE)
    ruleset.allow("/dev/urandom", READ)
    ruleset.allow(config["directory"], WRITE)
    return ruleset


def list_readable(config: WallsConfig) -> list[str]:
    """List the real paths of what a program may read."""
    return sorted({real for _, real in config["readable"]})


def count_threads(user: int) -> int:
    """Those that the limit per user counts: the user's own, whoever started them."""
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                found += os.stat(f"/proc/{name}/task").st_nlink - 2
    return found


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, data)]
    try:
        call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3])
    except OSError as error:
        raise OSError(f"{error} ({target})") from error


def _write_outside(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
