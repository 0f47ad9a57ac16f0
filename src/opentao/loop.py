"""The whole method in one function: rounds of generate → score → train → evaluate, then an honest verdict.

Every stage is a pure function of what it is given and leaves files under the run directory; started again after a kill,
`run` walks the same path and reuses what is there. Of the rounds that beat the base beyond doubt on held-out prompts
the best is kept; if none does, the verdict is "keep base". Before any training the base's groups say what there is to
gain; a round whose reward rises while the audit falls ends the run. What it looks like: `tao demo`,
`examples/loop_from_scratch.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opentao.config import Config
from opentao.errors import BrokenModelError, DataError, ScoreError, TrainError
from opentao.evaluate import Evaluation, evaluate, round_summary
from opentao.generate import generate, planned
from opentao.guard import best_of, watch
from opentao.policy import Policy
from opentao.predict import predict, said
from opentao.progress import Progress
from opentao.report import write_report
from opentao.score import failures, score, unscored
from opentao.session import Session, open_session
from opentao.train import train
from opentao.types import Engine, content_hash
from opentao.verdict import write_summary

Facts = dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What one round left behind."""

    evaluation: Evaluation
    numbers: dict[str, Any]  # a ROUND of summary.json
    unscored: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)


def run(
    config: Config,
    directory: Path,
    progress: Progress,
    engine: Engine | None = None,
    go_on: Callable[[str], bool] = lambda why_flat: True,
) -> dict[str, Any]:
    """Tune `config.model` from prompts alone. Returns the content of `summary.json`.

    `go_on` is asked before any training if the prediction is that there is nothing to gain, and told why.
    """
    with open_session(config, directory, progress, engine) as session:
        base = policy = Policy.of_base(config.model, trust_remote_code=config.trust_remote_code)
        outcomes = [measure(session, 0, base, base, earlier=[], facts=None)]
        prediction = predict(session, outcomes[0].evaluation)
        for line in said(prediction):
            progress.note(line)
        begun = session.run.have("round-1/steps.json")  # then nobody need be asked
        if prediction["flat"] and not begun and not go_on(prediction["flat"]):
            return finish(session, outcomes, prediction, stopped=prediction["flat"])
        for round_ in range(1, config.rounds + 1):
            try:
                shards = sample_round(session, round_, policy)
                groups = score(session, shards, f"round {round_}: score")
                policy, facts = train(session, round_, policy, groups)
                outcome = measure(session, round_, policy, base, earlier=outcomes, facts=facts)
            except (TrainError, ScoreError, BrokenModelError) as error:
                if round_ == 1 and isinstance(error, (ScoreError, BrokenModelError) if policy == base else ScoreError):
                    raise  # there is nothing to judge
                progress.note(f"round {round_} is not judged: {error}")
                return finish(session, outcomes, prediction, stopped=str(error))
            outcome.unscored += unscored(groups)
            outcome.failures += failures(groups)
            outcomes.append(outcome)
            if reason := outcome.numbers["guard"]["tripped"]:
                progress.note(reason)
                return finish(session, outcomes, prediction, stopped=reason)
        return finish(session, outcomes, prediction)


def sample_round(session: Session, round_: int, policy: Policy) -> list[str]:
    """Groups for a round's prompts from the newest policy; every round draws from streams of its own."""
    prompts, plan = session.prompts_of_round(round_), session.plan_of_round(round_)
    return generate(session, f"round-{round_}/groups", prompts, policy, plan, f"round {round_}: generate")


def sampled_round(session: Session, round_: int, policy: Policy) -> list[str]:
    """The shards that `sample_round` left.

    Raises:
        DataError: one is missing, or was made from another policy, other prompts or other settings.
    """
    folder, prompts = f"round-{round_}/groups", session.prompts_of_round(round_)
    shards = list(planned(session, folder, prompts, policy, session.plan_of_round(round_)))
    there = sum(session.run.have(name, key) for name, key, _ in shards)
    if there < len(shards):
        have = f"{there} of {len(shards)} shards of" if session.run.names(f"{folder}/") else "no"
        raise DataError(
            f"{session.run.root}: round {round_} has {have} groups as this config makes them; run"
            f" `tao generate --round {round_}` first, with the same settings"
        )
    return [name for name, _, _ in shards]


def policy_before(session: Session, round_: int) -> Policy:
    """The policy that round `round_` starts from: what the newest earlier round wrote, or the base.

    Raises:
        DataError: an earlier round is not trained.
    """
    run = session.run
    policy = Policy.of_base(session.config.model, trust_remote_code=session.config.trust_remote_code)
    for earlier in range(1, round_):
        name, steps = f"round-{earlier}/policy", f"round-{earlier}/steps.json"
        taken = run.read_json(steps) if run.have(steps) else None
        if taken is None or (taken and not run.have(name, run.key(steps))):
            raise DataError(f"{run.root}: round {earlier} is not trained; run `tao train --round {earlier}` first")
        if taken:
            policy = Policy.of_folder(policy, run.path(name))
    return policy


def measure(
    session: Session, round_: int, policy: Policy, base: Policy, *, earlier: Sequence[Outcome], facts: Facts | None
) -> Outcome:
    """Evaluate a policy on the held-out prompts, watch it against the `earlier` rounds, write `round-K/eval.json`."""
    evaluation = evaluate(session, round_, policy, base)
    numbers = round_summary(session, evaluation, earlier[0].evaluation if earlier else evaluation)
    numbers["guard"] = watch(session, evaluation, best_of([o.evaluation for o in earlier] or [evaluation]), base)
    numbers |= {"policy": policy.hash, "train": facts} | session.spent(f"round-{round_}")
    name, key = f"round-{round_}/eval.json", content_hash(policy.hash, session.scorers_key, session.audit_key)
    session.run.write_json(name, key, numbers | {"samples": evaluation.samples})
    return Outcome(
        evaluation=evaluation,
        numbers=numbers,
        unscored=Counter(evaluation.unscored),
        failures=Counter(evaluation.failures),
    )


def finish(session: Session, outcomes: list[Outcome], prediction: Facts, stopped: str | None = None) -> dict[str, Any]:
    """Verdict, `summary.json`, `report.html`."""
    summary = write_summary(
        session,
        [o.numbers for o in outcomes],
        [o.evaluation.policy for o in outcomes],
        unscored=sum((o.unscored for o in outcomes), Counter()),
        failures=sum((o.failures for o in outcomes), Counter()),
        prediction=prediction,
        stopped=stopped,
    )
    write_report(session.run.root)
    return summary
