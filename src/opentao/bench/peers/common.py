"""The protocol between `tao bench` and a program that it times. Stands alone: a peer's environment has no opentao.

A worker gets the case as a JSON file, says that it is ready in one line of JSON, and then does the whole work once for
every line "go" on standard input, each time answering in one line. Everything else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Answers:
    """Standard output, kept for answers; what libraries print there goes to standard error instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **fields: Any) -> None:
        print(json.dumps(fields), file=self._out, flush=True)


def read_case() -> dict[str, Any]:
    case: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    return case


def serve(answers: Answers, work: Callable[[], int], **about: Any) -> None:
    """Say what this is, then do `work` whenever asked; it returns the number of tokens that it made or computed."""
    answers.say(ready=True, **about)
    cuda = _cuda()
    for line in sys.stdin:
        if line.strip() == "go":
            if cuda:
                cuda.synchronize()
                cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            tokens = work()
            if cuda:
                cuda.synchronize()
            seconds = time.perf_counter() - start
            answers.say(seconds=seconds, tokens=tokens, gpu_peak_bytes=cuda.max_memory_allocated() if cuda else 0)


def _cuda() -> Any:
    """torch.cuda, if this process computes on a GPU with it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def guarded(main: Callable[[Answers], None]) -> None:
    """Run a worker; a failure is one line of JSON and exit status 1."""
    answers = Answers()
    try:
        main(answers)
    except Exception as error:  # whatever a peer raises ends in its answer
        answers.say(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        raise
