"""Against TRL's GRPOTrainer: held-out first try against wall-clock minutes, same model, prompts, reward and machine.

Both in one process, from the first round or step on, with what they load and save on the way (TRL's saving of policies
to be judged does not count). Judging counts for neither. TRL is given `times` as many seconds as ours took to reach the
base's best of 8 (in all, if it did not): what it has not reached by then, it does not reach in less than that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import sizes
import small
import torch
import yaml
from lab import HERE, SEEDS, Facts, Lab, changes, made, made_of, meaning, python, tao

from opentao.models import resolve_model
from opentao.prompts import read_prompts
from opentao.store import Run, table_to_prompts

TRL = HERE.parent / "envs" / "trl" / "bin" / "python"
BF16 = bool(torch.cpu.get_capabilities().get("amx_bf16"))  # what TRL multiplies in: without AMX its steps are slower so
POLICIES = 4  # of TRL's that are judged, evenly over its time


@dataclass(kw_only=True, frozen=True, slots=True)
class Match:
    """One task on which both train. `settings`: of ours; `theirs`: of trl_grpo.py (dev/LOG.md says how found)."""

    name: str
    folder: Path
    settings: Facts
    rounds: int
    times: float
    theirs: Facts = field(default_factory=dict)


def matches(lab: Lab) -> tuple[Match, ...]:
    """Short prompts: the small tasks, asked of the 135M model; long ones: a recipe by its verifier alone."""
    grpo: Facts = {"group_size": 8, "prompts_per_step": 4, "micro_batch": 8, "learning_rate": 1e-4, "lora": False}
    short: Facts = {"scorers": small.EXACT, "train.learning_rate": sizes.RATES["135M"]}
    levels = {"parses": 0.1, "runs": 0.3, "non_empty": 1.0}  # no votes: TRL's answers are judged in other groups
    queries: list[Facts] = [
        {"type": "sql", "args": {"database": "databases/{db_id}.sqlite", "levels": levels}},
        {"type": "python", "name": "linked", "args": {"function": "queries:linked"}},  # else any query will do
    ]
    own = {  # from the second round on: the policy's own answers, and what is bad counts, too
        "generate": {"strategies": [{"name": "plain"}]},
        "train": {
            "objective": "online",
            "epochs": 1,
            "temperature": None,
            "keep": {"strategy": "max_variance", "responses": 4},
        },
    }
    return (
        Match(
            name="small tasks",
            folder=small.folder(lab, "135M"),
            settings=short,
            rounds=2,
            times=6.0,
            theirs=grpo,
        ),
        Match(
            name="text_to_sql",
            folder=lab.folder("text_to_sql"),
            settings={"scorers": queries, "prompts_per_round": 64, "later_rounds": own},
            rounds=2,
            times=6.0,
            theirs=grpo | {"learning_rate": 3e-5},
        ),
    )


def measure(lab: Lab, match: Match) -> None:
    if not TRL.exists():
        print(f"peer: no {TRL}, see benchmarks/README.md", flush=True)
        return
    for seed in SEEDS:
        of = [made_of(match.folder), meaning(match.folder / "tao.yaml"), match.settings, match.rounds]
        ours = lab.cell("peer", f"{match.name}/opentao/{seed}", lambda s=seed: _ours(lab, match, s), of)
        of = [of, match.theirs, match.times, POLICIES]
        lab.cell("peer", f"{match.name}/trl/{seed}", lambda s=seed, o=ours: _trl(lab, match, s, o), of)


def reached(points: list[Facts], level: float) -> float | None:
    """Seconds until the first policy whose first try is as good as `level`; None: never.

    >>> reached([{"seconds": 0, "first_try": {"mean": 0.0}}, {"seconds": 10, "first_try": {"mean": 1.0}}], 0.5)
    10.0
    """
    point = as_good(points, level)
    return float(point["seconds"]) if point else None


def took(ours: Facts) -> float:
    """Seconds until ours was as good as the base's best of 8; all that it took, if it never was."""
    return reached(ours["points"], ours["best_of"]["8"]["mean"]) or float(ours["points"][-1]["seconds"])


def as_good(points: list[Facts], level: float) -> Facts | None:
    """The first whose first try is as good as `level`."""
    return next((p for p in points if p["first_try"]["mean"] >= level), None)


def _ours(lab: Lab, match: Match, seed: int) -> Facts:
    """From nothing: a round that was there already would take no time."""
    directory = lab.work / "peer" / match.name / f"opentao-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    given = changes(match.settings | {"seed": seed, "rounds": match.rounds})
    out = directory.with_name(f"opentao-{seed}.jsonl")
    python(HERE / "timed_run.py", "tao.yaml", str(directory), str(out), *given, cwd=match.folder)
    base = json.loads((directory / "round-0" / "eval.json").read_text())
    return {"points": [json.loads(line) for line in out.read_text().splitlines()], "best_of": base["best_of"]}


def _trl(lab: Lab, match: Match, seed: int, ours: Facts) -> Facts:
    out = made(
        lab.work / "peer" / match.name / f"trl-{seed}",
        [match.settings, match.theirs, match.times, took(ours), POLICIES],
        lambda out: _train(lab, match, seed, out, match.times * took(ours)),
    )
    points = ours["points"][:1]
    for line in (out / "policies.jsonl").read_text().splitlines():
        policy = json.loads(line)
        directory = out / f"judged-{policy['step']}"
        few = {"evaluate.base_group_size": 4, "model": policy["path"], "seed": seed}
        given = [f"--set={c}" for c in changes(match.settings | few)]
        tao("predict", "tao.yaml", "--run", str(directory), *given, cwd=match.folder)
        after = json.loads((directory / "round-0" / "eval.json").read_text())
        audit = after["audit"] and after["audit"]["first_try"]
        point = {"seconds": round(policy["seconds"], 1), "first_try": after["first_try"], "audit": audit}
        points.append(point | {"step": policy["step"]})
    return {"points": points, "settings": match.theirs, "bf16": BF16, "stops": True}


def _train(lab: Lab, match: Match, seed: int, out: Path, seconds: float) -> None:
    """The prompts that ours trained on, by their place in the file that the service reads."""
    ours = out.with_name(f"opentao-{seed}")
    if not ours.exists():  # its cell is kept, its run is not
        _ours(lab, match, seed)
    config = _resolved(ours)
    places = {p.id: i for i, p in enumerate(read_prompts(match.folder / "prompts.jsonl").prompts)}
    with Run(ours, read_only=True) as run:
        prompts = table_to_prompts(run.read_table("prompts/train.parquet"))
    case = {
        "model": str(resolve_model(config["model"])),
        "folder": str(match.folder),
        "service": [
            sys.executable,
            str(HERE / "scorer_service.py"),
            "tao.yaml",
            "prompts.jsonl",
            *changes(match.settings),
        ],
        "prompts": [{"messages": list(p.messages), "index": places[p.id]} for p in prompts],
        "out": str(out),
        "seed": seed,
        "threads": 2,
        "bf16": BF16,
        "save_at": [seconds * (i + 1) / POLICIES for i in range(POLICIES)],
        "new_tokens": config["generate"]["max_new_tokens"],
        "temperature": config["generate"]["temperature"],
        "stop": config["generate"]["stop"],
    } | match.theirs
    (out / "case.json").write_text(json.dumps(case))
    (out / "policies.jsonl").unlink(missing_ok=True)
    subprocess.run([str(TRL), str(HERE / "trl_grpo.py"), str(out / "case.json")], check=True)


def _resolved(directory: Path) -> Facts:
    found: Facts = yaml.safe_load((directory / "config.yaml").read_text())
    return found
