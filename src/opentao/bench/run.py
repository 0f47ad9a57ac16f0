"""Start our worker and the peers, let them take turns, and say what came out: medians, ranges, peak memory.

Only one of them computes at a time. Before generating, the machine's matrix-product limit is measured for the same
model and precision, so that tokens per second can be read as a share of what the products alone would allow.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from opentao.bench.case import Case
from opentao.errors import TaoError

PEERS = Path(__file__).parent / "peers"
SCRIPTS = {
    "transformers": "transformers_peer.py",
    "trl": "trl_peer.py",
    "vllm": "vllm_peer.py",
    "llama.cpp": "llama_cpp_peer.py",
}
DOES = {
    "transformers": {"generate", "score"},
    "trl": {"train", "reward-train", "round"},
    "vllm": {"generate"},
    "llama.cpp": {"generate"},
}
ENVIRONMENTS = Path("benchmarks/envs")
AGAIN_S = 20  # a shorter run is done again at once, and the second counts
SHOWN = 400  # characters of a dead worker's last words


class BenchError(TaoError):
    """A peer cannot be started, or it failed."""


@dataclass(kw_only=True, slots=True)
class Timing:
    """What one system did. Seconds of each run, tokens of one, peak memory in bytes (a GPU's, else the processes')."""

    name: str
    version: str
    config: str
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"median_s": self.median, "tokens_per_second": self.tokens / self.median}


class Worker:
    """A process that does the case's work whenever it is asked."""

    def __init__(self, command: Sequence[str], directory: Path, label: str) -> None:
        self.label = label
        self.log = directory / f"{label}.log"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.about = self._answer()
        self._forget_peak()

    def go(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            print("go", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise BenchError(f"{self.label}: died: {self._last_words()}") from None
        return self._answer()

    def turn(self) -> dict[str, Any]:
        """One run that counts. Memory that a virtual machine took back while others worked is slow at first."""
        answer = self.go()
        return self.go() if answer["seconds"] < AGAIN_S else answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.label}: died: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{self.label}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return " ".join(lines[-3:])[-SHOWN:] or f"exit status {self.process.wait()}, nothing said"

    @property
    def peak_bytes(self) -> int:
        """Sum over its processes of the most memory each has held; 0 where the system does not tell."""
        return sum(_peak(pid) for pid in _tree(self.process.pid))

    def _forget_peak(self) -> None:
        """What the warm-up tried on the way to its choice does not count."""
        for pid in _tree(self.process.pid):
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def close(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _peak(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(p for child in children for p in _tree(int(child)))]


def interpreter(peer: str, kind: str, environments: dict[str, Path]) -> str:
    """The python of a peer's environment.

    Raises:
        BenchError: there is no such peer, it cannot do this, or its environment is missing.
    """
    if peer not in SCRIPTS:
        raise BenchError(f"--vs {peer}: expected one of: {', '.join(SCRIPTS)}")
    if kind not in DOES[peer]:
        raise BenchError(f"--vs {peer}: does not {kind}; it does: {', '.join(sorted(DOES[peer]))}")
    folder = environments.get(peer, ENVIRONMENTS / peer)
    python = folder / "bin" / "python"
    if not python.exists():
        raise BenchError(f"{peer}: no environment at {folder}; benchmarks/README.md says how to make it (--peer-env)")
    return str(python)


@contextmanager
def _workers(case: Case, peers: Sequence[str], environments: dict[str, Path]) -> Iterator[tuple[list[Worker], Any]]:
    pythons = {peer: interpreter(peer, case.kind, environments) for peer in peers}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = directory / "case.json"

        def start(case: Case, command: Sequence[str], label: str) -> Worker:
            path.write_text(json.dumps(case.as_dict()))
            worker = Worker([*command, str(path)], directory, label)
            stack.callback(worker.close)
            return worker

        ours = [sys.executable, "-m", "opentao.bench.worker"]
        limit = {}
        if case.kind == "generate":
            limit = start(replace(case, options={"limit": True}), ours, "limit").about["limit"]
        workers = [start(case, ours, "opentao")]
        for peer, python in pythons.items():
            workers.append(start(case, [python, str(PEERS / SCRIPTS[peer])], peer))
        yield workers, limit


def bench(case: Case, peers: Sequence[str], environments: dict[str, Path], repeats: int) -> dict[str, Any]:
    """Run everything. Returns the case's sizes, the limit, and a timing for each system, ours first."""
    with _workers(case, peers, environments) as (workers, limit):
        timings = [Timing(**{k: w.about[k] for k in ("name", "version", "config")}) for w in workers]
        for _ in range(repeats):
            for worker, timing in zip(workers, timings, strict=True):
                answer = worker.turn()
                timing.seconds.append(answer["seconds"])
                timing.tokens, timing.peak_bytes = answer["tokens"], answer["gpu_peak_bytes"] or worker.peak_bytes
    sizes = {
        "prompts": len(case.prompt_ids),
        "prompt_tokens": len(case.prompt_ids[0]),
        "group_size": case.group_size,
        "new_tokens": case.new_tokens,
    }
    return {
        "kind": case.kind,
        **sizes,
        "dtype": case.dtype,
        "lora": case.lora,
        "limit_tokens_per_second": limit,
        "systems": [t.as_dict() for t in timings],
        "times_faster": {t.name: t.median / timings[0].median for t in timings[1:]},
    }


def as_text(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    head = "| | seconds, median (range) | tok/s | peak memory | ours is faster by |\n|---|---|---|---|---|"
    rows = []
    for system in result["systems"]:
        seconds = system["seconds"]
        ratio = result["times_faster"].get(system["name"])
        rows.append(
            f"| {system['name']} {system['version']} ({system['config']})"
            f" | {system['median_s']:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
            f" | {system['tokens_per_second']:.0f} | {system['peak_bytes'] / 1e9:.1f} GB"
            f" | {'' if ratio is None else f'{ratio:.1f}×'} |"
        )
    best = max(result["limit_tokens_per_second"].values(), default=0)
    limit = f"Matrix products alone: {best:.0f} tok/s ({result['dtype']})." if result["kind"] == "generate" else ""
    return "\n".join([head, *rows, "", limit]).rstrip() + "\n"
