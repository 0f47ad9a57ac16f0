"""What experiments share: cells that are measured once and kept, runs by the command line, runs from others' groups.

A *cell* is one finished run or measurement; its name has all that tells it apart from its neighbours, the seed last.
Its facts are in evidence.json as soon as they are there, with a hash of what they were measured of: settings, prompts,
the recipe's code, a decoder's weights. So an experiment that was stopped goes on where it was, and one whose settings
changed is measured again, in a new directory; its other seeds go, so that no mean is over seeds of different things.
The code of OpenTAO and of the experiments is not part of the hash. A run that differs from another only in what comes
after sampling starts from a copy of that run's directory: prompts, base samples and groups are then the same, byte for
byte, and cost nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opentao.store import Run, attach_scores, table_to_groups
from opentao.types import content_hash

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "evidence.json"
EXAMPLES = HERE.parents[1] / "examples"
SEEDS = (0, 1, 2)
BELONGS = ("db_id", "document")  # meta entries of prompts that are held out together
OF_A_PROCESS = ("lock", "owner.json", "spent.json")
Facts = dict[str, Any]
Cells = dict[str, Facts]  # name -> what was measured


@dataclass(kw_only=True, slots=True)
class Lab:
    """Where experiments work: their folder, the folder of public data (None: fetched), the file of results."""

    work: Path
    data: Path | None = None
    results: Path = RESULTS

    def kept(self, experiment: str) -> dict[str, Facts]:
        found: dict[str, dict[str, Facts]] = json.loads(self.results.read_text()) if self.results.exists() else {}
        return found.get(experiment, {})

    def cell(
        self, experiment: str, name: str, measure: Callable[[], Facts], of: object, directory: Path | None = None
    ) -> Facts:
        """The cell's facts: those kept of the same thing, or measured now.

        `of`: what they depend on but for the seed, as JSON. `directory`: of the run; one of something else goes first.
        """
        key = content_hash(of)
        facts = self.kept(experiment).get(name, {})
        if facts.get("of") != key:
            if directory:
                _clear(directory, key)
            start = time.perf_counter()
            facts = measure()
            facts |= {"of": key, "wall_seconds": round(time.perf_counter() - start, 1)}
            self._keep(experiment, name, facts)
            print(f"{experiment} {name}: {facts['wall_seconds']:.0f} s", flush=True)
        return facts

    def _keep(self, experiment: str, name: str, facts: Facts) -> None:
        found = json.loads(self.results.read_text()) if self.results.exists() else {}
        cells = found.setdefault(experiment, {})
        family, _, seed = name.rpartition("/")
        for other in [n for n in cells if seed.isdigit() and n.rpartition("/")[0] == family]:
            if cells[other].get("of") != facts["of"]:
                del cells[other]
        cells[name] = facts
        part = self.results.with_suffix(".part")
        part.write_text(as_text(found))
        part.replace(self.results)

    def folder(self, recipe: str) -> Path:
        """The recipe's prompts and files, prepared once."""

        def prepare(out: Path) -> None:
            data = ["--data", str(self.data)] if self.data else []
            python(EXAMPLES / recipe / "prepare.py", "--out", str(out), *data, cwd=EXAMPLES)

        own = EXAMPLES / recipe
        code = [meaning(p) for p in sorted(own.glob("*.py")) if "financebench" not in p.name]  # sources: by sha256
        out = made(self.work / recipe / "files", code, prepare)
        for config in own.glob("*.yaml"):  # prompts and reward models do not depend on them
            shutil.copy(config, out)
        return out

    def run(
        self,
        config: str,
        directory: Path,
        settings: Facts,
        *,
        cwd: Path,
        start: Path | None = None,
        keep_policy: bool = False,
    ) -> Facts:
        """`tao run`, from a copy of the run `start` if there is one. Returns its essence; policies are dropped."""
        if start is not None and not directory.exists():
            copy_run(start, directory)
        given = [f"--set={change}" for change in changes(settings)]
        tao("run", config, "--run", str(directory), "--go-on-if-flat", *given, cwd=cwd)
        return essence_alone(directory, keep_policy=keep_policy)


