"""What every child does first and last. Standard library only: a child starts in the time that Python takes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from opentao.isolation import restrict

Answer = Callable[[Any], Any]


def serve(path: str, prepare: Callable[[dict[str, Any]], Answer]) -> None:
    """Read the order at `path`, `prepare` (imports), lock the door, then answer job after job, one line each."""
    with open(path, encoding="utf-8") as file:
        order = json.load(file)
    os.unlink(path)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)  # what an answer prints is not an answer
    sys.setrecursionlimit(1000)
    answer = prepare(order["setup"])
    restrict.limit_resources(order["memory_bytes"], order["cpu_seconds"], order["file_bytes"])
    if order["full"]:
        restrict.isolate(order["readable"], order["writable"])
    out.write("\n")
    out.flush()
    os.dup2(nowhere, 2)
    for job in order["jobs"]:
        out.write(json.dumps(answer(job)) + "\n")
        out.flush()
