"""Evaluate: a policy on held-out prompts, in numbers with intervals.

The same prompts and the same per-prompt statistics for every policy, so differences are paired. First try: the mean
reward of sampled responses (and of the greedy one). Best-of-k: unbiased, for every power of two that the group allows.
The audit scores the same responses and never enters a reward. KL is measured by the learner on the policy's own
samples at the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opentao.bestofn import Interval, baked_fraction, best_of_k, bootstrap, paired_difference, selection_probabilities
from opentao.generate import generate
from opentao.optimise import autocast
from opentao.pack import group_logprobs
from opentao.policy import Policy, free_memory, load_policy
from opentao.rows import Sequences
from opentao.score import failures, require_scores, score, unscored
from opentao.scorers.verifiers.repetition import distinct_share
from opentao.session import AUDIT, Session
from opentao.solved import full_marks, solved
from opentao.store import table_to_groups
from opentao.types import NAN, PLAIN, Group, SamplingPlan, content_hash

Values = NDArray[np.float64]
REPEATED_WORDS = 4
BAKED_K = 8  # the baked fraction measures how much of the base's best of this many is in the first try


@dataclass(kw_only=True, slots=True)
class Evaluation:
    """One policy on the held-out prompts. Arrays have one number a prompt, NaN where nothing could be scored."""

    round: int
    policy: Policy
    rewards_PN: list[Values]  # of every sampled response, NaN where unscored
    audits_PN: list[Values]
    first_P: Values
    greedy_P: Values
    best_P: dict[int, Values]  # k -> expected best of k
    audit_first_P: Values
    audit_greedy_P: Values
    audit_selected_P: dict[int, Values]  # k -> audit of the response that the reward picks among k
    audit_best_P: dict[int, Values]
    kl_P: Values
    length_P: Values
    distinct_P: Values  # share of runs of REPEATED_WORDS words that have not stood before in the response
    samples: list[dict[str, Any]]
    unscored: dict[str, int]
    failures: dict[str, int]


def evaluate(session: Session, round_: int, policy: Policy, base: Policy) -> Evaluation:
    """Sample, score and measure `policy`; round 0 is the base itself.

    Raises:
        ScoreError: none of the answers has a reward, or none an audit: there is nothing to compare.
    """
    plan = heldout_plan(session, policy, base)
    size = plan.group_size
    greedy_plan = replace(plan, group_size=1, temperature=0.0)
    folder, label = f"round-{round_}/eval", "base" if round_ == 0 else f"round {round_}"
    others = [] if policy == base else company(session, base)
    sampled = _scored(session, f"{folder}/groups", policy, plan, f"{label}: held-out", others)
    require_scores(session, sampled, f"{label}: held-out", with_audit=True)
    others = others or (sampled if session.relative else [])
    greedy = _scored(session, f"{folder}/greedy", policy, greedy_plan, f"{label}: held-out, greedy", others)
    if policy == base:
        kl_P = np.zeros(len(sampled))
    elif plan.truncated:  # the answers are not the policy's own draws: the mean of their log-ratios may be negative
        kl_P = np.full(len(sampled), NAN)
    else:
        kl_P = _kl(session, f"{folder}/kl.json", policy, base, sampled)
    ks = [2**i for i in range(size.bit_length())]
    rewards, audits = [_rewards(g) for g in sampled], [_audits(g) for g in sampled]
    return Evaluation(
        round=round_,
        policy=policy,
        rewards_PN=rewards,
        audits_PN=audits,
        first_P=_means(rewards),
        greedy_P=_means([_rewards(g) for g in greedy]),
        best_P={k: _bests(rewards, k) for k in ks},
        audit_first_P=_means(audits),
        audit_greedy_P=_means([_audits(g) for g in greedy]),
        audit_selected_P={k: _selected(rewards, audits, k) for k in ks},
        audit_best_P={k: _bests(audits, k) for k in ks},
        kl_P=kl_P,
        length_P=_means([np.array([len(r.tokens_R) for r in g.responses], dtype=float) for g in sampled]),
        distinct_P=_means(
            [np.array([distinct_share(r.text.split(), REPEATED_WORDS) for r in g.responses]) for g in sampled]
        ),
        samples=[_sample(g, h) for g, h in zip(sampled, greedy, strict=True)],
        unscored=dict(unscored([*sampled, *greedy])),
        failures=dict(failures(sampled)),
    )


def company(session: Session, base: Policy) -> list[Group]:
    """The base's held-out answers, if there are scorers that judge an answer by the others of its group; else none.

    Every policy's answers are judged among these: a vote or a rank inside a group of their own would say nothing of the
    policy (the mean rank of any group is the same), and more or less by how large the group is.
    """
    if not session.relative:
        return []
    names = generate(session, "round-0/eval/groups", session.heldout, base, heldout_plan(session, base, base), "base")
    return [group for name in names for group in table_to_groups(session.run.read_table(name))]


def heldout_plan(session: Session, policy: Policy, base: Policy) -> SamplingPlan:
    """How a policy's held-out answers are sampled."""
    config = session.config
    size = config.evaluate.base_group_size if policy == base else config.evaluate.group_size
    return replace(config.generate.plan(config.seed + 1), group_size=size, strategies=(PLAIN,), dtype="auto")


def _scored(
    session: Session, folder: str, policy: Policy, plan: SamplingPlan, label: str, others: Sequence[Group]
) -> list[Group]:
    names = generate(session, folder, session.heldout, policy, plan, label)
    return score(session, names, label, with_audit=True, company=others)


