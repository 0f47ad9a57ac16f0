"""Train: scored groups in, a policy out. It owns rows, micro-batches and the stage's files, no algorithm.

Groups whose rewards are all equal teach nothing and are left out (counted). One optimiser step takes
`prompts_per_step` groups; rows of packed groups are micro-batches inside it and never change its gradient. A group too
long for one row is differentiated in two passes: first the loss with respect to its log-probs, then row by row.
Left out: dropout (the policy must equal its reference at the first step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opentao.bestofn import bootstrap, max_variance_subset
from opentao.config import TrainConfig
from opentao.engines.memory import default_row_tokens
from opentao.objectives import OBJECTIVES, Credit, Objective, Totals
from opentao.optimise import Checkpoint, Metrics, autocast, batches, num_steps, optimise
from opentao.pack import check_packing, group_logprobs, row_logprobs, rows_for
from opentao.policy import LoadedPolicy, Policy, free_memory, load_for_training
from opentao.rows import Row, Sequences, whole_groups
from opentao.score import require_scores
from opentao.session import Session
from opentao.types import NAN, Group, ReleasingEngine, Strategy, content_hash

KNOBS = {"row_tokens", "gradient_checkpointing", "save_every_steps"}  # of memory and time: the policy is the same
MISMATCH_GROUPS = 16  # on which the distance of the sampler from the learner is measured


Draws = tuple[Sequences, list[Tensor]]  # what was sampled after one prompt, and its log-probs [R] by the sampler


@dataclass(kw_only=True, slots=True)
class Example:
    """One informative group, cut down to the responses that the objective looks at."""

    rewards_N: np.ndarray
    chosen: list[int]
    sequences: Sequences
    sampler_logprobs: list[Tensor]
    ref_logprobs: list[Tensor]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences.responses_NR))


def examples_of(groups: Sequence[Group], config: TrainConfig) -> list[Example]:
    """Informative groups as training examples, without reference log-probs."""
    objective = OBJECTIVES[config.objective]
    examples = []
    for group in groups:
        if not group.informative:
            continue
        rewards_N = np.array(group.rewards_N, dtype=np.float64)
        chosen = kept(rewards_N, list(objective.choose(rewards_N, config)), config)
        responses = [group.responses[i] for i in chosen]
        examples.append(
            Example(
                rewards_N=rewards_N,
                chosen=chosen,
                sequences=Sequences(prompt_P=group.prompt_tokens_P, responses_NR=tuple(r.tokens_R for r in responses)),
                sampler_logprobs=[torch.tensor(r.sampler_logprobs_R) for r in responses],
                ref_logprobs=[],
            )
        )
    return examples


def kept(rewards_N: np.ndarray, chosen: list[int], config: TrainConfig) -> list[int]:
    """Of the responses an objective would look at, those that `train.keep` leaves."""
    if config.keep is None or len(chosen) <= config.keep.responses:
        return chosen
    return [chosen[i] for i in max_variance_subset(rewards_N[chosen], config.keep.responses)]


def attach_reference(
    model: Any, examples: Sequence[Example], config: TrainConfig, temperature: float, on_group: Callable[[int], None]
) -> None:
    """Fill `ref_logprobs` with the model as it is now (for LoRA on the base: call inside `LoadedPolicy.reference`)."""
    sequences = [e.sequences for e in examples]
    with autocast(model):
        for i, logprobs in group_logprobs(model, sequences, row_tokens=config.row_tokens, temperature=temperature):
            examples[i].ref_logprobs = [lp.float().cpu() for lp in logprobs]
            on_group(sequences[i].num_tokens)


def plain_draws(groups: Sequence[Group], strategies: Collection[str]) -> list[Draws]:
    """Of the first groups all responses whose strategy changes nothing: the sampler saw the prompt that is trained on.

    Whatever their rewards: those that an objective chooses are no draws.
    """
    found: list[Draws] = []
    for group in groups:
        responses = [r for r in group.responses if r.strategy in strategies and r.tokens_R]
        if responses and len(found) < MISMATCH_GROUPS:
            sequences = Sequences(prompt_P=group.prompt_tokens_P, responses_NR=tuple(r.tokens_R for r in responses))
            found.append((sequences, [torch.tensor(r.sampler_logprobs_R) for r in responses]))
    return found


@torch.no_grad()
def sampler_mismatch(model: Any, draws: Sequence[Draws], row_tokens: int | None, temperature: float) -> list[float]:
    """KL(sampler ‖ learner) in nats a token, estimated on each group's draws.

    The mean of r − 1 − log r over sampled tokens, r = π_learner/π_sampler, is unbiased and never negative.
    Source: Schulman, "Approximating KL divergence" (k3).
    """
    found = []
    groups = group_logprobs(model, [s for s, _ in draws], row_tokens=row_tokens, temperature=temperature)
    for i, learner in groups:
        log_r = torch.cat([p.float().cpu() - s for p, s in zip(learner, draws[i][1], strict=True)]).double()
        found.append(float((log_r.exp() - 1 - log_r).mean()))
    return found


def train_policy(
    model: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    *,
    seed: int,
    temperature: float,
    checkpoint: Checkpoint,
    on_step: Callable[[Metrics], None],
    on_resume: Callable[[int], None] = lambda done: None,
) -> list[Metrics]:
    """All steps of a round. Returns their metrics, those before the checkpoint included."""
    objective = OBJECTIVES[config.objective]

    def step(batch: list[Example]) -> tuple[float, int]:
        loss = accumulate(model, batch, objective, config, temperature)
        return loss, sum(e.sequences.num_tokens for e in batch)

    steps = batches(examples, config.epochs, config.prompts_per_step, seed)
    return optimise(model, steps, step, config, checkpoint, on_step, on_resume)


def accumulate(
    model: Any, batch: Sequence[Example], objective: Objective, config: TrainConfig, temperature: float
) -> float:
    """Add the gradient of one step's loss to the model, row by row. Returns the loss."""
    totals = Totals(num_groups=len(batch), num_tokens=sum(e.num_tokens for e in batch))
    total = 0.0
    for examples, rows in micro_batches(model, batch, config.row_tokens or default_row_tokens(model)):

        def loss_of(logprobs: list[list[Tensor]], examples: list[Example] = examples) -> Tensor:
            credits = [_credit(e, lp) for e, lp in zip(examples, logprobs, strict=True)]
            return torch.stack([objective.loss(c, totals, config) for c in credits]).sum()

        total += _backward(model, rows, len(examples), loss_of, temperature)
    return total


