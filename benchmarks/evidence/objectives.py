"""Objectives at equal compute: the same groups, steps and passes; only the loss differs, and its learning rate.

Rewards: the exact verifier, a reward model of preferences, one whose preferences were turned round in one of four, and
one that knows nothing. For each objective on each reward and seed: first try, audit, KL, length, seconds. Every
objective has the same rates to choose from; the choice is made on other questions, with the exact verifier.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import records
import small
import tasks
from lab import SEEDS, Facts, Lab, made_of
from recipes import NOISE, RANDOM

VARIANTS: dict[str, Facts] = {
    "regress": {"train.objective": "regress"},
    "regress value": {"train.objective": "regress", "train.target": "value"},
    "distill": {"train.objective": "distill"},
    "prefer": {"train.objective": "prefer"},
    "GRPO": {"train.objective": "online", "train.advantage": "group"},
    "Dr. GRPO": {"train.objective": "online", "train.advantage": "centred"},
    "RLOO": {"train.objective": "online", "train.advantage": "loo"},
}
REWARD_NAMES = {"exact": "exact", "dbrm": "reward model", "flipped": "turned round", "random": "random"}
REWARDS = tuple(REWARD_NAMES)
GRID = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
OTHER_QUESTIONS = 7  # a draw of the small tasks' questions, on which rates are chosen


@dataclass(kw_only=True, frozen=True, slots=True)
class Task:
    """A folder with tao.yaml, `reward` and `flipped`; `choosing`: a folder of the same task with other questions."""

    name: str
    folder: Path
    choosing: Path
    exact: list[Facts]
    settings: Facts = field(default_factory=dict)


def small_tasks(lab: Lab, size: str = "3M") -> list[Task]:
    """The mixture of tasks.py, whose exact reward is right or wrong, and records.py, where it goes by degrees."""
    return [
        Task(
            name=name,
            folder=small.preferences(lab, size, names),
            choosing=small.folder(lab, size, names, draw=OTHER_QUESTIONS),
            exact=exact,
            settings={"train.epochs": 2, "train.schedule": "linear"},
        )
        for name, names, exact in (
            ("small", tasks.TASKS, small.EXACT),
            ("records", records.TASKS, small.EXACT_RECORDS),
        )
    ]


def scorers(task: Task, reward: str) -> list[Facts]:
    if reward == "exact":
        return task.exact
    if reward == "random":
        (task.folder / "noise.py").write_text(NOISE)
        return list(RANDOM["scorers"])
    model = {"dbrm": "reward", "flipped": "flipped"}[reward]
    return [{"type": "reward_model", "args": {"model": model, "squash": True}}]


def measure(lab: Lab, task: Task) -> None:
    """The first run of a seed makes base samples and groups for all others."""
    rates = {variant: _rate(lab, task, variant) for variant in VARIANTS}
    for seed in SEEDS:
        start: Path | None = None
        for reward in REWARDS:
            for variant, change in VARIANTS.items():
                directory = lab.work / "objectives" / task.name / f"{reward}-{variant.replace(' ', '-')}-{seed}"
                settings = {"rounds": 1, "scorers": scorers(task, reward)} | task.settings | change
                settings["train.learning_rate"] = rates[variant]
                judge = made_of(task.folder, "rewards_of") if reward in ("dbrm", "flipped") else NOISE
                lab.cell(
                    "objectives",
                    f"{task.name}/{reward}/{variant}/{seed}",
                    lambda d=directory, s=settings | {"seed": seed}, f=start: (
                        lab.run("tao.yaml", d, s, cwd=task.folder, start=f) | {"rate": s["train.learning_rate"]}
                    ),
                    [made_of(task.folder), settings, judge],
                    directory,
                )
                start = start or (directory if directory.exists() else None)


def _rate(lab: Lab, task: Task, variant: str) -> float:
    """Of GRID the one whose audit is best on the other questions, first seed, exact verifier."""
    place = lab.work / "objectives" / f"{task.name}-rates"
    first = place / f"{next(iter(VARIANTS))}-{GRID[0]:g}"

    def audit(rate: float) -> float:
        directory = place / f"{variant.replace(' ', '-')}-{rate:g}"
        settings = {"seed": SEEDS[0], "rounds": 1, "scorers": task.exact, "train.learning_rate": rate}
        settings |= task.settings | VARIANTS[variant]
        start = first if first.exists() else None
        found = lab.cell(
            "objectives, rates",
            f"{task.name}/{variant}/{rate:g}",
            lambda: lab.run("tao.yaml", directory, settings, cwd=task.choosing, start=start),
            [made_of(task.choosing), settings],
            directory,
        )
        return float(found["after"]["audit"]["first_try"]["mean"])

    return max(GRID, key=audit)
