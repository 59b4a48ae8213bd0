"""The container around a server: few file descriptors, process number 1, system calls that are not allowed."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable

from torchship.errors import Unavailable

_MOST = 65536
_KEPT = 64  # descriptors for artifacts, ports, logs, and a worker that is being started
_FOR_WORKER = 4  # its memory, its socket, its output, its process
_LEAST = 16


def room_for_connections(workers: int, *, most: int = 4096) -> int:
    """Raise the soft limit of this process as far as it may go; how many connections a listener may then hold beside so
    many workers. Raises Unavailable where there are not enough descriptors for the workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return most
    kept = _KEPT + _FOR_WORKER * workers
    if soft < kept + _LEAST:
        raise Unavailable(
            f"{workers} workers need {kept + _LEAST} file descriptors, this process may have {soft}",
            hint="raise the limit (ulimit -n, --ulimit nofile=), or serve fewer models",
        )
    return min(most, soft - kept)


def check_system_calls() -> None:
    """Raise Unavailable naming a system call that workers need and this system or its container does not allow."""
    calls: list[tuple[str, Callable[..., int], object]] = [
        ("memfd_create", os.memfd_create, "torchship-probe"),
        ("pidfd_open", os.pidfd_open, os.getpid()),
    ]
    for name, call, argument in calls:
        try:
            os.close(call(argument))
        except OSError as fault:
            if fault.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES):
                raise
            raise Unavailable(
                f"the system call {name} is not allowed here: {fault.strerror}",
                hint="it needs Linux 5.3, and a seccomp profile of the container that knows it",
            ) from None


def become_init() -> None:
    """In process number 1 of a container: go on in a child, and stay behind to do what that process has to do.

    Whatever loses its parent becomes its child and must be waited for, or the table of processes fills up. Signals are
    passed on, and the child's exit code becomes ours. Elsewhere nothing happens.
    """
    if os.getpid() != 1:
        return
    child = os.fork()
    if not child:
        os.setpgid(0, 0)  # Ctrl-C reaches this process by being passed on, and not a second time
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
