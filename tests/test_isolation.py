"""The isolated process: what gets through, what does not, and what is said of what broke."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from opentao.isolation import restrict
from opentao.isolation.run import Broken, Limits, missing_layers, require, run_jobs

isolated = pytest.mark.skipif(bool(missing_layers()), reason=f"this machine lacks {', '.join(missing_layers())}")


def run_code(*codes: str, **limits: Any) -> list[Any]:
    jobs = [{"code": code, "calls": [{"function": "f"}]} for code in codes]
    return run_jobs("opentao.isolation.python_child", {}, jobs, Limits(**{"seconds": 2.0} | limits))


@isolated
def test_a_broken_job_costs_itself_only() -> None:
    good = "def f(): return 7"
    found = run_code(good, "import os; os._exit(3)", good, "while True: pass", good, seconds=0.5)
    seven = {"returned": [[True, 7]]}
    assert [found[i] for i in (0, 2, 4)] == [seven] * 3
    assert found[1] == Broken(kind="crashed", message="the process ended with 3 (memory limit 512 MB)")
    assert found[3] == Broken(kind="timeout", message="over 0.5 s")


@isolated
def test_too_much_output() -> None:
    (found,) = run_code("def f(): return 'x' * 5000", output_bytes=10_000)
    assert found == {"returned": [[True, "x" * 5000]]}
    (found,) = run_code("def f(): return 'x' * 500000", output_bytes=1000)
    assert isinstance(found, Broken) and found.kind == "too_much_output"


@isolated
def test_memory_is_limited() -> None:
    (found,) = run_code("def f(): return len('x' * (300 << 20))", memory_mb=256)
    assert found == {"error": "MemoryError: "}  # the limit, not the answer: said of all of it
    (found,) = run_code("def f(): return len('x' * (100 << 20))", memory_mb=256)
    assert found == {"returned": [[True, 100 << 20]]}


@isolated
def test_nothing_of_the_environment_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    (found,) = run_code("import os\ndef f(): return sorted(os.environ)")
    assert found["returned"][0][1] == ["HOME", "LANG", "OMP_NUM_THREADS", "PYTHONHASHSEED", "TMPDIR"]


@isolated
def test_what_an_answer_may_do() -> None:
    """Threads, files in its own folder, the standard library, installed packages."""
    code = """
import threading, tempfile, json, decimal, zoneinfo, numpy
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start(); thread.join()
with tempfile.TemporaryFile("w+") as file:
    file.write("x"); file.seek(0); found.append(file.read())
found.append(int(numpy.ones(3).sum()))
def f(): return found
"""
    assert run_code(code, seconds=10.0, memory_mb=2048) == [{"returned": [[True, [1, "x", 3]]]}]


@isolated
def test_its_folder_is_gone_afterwards() -> None:
    (found,) = run_code("import os\nopen('a', 'w').write('x')\ndef f(): return os.getcwd()")
    assert not Path(found["returned"][0][1]).exists()


def test_a_process_that_left_its_group_holds_nobody_up() -> None:
    """Without seccomp an answer can start one, and it holds the pipes open."""
    code = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(6); os._exit(0)\ndef f(): return 7"
    jobs = [{"code": code, "calls": [{"function": "f"}]}]
    start = time.monotonic()
    found = run_jobs("opentao.isolation.python_child", {}, jobs, Limits(seconds=2.0), isolation="process")
    assert found == [{"returned": [[True, 7]]}]
    assert time.monotonic() - start < 5


@isolated
def test_no_signal_by_way_of_a_descriptor() -> None:
    """The kernel would send one to whoever is named as the owner."""
    code = """
import array, fcntl, os, socket
reader, _ = os.pipe()
left, _ = socket.socketpair()
found = []
def tried(what, *args):
    try:
        what(*args)
        found.append("done")
    except PermissionError:
        found.append("refused")
tried(fcntl.fcntl, reader, fcntl.F_SETOWN, os.getppid())
tried(fcntl.fcntl, reader, 10, 9)  # F_SETSIG
tried(fcntl.ioctl, left, 0x8901, array.array("i", [os.getppid()]))  # FIOSETOWN
tried(fcntl.fcntl, reader, fcntl.F_GETFL)
def f(): return found
"""
    assert run_code(code) == [{"returned": [[True, ["refused", "refused", "refused", "done"]]]}]


@isolated
def test_no_process_is_left() -> None:
    (found,) = run_code("import os\ndef f(): return os.getpid()")
    pid = found["returned"][0][1]
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
    pytest.fail(f"process {pid} lives on")


@isolated
def test_seccomp_kills_calls_of_another_table() -> None:
    """x86_64 has a second table of calls, in which a filter by number alone would see other numbers."""
    code = "import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 41, 2, 1, 0)\ndef f(): return 1"
    (found,) = run_code(code)
    assert isinstance(found, Broken) and found.kind == "crashed"


def test_a_child_that_cannot_start_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"did not start: .*No module named"):
        run_jobs("opentao.isolation.no_such_child", {}, [1], Limits(), isolation="process")


def test_without_isolation_it_must_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.isolation.run.missing_layers", lambda: ("Landlock",))
    with pytest.raises(ValueError, match="lacks Landlock; `isolation: process`"):
        require("full")
    require("process")


def test_machines_without_the_layers_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert restrict.support() == [f"Linux on x86_64 or aarch64 (this is Darwin on {os.uname().machine})"]
    with pytest.raises(restrict.IsolationError):
        restrict.isolate([], [])


@pytest.mark.parametrize("column", [0, 1])
def test_the_filter_jumps_inside_itself(column: int) -> None:
    """Every jump lands on a step, every path ends in a verdict, and both machines get every denied call they have."""
    steps = restrict.program(column, 1)
    for at, (operation, yes, no, _) in enumerate(steps):
        if operation & 0x07 == 0x05:
            assert at + 1 + max(yes, no) < len(steps)
    assert steps[-1][0] == 0x06
    tested = {operand for operation, _, _, operand in steps if operation == 0x15}
    assert {numbers[column] for numbers in restrict.DENIED.values() if numbers[column] is not None} <= tested
    assert {value for _, values in restrict.DENIED_WITH.values() for value in values} <= tested
