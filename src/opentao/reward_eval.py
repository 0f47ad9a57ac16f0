"""How good is a reward model? ``tao reward eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opentao.bestofn import bootstrap
from opentao.preferences import Ranking
from opentao.progress import Progress
from opentao.reward_model import RewardModel


def accuracy(reward_model: RewardModel, rankings: Sequence[Ranking], progress: Progress) -> dict[str, Any]:
    """Share of pairs in which the preferred answer scores higher (a tie counts half), beside "the longer answer wins".

    Intervals are over prompts, since pairs of one prompt are not independent.
    """
    rankings = [r for r in rankings if r.pairs]
    groups = [reward_model.encode(r.prompt.messages, r.texts, r.instruction) for r in rankings]
    hits, longer = [], []
    with progress.stage("score", total=len(groups), unit="prompts", label="score preferences") as step:
        for i, scores in reward_model.score(groups):
            lengths = [float(len(t)) for t in rankings[i].texts]
            hits.append(_share_of_wins(scores, rankings[i].pairs))
            longer.append(_share_of_wins(lengths, rankings[i].pairs))
            step.advance(1, tokens=groups[i].num_tokens)
    return {
        "accuracy": bootstrap(hits).as_dict(),
        "longer_wins": bootstrap(longer).as_dict(),
        "prompts": len(rankings),
        "pairs": sum(len(r.pairs) for r in rankings),
    }


def _share_of_wins(values: Sequence[float], pairs: Sequence[tuple[int, int]]) -> float:
    wins = [1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0 for i, j in pairs]
    return sum(wins) / len(wins)
