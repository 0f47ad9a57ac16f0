"""Numbers of one thing over its seeds: each prompt's values are averaged over seeds, intervals are over prompts.

Prompts of one database or document are drawn together. The worst seed stands beside: an interval over prompts says
nothing of how much a run depends on chance in training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from lab import Facts

from opentao.bestofn import Interval, bootstrap

Pick = Callable[[Facts], bool]


def everything(entry: Facts) -> bool:
    return True


def first_try(cells: Sequence[Facts], side: str, what: str, pick: Pick = everything) -> Interval:
    """`side`: base or after; `what`: reward or audit."""
    return _interval(_by_prompt(cells, side, what, pick))


def gain(cells: Sequence[Facts], what: str, pick: Pick = everything) -> Interval:
    """After less before, prompt by prompt."""
    before, after = (_by_prompt(cells, side, what, pick) for side in ("base", "after"))
    return _interval({key: (after[key][0] - value, of) for key, (value, of) in before.items() if key in after})


def worst(cells: Sequence[Facts], what: str) -> float:
    """The smallest gain of a seed."""
    return min(gain([cell], what).mean for cell in cells)


def clear(cells: Sequence[Facts], what: str) -> bool:
    """Do the intervals before and after lie apart, the later one above?"""
    return first_try(cells, "after", what).low > first_try(cells, "base", what).high


def _by_prompt(cells: Sequence[Facts], side: str, what: str, pick: Pick) -> dict[str, tuple[float, str]]:
    """Prompt -> (mean over seeds, what it belongs to)."""
    values: dict[str, list[float]] = defaultdict(list)
    cluster: dict[str, str] = {}
    for cell in cells:
        for entry in filter(pick, cell["first_tries"][side]):
            if entry[what] is not None:
                values[entry["id"]].append(entry[what])
                cluster[entry["id"]] = entry.get("db_id") or entry.get("document") or entry["id"]
    return {key: (float(np.mean(own)), cluster[key]) for key, own in values.items()}


def _interval(by_prompt: dict[str, tuple[float, str]]) -> Interval:
    values = [value for value, _ in by_prompt.values()]
    return bootstrap(values, clusters=[of for _, of in by_prompt.values()])
