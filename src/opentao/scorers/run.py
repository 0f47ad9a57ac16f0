"""Run scorers over a group and combine their numbers into rewards.

What a scorer returns is someone else's data, so each value is checked: a finite number is a score, everything else is
unscored with a reason, "kind: message":

* ``no_score``: None, or NaN without a reason;
* ``not_finite``: infinite, or beyond a float;
* ``not_a_number``: any other object;
* ``wrong_length``: not one value a response (the whole group is unscored: there is no telling which is whose);
* an exception's type: the scorer raised (the whole group), or the number's own conversion did. A `ScoreError` is no
  failure of a group: it ends the run.

A scorer that knows why a response has no score returns ``Score(value=NAN, error="kind: message")`` in its place. A
`Score` that carries an error is unscored whatever its value: a failure with a number on it is still a failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

from opentao.scorers.plugin import call_plugin, one_line, unscored
from opentao.types import NAN, BatchScorer, Group, Response, Score, Scorer


def run_scorer(scorer: Scorer, group: Group) -> tuple[Score, ...]:
    """One `Score` a response, whatever the scorer does; a failed group's responses carry the group's failure."""
    return _checked_values(group, lambda: scorer.score(group))


def run_scorer_many(scorer: Scorer, groups: Sequence[Group]) -> list[tuple[Score, ...]]:
    """`run_scorer` for several groups: in one call if the scorer has `score_many`, one by one if that call fails."""
    asked = [i for i, g in enumerate(groups) if g.responses and not g.failure]
    values: Any = None
    if isinstance(scorer, BatchScorer) and len(asked) > 1:
        values = call_plugin(lambda: list(scorer.score_many([groups[i] for i in asked])))
    if not isinstance(values, list) or len(values) != len(asked):
        return [run_scorer(scorer, group) for group in groups]
    found = dict(zip(asked, values, strict=True))
    return [_checked_values(group, lambda i=i: found[i]) for i, group in enumerate(groups)]  # type: ignore[misc]


def is_relative(scorer: Scorer) -> bool:
    """Does it say what an answer is worth among the others of its group, and so nothing beside another group's?"""
    return bool(getattr(scorer, "relative", False))


def largest_group(scorer: Scorer) -> int | None:
    """How many answers it takes at once; None: any number."""
    return getattr(scorer, "largest_group", None)


def run_scorer_among(scorer: Scorer, groups: Sequence[Group], companies: Sequence[Group]) -> list[tuple[Score, ...]]:
    """As `run_scorer_many`, but each answer alone in the place of one answer of its company, a group of that prompt.

    So the answers of every policy are judged beside the same others. If a policy is the one that made the company, its
    answers score as those did: in expectation there is no difference. Costs a group of the company's size an answer.
    """
    placed = [
        _placed(company, j, response)
        for group, company in zip(groups, companies, strict=True)
        for j, response in enumerate(group.responses)
        if not group.failure
    ]
    at_once = len(groups)  # as many as without company: a judge's deadline is for those that are scored together
    found = iter(
        [
            scores
            for start in range(0, len(placed), max(1, at_once))
            for scores in run_scorer_many(scorer, placed[start : start + at_once])
        ]
    )
    return [
        run_scorer(scorer, group)
        if group.failure
        else tuple(next(found)[_place(company, j)] for j in range(len(group.responses)))
        for group, company in zip(groups, companies, strict=True)
    ]


def _placed(company: Group, index: int, response: Response) -> Group:
    others = list(company.responses) or [response]
    others[_place(company, index)] = response
    return replace(company, responses=tuple(others), scores={}, rewards_N=())


def _place(company: Group, index: int) -> int:
    return index % max(1, len(company.responses))


def _checked_values(group: Group, read: Callable[[], Iterable[Any]]) -> tuple[Score, ...]:
    """What `read` gives for a group, each value checked."""
    num_responses = len(group.responses)
    if group.failure:
        return (unscored(group.failure.kind, group.failure.message),) * num_responses
    if not num_responses:
        return ()
    values = call_plugin(lambda: list(read()))  # list() inside: a generator raises only when read
    if isinstance(values, Score):
        return (values,) * num_responses
    if len(values) != num_responses:
        return (unscored("wrong_length", f"{len(values)} values for {num_responses} responses"),) * num_responses
    return tuple(to_score(value) for value in values)


def to_score(value: Any) -> Score:
    """Check one value of a scorer.

    >>> to_score(True).value, to_score(None).error
    (1.0, 'no_score: the scorer returned None')
    """
    if isinstance(value, Score):
        return _checked(value)
    if value is None:
        return unscored("no_score", "the scorer returned None")
    if not isinstance(value, SupportsFloat) or isinstance(value, str | bytes):
        return unscored("not_a_number", f"the scorer returned {type(value).__name__}")
    number = call_plugin(float, value)  # numpy, torch and Decimal convert; an array of several numbers raises
    return _checked(number if isinstance(number, Score) else Score(value=number))


