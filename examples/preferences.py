"""Scored groups become preferences: python examples/preferences.py RUN --out preferences.jsonl

RUN is a directory that `tao generate` and `tao score` have filled, whose scorer stands in for the people who choose:
of every group up to four different answers, from the best to the worst, ranked by it. Groups in which nothing differs
teach nothing and are passed over.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from opentao.preferences import Ranking, write_preferences
from opentao.store import Run, attach_scores, table_to_groups
from opentao.types import Group

MOST = 4  # answers of a group


def ranking(group: Group) -> Ranking | None:
    """Which answers a person would be shown, and how they would be ranked; drawn by the prompt's own id."""
    scored = {group.responses[i].text: group.rewards_N[i] for i in group.scored}  # each text once
    texts = sorted(scored)
    random.Random(group.prompt.id).shuffle(texts)
    levels = spread(sorted(set(scored.values()), reverse=True), MOST)
    if len(levels) < 2:
        return None
    queues = [[t for t in texts if scored[t] == level] for level in levels]
    shown: list[str] = []
    while len(shown) < MOST and any(queues):
        shown += [queue.pop() for queue in queues if queue][: MOST - len(shown)]
    ranks = tuple(float(1 + sum(scored[other] > scored[t] for other in shown)) for t in shown)
    return Ranking(prompt=group.prompt, texts=tuple(shown), ranks=ranks, ties_equal=False)


def spread(values: list[float], most: int) -> list[float]:
    """At most so many of them, the first, the last, and those evenly between.

    >>> spread([9.0, 7.0, 6.0, 5.0, 2.0, 1.0], 3)
    [9.0, 6.0, 1.0]
    """
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with Run(given.run, read_only=True) as run:
        names = run.names("round-1/groups/")
        groups = [
            g
            for name in names
            for g in attach_scores(
                table_to_groups(run.read_table(name)), run.read_table(name.replace("/groups/", "/scores/"))
            )
        ]
    rankings = [r for r in map(ranking, groups) if r]
    write_preferences(given.out, rankings)
    print(f"{given.out}: {len(rankings)} rankings of {len(groups)} groups")


if __name__ == "__main__":
    main()
