"""Child processes that start fresh (never forked), take and give plain data, and cannot outlive or harm their parent.

There are two shapes. One call: `run` starts `module:function(argument)` and waits for its result under limits. One
conversation: `converse` starts `module:function(argument, socket)`, and the two send each other messages for as long as
they like. Argument and result are JSON: nothing is pickled, and nothing is inherited but the file descriptors that are
named.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeAlias

import msgspec
import psutil

from torchship.hardware import THREAD_VARIABLES

_PR_SET_PDEATHSIG = 1
_LOG_TAIL = 4096
_LIBRARY = re.compile(r'File ".*?/(?:site|dist)-packages/([^/"]+)[^\n]*')  # the innermost frame comes first


class Outcome(msgspec.Struct, frozen=True):
    """How a child ended: `value` when `fault` is empty; `peak` is the largest resident size of its tree in bytes."""

    value: Any = None
    fault: str = ""
    log: str = ""
    seconds: float = 0.0
    peak: int = 0


class Child(Protocol):
    """A running child: what `subprocess.Popen` has of it. Its `pid` leads a session of its own."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


Start: TypeAlias = Callable[[int, int], Child]  # takes the descriptors of the log and of the answer


class _ChildAnswer(msgspec.Struct):
    """What a child writes before it exits."""

    value: Any = None
    fault: str = ""


