"""What a hostile program tries: sent as text into the sandbox (escape_run.py), where WORLD says what there is outside.

Every function named attempt_KIND_… is one attempt. One that returns has succeeded; a refusal is an exception. What it
did outside is looked at from there, too.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORLD: dict[str, Any] = {}
libc = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"


def call(name: str, *args: Any) -> int:
    """A function of the C library; raises where that says -1."""
    result = int(getattr(libc, name)(*args))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def raw(x86_64: int, aarch64: int, *args: Any) -> int:
    """A system call by its number."""
    return call("syscall", ctypes.c_long(aarch64 if ARM else x86_64), *args)


def refused(*actions: Callable[[], Any]) -> None:
    """Several ways to one thing: raises when all are refused."""
    for action in actions:
        try:
            action()
        except (OSError, ValueError):
            continue
        return
    raise PermissionError("every way")


# Files.


def attempt_files_read_secret() -> None:
    Path(WORLD["secret"]).read_text()


def attempt_files_read_problems() -> None:
    Path(WORLD["problems"]).read_text()


def attempt_files_read_private() -> None:
    refused(*(lambda path=path: Path(path).read_text() for path in ("/etc/passwd", "/etc/shadow", WORLD["code"])))


def attempt_files_list() -> None:
    refused(
        *(lambda path=path: os.listdir(path) for path in (WORLD["folder"], "/proc", "/sys", "/root/.ssh", "/var")),
        lambda: os.listdir("/etc").index("passwd"),
    )


def attempt_files_write() -> None:
    os.write(os.open(WORLD["loot"], os.O_WRONLY), b"x")


def attempt_files_truncate() -> None:
    refused(
        lambda: os.truncate(WORLD["loot"], 0),
        lambda: os.open(WORLD["loot"], os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(WORLD["loot"], os.O_ACCMODE | os.O_TRUNC),
        lambda: os.open(WORLD["library"], os.O_RDONLY | os.O_TRUNC),
        lambda: os.open(WORLD["library"], os.O_ACCMODE),
        lambda: raw(437, 437, -100, WORLD["loot"].encode(), struct.pack("QQQ", os.O_TRUNC, 0, 0), 24),
    )


def attempt_files_create() -> None:
    target = os.path.join(WORLD["folder"], "new")
    refused(
        lambda: Path(target).write_text("x"),
        lambda: os.mkdir(target),
        lambda: os.mkfifo(target),
        lambda: os.mknod(target),
        lambda: os.symlink("/etc", target),
        lambda: os.open(WORLD["folder"], os.O_TMPFILE | os.O_WRONLY),
        lambda: Path("/dev/shm", WORLD["token"]).write_text("x"),
        lambda: Path(WORLD["library"]).with_name(WORLD["token"]).write_text("x"),
    )


def attempt_files_create_beside_ones_own() -> None:
    """Seen from outside: a folder of its own may be called /tmp."""
    for folder in ("/tmp", "/var/tmp", "/dev", os.path.dirname(os.getcwd()), ".."):
        try:
            Path(folder, WORLD["token"]).write_text("x")
        except OSError:
            continue
    raise PermissionError("as far as can be told from here")


def attempt_files_move() -> None:
    refused(
        lambda: os.link(WORLD["secret"], "linked"),
        lambda: os.link(WORLD["library"], "linked"),
        lambda: os.rename(WORLD["loot"], "moved"),
        lambda: os.unlink(WORLD["loot"]),
        lambda: os.rmdir(WORLD["empty"]),
        lambda: os.rename(WORLD["empty"], "moved"),
        lambda: os.rename(os.getcwd(), os.getcwd() + "-moved"),
    )


def attempt_files_by_link() -> None:
    os.symlink(WORLD["secret"], "by-link")
    Path("by-link").read_text()


def attempt_files_attributes() -> None:
    path = WORLD["loot"]
    library = WORLD["library"]
    refused(
        lambda: os.chmod(path, 0),
        lambda: os.chmod(library, 0o777),
        lambda: os.fchmod(os.open(library, os.O_RDONLY), 0o777),
        lambda: raw(452, 452, -100, path.encode(), 0, 0),
        lambda: os.utime(path, (0, 0)),
        lambda: os.utime(library),
        lambda: os.utime(os.open(library, os.O_RDONLY), (0, 0)),
        lambda: os.chown(path, os.getuid(), os.getgid()),
        lambda: os.setxattr(path, "user.x", b"x"),
        lambda: os.setxattr(library, "user.x", b"x"),
        lambda: fcntl.ioctl(os.open(library, os.O_RDONLY), 0x40086602, struct.pack("i", 0x40)),  # FS_IOC_SETFLAGS
        lambda: fcntl.fcntl(os.open(library, os.O_RDONLY), 1024, fcntl.F_RDLCK),  # F_SETLEASE
    )


def attempt_files_devices() -> None:
    refused(
        *(lambda path=path: os.open(path, os.O_RDWR) for path in ("/dev/tty", "/dev/ptmx", "/dev/mem", "/dev/kmsg")),
        lambda: os.open("/dev/fuse", os.O_RDWR),
        lambda: os.mknod("device", 0o20666, os.makedev(1, 1)),
    )


def attempt_files_watch() -> None:
    refused(
        lambda: call("inotify_init1", 0),
        lambda: call("fanotify_init", 0, 0),
        lambda: fcntl.fcntl(os.open(os.path.dirname(WORLD["library"]), os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_MODIFY),
    )


def attempt_files_by_handle() -> None:
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    call("name_to_handle_at", -100, b"/", handle, ctypes.byref(mount), 0)


def attempt_files_mount() -> None:
    refused(
        lambda: call("mount", b"tmpfs", b".", b"tmpfs", 0, None),
        lambda: call("umount2", b"/tmp", 2),
        lambda: call("chroot", b"."),
        lambda: raw(155, 41, b".", b"."),
        lambda: raw(428, 428, -100, b"/", 0),
        lambda: raw(430, 430, b"tmpfs", 0),
        lambda: call("setns", 0, 0),
        lambda: call("swapon", b"swap", 0),
    )


# Processes.


def list_pids() -> list[int]:
    """The bystander, the host, the parent and their neighbours, among which is the judge."""
    near = {WORLD["bystander"], WORLD["host"], os.getppid()}
    around = {pid + step for pid in near for step in range(-3, 12)}
    return sorted(pid for pid in near | around if pid > 0 and pid != os.getpid())


def own_by(pid: int, number: int) -> None:
    """Have the kernel send a signal to a file's owner."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for action in (
            lambda: fcntl.fcntl(ours, fcntl.F_SETOWN, pid),
            lambda: fcntl.fcntl(ours, 15, struct.pack("ii", 1, pid)),  # F_SETOWN_EX
            lambda: fcntl.ioctl(ours, 0x8901, struct.pack("i", pid)),  # FIOSETOWN
            lambda: fcntl.ioctl(ours, 0x8902, struct.pack("i", pid)),  # SIOCSPGRP
        ):
            try:
                action()
            except OSError:
                continue
            fcntl.fcntl(ours, 10, number)  # F_SETSIG
            fcntl.fcntl(ours, fcntl.F_SETFL, fcntl.fcntl(ours, fcntl.F_GETFL) | os.O_ASYNC)
            theirs.send(b"x")
            time.sleep(0.01)
            return
    raise PermissionError("every way")


