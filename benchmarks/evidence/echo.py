"""What is in two recipes' held-out answers that their rules take for what it is not; of runs that are there.

    python echo.py RUN…     directories of instruction_following or document_qa, as run_all.py leaves them

instruction_following: the score if an answer that mostly repeats its prompt follows nothing. document_qa: quotations
and few words by the passage alone; the recipe's rules count what stands before it, the first one the question, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from lab import EXAMPLES, summary_of

from opentao.store import Run, table_to_groups
from opentao.types import Group, Prompt

sys.path[:0] = [str(EXAMPLES / "instruction_following"), str(EXAMPLES / "document_qa")]
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


def questions(found: list[Group]) -> Iterator[tuple[str, float, float, float]]:
    """(rule, score, score by the passage alone, share of answers that differ)."""
    from answers import grounded

    from opentao.config import ScorerConfig
    from opentao.scorers.registry import build_scorer
    from opentao.scorers.run import run_scorer

    whole, alone = (
        build_scorer(ScorerConfig(type="citation", args={"min_words": 4} | key)) for key in ({}, {"key": "passage"})
    )
    pairs: dict[str, list[tuple[float, float]]] = {"citation": [], "grounded": []}
    for group in found:
        before, after = parts(group.prompt)
        sides = (whole, group), (alone, replace(group, prompt=before))
        pairs["citation"] += zip(*([s.value for s in run_scorer(scorer, g)] for scorer, g in sides), strict=True)
        prompts = (group.prompt, after)
        pairs["grounded"] += zip(*([grounded(p, r.text) for r in group.responses] for p in prompts), strict=True)
    for rule, own in pairs.items():
        yield rule, fmean(a for a, _ in own), fmean(b for _, b in own), fmean(a != b for a, b in own)


def parts(prompt: Prompt) -> tuple[Prompt, Prompt]:
    """The prompt with its passage as a label, and without what stands before the passage."""
    text = str(prompt.messages[-1]["content"]).partition("Passage:")[2]
    labelled = Prompt(messages=prompt.messages, meta=prompt.meta | {"passage": text.rpartition("Question:")[0]})
    return labelled, Prompt(messages=({"role": "user", "content": text},), meta=prompt.meta)


if __name__ == "__main__":
    for run in map(Path, sys.argv[1:]):
        for round_ in sorted({0, summary_of(run)["best_round"]}):
            found = groups(run, round_)
            rows = instructions(found) if any("constraints" in g.prompt.meta for g in found) else questions(found)
            for what, score, other, share_ in rows:
                print(f"{run} round {round_}: {what} {score:.3f}, so {other:.3f} ({share_:.1%} of the answers)")
