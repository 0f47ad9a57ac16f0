"""The four objectives: how a scored group becomes a loss. The trainer knows none of them.

Notation: Δ_i = log π(y_i|x) − log π_ref(y_i|x), summed over the response's tokens; π_ref is the policy at the start of
the round, recomputed by the learner. Denominators are global for the optimiser step and passed in (`Totals`), so the
sum over micro-batches or ranks is the loss of the whole batch. `choose` says which responses an objective looks at;
credit always comes from the whole group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opentao.bestofn import target_log_ratio, weights
from opentao.config import TrainConfig

NEGLIGIBLE = 0.01  # distill leaves out responses whose best-of-n weight is below this, and below a tenth of 1/N


@dataclass(kw_only=True, slots=True)
class Credit:
    """One group as an objective sees it. Lists have one entry per chosen response.

    Example: rewards_N = [0.1, nan, 0.9], chosen = [0, 2], policy_logprobs = [tensor [R0], tensor [R2]]
    """

    rewards_N: np.ndarray  # the whole group's rewards, NaN = unscored
    chosen: list[int]  # indices into the group
    policy_logprobs: list[Tensor]  # [R] nats, with gradients
    ref_logprobs: list[Tensor]  # [R] nats; empty if the objective needs no reference
    sampler_logprobs: list[Tensor]  # [R] nats, from the engine

    def delta(self) -> Tensor:
        """Δ of the chosen responses."""
        pairs = zip(self.policy_logprobs, self.ref_logprobs, strict=True)
        return torch.stack([(p - r).sum() for p, r in pairs])

    def like(self, values: np.ndarray) -> Tensor:
        """Per-response numbers of the chosen responses as a tensor beside the log-probs."""
        first = self.policy_logprobs[0]
        return torch.as_tensor(values[self.chosen], dtype=first.dtype, device=first.device)


@dataclass(kw_only=True, slots=True, frozen=True)
class Totals:
    """Denominators of one optimiser step over all micro-batches and ranks."""

    num_groups: int
    num_tokens: int  # chosen response tokens


def regress(credit: Credit, totals: Totals, config: TrainConfig) -> Tensor:
    """mean_i ((Δ_i − mean Δ) − (t_i − mean t))², t = best-of-n target log-ratio, or reward / β.

    Its optimum is the best-of-n policy itself, so a round moves by a known KL and no further; off-policy by
    construction. Source: REBEL (2404.16767) and A*-PO (2505.20686) with the target of vBoN (2407.06057).
    """
    if config.target == "rank":
        target = target_log_ratio(credit.rewards_N, config.target_n, config.floor)
    else:
        target = credit.rewards_N / config.beta
    delta, t = credit.delta(), credit.like(target)
    return ((delta - delta.mean()) - (t - t.mean())).square().mean() / totals.num_groups


def distill(credit: Credit, totals: Totals, config: TrainConfig) -> Tensor:
    """−Σ_i w_i log π(y_i|x): cross-entropy to the best-of-n policy; a large target_n is rejection-sampling fine-tuning.

    Source: BOND's forward KL (2407.14622), RAFT (2304.06767).
    """
    w = credit.like(weights(credit.rewards_N, config.target_n))
    logprobs = torch.stack([p.sum() for p in credit.policy_logprobs])
    return -(w * logprobs).sum() / totals.num_groups


def prefer(credit: Credit, totals: Totals, config: TrainConfig) -> Tensor:
    """−log σ(β (Δ_best − Δ_worst)). Source: DPO (2305.18290) on the best and the worst of the group."""
    delta = credit.delta()
    return -torch.nn.functional.logsigmoid(config.beta * (delta[0] - delta[1])) / totals.num_groups


def online(credit: Credit, totals: Totals, config: TrainConfig) -> Tensor:
    """−Σ_i Σ_t min(ρ A_i, clip(ρ, 1 ± c) A_i) / tokens, ρ = π / π_sampler per token.

    A_i = (r_i − mean)/std over the group, r_i − mean, or leave-one-out r_i − mean of the others. Source: GRPO
    (2402.03300) with DAPO's token mean (2503.14476); Dr. GRPO (2503.20783), whose divisor is a constant where ours is
    the step's tokens; RLOO (2402.14740).
    """
    advantage = credit.like(advantages(credit.rewards_N, config.advantage))
    loss = credit.policy_logprobs[0].new_zeros(())
    for a, policy, sampler in zip(advantage, credit.policy_logprobs, credit.sampler_logprobs, strict=True):
        ratio = (policy - sampler).exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        loss = loss - torch.minimum(ratio * a, clipped * a).sum()
    return loss / totals.num_tokens


def advantages(rewards_N: np.ndarray, kind: str) -> np.ndarray:
    """Group-relative advantages of the scored responses; NaN stays NaN; equal rewards give exact zeros."""
    scored = rewards_N[~np.isnan(rewards_N)]
    M = len(scored)
    if M < 2 or np.ptp(scored) == 0:
        return rewards_N * 0
    centred: np.ndarray = rewards_N - scored.mean()
    scale = {"group": 1 / scored.std(ddof=1), "centred": 1.0, "loo": M / (M - 1)}[kind]
    return centred * scale


def _scored(rewards_N: np.ndarray, config: TrainConfig) -> list[int]:
    return [int(i) for i in np.flatnonzero(~np.isnan(rewards_N))]


def _weighty(rewards_N: np.ndarray, config: TrainConfig) -> list[int]:
    least = min(NEGLIGIBLE, 0.1 / len(rewards_N))  # in a large group every weight may be small
    return [int(i) for i in np.flatnonzero(np.nan_to_num(weights(rewards_N, config.target_n)) >= least)]


def _best_and_worst(rewards_N: np.ndarray, config: TrainConfig) -> list[int]:
    return [int(np.nanargmax(rewards_N)), int(np.nanargmin(rewards_N))]


@dataclass(frozen=True, slots=True)
class Objective:
    """What the trainer needs to know of an objective."""

    loss: Callable[[Credit, Totals, TrainConfig], Tensor]
    choose: Callable[[np.ndarray, TrainConfig], Sequence[int]]  # which responses of a group to compute
    needs_reference: bool


OBJECTIVES: dict[str, Objective] = {
    "regress": Objective(regress, _scored, needs_reference=True),
    "distill": Objective(distill, _weighty, needs_reference=False),
    "prefer": Objective(prefer, _best_and_worst, needs_reference=True),
    "online": Objective(online, _scored, needs_reference=False),
}