def micro_batches(model: Any, batch: Sequence[Example], row_tokens: int) -> Iterator[tuple[list[Example], list[Row]]]:
    """Whole groups that share one row; a group that needs several rows comes alone."""
    for indices in whole_groups([e.sequences for e in batch], row_tokens):
        examples = [batch[i] for i in indices]
        yield examples, list(rows_for(model, [e.sequences for e in examples], row_tokens))


def _backward(
    model: Any,
    rows: list[Row],
    num_groups: int,
    loss_of: Callable[[list[list[Tensor]]], Tensor],
    temperature: float,
) -> float:
    """Backward through one row directly; through several by the chain rule over their log-probs.

    With several rows the loss couples log-probs that are not alive together: L(lp) is differentiated with respect to
    detached lp first, then each row is run again and its lp get that gradient. Exact, for one more forward.
    """
    if len(rows) == 1:
        with autocast(model):
            logprobs = row_logprobs(model, rows[0], temperature)
        loss = loss_of(_by_group(rows, [logprobs], num_groups))
        loss.backward()
        return float(loss.detach())
    with torch.no_grad(), autocast(model):
        leaves = [[lp.detach().requires_grad_() for lp in row_logprobs(model, row, temperature)] for row in rows]
    loss = loss_of(_by_group(rows, leaves, num_groups))
    loss.backward()
    for row, own in zip(rows, leaves, strict=True):
        with autocast(model):
            logprobs = row_logprobs(model, row, temperature)
        torch.autograd.backward(logprobs, [lp.grad if lp.grad is not None else torch.zeros_like(lp) for lp in own])
    return float(loss.detach())


def _by_group(rows: list[Row], logprobs: list[list[Tensor]], num_groups: int) -> list[list[Tensor]]:
    """Responses of all rows back under their groups, in response order."""
    found: list[dict[int, Tensor]] = [{} for _ in range(num_groups)]
    for row, own in zip(rows, logprobs, strict=True):
        for (g, i), lp in zip(row.owners, own, strict=True):
            found[g][i] = lp
    return [[own[i] for i in sorted(own)] for own in found]


def _credit(example: Example, logprobs: list[Tensor]) -> Credit:
    device = logprobs[0].device
    return Credit(
        rewards_N=example.rewards_N,
        chosen=example.chosen,
        policy_logprobs=logprobs,
        ref_logprobs=[lp.to(device) for lp in example.ref_logprobs],
        sampler_logprobs=[lp.to(device) for lp in example.sampler_logprobs],
    )


