"""The objectives: numbers worked out by hand, invariances, denominators, and where `regress` comes to rest."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float64, jaxtyped
from torch import Tensor

from opentao.bestofn import weights
from opentao.config import TrainConfig
from opentao.objectives import NEGLIGIBLE, OBJECTIVES, Credit, Totals, advantages

Scalar = Float64[Tensor, ""]
PerResponse = Float64[Tensor, "chosen"]
NAN = float("nan")
rewards_lists = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=6)


def exact(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def credit_of(
    name: str,
    rewards: list[float],
    policy: list[list[float]],
    ref: list[list[float]] | None = None,
    sampler: list[list[float]] | None = None,
    **config: Any,
) -> tuple[Credit, TrainConfig]:
    """The whole group's log-probs in; the objective chooses its responses as the trainer lets it."""
    settings_ = TrainConfig(objective=name, **config)
    chosen = list(OBJECTIVES[name].choose(np.array(rewards), settings_))
    zeros = [[0.0] * len(p) for p in policy]
    credit = Credit(
        rewards_N=np.array(rewards),
        chosen=chosen,
        policy_logprobs=[exact(policy[i]).requires_grad_() for i in chosen],
        ref_logprobs=[exact((ref or zeros)[i]) for i in chosen],
        sampler_logprobs=[exact((sampler or zeros)[i]) for i in chosen],
    )
    return credit, settings_


@jaxtyped(typechecker=beartype)
def scalar_loss(name: str, credit: Credit, totals: Totals, config: TrainConfig) -> Scalar:
    return OBJECTIVES[name].loss(credit, totals, config)


@jaxtyped(typechecker=beartype)
def sides(credit: Credit, target: np.ndarray) -> tuple[PerResponse, PerResponse]:
    return credit.delta(), credit.like(target)


def loss_of(name: str, *args: Any, totals: Totals | None = None, **kwargs: Any) -> float:
    credit, config = credit_of(name, *args, **kwargs)
    return float(scalar_loss(name, credit, totals or Totals(num_groups=1, num_tokens=1), config).detach())


# ---------------------------------------------------------------------------------------------------- by hand


def test_regress_rank_by_hand() -> None:
    # Δ = 0.3, -0.1: centred ±0.2.  t = log 0.5, log 1.5 (best of 2 from 2): centred ∓0.549306.
    # (0.2 + 0.549306)^2 = 0.561460 for both; over 2 groups: 0.280730
    policy, ref = [[-1.0, -0.5], [-2.0]], [[-1.2, -0.6], [-1.9]]
    totals = Totals(num_groups=2, num_tokens=99)
    loss = loss_of("regress", [0.1, 0.9], policy, ref, target_n=2, totals=totals)
    assert loss == pytest.approx((0.2 + math.log(3) / 2) ** 2 / 2)
    assert loss == pytest.approx(0.280730, abs=1e-6)


def test_regress_floor_by_hand() -> None:
    # three ranks, best of 100: t = 100 log 1/3 + log 1 and so on, far below: floored at -2; the best has log 3
    # Δ = 0: mean of (t - mean t)^2 with t = -2, -2, 1.098612: mean -0.967129; 2 * 1.066773 + 4.267094, over 3
    loss = loss_of("regress", [1.0, 2.0, 3.0], [[-1.0]] * 3, [[-1.0]] * 3, target_n=100, floor=2.0)
    assert loss == pytest.approx((2 * 1.032871**2 + 2.065741**2) / 3, abs=1e-5)


def test_regress_value_by_hand() -> None:
    # t = r/β = 2, 6, centred ∓2; Δ = 1, 0, centred ±0.5: (0.5 + 2)^2 = 6.25
    loss = loss_of("regress", [1.0, 3.0], [[-1.0], [-2.0]], [[-2.0], [-2.0]], target="value", beta=0.5)
    assert loss == pytest.approx(6.25)


def test_distill_by_hand() -> None:
    # best of 2 from 3: w = 1/9, 3/9, 5/9;  log π = -3, -2, -1:  (3 + 6 + 5)/9 = 14/9, over 4 groups
    totals = Totals(num_groups=4, num_tokens=99)
    loss = loss_of("distill", [1.0, 2.0, 3.0], [[-1.0, -2.0], [-2.0], [-0.5, -0.5]], target_n=2, totals=totals)
    assert loss == pytest.approx(14 / 36)