def spawn(
    target: str,
    *,
    argument: object = None,
    fds: Sequence[int] = (),
    output: int | None = None,
    answer: int | None = None,
    talk: int | None = None,
    threads: int | None = None,
    cpus: Collection[int] = (),
    env: Mapping[str, str] = {},
) -> subprocess.Popen[bytes]:
    """Start `module:function(argument)` in a fresh interpreter, in a session of its own.

    It dies when the calling thread's process dies. `fds` stay open under their numbers; `output` takes stdout and
    stderr; `threads` bounds the numeric libraries; `cpus` pins the process; `answer` takes the result; `talk`
    is a socket that the function is given as well.
    """
    given = task(target, argument=argument, cpus=cpus, answer=answer, talk=talk)
    try:
        environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES if threads} | dict(env)
        environment["PYTHONPATH"] = os.pathsep.join(part or os.getcwd() for part in sys.path)
        return subprocess.Popen(
            [sys.executable, "-c", f"from torchship.process import perform; perform({given})"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(given, *fds, *(fd for fd in (answer, talk) if fd is not None)),
            start_new_session=True,
            env=environment,
        )
    finally:
        os.close(given)


def converse(
    target: str,
    *,
    argument: object = None,
    fds: Sequence[int] = (),
    output: int | None = None,
    threads: int | None = None,
    cpus: Collection[int] = (),
    env: Mapping[str, str] = {},
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `module:function(argument, socket)` as `spawn` does; the child, and this side's end of the socket.

    It keeps messages apart (SOCK_SEQPACKET), carries descriptors, and reads as closed once the other side is gone.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            talk = theirs.fileno()
            child = spawn(
                target, argument=argument, fds=fds, output=output, talk=talk, threads=threads, cpus=cpus, env=env
            )
            return child, ours
        except BaseException:
            ours.close()
            raise


def task(
    target: str,
    *,
    argument: object,
    cpus: Collection[int] = (),
    answer: int | None = None,
    talk: int | None = None,
) -> int:
    """The descriptor of a file in memory that tells a child of this process what to do."""
    given = os.memfd_create("torchship-argument")
    os.write(given, msgspec.json.encode([target, argument, os.getpid(), sorted(cpus), answer, talk]))
    os.lseek(given, 0, os.SEEK_SET)
    return given


def run(
    target: str,
    *,
    argument: object = None,
    timeout: float,
    memory: int | None = None,
    threads: int | None = None,
    cpus: Collection[int] = (),
    meanwhile: Callable[[], None] | None = None,
) -> Outcome:
    """Run `module:function(argument)` in a child for at most `timeout` seconds and `memory` bytes.

    `meanwhile` is called about twenty times a second while it runs.
    Never raises for what the child does: exceptions, signals, hangs and blow-ups are an Outcome with a fault.
    KeyboardInterrupt kills the child and goes on.
    """

    def start(log: int, answer: int) -> Child:
        return spawn(target, argument=argument, output=log, answer=answer, threads=threads, cpus=cpus)

    return watched(start, timeout=timeout, memory=memory, meanwhile=meanwhile)


def watched(
    start: Start, *, timeout: float, memory: int | None = None, meanwhile: Callable[[], None] | None = None
) -> Outcome:
    """Start a child in the way of `start`, and wait for it as `run` does."""
    answer, log = os.memfd_create("torchship-answer"), os.memfd_create("torchship-log")
    started = time.monotonic()
    fault, peak, pause = "", 0, 0.005
    try:
        child = start(log, answer)
        try:
            while not fault and child.poll() is None:
                peak = max(peak, resident(child.pid))
                if meanwhile is not None:
                    meanwhile()
                if memory and peak > memory:
                    fault = f"took {peak / 2**30:.2f} GiB, more than its limit of {memory / 2**30:.2f} GiB"
                elif time.monotonic() > started + timeout:
                    fault = f"did not finish within {timeout:.0f} s"
                else:
                    time.sleep(pause)
                    pause = min(pause * 1.5, 0.05)
        finally:
            stop(child)
        size = os.fstat(answer).st_size
        found = msgspec.json.decode(os.pread(answer, size, 0), type=_ChildAnswer) if size else _ChildAnswer()
        code = child.wait()
        words = tail(log)
        fault = fault or found.fault or ("" if code == 0 else explain_crash(describe_exit(code), words))
        return Outcome(found.value, fault, words, time.monotonic() - started, peak)
    finally:
        os.close(answer)
        os.close(log)


def resident(pid: int) -> int:
    """Resident memory of a process and its descendants in bytes; 0 when it is gone."""
    total = 0
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def held(pid: int) -> int:
    """Memory of a process and its descendants in bytes, as if no others ran: pages that they share, with each other or
    with strangers, count once. This is their PSS on a machine that is their own; 0 when they are gone.

    Source: Linux, Documentation/filesystems/proc.rst, /proc/PID/smaps.
    """
    own, shared = 0, dict[tuple[str, ...], int]()
    with suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(OSError), open(f"/proc/{process.pid}/smaps") as lines:
                place: tuple[str, ...] | None = None
                for line in lines:
                    words = line.split()
                    if not words[0].endswith(":"):  # address, rights, offset, device, inode, path
                        place = (words[2], words[3], words[4]) if words[4] != "0" else None
                    elif words[0] == "Pss:" and place is None:
                        own += int(words[1])
                    elif words[0] == "Rss:" and place is not None:
                        pages = int(words[1])
                    elif words[0] == "Anonymous:" and place is not None:  # pages of a file that were written to
                        own += int(words[1])
                        shared[place] = max(shared.get(place, 0), pages - int(words[1]))
    return (own + sum(shared.values())) * 1024


def waited_for_processor(pid: int) -> float:
    """Seconds that the main thread of a process could have run but had no processor; 0 where that is not told.

    Source: Linux, Documentation/scheduler/sched-stats, /proc/PID/schedstat.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def stop(child: Child, *, grace: float = 0.0) -> None:
    """End a child and everything in its session: SIGTERM and `grace` seconds first if asked for, then SIGKILL."""
    if grace and child.poll() is None:
        os.kill(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def describe_exit(code: int) -> str:
    """`killed by SIGSEGV` or `exited with code 3`."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def explain_crash(end: str, log: str) -> str:
    """How a child ended, as `describe_exit` says it, and the library to change, by faulthandler's lines in its log:
    whose import was under way, or whose call where its processor did not know an instruction."""
    found = _LIBRARY.search(log)
    unknown, imported = end == "killed by SIGILL", found is not None and found[0].endswith("in <module>")
    if found is None or not (unknown or (imported and end in ("killed by SIGSEGV", "killed by SIGBUS"))):
        return end
    name = found[1].removesuffix(".py")
    names = importlib.metadata.packages_distributions().get(name, [])
    what = f"{names[0]} {importlib.metadata.version(names[0])}" if names else name
    why = "was built for a newer processor" if unknown else "crashed"
    when = "imported" if imported else "called"
    return f"{end}: {what} {why}, told when it was {when}: install another version of {names[0] if names else name}"


def tail(log: int) -> str:
    """The last lines of a log file, at most 4 KiB."""
    size = os.fstat(log).st_size
    text = os.pread(log, _LOG_TAIL, max(0, size - _LOG_TAIL)).decode(errors="replace")
    return text.strip()


def resolve(target: str) -> Any:
    """The object that `module:attribute` (dots allowed) names. Raises ImportError or AttributeError."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def perform(given: int, *, parent: int = 0, answer: int | None = None) -> NoReturn:
    """The child's side: do the task in `given`, leave the result, and exit.

    A forked child is told who its parent is, and its own number of the descriptor for the answer.
    """
    with os.fdopen(given, "rb") as file:
        target, argument, teller, cpus, told, talk = msgspec.json.decode(file.read())
    parent, answer = parent or teller, told if answer is None else answer
    faulthandler.enable()  # a crash in native code leaves the Python lines in the log
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if cpus:
        os.sched_setaffinity(0, cpus)
    try:
        line = [] if talk is None else [socket.socket(fileno=talk)]
        result = _ChildAnswer(value=resolve(target)(argument, *line))
        code = 0
    except SystemExit as end:  # as Python takes it
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        answer, code = None, end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as fault:
        import traceback

        traceback.print_exc()
        words = getattr(fault, "line", None) or f"{type(fault).__name__}: {' '.join(str(fault).split())[:500]}"
        result, code = _ChildAnswer(fault=words), 1
    if answer is not None:
        os.write(answer, msgspec.json.encode(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no interpreter teardown: libraries with live threads crash there
