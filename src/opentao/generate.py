"""Generate: prompts in, unscored groups out, one Parquet shard for every few prompts.

A shard is made from its prompts, the policy and the sampling plan, and only from them; one that is there already is
reused, so a killed run samples nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from opentao.engines.memory import default_rows
from opentao.policy import Policy, default_device
from opentao.session import Session, scores_of, shards
from opentao.store import groups_to_table
from opentao.types import Group, Prompt, ReportingEngine, SamplingPlan, content_hash

SHARDS = "shards.json"


def generate(
    session: Session, folder: str, prompts: Sequence[Prompt], policy: Policy, plan: SamplingPlan, label: str
) -> list[str]:
    """Sample a group for each prompt into `folder`. Returns the shards' names, in the prompts' order."""
    run = session.run
    names = []
    with session.progress.stage("generate", total=len(prompts), unit="prompts", label=label) as step:
        for name, key, batch in planned(session, folder, prompts, policy, plan):
            if run.have(name, key):
                step.reuse(len(batch))
            else:
                session.engine.load(policy)
                if isinstance(session.engine, ReportingEngine):
                    session.engine.on_progress = step.underway
                groups = []
                for group in session.engine.sample(batch, plan):
                    groups.append(group)
                    step.advance(1, tokens=sum(len(r.tokens_R) for r in group.responses))
                run.discard(scores_of(name))  # of other answers
                run.write_table(name, key, groups_to_table(_in_order(batch, groups)))
            names.append(name)
    session.spent(folder.partition("/")[0])
    for left_over in set(run.names(f"{folder}/")) - set(names):  # of an earlier config with more prompts
        run.discard(scores_of(left_over))
        run.discard(left_over)
    return names


def planned(
    session: Session, folder: str, prompts: Sequence[Prompt], policy: Policy, plan: SamplingPlan
) -> Iterator[tuple[str, str, list[Prompt]]]:
    """Name, key and prompts of every shard that `generate` makes."""
    for number, batch in enumerate(shards(prompts, _shard_size(session, plan))):
        key = content_hash([p.id for p in batch], policy.hash, asdict(plan))
        yield f"{folder}/{number:05d}.parquet", key, batch


def _shard_size(session: Session, plan: SamplingPlan) -> int:
    """Two full batches a shard, so that waiting groups take the rows of those that end early.

    Whatever `batch_responses` is, and on whatever device the run goes on: turning the one down for want of memory, or
    losing the other, must not sample anything again. So the run remembers what was a batch where it began.
    """
    if session.config.generate.shard_prompts:
        return session.config.generate.shard_prompts
    if not session.run.have(SHARDS):
        session.run.write_json(SHARDS, SHARDS, {"responses": 2 * default_rows(default_device())})
    responses: int = session.run.read_json(SHARDS)["responses"]
    return max(1, responses // plan.group_size)


def _in_order(batch: Sequence[Prompt], groups: Sequence[Group]) -> list[Group]:
    """Engines may yield in any order; files do not depend on it."""
    by_id = {g.prompt.id: g for g in groups}
    return [by_id[p.id] for p in batch]
