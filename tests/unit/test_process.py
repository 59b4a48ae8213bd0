"""Children take and give plain data, keep to their limits, and never outlive their parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.unit.process_targets import ENDINGS, gone
from torchship import process

HERE = "tests.unit.process_targets"


def test_plain_data_goes_in_and_out() -> None:
    value = {"text": "ü", "list": [1, 2.5, None], "long": "x" * 300_000}
    outcome = process.run(f"{HERE}:echo", argument=value, timeout=30)
    assert (outcome.value, outcome.fault) == (value, "")
    assert outcome.peak > 0


def test_threads_and_cores_are_pinned() -> None:
    assert process.run(f"{HERE}:environment", argument="OMP_NUM_THREADS", timeout=30, threads=3).value == "3"
    core = min(os.sched_getaffinity(0))
    assert process.run(f"{HERE}:affinity", timeout=30, cpus=[core]).value == [core]


@pytest.mark.parametrize(("target", "argument", "fault"), ENDINGS)
def test_every_end_has_its_words(target: str, argument: object, fault: str) -> None:
    outcome = process.run(f"{HERE}:{target}", argument=argument, timeout=30)
    assert fault in outcome.fault
    assert outcome.value is None


def test_the_log_is_kept() -> None:
    assert "last words" in process.run(f"{HERE}:complain", argument="x", timeout=30).log


def test_a_hang_is_ended() -> None:
    outcome = process.run(f"{HERE}:sleep", argument=60, timeout=0.5)
    assert "did not finish within" in outcome.fault
    assert outcome.seconds < 20


def test_a_blow_up_is_ended() -> None:
    outcome = process.run(f"{HERE}:eat", argument=400 * 2**20, timeout=30, memory=200 * 2**20)
    assert "more than its limit of 0.20 GiB" in outcome.fault


def test_children_die_with_their_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parent = process.spawn(f"{HERE}:parent_of_a_sleeper", argument=str(pid_file))
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = int(pid_file.read_text())
    assert psutil.pid_exists(grandchild)
    time.sleep(0.5)  # let it arm its death signal
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(grandchild)


def test_no_descriptor_leaks() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        process.run(f"{HERE}:echo", argument=1, timeout=30)
    assert len(os.listdir("/proc/self/fd")) == before


def test_signals_have_names() -> None:
    assert process.describe_exit(-9) == "killed by SIGKILL"
    assert process.describe_exit(3) == "exited with code 3"
    assert process.describe_exit(-200) == "killed by signal 200"


def test_a_crash_leaves_the_python_lines_in_the_log() -> None:
    outcome = process.run(f"{HERE}:crash", timeout=30)
    assert "Segmentation fault" in outcome.log
    assert "process_targets.py" in outcome.log


def test_a_conversation_keeps_messages_apart_and_ends_with_either_side() -> None:
    child, sock = process.converse(f"{HERE}:answer_in_capitals", argument="> ")
    try:
        for message in (b"one", b"two"):
            sock.send(message)
        assert [sock.recv(100), sock.recv(100)] == [b"> ONE", b"> TWO"]
        sock.close()
        assert child.wait(30) == 0
    finally:
        process.stop(child)


def test_a_conversation_with_a_child_that_fails_reads_as_closed() -> None:
    child, sock = process.converse(f"{HERE}:no_such_function")
    try:
        assert sock.recv(100) == b""
        assert child.wait(30) == 1
    finally:
        sock.close()
        process.stop(child)


def test_waiting_for_a_processor_is_told_where_the_kernel_counts_it() -> None:
    waited = process.waited_for_processor(os.getpid())
    assert waited >= 0.0
    assert process.waited_for_processor(2**22 + 1) == 0.0  # there is no such process


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGILL, "was built for a newer processor"), (signal.SIGSEGV, "crashed"), (signal.SIGBUS, "crashed")],
)
def test_a_library_that_kills_its_importer_is_named(
    number: signal.Signals, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    for folder, name, text in (
        ("standin", "__init__.py", f"import os\nos.kill(os.getpid(), {int(number)})\n"),
        ("standin_runtime-1.27.0.dist-info", "METADATA", "Name: standin-runtime\nVersion: 1.27.0\n"),
        ("standin_runtime-1.27.0.dist-info", "top_level.txt", "standin\n"),
    ):
        (site / folder).mkdir(parents=True, exist_ok=True)
        (site / folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(site))
    outcome = process.run("standin:whatever", timeout=60.0)
    end = f"{words}, told when it was imported: install another version of standin-runtime"
    assert outcome.fault == f"killed by {number.name}: standin-runtime 1.27.0 {end}"


def test_a_call_is_blamed_for_an_unknown_instruction_only() -> None:
    log = (
        'Current thread 0x7f (most recent call first):\n  File "/x/site-packages/standin/conv.py", line 3 in forward\n'
    )
    told = process.explain_crash("killed by SIGILL", log)
    assert told.endswith(
        "standin was built for a newer processor, told when it was called: install another version of standin"
    )
    for end in ("killed by SIGSEGV", "killed by SIGBUS", "killed by SIGKILL", "exited with code 1"):
        assert process.explain_crash(end, log) == end