def _rewards(group: Group) -> Values:
    return np.array(group.rewards_N, dtype=np.float64)


def _audits(group: Group) -> Values:
    return np.array([s.value for s in group.scores.get(AUDIT, ())] or [NAN] * len(group.responses))


def _means(values: Sequence[Values]) -> Values:
    """Mean of each prompt's scored responses; NaN if there are none."""
    return np.array([np.nanmean(v) if v.size and not np.isnan(v).all() else NAN for v in values])


def _bests(values: Sequence[Values], k: int) -> Values:
    return np.array([best_of_k(v, k) if (~np.isnan(v)).sum() >= k else NAN for v in values])


def _selected(rewards: Sequence[Values], audits: Sequence[Values], k: int) -> Values:
    """Audit of the response that the reward would pick among k."""
    found = []
    for r, a in zip(rewards, audits, strict=True):
        r = np.where(np.isnan(a), NAN, r)
        enough = (~np.isnan(r)).sum() >= k
        found.append(float(np.nansum(selection_probabilities(r, k) * a)) if enough else NAN)
    return np.array(found)


def _kl(session: Session, name: str, policy: Policy, base: Policy, groups: Sequence[Group]) -> Values:
    """Mean over a prompt's first responses of Σ_t log π(y_t) − log π_base(y_t), in nats per response."""
    num, temperature = session.config.evaluate.kl_responses, session.config.generate.temperature
    read = [[g.prompt_tokens_P, *(r.tokens_R for r in g.responses[:num])] for g in groups]
    key = content_hash(policy.hash, base.hash, temperature, read)
    if not session.run.have(name, key):
        totals = [_sequence_logprobs(session, p, groups, num) for p in (policy, base)]
        values = [float(np.mean(a - b)) if len(a) else None for a, b in zip(*totals, strict=True)]
        session.run.write_json(name, key, values)
        session.spent(name.partition("/")[0])
    return np.array([NAN if v is None else v for v in session.run.read_json(name)])


def _sequence_logprobs(session: Session, policy: Policy, groups: Sequence[Group], num: int) -> list[Values]:
    """log π(y|x) of each group's first `num` responses, by the learner."""
    sequences = [
        Sequences(prompt_P=g.prompt_tokens_P, responses_NR=tuple(r.tokens_R for r in g.responses[:num])) for g in groups
    ]
    loaded = load_policy(policy, dtype=torch.float32)  # as the learner has it: products in bf16, sums not
    found = []
    with (
        autocast(loaded.model),
        session.progress.stage("evaluate", total=len(groups), unit="groups", label="KL") as step,
    ):
        row_tokens, temperature = session.config.train.row_tokens, session.config.generate.temperature
        for i, logprobs in group_logprobs(loaded.model, sequences, row_tokens=row_tokens, temperature=temperature):
            found.append(np.array([float(lp.double().sum()) for lp in logprobs]))
            step.advance(1, tokens=sequences[i].num_tokens)
    del loaded
    free_memory()
    return found


def _sample(group: Group, greedy: Group) -> dict[str, Any]:
    return {
        "prompt_id": group.prompt.id,
        "prompt": group.prompt.text,
        "responses": _shown(group)[:4],
        "greedy": next(iter(_shown(greedy)), None),
    }


def _shown(group: Group) -> list[dict[str, Any]]:
    return [
        {"text": r.text, "reward": _or_null(reward), "audit": _or_null(audit), "finish": r.finish}
        for r, reward, audit in zip(group.responses, group.rewards_N, _audits(group), strict=True)
    ]


def _or_null(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def round_summary(session: Session, own: Evaluation, base: Evaluation) -> dict[str, Any]:
    """The numbers of one round, each mean with its interval and n."""
    settings = session.config.evaluate
    args = session.interval_args

    def interval(values: Values) -> dict[str, Any]:
        return bootstrap(values, **args).as_dict()

    baked_k = max(k for k in base.best_P if k <= BAKED_K)
    summary: dict[str, Any] = {
        "round": own.round,
        "first_try": interval(own.first_P),
        "greedy": interval(own.greedy_P),
        "best_of": {str(k): interval(v) for k, v in own.best_P.items()},
        "kl": interval(own.kl_P),
        "length": interval(own.length_P),
        "distinct": interval(own.distinct_P),
        "baked_k": baked_k,
        "baked_fraction": baked_fraction(own.first_P, base.first_P, base.best_P[baked_k], **args).as_dict(),
        "improvement": None,
        "audit": None,
        "audit_improvement": None,
    }
    at, tries = settings.solved_at, min(settings.base_group_size, settings.group_size)
    at = full_marks(base.rewards_PN) if at is None else at
    summary["solved"] = None if at is None else solved(own.rewards_PN, at, args, tries)
    if session.audit is not None:
        marks = full_marks(base.audits_PN)
        summary["audit"] = {
            "solved": None if marks is None else solved(own.audits_PN, marks, args, tries),
            "first_try": interval(own.audit_first_P),
            "greedy": interval(own.audit_greedy_P),
            "best_of": {str(k): interval(v) for k, v in own.audit_best_P.items()},
            "selected_of": {str(k): interval(v) for k, v in own.audit_selected_P.items()},
        }
    if own is not base:
        summary["improvement"] = paired_difference(own.first_P, base.first_P, **args).as_dict()
        if session.audit is not None:
            difference: Interval = paired_difference(own.audit_first_P, base.audit_first_P, **args)
            summary["audit_improvement"] = difference.as_dict()
    return summary