def attempt_processes_signal_by_owner() -> None:
    refused(*(lambda pid=pid: own_by(pid, signal.SIGKILL) for pid in list_pids()))


def attempt_processes_signal() -> None:
    pid = WORLD["bystander"]
    info = ctypes.create_string_buffer(128)
    refused(
        *(lambda pid=pid: os.kill(pid, signal.SIGKILL) for pid in (*list_pids(), 0, -1, 1, -WORLD["group"])),
        *(lambda pid=pid: os.kill(pid, 0) for pid in (WORLD["bystander"], WORLD["host"])),
        lambda: os.killpg(WORLD["group"], signal.SIGKILL),
        lambda: raw(200, 130, pid, 9),
        lambda: raw(234, 131, pid, pid, 9),
        lambda: raw(129, 138, pid, 9, info),
        lambda: raw(297, 240, pid, pid, 9, info),
        lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL),
    )


def attempt_processes_look_into() -> None:
    pid = WORLD["bystander"]
    local = ctypes.create_string_buffer(8)
    vector = struct.pack("PN", ctypes.addressof(local), 8)
    refused(
        *(lambda pid=pid: os.open(f"/proc/{pid}/mem", os.O_RDWR) for pid in (*list_pids(), "self")),
        *(lambda pid=pid: Path(f"/proc/{pid}/environ").read_bytes() for pid in list_pids()),
        *(lambda pid=pid: Path(f"/proc/{pid}/maps").read_bytes() for pid in list_pids()),
        lambda: call("ptrace", 16, pid, 0, 0),
        lambda: call("ptrace", 0x4206, pid, 0, 0),
        lambda: call("process_vm_readv", pid, vector, 1, vector, 1, 0),
        lambda: call("process_vm_writev", pid, vector, 1, vector, 1, 0),
        lambda: raw(312, 272, pid, pid, 0, 0, 0),
        lambda: raw(440, 440, 0, vector, 1, 0, 0),
        lambda: raw(448, 448, 0, 0),
    )