def as_text(found: dict[str, dict[str, Facts]]) -> str:
    """JSON with a line a cell: what changed can be seen, and columns of numbers do not fill pages."""
    parts = [
        f"{json.dumps(experiment)}: {{\n"
        + ",\n".join(f"{json.dumps(n)}: {_line(c)}" for n, c in sorted(cells.items()))
        + "\n}"
        for experiment, cells in sorted(found.items())
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _line(facts: Facts) -> str:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"))


def made(out: Path, of: object, make: Callable[[Path], None], mark: str = "made_of") -> Path:
    """The folder `out`: there, or made now. What it is made of stands in it; made of something else, it goes first.

    Something that was stopped half-way goes on.
    """
    key, stands, begun = content_hash(of), out / mark, out / f"{mark}.part"
    if any(m.exists() and m.read_text() != key for m in (stands, begun)):
        _remove(out)
    if not stands.exists():
        out.mkdir(parents=True, exist_ok=True)
        begun.write_text(key)
        make(out)
        begun.rename(stands)
    return out


def _clear(directory: Path, key: str) -> None:
    """No directory of a run of something else; what is begun there from now on is of `key`."""
    mark = directory.with_name(f"{directory.name}.of")
    if not mark.exists() or mark.read_text() != key:
        _remove(directory)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(key)


def _remove(folder: Path) -> None:
    """At once or not at all, for whoever looks at it."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    if folder.exists():
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def made_of(folder: Path, mark: str = "made_of") -> str:
    return (folder / mark).read_text()


def meaning(path: Path) -> str:
    """The hash of a file; code without comments, docstrings and layout, YAML without its comments and layout."""
    text = path.read_bytes()
    if path.suffix == ".py":
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(value=None)
        text = ast.unparse(tree).encode()
    elif path.suffix == ".yaml":
        return content_hash(yaml.safe_load(text))
    return hashlib.sha256(text).hexdigest()[:16]


def changes(settings: Facts) -> list[str]:
    """As `--set` takes them: JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def tao(*arguments: str, cwd: Path) -> None:
    python("-m", "opentao", *arguments, cwd=cwd)


def python(*arguments: str | Path, cwd: Path) -> None:
    """Another Python process; its standard output is dropped, what it says of itself is shown."""
    cwd.mkdir(parents=True, exist_ok=True)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd=cwd, env=quiet)


def summary_of(directory: Path) -> Facts:
    found: Facts = json.loads((directory / "summary.json").read_text())
    return found


def _audit(numbers: Facts) -> Facts:
    return {"audit": numbers["audit"] and {"first_try": numbers["audit"]["first_try"]}}


def first_tries(directory: Path, round_: int) -> Facts:
    """Of every held-out prompt the mean reward and audit of its answers (null: unscored), and what it belongs to.

    In columns: `id`, `reward`, `audit`, those of `BELONGS` that all prompts have, and `task` where they have one.
    """
    folder = f"round-{round_}/eval"
    with Run(directory, read_only=True) as run:
        groups = [
            group
            for name in run.names(f"{folder}/groups/")
            for group in attach_scores(
                table_to_groups(run.read_table(name)), run.read_table(name.replace("/groups/", "/scores/"))
            )
        ]
    tasks = [task_of(g.prompt.meta) for g in groups]
    return {
        "id": [g.prompt.id[:8] for g in groups],
        "reward": [_mean(g.rewards_N) for g in groups],
        "audit": [_mean([score.value for score in g.scores.get("audit", ())]) for g in groups],
        **{key: [g.prompt.meta[key] for g in groups] for key in BELONGS if all(key in g.prompt.meta for g in groups)},
        **({"task": tasks} if all(tasks) else {}),
    }


def task_of(meta: Facts) -> str:
    """What is told apart in tables: the prompt's task, or the types of what it asks for; "" if it has neither."""
    asked = [*meta.get("constraints", []), *meta.get("unseen", [])]
    return str(meta.get("task") or " + ".join(c["type"] for c in asked))


def _mean(values: Sequence[float]) -> float | None:
    there = [v for v in values if not math.isnan(v)]
    return round(sum(there) / len(there), 4) if there else None


def essence_alone(directory: Path, *, keep_policy: bool = False) -> Facts:
    """The run's essence. Its policies, half a gigabyte each, are dropped, but for the kept one if that is wanted."""
    kept = f"round-{summary_of(directory)['best_round']}"
    for policy in directory.glob("round-*/policy"):
        if not (keep_policy and policy.parent.name == kept):
            shutil.rmtree(policy)
    return essence(directory)


def copy_run(source: Path, target: Path) -> None:
    """A run directory again, without what belongs to its process and without policies."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns("policy", "checkpoint", *OF_A_PROCESS))
    part.rename(target)


def essence(directory: Path, round_: int | None = None) -> Facts:
    """What the tables need of a run: the base, one round (the kept one; the last if none was kept), the verdict.

    `first_tries` holds every held-out prompt's mean reward and audit, for intervals over prompts across seeds.
    """
    summary = summary_of(directory)
    base, rounds = summary["base"], summary["rounds"]
    wanted = summary["best_round"] if round_ is None else round_
    own = next((r for r in rounds if r["round"] == wanted), rounds[-1] if rounds else base)
    rounds = [r for r in rounds if round_ is None or r["round"] <= round_]
    return {
        "first_tries": {"base": first_tries(directory, 0), "after": first_tries(directory, own["round"])},
        "base": {name: base[name] for name in ("first_try", "best_of", "length")} | _audit(base),
        "after": {
            name: own[name] for name in ("round", "first_try", "kl", "length", "improvement", "audit_improvement")
        }
        | _audit(own),
        "verdict": summary["verdict"],
        "why": summary["why"],
        "prediction": {name: summary["prediction"][name] for name in ("target_n", "target", "flat")},
        "seconds": {s: round(sum(r["seconds"][s] for r in [base, *rounds]), 1) for s in base["seconds"]},
        "tokens": {s: sum(r["tokens"][s] for r in [base, *rounds]) for s in base["tokens"]},
    }