def test_prefer_by_hand() -> None:
    # best: Δ = 0.5, worst: Δ = -0.3; β 0.5: -log σ(0.4) = log(1 + e^-0.4) = 0.513015
    policy, ref = [[-1.3], [-9.0], [-0.5, -0.5]], [[-1.0], [-1.0], [-1.0, -0.5]]
    credit, config = credit_of("prefer", [0.0, 0.5, 1.0], policy, ref, beta=0.5)
    assert credit.chosen == [2, 0]  # best first; the middle one is not even computed
    loss = scalar_loss("prefer", credit, Totals(num_groups=1, num_tokens=1), config)
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(-0.4)))
    loss.backward()
    slope = -0.5 / (1 + math.exp(0.4))  # -β σ(-β (Δ_best - Δ_worst))
    assert credit.policy_logprobs[0].grad.tolist() == pytest.approx([slope] * 2)
    assert credit.policy_logprobs[1].grad.tolist() == pytest.approx([-slope])


def test_advantages_by_hand() -> None:
    # mean 1; deviations -1, 0, 1; std (ddof 1) 1;  leave-one-out: 0 - 1.5, 1 - 1, 2 - 0.5
    rewards = np.array([0.0, 1.0, NAN, 2.0])
    np.testing.assert_allclose(advantages(rewards, "group"), [-1, 0, NAN, 1])
    np.testing.assert_allclose(advantages(rewards, "centred"), [-1, 0, NAN, 1])
    np.testing.assert_allclose(advantages(rewards, "loo"), [-1.5, 0, NAN, 1.5])


@pytest.mark.parametrize("kind", ["group", "centred", "loo"])
def test_equal_or_lonely_rewards_give_exact_zeros(kind: str) -> None:
    assert advantages(np.array([0.1, 0.1, 0.1]), kind).tolist() == [0, 0, 0]
    assert np.array_equal(advantages(np.array([0.1, NAN]), kind), [0, NAN], equal_nan=True)


@pytest.mark.parametrize(("kind", "size"), [("group", 1 / math.sqrt(2)), ("centred", 0.5), ("loo", 1.0)])
def test_online_by_hand(kind: str, size: float) -> None:
    """Two tokens each, ratios 1.5 and 0.5, clipped to 1.2 and 0.8 where that makes the objective smaller."""
    log = [math.log(1.5), math.log(0.5)]
    totals = Totals(num_groups=99, num_tokens=8)
    credit, config = credit_of("online", [1.0, 0.0], [log, log], sampler=[[0.0, 0.0]] * 2, advantage=kind, clip=0.2)
    loss = scalar_loss("online", credit, totals, config)
    # better: min(1.5, 1.2) + min(0.5, 0.8) = 1.7; worse: -max(1.5, 1.2) - max(0.5, 0.8) = -2.3
    assert float(loss.detach()) == pytest.approx(-size * (1.7 - 2.3) / 8)
    loss.backward()
    better, worse = (lp.grad.tolist() for lp in credit.policy_logprobs)
    assert better == pytest.approx([0.0, -size * 0.5 / 8])  # no gradient through a clipped ratio
    assert worse == pytest.approx([size * 1.5 / 8, 0.0])


def test_online_on_policy_is_the_policy_gradient() -> None:
    """Ratio 1: value Σ A_i · tokens_i, gradient -A_i per token."""
    credit, config = credit_of("online", [1.0, 0.0], [[-1.0, -2.0, -1.0], [-3.0]], sampler=[[-1.0, -2.0, -1.0], [-3.0]])
    loss = scalar_loss("online", credit, Totals(num_groups=1, num_tokens=4), config)
    loss.backward()
    a = 1 / math.sqrt(2)
    assert float(loss.detach()) == pytest.approx(-(3 * a - a) / 4)
    assert credit.policy_logprobs[0].grad.tolist() == pytest.approx([-a / 4] * 3)
    assert credit.policy_logprobs[1].grad.tolist() == pytest.approx([a / 4])