def attempt_processes_take_descriptors() -> None:
    refused(
        *(lambda pid=pid: raw(438, 438, os.pidfd_open(pid), 1, 0) for pid in list_pids()),
        *(lambda pid=pid: os.listdir(f"/proc/{pid}/fd") for pid in list_pids()),
        *(
            lambda pid=pid, fd=fd: os.open(f"/proc/{pid}/fd/{fd}", os.O_WRONLY)
            for pid in list_pids()
            for fd in range(9)
        ),
    )


def attempt_processes_change() -> None:
    pid = WORLD["bystander"]
    limit = struct.pack("QQ", 1, 1)
    refused(
        lambda: call("prlimit", pid, resource.RLIMIT_NOFILE, limit, None),
        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
        lambda: os.setpriority(os.PRIO_USER, 0, 19),
        lambda: os.setpriority(os.PRIO_PGRP, WORLD["group"], 19),
        lambda: os.sched_setaffinity(pid, {0}),
        lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
        lambda: raw(251, 30, 1, pid, 3 << 13),
        lambda: raw(256, 238, pid, 8, array.array("Q", [1]).tobytes(), array.array("Q", [1]).tobytes()),
        lambda: os.setpgid(pid, pid),
        lambda: raw(274, 100, pid, ctypes.create_string_buffer(8), ctypes.create_string_buffer(8)),
        lambda: os.sched_getaffinity(pid),
        lambda: os.getpgid(pid),
        lambda: os.getsid(pid),
    )


def attempt_processes_start() -> None:
    refused(
        os.fork,
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.execv("/bin/true", ["true"]),
        lambda: raw(58, 220, 0x4111, 0, 0, 0, 0),  # CLONE_VFORK | CLONE_VM
        lambda: raw(435, 435, bytes(88), 88),
        lambda: call("unshare", 0x10000000),
        os.setsid,
    )


def attempt_processes_stay() -> None:
    """Outlive the host, leave a core, take a way back to privileges."""
    refused(
        lambda: call("prctl", 1, 0, 0, 0, 0),  # PR_SET_PDEATHSIG
        lambda: call("prctl", 4, 1, 0, 0, 0),  # PR_SET_DUMPABLE
        lambda: call("prctl", 36, 1, 0, 0, 0),  # PR_SET_CHILD_SUBREAPER
        lambda: call("prctl", 0x59616D61, -1, 0, 0, 0),  # PR_SET_PTRACER
        lambda: call("prctl", 8, 1, 0, 0, 0),  # PR_SET_KEEPCAPS
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20)),
        lambda: resource.setrlimit(resource.RLIMIT_CPU, (99, 99)),
        lambda: raw(135, 92, 0x0040000),  # personality
        lambda: os.setresuid(0, 0, 0) if os.getuid() else os.setresuid(-1, 1, -1),
        lambda: os.setgroups([0]),
    )


