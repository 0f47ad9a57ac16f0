"""Do people agree, with each other and with themselves? Krippendorff's alpha, and shares of equal verdicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np

from opentao.web.choices import Choice

Unit = tuple[Any, ...]  # what was judged: an item and two of its answers, or one
TIE = "tie"


def verdicts(choices: Sequence[Choice], *, repeats: bool = False) -> dict[Unit, dict[str, str]]:
    """Unit -> annotator -> verdict. A ranking says something of each pair in it. Repeats do not count unless asked."""
    found: dict[Unit, dict[str, str]] = defaultdict(dict)
    for choice in choices:
        if repeats or choice.task.repeat_of is None:
            for unit, verdict in _said(choice):
                found[unit][choice.task.annotator] = verdict
    return found


def _said(choice: Choice) -> Iterable[tuple[Unit, str]]:
    task, answer = choice.task, choice.answer
    if "skip" in answer:
        return
    if task.kind == "mark":
        yield (task.item, task.shown[0]), str(answer["right"])
    elif task.kind == "pair":
        yield (task.item, *sorted(task.shown)), TIE if "tie" in answer else str(answer["better"])
    else:
        place = {i: n for n, i in enumerate(answer["order"])}
        last = len(place)
        for a, b in combinations(sorted(task.shown), 2):
            if place.get(a, last) != place.get(b, last):
                yield (task.item, a, b), str(a if place.get(a, last) < place.get(b, last) else b)


def alpha(choices: Sequence[Choice]) -> dict[str, float | int | None]:
    """Krippendorff's alpha, nominal, over units that at least two people judged: ``{"alpha": 0.61, "units": 40}``.

    1 is perfect, 0 what chance gives. None without such units, or if all verdicts are the same. A pair's two answers
    stand in a fixed order here, so "the first" means the same to everybody. Source: Krippendorff 2011.
    """
    shared = {unit: said for unit, said in verdicts(choices).items() if len(said) > 1}
    names = sorted({name for said in shared.values() for name in said})
    labels = {unit: {who: _label(unit, v) for who, v in said.items()} for unit, said in shared.items()}
    values = sorted({v for said in labels.values() for v in said.values()})
    if len(values) < 2:
        return {"alpha": None, "units": len(shared)}
    code = {value: n for n, value in enumerate(values)}
    table = np.array(
        [[code.get(said.get(name, ""), np.nan) for said in labels.values()] for name in names], dtype=float
    )
    found = krippendorff.alpha(reliability_data=table, level_of_measurement="nominal", value_domain=range(len(values)))
    return {"alpha": float(found), "units": len(shared)}


def _label(unit: Unit, verdict: str) -> str:
    """first, second or tie for a pair; right or wrong for a mark."""
    if len(unit) == 2 or verdict == TIE:
        return verdict
    return "first" if verdict == str(unit[1]) else "second"


def between(choices: Sequence[Choice]) -> dict[str, dict[str, float | int | None]]:
    """Annotator -> share of shared units on which another person said the same, over all such pairs of people."""
    same: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for said in verdicts(choices).values():
        for a, b in combinations(sorted(said), 2):
            for name in (a, b):
                total[name] += 1
                same[name] += said[a] == said[b]
    return {name: {"agreement": same[name] / total[name], "units": total[name]} for name in sorted(total)}


def with_oneself(choices: Sequence[Choice]) -> dict[str, dict[str, float | int | None]]:
    """Annotator -> share of what was said twice that was said alike, in the same units as `between`."""
    by_task = {c.task.id: c for c in choices}
    same: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for choice in choices:
        first = by_task.get(choice.task.repeat_of or "")
        if first is not None and "skip" not in choice.answer and "skip" not in first.answer:
            now, then = dict(_said(choice)), dict(_said(first))
            total[choice.task.annotator] += len(now.keys() & then.keys())
            same[choice.task.annotator] += sum(now[unit] == then[unit] for unit in now.keys() & then.keys())
    return {name: {"agreement": same[name] / total[name], "units": total[name]} for name in sorted(+total)}