def _checked(score: Score) -> Score:
    if score.error is not None:
        return Score(value=NAN, error=one_line(str(score.error)) or "unknown: no reason given")
    if not isinstance(score.value, float):
        return to_score(score.value)
    if math.isnan(score.value):
        return unscored("no_score", "the scorer returned NaN")
    if math.isinf(score.value):
        return unscored("not_finite", str(score.value))
    return score


@dataclass(kw_only=True, slots=True, frozen=True)
class Gate:
    """A hard rule on one scorer's score: ``Gate(at_least=1.0, cap=0.0)``."""

    at_least: float
    cap: float

    def apply(self, reward: float, score: float) -> float:
        if math.isnan(reward) or math.isnan(score):
            return NAN
        return reward if score >= self.at_least else min(reward, self.cap)


NO_GATES: Mapping[str, Gate] = {}


def combine(
    scores: Mapping[str, Sequence[Score]], weights: Mapping[str, float], gates: Mapping[str, Gate] = NO_GATES
) -> list[float]:
    """The rewards of a group: r_i = Σ_k weight_k · score_ki over the scorers in `weights`, capped by failed gates.

    A gate is a hard rule: a response whose score by that scorer is below `at_least` has a reward of at most `cap`, so
    no other scorer can make up for it. A response that any scorer of non-zero weight or with a gate left unscored has
    reward NaN: a partial sum would be a hidden 0. So has every response if no weight is non-zero, and a sum beyond a
    float. Scorers that `weights` does not name (an audit) do not count.

    Raises:
        ValueError: `weights` or `gates` name a scorer that has no scores.

    >>> combine({"a": [Score(value=1.0), Score(value=2.0)], "b": [Score(value=4.0), Score(value=NAN)]},
    ...         {"a": 1.0, "b": 0.5})
    [3.0, nan]
    >>> combine({"a": [Score(value=5.0), Score(value=2.0)], "valid": [Score(value=0.0), Score(value=1.0)]},
    ...         {"a": 1.0}, {"valid": Gate(at_least=1.0, cap=0.0)})
    [0.0, 2.0]
    """
    if missing := [name for name in (*weights, *gates) if name not in scores]:
        raise ValueError(f"weights name {missing}, but the scores are of {list(scores)}")
    counted = {name: weight for name, weight in weights.items() if weight != 0}
    num_responses = len(next(iter(scores.values()), ()))
    if not counted:
        return [NAN] * num_responses
    rows = zip(*(scores[name] for name in counted), strict=True)
    rewards = [_weighted_sum(row, list(counted.values())) for row in rows]
    for name, gate in gates.items():
        rewards = [gate.apply(r, s.value) for r, s in zip(rewards, scores[name], strict=True)]
    return rewards


def _weighted_sum(row: Sequence[Score], weights: Sequence[float]) -> float:
    """Exactly rounded, so that neither the order of the scorers nor the Python version can break or make a tie."""
    terms = [score.value * weight for score, weight in zip(row, weights, strict=True)]
    try:
        total = math.fsum(terms)
    except (OverflowError, ValueError):  # beyond a float; +inf and -inf among the terms
        return NAN
    return total if math.isfinite(total) else NAN


def score_groups(
    groups: Sequence[Group],
    scorers: Sequence[Scorer],
    weights: Mapping[str, float],
    gates: Mapping[str, Gate] = NO_GATES,
    companies: Sequence[Group] | None = None,
    *,
    keep: bool = False,
) -> list[Group]:
    """The groups with the scores of these scorers and the rewards made from them.

    `keep`: earlier scores of other scorers stay and count, else they are gone.

    `companies`: of each group's prompt, the answers among which relative scorers judge; none: the group's own.

    Raises:
        ValueError: two scorers have one name, or `weights` names none of them.
    """
    names = [scorer.name for scorer in scorers]
    if len(set(names)) < len(names):
        raise ValueError(f"scorer names must differ, got {names}")
    by_scorer = {
        scorer.name: run_scorer_many(scorer, groups)
        if companies is None or not is_relative(scorer)
        else run_scorer_among(scorer, groups, companies)
        for scorer in scorers
    }
    scored = []
    for i, group in enumerate(groups):
        scores = (group.scores if keep else {}) | {name: own[i] for name, own in by_scorer.items()}
        scored.append(group.with_scores(scores, combine(scores, weights, gates)))
    return scored
