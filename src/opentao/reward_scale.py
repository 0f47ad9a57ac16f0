"""The scale on which score differences are probabilities: fitted to people's choices. ``tao reward calibrate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opentao.bestofn import bootstrap
from opentao.errors import DataError
from opentao.preferences import Ranking
from opentao.progress import Progress
from opentao.scorers.run import run_scorer_many
from opentao.types import Group, Scorer

SCALES = (1e-3, 1e3)  # how far calibration may stretch or shrink scores
TOGETHER = 16  # groups scored in one call


@dataclass(kw_only=True, slots=True)
class Comparisons:
    """Score differences of compared answers: ``Comparisons(differences=[0.4], wins=[1.0], prompts=[0])``"""

    differences: list[float]  # s_a − s_b
    wins: list[float]  # 1: people preferred a, ½: equally good
    prompts: list[int]  # which prompt each is of, numbered as they come


def comparisons(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Comparisons:
    """Every compared pair of every ranking whose two answers have a score."""
    found = Comparisons(differences=[], wins=[], prompts=[])
    numbers: dict[str, int] = {}
    for ranking, own in zip(rankings, scores, strict=True):
        index = numbers.setdefault(ranking.prompt.id, len(numbers))
        for pairs, win in ((ranking.pairs, 1.0), (ranking.tied, 0.5)):
            for i, j in pairs:
                if not math.isnan(own[i] - own[j]):
                    found.differences.append(own[i] - own[j])
                    found.wins.append(win)
                    found.prompts.append(index)
    return found


def fit_scale(differences: Sequence[float], wins: Sequence[float]) -> float:
    """The b that makes σ(b·d) the probability of winning: least −Σ w·log σ(b·d) + (1−w)·log σ(−b·d), b > 0.

    `wins`: 1 the first won, 0 the second, ½ a tie. The function is convex in b; one lost and one won comparison of the
    mean difference are added, without which pairs that are all right would ask for an infinite b. Source: temperature
    scaling, Guo et al., arXiv 1706.04599.
    """
    d, w = np.array(differences, dtype=float), np.array(wins, dtype=float)
    mean = float(np.abs(d).mean()) if len(d) else 0.0
    if mean == 0.0:
        return 1.0
    d, w = np.append(d, [mean, mean]), np.append(w, [1.0, 0.0])

    def slope(b: float) -> float:
        return float((d * (1 / (1 + np.exp(-np.clip(b * d, -500, 500))) - w)).sum())

    low, high = SCALES
    if slope(low) >= 0:
        return low
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.sqrt(low * high)


def log_loss(differences: Sequence[float], wins: Sequence[float], scale: float) -> float:
    """Mean nats a comparison: −w·log σ(b·d) − (1−w)·log σ(−b·d). A coin's is log 2."""
    d, w = scale * np.array(differences, dtype=float), np.array(wins, dtype=float)
    return float((w * np.logaddexp(0, -d) + (1 - w) * np.logaddexp(0, d)).mean())


def _by_its_instruction(rankings: Sequence[Ranking], own: str) -> tuple[list[Ranking], int]:
    """The rankings by the scorer's instruction, and how many others were left out; all, if there is but one."""
    if len({r.instruction for r in rankings}) < 2:
        return list(rankings), 0
    kept = [r for r in rankings if r.instruction == own]
    if not kept:
        wanted = f"are by the scorer's, {own!r}" if own else "have none, as the scorer has"
        raise DataError(f"choices by several instructions, but no rows {wanted}; give the scorer's args `instruction`")
    return kept, len(rankings) - len(kept)


def calibrate_scorer(scorer: Scorer, rankings: Sequence[Ranking], progress: Progress) -> dict[str, Any]:
    """Score every ranking and fit the scale; what the file of ``tao reward calibrate`` holds.

    Half of the rankings' prompts fit the scale that the other half is judged with, and the other way round, so that
    `log_loss` is of choices that the scale has not seen. `scale` itself is fitted on all. Where rows were judged by
    several instructions, only those by the scorer's own count: what is good by one is not by another.

    Raises:
        DataError: none of several instructions is the scorer's.
    """
    rankings, others = _by_its_instruction(rankings, getattr(scorer, "instruction", ""))
    scores: list[list[float]] = []
    unscored: dict[str, int] = {}
    with progress.stage("score", total=len(rankings), unit="prompts", label="score preferences") as step:
        for start in range(0, len(rankings), TOGETHER):
            groups = [Group.of_texts(r.prompt, r.texts) for r in rankings[start : start + TOGETHER]]
            for found in run_scorer_many(scorer, groups):
                scores.append([s.value for s in found])
                for s in found:
                    if s.error:
                        kind = s.error.partition(":")[0]
                        unscored[kind] = unscored.get(kind, 0) + 1
                step.advance(1)
    found_pairs = comparisons(rankings, scores)
    if not found_pairs.differences:
        return {"scale": None, "pairs": 0, "other_instructions": others, "unscored": unscored}
    d, w, p = found_pairs.differences, found_pairs.wins, found_pairs.prompts
    halves = [[i for i in range(len(d)) if p[i] % 2 == side] for side in (0, 1)]
    crossed = [_crossed_loss(d, w, halves[1 - side], halves[side]) for side in (0, 1) if all(halves)]
    hits = [_hits(d, w, [i for i in range(len(d)) if p[i] == index]) for index in sorted(set(p))]
    return {
        "scale": fit_scale(d, w),
        "pairs": len(d),
        "prompts": len(set(p)),
        "other_instructions": others,
        "unscored": unscored,
        "accuracy": bootstrap([h for h in hits if h is not None]).as_dict(),
        "log_loss": sum(crossed) / len(d) if crossed else None,
        "log_loss_uncalibrated": log_loss(d, w, 1.0),
        "log_loss_coin": math.log(2),
    }


def _crossed_loss(d: Sequence[float], w: Sequence[float], fit: Sequence[int], judge: Sequence[int]) -> float:
    """Summed loss of `judge` under the scale that `fit` gives."""
    scale = fit_scale([d[i] for i in fit], [w[i] for i in fit])
    return log_loss([d[i] for i in judge], [w[i] for i in judge], scale) * len(judge)


def _hits(d: Sequence[float], w: Sequence[float], own: Sequence[int]) -> float | None:
    """Share of one prompt's decided pairs in which the preferred answer scores higher; an equal score counts half."""
    decided = [i for i in own if w[i] == 1.0]
    return sum(1.0 if d[i] > 0 else 0.5 if d[i] == 0 else 0.0 for i in decided) / len(decided) if decided else None