def train(session: Session, round_: int, policy: Policy, groups: Sequence[Group]) -> tuple[Policy, dict[str, Any]]:
    """The stage: train `policy` on a round's scored groups and write `round-K/policy`.

    Without one informative group no step is taken and the policy stays. Returns the policy and facts for the summary.

    Raises:
        TrainError: the loss is not a number; the last good policy is kept.
        ScoreError: not one response has a reward.
    """
    session = session.of_round(round_)
    run, config = session.run, session.config
    strategies = [s.build() for s in config.generate.strategies]
    examples = examples_of(groups, config.train)
    draws = plain_draws(groups, [s.name for s in strategies if s == Strategy(name=s.name)])
    facts: dict[str, Any] = {
        "groups": len(groups),
        "informative": len(examples),
        "steps": 0,
        "loss_first": None,
        "loss_last": None,
    }
    name, steps = f"round-{round_}/policy", f"round-{round_}/steps.json"
    mismatch = f"round-{round_}/sampler_mismatch.json"
    settings = [config.train.model_dump(mode="json", exclude=KNOBS), config.learner_temperature, config.seed]
    key = content_hash(policy.hash, settings, _fingerprint(examples), [[s.prompt_P, s.responses_NR] for s, _ in draws])
    checkpoint = Checkpoint(run=run, name=f"round-{round_}/checkpoint", key=key, every=config.train.save_every_steps)
    if not examples:
        require_scores(session, groups, f"round {round_}")  # a scorer that failed is no reason to drop a policy
        run.discard(name)  # of an earlier config
        checkpoint.discard()
        facts["idle"] = "all rewards are equal in every group"
        session.progress.note(f"round {round_}: {facts['idle']}: no step taken, policy unchanged")
        run.write_json(steps, key, [])
        return policy, facts
    if not all(run.have(written, key) for written in (name, steps, mismatch)):
        _train_round(session, round_, policy, examples, draws, checkpoint)
    session.spent(f"round-{round_}")
    checkpoint.discard()
    history = run.read_json(steps)
    facts |= {"steps": len(history), "loss_first": history[0]["loss"], "loss_last": history[-1]["loss"]}
    distances = np.array([NAN if value is None else value for value in run.read_json(mismatch)])
    facts["sampler_mismatch"] = bootstrap(distances).as_dict()
    return Policy.of_folder(policy, run.path(name)), facts


def _fingerprint(examples: Sequence[Example]) -> str:
    """Everything that training sees of the groups."""
    return content_hash(
        [
            [list(e.sequences.prompt_P), [list(r) for r in e.sequences.responses_NR], e.chosen, e.rewards_N.tolist()]
            for e in examples
        ]
    )


def _train_round(
    session: Session,
    round_: int,
    policy: Policy,
    examples: list[Example],
    draws: list[Draws],
    checkpoint: Checkpoint,
) -> None:
    """All steps of a round, from the newest checkpoint. Writes the metrics of every step, then the policy."""
    config, run = session.config.train, session.run
    if isinstance(session.engine, ReleasingEngine):  # other weights are next: training may have its memory
        session.engine.release()
    loaded = load_for_training(policy, config, session.config.seed)
    check_packing(loaded.model, max((e.sequences for e in examples), key=lambda s: s.num_tokens))
    _mismatch(session, round_, loaded, draws, checkpoint.key)
    _reference(session, round_, loaded, examples)
    total = num_steps(len(examples), config.epochs, config.prompts_per_step)
    with session.progress.stage("train", total=total, unit="steps", label=f"round {round_}: train") as step:

        def on_step(metrics: Metrics) -> None:
            step.advance(1, tokens=metrics.tokens)

        history = train_policy(
            loaded.model,
            examples,
            config,
            seed=session.config.seed + round_,
            temperature=session.config.learner_temperature,
            checkpoint=checkpoint,
            on_step=on_step,
            on_resume=step.reuse,
        )
    run.write_json(f"round-{round_}/steps.json", checkpoint.key, [asdict(m) for m in history])
    run.commit(f"round-{round_}/policy", checkpoint.key, loaded.save)
    del loaded
    free_memory()  # sampling is next


def _mismatch(session: Session, round_: int, loaded: LoadedPolicy, draws: list[Draws], key: str) -> None:
    """Measured before the first step, when the learner still is the policy that was sampled from."""
    with autocast(loaded.model):
        temperature = session.config.generate.temperature
        values = sampler_mismatch(loaded.model, draws, session.config.train.row_tokens, temperature)
    finite = [value if math.isfinite(value) else None for value in values]  # what is not will stop the training
    session.run.write_json(f"round-{round_}/sampler_mismatch.json", key, finite)


def _reference(session: Session, round_: int, loaded: LoadedPolicy, examples: list[Example]) -> None:
    """Reference log-probs: the policy before the first step; for LoRA on the base, the adapter switched off."""
    config = session.config.train
    if not OBJECTIVES[config.objective].needs_reference:
        return
    first_round = loaded.policy.kind == "base"
    with (
        session.progress.stage("train", total=len(examples), unit="groups", label=f"round {round_}: reference") as step,
        loaded.reference() if first_round else nullcontext(),
    ):
        attach_reference(
            loaded.model,
            examples,
            config,
            session.config.learner_temperature,
            lambda tokens: step.advance(1, tokens=tokens),
        )
