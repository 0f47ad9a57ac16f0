"""Objectives at equal compute: the same groups, steps and passes; only the loss differs, and its learning rate.

Rewards: the exact verifier, a reward model of preferences, one whose preferences were turned round in one of four, and
one that knows nothing. For each objective on each reward and seed: first try, audit, KL, length, seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import small
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
REWARDS = ("exact", "dbrm", "flipped", "random")


@dataclass(kw_only=True, frozen=True, slots=True)
class Task:
    """A folder with tao.yaml, `reward` and `flipped`; `rates`: a learning rate for each variant."""

    name: str
    folder: Path
    exact: list[Facts]
    settings: Facts = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)


SMALL_RATES = {  # the best of those tried on seed 0 with the exact verifier (dev/LOG.md)
    "regress": 2e-4,
    "regress value": 1e-4,
    "distill": 4e-4,
    "prefer": 1e-4,
    "GRPO": 3e-4,
    "Dr. GRPO": 3e-4,
    "RLOO": 3e-4,
}


def small_task(lab: Lab, size: str = "3M") -> Task:
    settings = {"train.epochs": 2, "train.schedule": "linear"}
    return Task(
        name="small", folder=small.preferences(lab, size), exact=small.EXACT, settings=settings, rates=SMALL_RATES
    )


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
    for seed in SEEDS:
        start: Path | None = None
        for reward in REWARDS:
            for variant, change in VARIANTS.items():
                directory = lab.work / "objectives" / task.name / f"{reward}-{variant.replace(' ', '-')}-{seed}"
                rate = task.rates.get(variant)
                settings = (
                    {"seed": seed, "rounds": 1, "scorers": scorers(task, reward)}
                    | task.settings
                    | change
                    | ({"train.learning_rate": rate} if rate else {})
                )
                lab.cell(
                    "objectives",
                    f"{task.name}/{reward}/{variant}/{seed}",
                    lambda d=directory, s=settings, f=start: lab.run("tao.yaml", d, s, cwd=task.folder, start=f),
                    [made_of(task.folder, "rewards_of"), settings],
                )
                start = start or (directory if directory.exists() else None)
