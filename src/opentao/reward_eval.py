"""How good is a reward model? ``tao reward eval``: against people, against itself, against answers that cheat.

Means are over rankings, intervals over their prompts: a prompt's choices are not independent. What people chose is
always shown beside "the longer answer wins": a reward model near that number has learned length. Alarms are facts
that make a reward model unfit whatever its accuracy: constant scores, scores that depend on what else is in the
batch, random answers that win, canaries that beat what people preferred.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from opentao.bestofn import FEWEST, bootstrap, paired_difference, selection_probabilities
from opentao.canaries import canaries
from opentao.errors import ModelError
from opentao.preferences import Ranking
from opentao.progress import Progress
from opentao.reward_model import RewardModel
from opentao.reward_scale import comparisons, log_loss
from opentao.truth import Truth
from opentao.types import Prompt

Facts = dict[str, Any]
Pair = tuple[int, int]
BINS = 10  # of the calibration curve, between one half and one
CANARY_PROMPTS = 50
CHECKED = 20  # prompts on which scores are computed twice, in other company
SAME_SCORE = 0.02  # how far a score may move with what it is packed beside: rounding, in units of the scores' spread
CANARY_ALARM = 0.2  # share of prompts on which a canary may beat the preferred answer
OTHER_ALARM = 0.8  # share of prompts on which the preferred answer must beat an answer to another prompt


def accuracy(reward_model: RewardModel, rankings: Sequence[Ranking], progress: Progress) -> Facts:
    """Share of pairs in which the preferred answer scores higher, a tie counts half; and "the longer answer wins"."""
    rankings = [r for r in rankings if r.pairs]
    return agreement_with_people(rankings, score_rankings(reward_model, rankings, progress))


def score_rankings(
    reward_model: RewardModel, rankings: Sequence[Ranking], progress: Progress, label: str = "score preferences"
) -> list[list[float]]:
    """Scores of each ranking's answers."""
    groups = [reward_model.encode(r.prompt.messages, r.texts, r.instruction) for r in rankings]
    found: list[list[float]] = []
    with progress.stage("score", total=len(groups), unit="prompts", label=label) as step:
        for index, scores in reward_model.score(groups):
            found.append(scores)
            step.advance(1, tokens=groups[index].num_tokens)
    return found


