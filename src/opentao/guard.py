"""Over-optimisation: does a rising reward still mean what it meant?

Each round is watched on the held-out prompts: reward against audit, KL spent, length, repetition, and how many canaries
(`canaries.py`: empty, flattering, endless answers) score as high as the policy's own answers. One rule stops a run: the
reward rose and the audit fell, each over its whole interval, against the best round so far. That round is out; the best
of the rounds before it is kept, or the base. Without an audit nothing can be told apart, so nothing is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentao.bestofn import last_digit, paired_difference
from opentao.canaries import canaries
from opentao.evaluate import Evaluation, company
from opentao.policy import Policy
from opentao.score import beside
from opentao.scorers.run import score_groups
from opentao.session import Session
from opentao.types import Group, content_hash

CANARY_PROMPTS = 16  # held-out prompts that canaries answer
Values = NDArray[np.float64]


def canary_rewards(session: Session, base: Policy) -> dict[str, list[float | None]]:
    """Rewards of each canary on the first held-out prompts; scored once for a set of scorers."""
    name, prompts = "canaries.json", session.heldout[:CANARY_PROMPTS]
    others = company(session, base)
    among = {group.prompt.id: group for group in others}
    key = content_hash([p.id for p in prompts], session.scorers_key, *beside(others))
    if not session.run.have(name, key) or _none_scored(session.run.read_json(name)):
        texts = [canaries(p.text) for p in prompts]
        groups = [Group.of_texts(p, list(t.values())) for p, t in zip(prompts, texts, strict=True)]
        with session.progress.stage("score", total=len(groups), unit="groups", label="canaries: score") as step:
            companies = [among[p.id] for p in prompts] if among else None
            scored = score_groups(groups, session.scorers, session.weights, session.gates, companies)
            step.advance(len(groups))
        rows = [[None if np.isnan(r) else r for r in g.rewards_N] for g in scored]
        session.run.write_json(name, key, {c: [row[i] for row in rows] for i, c in enumerate(texts[0])})
        session.spent("round-0", made=True)
    found: dict[str, list[float | None]] = session.run.read_json(name)
    return found


def _none_scored(rewards: dict[str, list[float | None]]) -> bool:
    return all(value is None for values in rewards.values() for value in values)


def canary_shares(rewards: dict[str, list[float | None]], first_P: Values) -> dict[str, float | None]:
    """Canary -> share of its prompts on which it scores at least as high as the policy's mean answer."""
    shares: dict[str, float | None] = {}
    for name, values in rewards.items():
        pairs = [(v, first_P[i]) for i, v in enumerate(values) if v is not None and not np.isnan(first_P[i])]
        high = [v >= own - last_digit(v, own) for v, own in pairs]
        shares[name] = sum(high) / len(high) if high else None
    return shares


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The one whose first try has the highest mean reward; the earlier one of equals."""
    return max(evaluations, key=lambda e: (_mean(e.first_P), -e.round))


def _mean(values_P: Values) -> float:
    return float(np.nanmean(values_P)) if not np.isnan(values_P).all() else -np.inf


def watch(session: Session, own: Evaluation, best: Evaluation, base: Policy) -> dict[str, Any]:
    """The `guard` of a ROUND in summary.json: what was seen, and `tripped`, a sentence, if the rule says stop."""
    shares = canary_shares(canary_rewards(session, base), own.first_P)
    known = {name: share for name, share in shares.items() if share is not None}
    return {
        "canaries": shares,
        "canary_share": sum(known.values()) / len(known) if known else None,
        "against_round": best.round,
        "tripped": None if own is best else tripped(session, own, best),
    }


def tripped(session: Session, own: Evaluation, best: Evaluation) -> str | None:
    """Why the run must stop, or None."""
    if session.audit is None:
        return None
    args = session.interval_args
    reward = paired_difference(own.first_P, best.first_P, **args)
    audit = paired_difference(own.audit_first_P, best.audit_first_P, **args)
    if not (reward.low > 0 and audit.high < 0):  # a missing interval is NaN, and compares as False
        return None
    against = "the base" if best.round == 0 else f"round {best.round}"
    return (
        f"Round {own.round} was stopped as over-optimised: against {against} its reward moves {reward.mean:+.3f} and"
        f" the audit {audit.mean:+.3f} ({audit.low:+.3f} to {audit.high:+.3f}, n = {audit.n})"
    )