def attempt_processes_cgroups() -> None:
    refused(
        *(
            lambda path=path: Path(path).write_text("0")
            for path in (
                "/sys/fs/cgroup/cgroup.procs",
                "/sys/fs/cgroup/unified/cgroup.procs",
                "/sys/fs/cgroup/memory/cgroup.procs",
                "/proc/self/oom_score_adj",
                "/proc/sys/kernel/core_pattern",
            )
        )
    )


# Network and sockets.


def attempt_network_sockets() -> None:
    kinds = ((2, 1), (2, 2), (10, 1), (1, 1), (1, 2), (16, 3), (17, 3), (38, 5), (40, 1))
    refused(*(lambda kind=kind: socket.socket(*kind) for kind in kinds))


def attempt_network_connect() -> None:
    refused(
        lambda: socket.create_connection(("127.0.0.1", WORLD["port"])),
        *(
            lambda kind=kind, name=name: socket.socketpair(socket.AF_UNIX, kind)[0].connect(name)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
            for name in (WORLD["datagrams"], WORLD["stream"], "\0" + WORLD["token"])
        ),
        lambda: socket.socketpair(socket.AF_UNIX)[0].bind("\0" + WORLD["token"] + "-in"),
        lambda: socket.socketpair(socket.AF_UNIX)[0].listen(),
    )


def attempt_network_datagrams() -> None:
    def send(name: str, kind: int, way: str) -> None:
        ours, _ = socket.socketpair(socket.AF_UNIX, kind)
        if way == "sendto":
            ours.sendto(b"out", name)
        elif way == "sendmsg":
            ours.sendmsg([b"out"], [], 0, name)
        else:  # sendmmsg
            address = struct.pack("H", 1) + name.encode().ljust(108, b"\0")
            keep = ctypes.create_string_buffer(address), ctypes.create_string_buffer(b"out")
            vector = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(keep[1]), 3))
            header = (ctypes.addressof(keep[0]), 2 + len(name), ctypes.addressof(vector), 1, 0, 0, 0)
            message = struct.pack("PIxxxxPNPNixxxxIxxxx", *header, 0)
            call("sendmmsg", ours.fileno(), message, 1, 0)

    names = (WORLD["datagrams"], "\0" + WORLD["token"], "/dev/log", "/run/systemd/journal/socket")
    refused(
        *(
            lambda name=name, kind=kind, way=way: send(name, kind, way)
            for name in names
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET)
            for way in ("sendto", "sendmsg", "sendmmsg")
            if not (kind == socket.SOCK_STREAM and way == "sendmsg" and name == "")
        )
    )


def attempt_network_pass_descriptors() -> None:
    ours, _ = socket.socketpair()
    refused(
        lambda: socket.send_fds(ours, [b"x"], [0]),
        lambda: ours.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 0, 0)),  # SO_ATTACH_FILTER
        lambda: ours.send(b"x", socket.MSG_OOB),
    )


def attempt_network_fifo() -> None:
    os.write(os.open(WORLD["fifo"], os.O_WRONLY | os.O_NONBLOCK), b"out")


# Objects of the kernel.


def attempt_kernel_queues() -> None:
    refused(
        lambda: call("msgsnd", WORLD["queue"], struct.pack("l8s", 1, b"out"), 8, 0o4000),
        lambda: call("msgrcv", WORLD["queue"], ctypes.create_string_buffer(16), 8, 0, 0o4000),
        lambda: call("msgctl", WORLD["queue"], 0, None),
        lambda: call("msgget", 0, 0o1600),
        lambda: call("mq_open", WORLD["posix_queue"].encode(), os.O_RDWR),
        lambda: call("mq_open", b"/new-queue", os.O_RDWR | os.O_CREAT, 0o600, None),
        lambda: call("mq_unlink", WORLD["posix_queue"].encode()),
    )