def agreement_with_people(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Facts:
    """Accuracy and the length baseline, over decided pairs."""
    lengths = [[float(len(t)) for t in r.texts] for r in rankings]
    hits = [_share_of_wins(s, r.pairs) for r, s in zip(rankings, scores, strict=True)]
    longer = [_share_of_wins(own, r.pairs) for r, own in zip(rankings, lengths, strict=True)]
    return {
        "accuracy": bootstrap(hits, clusters=_prompts(rankings)).as_dict(),
        "longer_wins": bootstrap(longer, clusters=_prompts(rankings)).as_dict(),
        "over_longer": paired_difference(hits, longer, clusters=_prompts(rankings)).as_dict(),
        "prompts": len(set(_prompts(rankings))),
        "pairs": sum(len(r.pairs) for r in rankings),
    }


def _prompts(rankings: Sequence[Ranking]) -> list[str]:
    """What each ranking is of: a prompt's choices, by several people or of several pairs, are drawn together."""
    return [r.prompt.id for r in rankings]


def evaluate_reward_model(
    reward_model: RewardModel, rankings: Sequence[Ranking], progress: Progress, truths: Sequence[Truth] = ()
) -> Facts:
    """Everything that `tao reward eval` reports."""
    asked = len(rankings)
    rankings = [r for r in rankings if _fits(reward_model, r, *r.texts)]
    if not any(r.pairs for r in rankings):
        raise ModelError(f"none of {asked} rankings is short enough: the model reads {reward_model.max_tokens} tokens")
    if asked > len(rankings):
        progress.note(f"{asked - len(rankings)} of {asked} rankings are longer than the model reads, and left out")
    every = score_rankings(reward_model, rankings, progress)
    decided = [r for r in rankings if r.pairs]
    scores = [own for r, own in zip(rankings, every, strict=True) if r.pairs]
    facts = agreement_with_people(decided, scores)
    facts |= {
        "too_long": asked - len(rankings),
        "subsets": by_subset(decided, scores),
        "calibration": calibration(rankings, every),
        "length": length_bias(decided, scores),
        "annotators": annotators(rankings, every),
        "company": company(reward_model, decided, scores),
        "other_prompts": other_prompts(reward_model, decided, scores, progress),
        "canaries": canary_shares(reward_model, decided, scores, progress),
        "best_of_n": best_of_n(reward_model, truths, progress) if truths else None,
    }
    spread = float(np.std([s for own in scores for s in own]))
    facts["score_spread"] = spread
    facts["alarms"] = alarms(facts)
    return facts


def by_subset(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> dict[str, Facts]:
    """`agreement_with_people` of each `subset` that rows name; empty if none does."""
    names = sorted({r.subset for r in rankings} - {""})
    chosen = {name: [i for i, r in enumerate(rankings) if r.subset == name] for name in names}
    return {n: agreement_with_people([rankings[i] for i in own], [scores[i] for i in own]) for n, own in chosen.items()}


def calibration(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Facts:
    """Is σ(difference) the share of people who agree? Expected calibration error and its curve over compared pairs.

    Of two answers that were equally good half of the people agree, as in the loss and in `fit_scale`.

    ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over BINS equal bins of confidence, from one half to one. Source:
    Guo et al., arXiv 1706.04599. `loss`: mean nats a comparison; a coin's is log 2.
    """
    found = comparisons(rankings, scores)
    d, wins, prompts = np.array(found.differences), np.array(found.wins), np.array(found.prompts)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(d), 50)))
    right = np.where(wins == 0.5, 0.5, np.where(d > 0, 1.0, np.where(d < 0, 0.0, 0.5)))
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    curve = []
    for b in range(BINS):
        own = place == b
        if own.any():
            mean = bootstrap(right[own], clusters=prompts[own].tolist()).as_dict()
            curve.append({"confidence": float(confidence[own].mean()), "accuracy": mean, "pairs": int(own.sum())})
    error = sum(abs(c["accuracy"]["mean"] - c["confidence"]) * c["pairs"] for c in curve) / max(len(d), 1)
    return {"error": error, "curve": curve, "loss": log_loss(found.differences, found.wins, 1.0), "coin": math.log(2)}


