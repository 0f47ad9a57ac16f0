"""Score: groups in, scores out, one shard beside each shard of groups and keyed by response id.

Re-scoring never touches responses. A scorer that fails leaves its responses unscored with the reason; a response with
an unscored part has no reward. The audit's scores stand in the same file and never enter the reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from opentao.errors import ScoreError
from opentao.scorers.run import score_groups
from opentao.session import AUDIT, Session, scores_of, shards
from opentao.store import attach_scores, scores_to_table, table_to_groups
from opentao.types import Group, content_hash

GROUPS_TOGETHER = 16  # a reward model fills its rows with several groups


def score(
    session: Session,
    group_shards: Sequence[str],
    label: str,
    *,
    with_audit: bool = False,
    company: Sequence[Group] = (),
) -> list[Group]:
    """Score every group of the shards. Returns the scored groups as the files hold them.

    A scorer that could score nothing at all of a shard (a judge that was not there, a key that was missing) is asked
    again when the run is started again. `company`: for every prompt of the shards, the group among whose answers
    relative scorers judge (`scorers.run`); none: the group's own.
    """
    run, among = session.run, {group.prompt.id: group for group in company}
    scorers = [*session.scorers, *([session.audit] if with_audit and session.audit else [])]
    audited = [session.audit_key] if with_audit else []
    scored: list[Group] = []
    told: set[str] = set()
    loaded = [table_to_groups(run.read_table(name)) for name in group_shards]
    with session.progress.stage("score", total=sum(map(len, loaded)), unit="groups", label=label) as step:
        for source, groups in zip(group_shards, loaded, strict=True):
            name = scores_of(source)
            key = content_hash(run.hash(source), session.scorers_key, *audited, *beside(company))
            asked, left = scorers, groups
            if run.have(name, key):
                groups = attach_scores(groups, run.read_table(name))
                asked = [scorer for scorer in scorers if scorer.name in silent(groups)]
                left = groups if asked else []
            step.reuse(len(groups) - len(left))
            if left:
                done = {group.prompt.id: group for group in groups}
                for batch in shards(left, GROUPS_TOGETHER):
                    others = [among[g.prompt.id] for g in batch] if company else None
                    scored_now = score_groups(batch, asked, session.weights, session.gates, others, keep=True)
                    done |= {group.prompt.id: group for group in scored_now}
                    step.advance(len(batch), tokens=sum(len(r.tokens_R) for g in batch for r in g.responses))
                run.write_table(name, key, scores_to_table(done.values()))
            scored += attach_scores(groups, run.read_table(name))
            for scorer_name in set(silent(scored[-len(groups) :])) - told:
                told.add(scorer_name)
                session.progress.note(f"{label}: scored nothing: {why_unscored(scored[-len(groups) :], [scorer_name])}")
    for note in _left_out(scored, told):
        session.progress.note(f"{label}: {note}")
    if group_shards:
        session.spent(group_shards[0].partition("/")[0])
    return scored


def _left_out(groups: Sequence[Group], told: Collection[str]) -> Iterator[str]:
    """What takes no part, in words: prompts without answers, answers unscored by a scorer that is not told of yet."""
    if failed := failures(groups):
        kinds = ", ".join(f"{kind} {count}" for kind, count in failed.most_common())
        yield f"{failed.total()} of {len(groups)} prompts could not be answered ({kinds})"
    num = sum(len(g.responses) for g in groups if not g.failure)
    for name, count in unscored([g for g in groups if not g.failure]).items():
        if name not in told:
            yield f"{count} of {num} answers unscored, most for {why_unscored(groups, [name])}"


def beside(company: Sequence[Group]) -> list[str]:
    """What of the company goes into a key: every answer's text."""
    return [content_hash([[r.text for r in group.responses] for group in company])] if company else []


def silent(groups: Sequence[Group]) -> list[str]:
    """Scorers that scored no response of these groups, though there are some."""
    found: dict[str, bool] = {}
    for group in groups:
        for name, scores in group.scores.items():
            if scores and not group.failure:
                found[name] = found.get(name, False) or any(s.scored for s in scores)
    return [name for name, scored in found.items() if not scored]


def require_scores(session: Session, groups: Sequence[Group], label: str, *, with_audit: bool = False) -> None:
    """Answers of which none could be scored say nothing: no reason to keep the base, but an error of the scorer.

    Raises:
        ScoreError: no prompt was answered, no answer has a reward or, `with_audit`, none an audit.
    """
    kept = "what was sampled is kept: mend that and start again"
    failed = Counter(f"{g.failure.kind}: {g.failure.message}" for g in groups if g.failure)
    if failed.total() == len(groups):
        why = "".join(f" ({reason})" for reason, _ in failed.most_common(1))
        raise ScoreError(f"{label}: none of {len(groups)} prompts could be answered{why}; {kept}")
    num = sum(len(group.responses) for group in groups)
    if not any(group.scored for group in groups):
        why = why_unscored(groups, session.weights)
        raise ScoreError(f"{label}: none of {num} answers could be scored ({why}); {kept}")
    if with_audit and session.audit and not any(s.scored for g in groups for s in g.scores.get(AUDIT, ())):
        why = why_unscored(groups, [AUDIT])
        raise ScoreError(f"{label}: none of {num} answers could be scored by the audit ({why}); {kept}")


def unscored(groups: Sequence[Group]) -> Counter[str]:
    """How many responses each scorer left unscored."""
    return Counter(name for g in groups for name, scores in g.scores.items() for s in scores if not s.scored)


def why_unscored(groups: Sequence[Group], by: Collection[str] | None = None) -> str:
    """The most frequent reason for which responses were left unscored, by these scorers or by any; "" if none was."""
    reasons = Counter(
        (name, s.error or "no reason given")
        for g in groups
        for name, scores in g.scores.items()
        for s in scores
        if not s.scored and (by is None or name in by)
    )
    return ": ".join(max(reasons, key=lambda reason: reasons[reason])) if reasons else ""


def failures(groups: Sequence[Group]) -> Counter[str]:
    """How many groups failed, by kind."""
    return Counter(g.failure.kind for g in groups if g.failure)
