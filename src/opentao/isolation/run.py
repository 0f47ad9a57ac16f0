"""The parent's side: start a child, give it jobs, read one line a job, kill it when it is late.

A child is one of the modules beside this file, by its `main`. It writes an empty line when it is ready, then one line
of JSON a job, in order. If it dies or is late, the job at hand is `Broken` and a new child gets the rest, so one
hostile answer costs its own verdict and no other.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from opentao.isolation import restrict

Isolation = Literal["full", "process"]
HOME = Path(__file__).parent.parent.parent  # where `opentao` is imported from
START = "import sys, importlib; sys.path.insert(0, sys.argv[1]); importlib.import_module(sys.argv[2]).main(sys.argv[3])"
START_SECONDS = 30.0  # for the child to be ready: its imports, on a machine that is busy
KINDS = {"timeout", "crashed", "too_much_output"}


@dataclass(kw_only=True, slots=True, frozen=True)
class Limits:
    """What one job may use."""

    seconds: float = 5.0  # of wall-clock time
    memory_mb: int = 512  # of address space
    output_bytes: int = 1 << 20  # of its answer
    file_bytes: int = 1 << 20  # of each file that it writes


@dataclass(kw_only=True, slots=True, frozen=True)
class Broken:
    """A job without an answer: `kind` is one of KINDS. ``Broken(kind="timeout", message="over 5 s")``"""

    kind: str
    message: str


@cache
def missing_layers() -> tuple[str, ...]:
    """What this machine lacks for ``isolation: full``; empty if nothing."""
    return tuple(restrict.support())


def require(isolation: Isolation) -> None:
    """Raises ValueError if this machine cannot isolate that far."""
    if isolation == "full" and missing_layers():
        raise ValueError(
            f"isolation: this machine lacks {', '.join(missing_layers())}; `isolation: process` does with a process"
            " under resource limits, in which an answer can read files and open connections"
        )


def run_jobs(
    module: str,
    setup: dict[str, Any],
    jobs: Sequence[Any],
    limits: Limits,
    *,
    readable: Sequence[str] = (),
    isolation: Isolation = "full",
) -> list[Any]:
    """What the child `module` answers to each job (any JSON), or `Broken`. `setup` goes to every child.

    Raises:
        RuntimeError: a child could not start; its own words.
    """
    found: list[Any] = []
    while len(found) < len(jobs):
        with _child(module, setup, jobs[len(found) :], limits, readable, isolation) as child:
            found += _answers(child, len(jobs) - len(found), limits)
    return found


@contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="opentao-")
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except RecursionError:  # folders in folders, made for this; Python below 3.13 goes down by calls
            subprocess.run(["rm", "-rf", "--", folder], check=False)


@contextmanager
def _child(
    module: str,
    setup: dict[str, Any],
    jobs: Sequence[Any],
    limits: Limits,
    readable: Sequence[str],
    isolation: Isolation,
) -> Iterator[subprocess.Popen[bytes]]:
    with _folder() as folder:
        order = {
            "setup": setup,
            "jobs": list(jobs),
            "full": isolation == "full",
            "memory_bytes": limits.memory_mb << 20,
            "cpu_seconds": int(limits.seconds * len(jobs) + START_SECONDS) + 1,
            "file_bytes": limits.file_bytes,
            "readable": [*readable, *_python_folders()],
            "writable": [folder],
        }
        path = Path(folder) / "order.json"
        path.write_text(json.dumps(order))
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", START, str(HOME), module, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            for pipe in (child.stdout, child.stderr):  # not read to their end: what left the group may hold them open
                if pipe is not None:
                    pipe.close()
            child.wait()


def _python_folders() -> list[str]:
    """What an interpreter reads to run and import, the program's own folder left out."""
    paths = [sys.prefix, sys.base_prefix, *(p for p in sys.path if "site-packages" in p or "dist-packages" in p)]
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return [*paths, *system, "/dev/null", "/dev/urandom", "/dev/zero"]


def _answers(child: subprocess.Popen[bytes], num_jobs: int, limits: Limits) -> list[Any]:
    """The answers up to and including the first broken job."""
    assert child.stdout is not None
    lines = _Lines(child.stdout, limits.output_bytes)
    ready = lines.next(START_SECONDS)
    if ready != b"":
        raise RuntimeError(f"the isolated process did not start: {_last_words(child, ready)}")
    found: list[Any] = []
    while len(found) < num_jobs:
        line = lines.next(limits.seconds)
        found.append(_explained(child, line, limits) if isinstance(line, Broken) else _parsed(line))
        if isinstance(found[-1], Broken):
            break
    return found


def _parsed(line: bytes) -> Any:
    """A line comes from a process that ran someone else's code: nothing about it is certain."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return Broken(kind="crashed", message="the process wrote something that is not JSON")


def _explained(child: subprocess.Popen[bytes], broken: Broken, limits: Limits) -> Broken:
    if broken.kind != "crashed":
        return broken
    with suppress(subprocess.TimeoutExpired):
        child.wait(1.0)
    code = child.returncode
    if code is not None and code < 0 and -code in (signal.SIGXCPU, signal.SIGKILL):
        return Broken(kind="timeout", message=f"killed by {signal.Signals(-code).name}")
    return Broken(kind="crashed", message=f"the process ended with {code} (memory limit {limits.memory_mb} MB)")


def _last_words(child: subprocess.Popen[bytes], ready: bytes | Broken) -> str:
    child.kill()
    _, errors = child.communicate()
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:300] if lines else str(ready)[:300]


class _Lines:
    """Lines of a pipe, with a time limit for each and a limit of length."""

    def __init__(self, pipe: Any, most: int) -> None:
        self.pipe = pipe
        self.most = most
        self.held = bytearray()
        self.selector = selectors.DefaultSelector()
        os.set_blocking(pipe.fileno(), False)
        self.selector.register(pipe, selectors.EVENT_READ)

    def next(self, seconds: float) -> bytes | Broken:
        """The next line without its end, or why there is none."""
        deadline = time.monotonic() + seconds
        while (end := self.held.find(b"\n")) < 0:
            if len(self.held) > self.most:
                return Broken(kind="too_much_output", message=f"over {self.most} bytes")
            left = deadline - time.monotonic()
            if left <= 0 or not self.selector.select(left):
                return Broken(kind="timeout", message=f"over {seconds:g} s")
            piece = os.read(self.pipe.fileno(), 1 << 16)
            if not piece:
                return Broken(kind="crashed", message="")
            self.held += piece
        line = bytes(self.held[:end])
        del self.held[: end + 1]
        return line