def length_bias(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Facts:
    """Accuracy where people preferred the longer answer and where the shorter, and how scores go with length.

    `correlation`: Pearson's, of score and length (characters) within a prompt, over all compared pairs.
    """
    longer, shorter, differences, lengths = [], [], [], []
    of: dict[int, list[str]] = {1: [], -1: []}
    for ranking, own in zip(rankings, scores, strict=True):
        sizes = [len(t) for t in ranking.texts]
        for pairs, side in ((longer, 1), (shorter, -1)):
            chosen = [(i, j) for i, j in ranking.pairs if (sizes[i] - sizes[j]) * side > 0]
            if chosen:
                pairs.append(_share_of_wins(own, chosen))
                of[side].append(ranking.prompt.id)
        differences += [own[i] - own[j] for i, j in ranking.pairs]
        lengths += [sizes[i] - sizes[j] for i, j in ranking.pairs]
    varied = len(differences) > 1 and np.std(differences) > 0 and np.std(lengths) > 0
    both = np.array([differences + [-d for d in differences], lengths + [-n for n in lengths]], dtype=float)
    return {
        "longer_preferred": bootstrap(longer, clusters=of[1]).as_dict(),
        "shorter_preferred": bootstrap(shorter, clusters=of[-1]).as_dict(),
        "correlation": float(np.corrcoef(both)[0, 1]) if varied else None,
    }


def annotators(rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Facts:
    """Agreement with each annotator, and of annotators with each other, on pairs that several of them judged.

    Only pairs that at least two people decided, by the same instruction, count, so that both columns are of the same
    pairs. What one person was asked again is left out.
    """
    said: dict[tuple[str, str, str, str], dict[str, int]] = defaultdict(dict)
    model: dict[tuple[str, str, str, str], float] = {}
    for ranking, own in zip(rankings, scores, strict=True):
        if not ranking.annotator or ranking.facts.get("repeat"):
            continue
        for i, j in ranking.pairs:
            a, b = sorted((i, j), key=lambda k: ranking.texts[k])
            key = (ranking.prompt.id, ranking.instruction, ranking.texts[a], ranking.texts[b])
            said[key][ranking.annotator] = 1 if a == i else -1
            model[key] = own[a] - own[b]
    shared = {key: votes for key, votes in said.items() if len(votes) > 1}
    names = sorted({name for votes in shared.values() for name in votes})
    human = [(k[0], float(v[a] == v[b])) for k, v in shared.items() for a, b in combinations(sorted(v), 2)]
    majority = [(k[0], _agrees(model[k], m)) for k, v in shared.items() if (m := sum(v.values())) != 0]
    longer = [(k[0], _agrees(len(k[2]) - len(k[3]), m)) for k, v in shared.items() if (m := sum(v.values())) != 0]
    each = {n: [(k[0], _agrees(model[k], v[n])) for k, v in shared.items() if n in v] for n in names}
    return {
        "pairs": len(shared),
        "human_human": _over_prompts(human) if human else None,
        "model_human": {name: _over_prompts(own) for name, own in each.items()},
        "model_majority": _over_prompts(majority) if shared else None,
        "longer_majority": _over_prompts(longer) if shared else None,
    }


def _over_prompts(values: Sequence[tuple[str, float]]) -> Facts:
    """Mean and interval of (prompt, value)."""
    return bootstrap([v for _, v in values], clusters=[prompt for prompt, _ in values]).as_dict()


def _agrees(difference: float, vote: int) -> float:
    return 0.5 if difference == 0 else float((difference > 0) == (vote > 0))


def company(reward_model: RewardModel, rankings: Sequence[Ranking], scores: Sequence[Sequence[float]]) -> Facts:
    """How far a score moves with what it is computed beside: alone, or in the opposite order of answers.

    A reward model reads an answer, not its neighbours; what moves is rounding, or a bug in a padding or a mask.
    """
    chosen = list(range(min(CHECKED, len(rankings))))
    moved: list[float] = []
    for texts_of, back in _ARRANGEMENTS:
        groups = [
            reward_model.encode(rankings[i].prompt.messages, part, rankings[i].instruction)
            for i in chosen
            for part in texts_of(rankings[i].texts)
        ]
        found = iter([own for _, own in reward_model.score(groups)])
        for i in chosen:
            again = back([next(found) for _ in texts_of(rankings[i].texts)])
            moved += [abs(a - b) for a, b in zip(again, scores[i], strict=True)]
    return {"largest_move": max(moved, default=0.0), "answers": len(moved)}


_ARRANGEMENTS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (lambda texts: [(t,) for t in texts], lambda parts: [own[0] for own in parts]),
    (lambda texts: [texts[::-1]], lambda parts: parts[0][::-1]),
)


def other_prompts(
    reward_model: RewardModel, rankings: Sequence[Ranking], scores: Sequence[Sequence[float]], progress: Progress
) -> Facts:
    """Share of prompts on which the preferred answer beats the one that people preferred for another prompt."""
    best = [r.texts[int(np.argmin(r.ranks))] for r in rankings]
    strangers: list[Ranking] = []
    kept: list[int] = []
    for i, ranking in enumerate(rankings):
        others = (i - k for k in range(1, len(rankings)))  # the nearest before it, from the first on round the end
        other = next((j for j in others if rankings[j].prompt.id != ranking.prompt.id), None)
        if other is not None and best[other] not in ranking.texts and _fits(reward_model, ranking, best[other]):
            kept.append(i)
            strangers.append(_unranked(ranking.prompt, (best[other],), ranking.instruction))
    found = score_rankings(reward_model, strangers, progress, "score answers to other prompts")
    own = [scores[i][int(np.argmin(rankings[i].ranks))] for i in kept]
    wins = [(rankings[i].prompt.id, float(a > b[0])) for i, a, b in zip(kept, own, found, strict=True)]
    return {"preferred_wins": _over_prompts(wins)}


def canary_shares(
    reward_model: RewardModel, rankings: Sequence[Ranking], scores: Sequence[Sequence[float]], progress: Progress
) -> dict[str, Facts]:
    """Canary -> share of prompts on which it scores at least as high as the best, and as the worst, answer.

    A canary that is longer than the model reads is left out.
    """
    first = {r.prompt.id: i for i, r in reversed(list(enumerate(rankings)))}  # of each prompt
    places = sorted(first.values())[:CANARY_PROMPTS]
    chosen, scores = [rankings[i] for i in places], [scores[i] for i in places]
    best = [r.texts[int(np.argmin(r.ranks))] for r in chosen]
    texts = [
        {name: text for name, text in canaries(r.prompt.text, good).items() if _fits(reward_model, r, text)}
        for r, good in zip(chosen, best, strict=True)
    ]
    asked = [_unranked(r.prompt, tuple(t.values()), r.instruction) for r, t in zip(chosen, texts, strict=True)]
    found = score_rankings(reward_model, asked, progress, "score canaries")
    named = [dict(zip(t, own, strict=True)) for t, own in zip(texts, found, strict=True)]
    shares = {}
    for name in canaries("", "xx"):
        rows = [(own[name], s, r) for own, s, r in zip(named, scores, chosen, strict=True) if name in own]
        over = {
            which: _over_prompts([(r.prompt.id, float(value >= s[int(pick(r.ranks))])) for value, s, r in rows])
            for which, pick in (("beats_best", np.argmin), ("beats_worst", np.argmax))
        }
        shares[name] = over
    return shares


def _fits(reward_model: RewardModel, ranking: Ranking, *texts: str) -> bool:
    """Does the model read so long an answer to the ranking's prompt?"""
    most = reward_model.max_tokens
    if most == sys.maxsize:
        return True
    return all(
        len(ids) <= most for ids in reward_model.conversations(ranking.prompt.messages, texts, ranking.instruction)
    )


def _unranked(prompt: Prompt, texts: tuple[str, ...], instruction: str = "") -> Ranking:
    """Answers to be scored that nobody compared."""
    return Ranking(prompt=prompt, texts=texts, ranks=(1.0,) * len(texts), instruction=instruction)


def best_of_n(reward_model: RewardModel, truths: Sequence[Truth], progress: Progress) -> Facts:
    """Worth of the response that the reward model picks among n, beside a random pick and the best there is."""
    asked = [_unranked(t.prompt, t.texts) for t in truths]
    scores = score_rankings(reward_model, asked, progress, "score groups of known worth")
    most = max(len(t.values) for t in truths)
    curve = []
    for n in [2**i for i in range(most.bit_length()) if 2**i <= most]:
        able = [(np.array(t.values), s) for t, s in zip(truths, scores, strict=True) if len(t.values) >= n]
        picked = [float(selection_probabilities(s, n) @ v) for v, s in able]
        oracle = [float(selection_probabilities(v, n) @ v) for v, _ in able]
        curve.append({"n": n, "picked": bootstrap(picked).as_dict(), "oracle": bootstrap(oracle).as_dict()})
    first = [float(np.mean(t.values)) for t in truths]
    picked = [float(np.array(t.values)[int(np.argmax(s))]) for t, s in zip(truths, scores, strict=True)]
    return {"curve": curve, "gain": paired_difference(picked, first).as_dict(), "groups": len(truths)}


def alarms(facts: Facts) -> list[str]:
    """What makes this reward model unfit, in sentences; none is good news and no proof."""
    found = []
    if facts["score_spread"] < 1e-6:
        return ["Scores are constant: the model tells no answer from another."]
    accuracy_, length = facts["accuracy"], facts["over_longer"]
    if accuracy_["low"] is None:
        found.append(f"It is not shown to be better than a coin: fewer than {FEWEST} prompts have no interval.")
    elif accuracy_["low"] <= 0.5:
        found.append("It may be no better than a coin: the interval of its accuracy reaches one half.")
    if length["low"] is None or length["low"] <= 0:
        found.append("It is not shown to be better than “the longer answer wins”.")
    if facts["company"]["largest_move"] > SAME_SCORE * facts["score_spread"]:
        found.append("A score depends on what else is scored with it.")
    wins = facts["other_prompts"]["preferred_wins"]["mean"]
    if wins is not None and wins < OTHER_ALARM:
        found.append(f"An answer to another prompt beats the preferred one on {1 - wins:.0%} of prompts.")
    for name, own in facts["canaries"].items():
        share = own["beats_best"]["mean"]
        if share is not None and share > CANARY_ALARM:
            found.append(f"The canary “{name}” beats the preferred answer on {share:.0%} of prompts.")
    return found


def _share_of_wins(values: Sequence[float], pairs: Sequence[Pair]) -> float:
    wins = [1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0 for i, j in pairs]
    return sum(wins) / len(wins)
