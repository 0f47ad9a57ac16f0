"""Numbers of one thing over its seeds: each prompt's values are averaged over seeds, intervals are over prompts.

Prompts of one database or document are drawn together. The worst seed stands beside: an interval over prompts says
nothing of how much a run depends on chance in training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np
from lab import SEEDS, Cells, Facts

from opentao.bestofn import Interval, bootstrap


def first_try(cells: Sequence[Facts], side: str, what: str, task: str | None = None) -> Interval:
    """`side`: base or after; `what`: reward or audit; `task`: prompts of this one only."""
    return _interval(_by_prompt(cells, side, what, task))


def gain(cells: Sequence[Facts], what: str, task: str | None = None) -> Interval:
    """After less before, prompt by prompt."""
    before, after = (_by_prompt(cells, side, what, task) for side in ("base", "after"))
    return _interval({key: (after[key][0] - value, of) for key, (value, of) in before.items() if key in after})


def better(cells: Sequence[Facts], others: Sequence[Facts], what: str) -> Interval:
    """The first ones' first try less the others', prompt by prompt."""
    own, other = (_by_prompt(side, "after", what, None) for side in (cells, others))
    return _interval({key: (value - other[key][0], of) for key, (value, of) in own.items() if key in other})


def tasks_of(cells: Cells) -> list[str]:
    """The first parts of the cells' names."""
    return sorted({name.split("/")[0] for name in cells})


def audited_tasks(cells: Sequence[Facts]) -> list[str]:
    """Tasks of the prompts that have an audit."""
    columns = [cell["first_tries"]["base"] for cell in cells if "task" in cell["first_tries"]["base"]]
    return sorted({t for tries in columns for t, a in zip(tries["task"], tries["audit"], strict=True) if a is not None})


def worst(cells: Sequence[Facts], what: str) -> float:
    """The smallest gain of a seed."""
    return min(gain([cell], what).mean for cell in cells)


def clear(cells: Sequence[Facts], what: str) -> bool:
    """Do the intervals before and after lie apart, the later one above?"""
    return first_try(cells, "after", what).low > first_try(cells, "base", what).high


def _by_prompt(cells: Sequence[Facts], side: str, what: str, task: str | None) -> dict[str, tuple[float, str]]:
    """Prompt -> (mean over seeds, what it belongs to)."""
    values: dict[str, list[float]] = defaultdict(list)
    cluster: dict[str, str] = {}
    for cell in cells:
        tries = cell["first_tries"][side]
        belongs = tries.get("db_id") or tries.get("document") or tries["id"]
        tasks = tries.get("task") or [None] * len(tries["id"])
        for key, value, of, own in zip(tries["id"], tries[what], belongs, tasks, strict=True):
            if value is not None and task in (None, own):
                values[key].append(value)
                cluster[key] = of
    return {key: (float(np.mean(own)), cluster[key]) for key, own in values.items()}


def _interval(by_prompt: dict[str, tuple[float, str]]) -> Interval:
    return _bootstrap(tuple(by_prompt.values()))


@cache
def _bootstrap(values: tuple[tuple[float, str], ...]) -> Interval:
    """Several tables and pages show the same interval."""
    return bootstrap([value for value, _ in values], clusters=[of for _, of in values])


def of(cells: Cells, name: str) -> list[Facts]:
    """The cells ``name/SEED`` that are there."""
    return [cells[f"{name}/{seed}"] for seed in SEEDS if f"{name}/{seed}" in cells]


def average(cells: Sequence[Facts], what: str, side: str = "after") -> float:
    return float(sum(c[side][what]["mean"] for c in cells) / len(cells))


def seeds(cells: Sequence[Facts]) -> str:
    return f"{len(cells)} seed{'s' * (len(cells) > 1)}"


def verdicts(cells: Sequence[Facts]) -> str:
    kept = sum(c["verdict"] == "promote" for c in cells)
    return f"promote {kept} of {len(cells)}"
