"""Kill `tao run` with SIGKILL at random moments, start it again each time, and compare the result with an unbroken run.

    python scripts/kill_test.py                    twenty kills, a minute or two on two cores; exit 1 on a difference

The reference is one `tao run` in a process of its own. The runs that are killed are real processes, too, but forked
from this one after it has imported torch (and computed nothing): a start costs milliseconds, so twenty kills can be
spread over the work instead of the imports. If a run is done before all kills are, another one is begun.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch comes
TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))

# ruff: noqa: E402
import yaml
from tiny import build_tiny_model, tiny_config, write_prompts

import opentao.loop  # noqa: F401  with torch and transformers: the forked processes have them from the start
from opentao.cli import app

MADE_ONCE = ("**/*.safetensors", "**/*.parquet")  # what must not differ by a single byte
Command = list[str]


def prepare(folder: Path) -> None:
    """A tiny model, 40 prompts, and a config with many steps, checkpoints and shards to be killed at."""
    tree = tiny_config(build_tiny_model(folder / "model"), write_prompts(folder / "prompts.jsonl"))
    tree["generate"] |= {"shard_prompts": 2, "batch_responses": 8}
    tree["train"] |= {"objective": "regress", "save_every_steps": 1, "epochs": 4}
    (folder / "tao.yaml").write_text(yaml.safe_dump(tree))


def fork(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a child process that writes to `log`. Returns its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.chdir(TESTS)  # the config's scorers are found here
        work()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        os._exit(status)


def check(status: int, log: Path) -> None:
    """A run that failed ends the test with the end of its log."""
    if status:
        sys.exit(f"a run failed with status {status}:\n" + "\n".join(log.read_text().splitlines()[-20:]))


def wait(child: int, log: Path) -> None:
    check(os.waitpid(child, 0)[1], log)


def killed(child: int, delay: float, log: Path) -> bool:
    """Send SIGKILL after `delay` seconds. False if the child was done before."""
    end = time.monotonic() + delay
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            check(status, log)
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def timed(child: int, log: Path) -> float:
    started = time.monotonic()
    wait(child, log)
    return time.monotonic() - started


def digests(run: Path) -> dict[str, str]:
    """sha256 by name of every file that is made once."""
    paths = sorted(p for pattern in MADE_ONCE for p in run.glob(pattern))
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def num_entries(run: Path) -> int:
    manifest = run / "manifest.jsonl"
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


def compare(reference: dict[str, str], run: Path) -> int:
    """Print one line a file of the reference, and those that should not be there. Returns the number of differences."""
    found = digests(run)
    for name in sorted(reference.keys() | found.keys()):
        same = reference.get(name) == found.get(name)
        print(f"{'same     ' if same else 'DIFFERENT'} {found.get(name, 'missing')[:16]} {run.name}/{name}")
    return sum(reference.get(name) != found.get(name) for name in reference.keys() | found.keys())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        differences = test(Path(folder), arguments.kills, random.Random(arguments.seed))
    print(f"{differences} differences, {time.monotonic() - started:.0f} s")
    return 1 if differences else 0


def test(folder: Path, kills: int, rng: random.Random) -> int:
    """Returns the number of files that differ between the unbroken and the killed runs."""
    log = folder / "log"
    wait(fork(lambda: prepare(folder), log), log)

    def command(name: str) -> Command:
        return ["run", str(folder / "tao.yaml"), "--run", str(folder / name)]

    def start(name: str) -> int:
        return fork(lambda: app(command(name)), log)

    with log.open("a") as file:
        own = [sys.executable, "-m", "opentao.cli", *command("unbroken")]
        subprocess.run(own, cwd=TESTS, stdout=file, stderr=file, check=True)
    reference = digests(folder / "unbroken")
    whole, nothing = timed(start("forked"), log), timed(start("forked"), log)
    print(f"{len(reference)} files; a whole run takes {whole:.1f} s, one with nothing left to do {nothing:.1f} s")
    names = ["killed-1"]
    differences = compare(reference, folder / "forked")
    for kill in range(1, kills + 1):
        delay = rng.uniform(nothing / 4, nothing + 2 * whole / kills)
        while not killed(start(names[-1]), delay, log):
            names.append(f"killed-{len(names) + 1}")
        entries = num_entries(folder / names[-1])
        print(f"kill {kill} of {names[-1]} after {delay:.2f} s, {entries} manifest entries", flush=True)
    wait(start(names[-1]), log)
    return differences + sum(compare(reference, folder / name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
