"""What instruction_following would score if an answer that mostly repeats its prompt followed nothing.

python echo.py RUN…     directories of instruction_following, as run_all.py leaves them
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from lab import EXAMPLES, summary_of

from opentao.store import Run, table_to_groups
from opentao.types import Group

sys.path.insert(0, str(EXAMPLES / "instruction_following"))
REPEATED = 0.5  # share of an answer's runs of four words that stand in the prompt


def groups(run: Path, round_: int) -> list[Group]:
    with Run(run, read_only=True) as opened:
        names = opened.names(f"round-{round_}/eval/groups/")
        return [group for name in names for group in table_to_groups(opened.read_table(name))]


def repeats(text: str, prompt: str) -> bool:
    """
    >>> repeats("Describe a kite briefly.", "Describe a kite briefly. Add a title."), repeats("A kite in the sky.", "A")
    (True, False)
    """
    there = set(_runs(prompt))
    own = _runs(text)
    return sum(run in there for run in own) > REPEATED * len(own)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return [tuple(words[i : i + 4]) for i in range(len(words) - 3)]


def instructions(found: list[Group]) -> Iterator[tuple[str, float, float, float]]:
    """(what, score, the same without repeated prompts, share of answers that repeat)."""
    from constraints import share

    for what, key in (("reward", "constraints"), ("audit", "unseen")):
        asked = [(g, g.prompt.meta[key]) for g in found if g.prompt.meta.get(key)]
        answers = [
            (share(wanted, r.text) or 0.0, repeats(r.text, g.prompt.text)) for g, wanted in asked for r in g.responses
        ]
        yield (
            what,
            fmean(s for s, _ in answers),
            fmean(0.0 if e else s for s, e in answers),
            fmean(e for _, e in answers),
        )


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        for round_ in sorted({0, summary_of(run)["best_round"]}):
            found = groups(run, round_)
            for what, score, other, share_ in instructions(found):
                print(f"{run} round {round_}: {what} {score:.3f}, so {other:.3f} ({share_:.1%} of the answers)")