# ---------------------------------------------------------------------------------------------------- invariances


@given(rewards=rewards_lists, n=st.integers(2, 40))
def test_equal_rewards_teach_nothing(rewards: list[float], n: int) -> None:
    """At the reference, exactly zero loss; online exactly zero anywhere."""
    same = [0.3] * len(rewards)
    assert loss_of("regress", same, [[-1.0, -2.0]] * len(same), [[-1.0, -2.0]] * len(same), target_n=n) == 0
    assert loss_of("online", same, [[r] for r in rewards], sampler=[[0.0]] * len(same)) == 0


@settings(deadline=None)
@given(
    rewards=rewards_lists, shift=st.floats(-5, 5), seed=st.integers(0, 99), target=st.sampled_from(["rank", "value"])
)
def test_regress_ignores_a_constant_per_prompt(rewards: list[float], shift: float, seed: int, target: str) -> None:
    """A constant on all of Δ, or on all rewards, says nothing about which response is better."""
    policy = torch.randn(len(rewards), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    plain = loss_of("regress", rewards, policy, target=target)
    moved = [[x + shift / 3 for x in row] for row in policy]
    assert loss_of("regress", rewards, moved, target=target) == pytest.approx(plain, abs=1e-9)
    assert loss_of("regress", [r + shift for r in rewards], policy, target=target) == pytest.approx(plain, abs=1e-9)


@settings(deadline=None)
@given(rewards=rewards_lists, seed=st.integers(0, 99))
def test_ranks_are_all_that_regress_and_distill_see(rewards: list[float], seed: int) -> None:
    policy = torch.randn(len(rewards), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    for name in ("regress", "distill"):
        for monotone in (math.exp, lambda r: 7 * r - 3, lambda r: r**3):
            assert loss_of(name, [monotone(r) for r in rewards], policy) == loss_of(name, rewards, policy)


@settings(deadline=None)
@given(
    rewards=rewards_lists.filter(lambda r: len(set(r)) > 1),
    gaps=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    name=st.sampled_from(sorted(OBJECTIVES)),
    config=st.sampled_from([{}, {"target": "value"}, {"advantage": "loo"}]),
)
def test_unscored_responses_are_as_if_never_sampled(
    rewards: list[float], gaps: list[int], name: str, config: dict[str, Any]
) -> None:
    policy = [[-0.1 * i, -0.3] for i in range(len(rewards))]
    expected = loss_of(name, rewards, policy, **config)
    for gap in gaps:
        rewards, policy = [*rewards], [*policy]
        rewards.insert(gap, NAN)
        policy.insert(gap, [-50.0, 1e300])
    assert loss_of(name, rewards, policy, **config) == pytest.approx(expected, rel=1e-12)


def test_chosen_responses() -> None:
    rewards = np.array([0.5, NAN, 0.9, 0.1])
    config = TrainConfig(target_n=4)
    chosen = {name: list(objective.choose(rewards, config)) for name, objective in OBJECTIVES.items()}
    # best of 4 from 3: w = 1/81, 15/81, 65/81, all above 0.01
    assert chosen == {"regress": [0, 2, 3], "online": [0, 2, 3], "distill": [0, 2, 3], "prefer": [2, 3]}
    assert OBJECTIVES["distill"].choose(rewards, TrainConfig(target_n=16)) == [2]  # 0.5 has (2/3)^16 = 0.0015


@pytest.mark.parametrize("N", [2, 8, 100, 256, 1024])
def test_distill_always_has_something_to_learn_from(N: int) -> None:
    """In a large group every weight may be below the threshold; the best must not be left out, nor much of the mass."""
    rewards = np.arange(N, dtype=np.float64)
    for n in (2, 4, 16):
        chosen = OBJECTIVES["distill"].choose(rewards, TrainConfig(target_n=n))
        assert N - 1 in chosen
        assert weights(rewards, n)[list(chosen)].sum() > 1 - 3 * NEGLIGIBLE


# ---------------------------------------------------------------------------------------------------- shapes


def test_shapes_are_checked() -> None:
    credit, config = credit_of("regress", [0.1, NAN, 0.9], [[-1.0, -0.5], [-1.0], [-2.0]])
    delta, t = sides(credit, np.array([1.0, 2.0, 3.0]))
    assert delta.shape == t.shape == (2,)
    assert t.tolist() == [1.0, 3.0]
    credit.ref_logprobs.pop()
    with pytest.raises(ValueError, match="zip"):
        OBJECTIVES["regress"].loss(credit, Totals(num_groups=1, num_tokens=1), config)


# ---------------------------------------------------------------------------------------------------- denominators


@settings(deadline=None)
@given(
    groups=st.lists(rewards_lists.filter(lambda r: len(set(r)) > 1), min_size=1, max_size=5),
    cuts=st.sets(st.integers(1, 4)),
    name=st.sampled_from(sorted(OBJECTIVES)),
    seed=st.integers(0, 9),
)
def test_the_batch_is_the_sum_of_any_micro_batches(
    groups: list[list[float]], cuts: set[int], name: str, seed: int
) -> None:
    """Loss and gradient, for every way to cut the batch; the totals are those of the whole step."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for rewards in groups:
        lengths = torch.randint(1, 4, (len(rewards),), generator=generator).tolist()
        draw = [[torch.randn(R, generator=generator, dtype=torch.float64).tolist() for R in lengths] for _ in range(3)]
        made.append(credit_of(name, rewards, *draw))
    totals = Totals(num_groups=len(made), num_tokens=sum(len(lp) for c, _ in made for lp in c.policy_logprobs))
    leaves = [lp for credit, _ in made for lp in credit.policy_logprobs]

    whole = torch.stack([scalar_loss(name, c, totals, config) for c, config in made]).sum()
    expected = torch.autograd.grad(whole, leaves)

    edges = [0, *sorted(c for c in cuts if c < len(made)), len(made)]
    total = 0.0
    for start, end in itertools.pairwise(edges):
        part = torch.stack([scalar_loss(name, c, totals, config) for c, config in made[start:end]]).sum()
        part.backward()
        total += float(part.detach())
    assert total == pytest.approx(float(whole.detach()), rel=1e-12, abs=1e-12)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, atol=1e-14, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- the optimum


@pytest.mark.parametrize(("rewards", "n"), [([0.0, 1.0, 2.0, 3.0], 4), ([5.0, 5.0, 1.0, 2.0], 16)])
def test_regress_comes_to_rest_at_the_best_of_n_policy(rewards: list[float], n: int) -> None:
    """A policy over four answers; the group holds each as often as the base gives it, so ranks are exact.

    Best of n draws answer v with probability F^n - F'^n over the base's distribution (ties by their share).
    """
    counts = [4, 3, 2, 1]
    base = exact(counts) / 10
    answers = [v for v, count in enumerate(counts) for _ in range(count)]
    group_rewards = [rewards[v] for v in answers]
    config = TrainConfig(objective="regress", target_n=n, floor=60.0)
    logits = base.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([logits], lr=1, max_iter=200, tolerance_grad=1e-14, tolerance_change=0)

    def closure() -> Tensor:
        optimiser.zero_grad()
        logp = logits.log_softmax(-1)
        credit = Credit(
            rewards_N=np.array(group_rewards),
            chosen=list(range(10)),
            policy_logprobs=[logp[v][None] for v in answers],
            ref_logprobs=[base[v].log()[None] for v in answers],
            sampler_logprobs=[],
        )
        loss = scalar_loss("regress", credit, Totals(num_groups=1, num_tokens=10), config)
        loss.backward()
        return loss

    optimiser.step(closure)
    best_of_n = [
        sum(base[u] for u in range(4) if rewards[u] <= rewards[v]) ** n
        - sum(base[u] for u in range(4) if rewards[u] < rewards[v]) ** n
        for v in range(4)
    ]
    expected = [
        float(best_of_n[v] * base[v] / sum(base[u] for u in range(4) if rewards[u] == rewards[v])) for v in range(4)
    ]
    assert sum(expected) == pytest.approx(1)
    assert logits.detach().softmax(-1).tolist() == pytest.approx(expected, abs=1e-9)