def attempt_kernel_shared_memory() -> None:
    refused(
        lambda: call("shmget", 0, 4096, 0o1600),
        lambda: raw(30, 196, WORLD["segment"], 0, 0),
        lambda: call("shmctl", WORLD["segment"], 0, None),
        lambda: call("semget", 0, 1, 0o1600),
        lambda: call("semctl", WORLD["semaphores"], 0, 0, 0),
        lambda: call("semop", WORLD["semaphores"], struct.pack("Hhh", 0, 1, 0), 1),
        lambda: call("memfd_create", b"x", 0),
        lambda: raw(447, 447, 0),
    )


def attempt_kernel_keys() -> None:
    refused(
        lambda: raw(250, 219, 0, -3, 0),
        lambda: raw(248, 217, b"user", b"x", b"x", 1, -3),
        lambda: raw(249, 218, b"user", b"x", 0, 0),
    )


def attempt_kernel_tracing() -> None:
    refused(
        lambda: raw(321, 280, 0, bytes(128), 128),
        lambda: raw(298, 241, bytes(128), 0, -1, -1, 0),
        lambda: raw(323, 282, 1),
        lambda: raw(425, 425, 8, ctypes.create_string_buffer(120)),
        lambda: raw(317, 277, 0, 0, 0),
        lambda: raw(103, 116, 3, ctypes.create_string_buffer(64), 64),  # the kernel's log
        lambda: raw(162, 81),  # sync
        lambda: raw(206, 0, 1, ctypes.create_string_buffer(8)),  # io_setup
    )


def attempt_kernel_machine() -> None:
    refused(
        lambda: socket.sethostname("x"),
        lambda: raw(169, 142, 0xFEE1DEAD, 672274793, 0, None),  # restart keys off
        lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
        lambda: raw(175, 105, b"", 0, b""),
        lambda: raw(163, 89, None),
        lambda: raw(179, 60, 0, None, 0, None),
    )


def try_all(kinds: tuple[str, ...]) -> str:
    """The outcome of every attempt whose name begins so, as JSON: "done", or the exception's type."""
    outcomes = {}
    for name, attempt in list(globals().items()):
        if name.startswith("attempt_") and name[8:].startswith(kinds):
            try:
                attempt()
            except BaseException as error:
                outcomes[name[8:]] = type(error).__name__
            else:
                outcomes[name[8:]] = "done"
    return json.dumps(outcomes)


def count_threads() -> int:
    """Start threads, with as little memory as they take, until there are no more."""
    threading.stack_size(32768)
    stop = threading.Event()
    started = 0
    try:
        while started < 4096:
            threading.Thread(target=stop.wait, daemon=True).start()
            started += 1
    except (RuntimeError, MemoryError):
        pass
    stop.set()
    return started


def litter() -> None:
    """A tree that a simple clean-up fails on or leaves behind."""
    top = os.open(".", os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("x" * 200)
        os.chdir("x" * 200)
    os.fchdir(top)
    os.symlink(WORLD["folder"], "link-to-folder")
    os.symlink(WORLD["loot"], "link-to-file")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    os.open("unlinked", os.O_CREAT | os.O_WRONLY)
    os.unlink("unlinked")
    with open("sparse", "wb") as file:
        file.truncate(1 << 20)
    os.link("sparse", "hard")
    for number in range(200):
        os.mkdir(f"moved-{number}")
        Path(f"moved-{number}/file").touch()
    os.mkdir("closed")
    os.mkdir("closed/within")
    os.umask(0o777)
    os.mkdir("nobody")
    os.umask(0o477)
    os.mkdir("unreadable")
    os.mkdir("unreadable/within")
    os.umask(0)
    for mode, path in ((0, "closed/within"), (0, "closed")):
        try:
            os.chmod(path, mode)
        except OSError:
            continue
    os.fchmod(top, 0)
