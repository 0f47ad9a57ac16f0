"""What should this person judge next?

Pairs: those that would teach the most. Under an ensemble of reward models that is the mutual information between the
choice and the model, H(mean_k p_k) − mean_k H(p_k) with p_k = σ(s_ka − s_kb): high where the heads are sure of
different things (BALD, Houlsby et al., arXiv 1112.5745). Without an ensemble: in an order drawn once, the same for
all, so that the pairs that are for everybody come to everybody though nobody sees all there are. A fixed share of
tasks repeats earlier ones, to see whether people agree with themselves; a fixed share of pairs is for everybody, the
rest for whoever comes first.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from opentao.types import content_hash
from opentao.web.choices import Choice, Choices, Item, Kind, Task

HELD = 1800.0  # seconds for which what one person is shown is not given to another
REPEAT_AFTER = 5  # tasks that lie between a task and its repeat, at least
Pair = tuple[str, int, int]  # item and two of its answers, smaller index first


@dataclass(kw_only=True, slots=True)
class Plan:
    """How tasks are chosen."""

    kind: Kind = "pair"
    repeats: float = 0.1  # share of tasks that are repeats
    overlap: float = 0.3  # share of units that everybody is shown
    most: int = 8  # answers to rank at once
    seed: int = 0
    information: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)  # item -> [N, N], nats; {}: by chance
    items: frozenset[str] | None = None  # ids of those to judge; None: all that the file of choices knows

    def asks_of(self, item: Item) -> bool:
        return self.items is None or item.id in self.items

    def fits(self, task: Task) -> bool:
        """Is it of this kind, and of what is to be judged? One file may hold choices of several sources."""
        return task.kind == self.kind and (self.items is None or task.item in self.items)


def pair_information(heads_NK: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Information [N, N] in nats of each choice between two of N answers, from the scores of K heads."""
    scores = np.asarray(heads_NK, dtype=np.float64)
    difference = scores[:, None, :] - scores[None, :, :]
    p = 1 / (1 + np.exp(-np.clip(difference, -30, 30)))
    found: NDArray[np.float64] = np.maximum(_entropy(p.mean(-1)) - _entropy(p).mean(-1), 0.0)
    return found


def _entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    found: NDArray[np.float64] = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    return found


def next_task(choices: Choices, annotator: str, plan: Plan) -> Task | None:
    """The open task if there is one, else a new one; None: this person has judged all there is."""
    with choices.lock:  # two requests at once get the same task
        return _next_task(choices, annotator, plan)


def _next_task(choices: Choices, annotator: str, plan: Plan) -> Task | None:
    if (task := choices.open_task(annotator, plan.fits)) is not None:
        return task
    done = [c for c in choices.choices(annotator) if c.task.policy != "import" and plan.fits(c.task)]
    rng = random.Random(content_hash(plan.seed, annotator, len(done)))
    if rng.random() < plan.repeats and (again := _to_repeat(done, rng)) is not None:
        shown = list(again.shown)
        rng.shuffle(shown)
        return choices.add_task(annotator, again.item, again.kind, shown, "repeat", repeat_of=again.id)
    found = _new_unit(choices, annotator, plan)
    if found is None:
        return None
    (item, *indices), policy = found
    shown = [int(i) for i in indices]
    rng.shuffle(shown)
    return choices.add_task(annotator, str(item), plan.kind, shown, policy)


def _to_repeat(done: Sequence[Choice], rng: random.Random) -> Task | None:
    """An earlier task that was not skipped, nor a repeat, nor repeated before."""
    made = [c for c in done if "skip" not in c.answer]
    repeated = {c.task.repeat_of for c in made}
    early = [c.task for c in made[:-REPEAT_AFTER]]
    candidates = [t for t in early if t.repeat_of is None and t.id not in repeated]
    return rng.choice(candidates) if candidates else None


def _new_unit(choices: Choices, annotator: str, plan: Plan) -> tuple[tuple[str | int, ...], str] | None:
    """(item, answers…) to judge and the policy that chose it. What one person skipped is left to the others."""
    tasks = [c.task for c in choices.choices() if "skip" not in c.answer] + choices.open_tasks(time.time() - HELD)
    taken = {(task.item, *sorted(task.shown)) for task in tasks}
    own = {(c.task.item, *sorted(c.task.shown)) for c in choices.choices(annotator)}
    free = [u for item in choices.items() if plan.asks_of(item) for u in units(item, plan) if u not in own]
    free = [u for u in free if u not in taken or for_everybody(u, plan)]
    if not free:
        return None
    judged = Counter(item for item, *_ in own)  # one pair of each prompt before a second of any
    if plan.kind != "pair" or not plan.information:
        item = min({u[0] for u in free}, key=lambda i: (judged[i], content_hash(plan.seed, "order", i)))
        of_item = [u for u in free if u[0] == item]
        return min(of_item, key=lambda u: content_hash(plan.seed, "order", list(u))), "random"
    fresh = [u for u in free if not judged[u[0]]] or free
    return max(fresh, key=lambda u: (_information(u, plan), content_hash(plan.seed, list(u)))), "informative"


def units(item: Item, plan: Plan) -> list[tuple[str | int, ...]]:
    """What can be judged of an item: its pairs, all of it (cut to `most` answers), or each answer."""
    count = len(item.responses)
    if plan.kind == "pair":
        return [(item.id, a, b) for a, b in combinations(range(count), 2)]
    if plan.kind == "rank":
        return [(item.id, *range(min(count, plan.most)))] if count > 1 else []
    return [(item.id, i) for i in range(count)]


def for_everybody(unit: tuple[str | int, ...], plan: Plan) -> bool:
    return int(content_hash(plan.seed, list(unit)), 16) / 16**16 < plan.overlap


def _information(unit: tuple[str | int, ...], plan: Plan) -> float:
    item, a, b = unit
    table = plan.information.get(str(item))
    return float(table[int(a), int(b)]) if table is not None else 0.0
