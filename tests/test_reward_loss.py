"""Losses of the reward model: by hand, against brute force, and their gradients in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opentao.reward_loss import bradley_terry, length_weights, plackett_luce

finite = st.floats(-5, 5, allow_nan=False)


def column(*scores: float) -> torch.Tensor:
    return torch.tensor(scores, dtype=torch.float64)[:, None]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand() -> None:
    scores = column(1.0, 0.0, -1.0).requires_grad_()
    # s_0 - s_1 = 1, s_0 - s_2 = 2: (log(1 + e^-1) + log(1 + e^-2))/2 = (0.313262 + 0.126928)/2
    (loss,) = bradley_terry(scores, [(0, 1), (0, 2)])
    assert float(loss.detach()) == pytest.approx(0.220095, abs=1e-6)
    loss.backward()
    a, b = 0.5 / (1 + math.e), 0.5 / (1 + math.e**2)
    assert scores.grad is not None
    assert scores.grad[:, 0].tolist() == pytest.approx([-a - b, a, b])
    assert float(bradley_terry(column(0.0, 0.0), [(1, 0)])) == pytest.approx(math.log(2))


@given(finite, finite, st.floats(0, 3), st.floats(0, 0.5))
@settings(max_examples=100, deadline=None)
def test_margin_and_smoothing(a: float, b: float, margin: float, smoothing: float) -> None:
    p = sigmoid(a - b - margin)
    expected = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
    found = bradley_terry(column(a, b), [(0, 1)], margin=margin, smoothing=smoothing)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@given(finite, finite)
@settings(max_examples=50, deadline=None)
def test_a_tie_is_half_of_each_choice_and_wants_equal_scores(a: float, b: float) -> None:
    scores = column(a, b)
    both = (bradley_terry(scores, [(0, 1)]) + bradley_terry(scores, [(1, 0)])) / 2
    assert float(bradley_terry(scores, [], [(0, 1)])) == pytest.approx(float(both))
    assert float(bradley_terry(scores, [], [(0, 1)])) >= math.log(2) - 1e-12


def test_weights_are_one_a_pair_then_one_a_tie() -> None:
    scores = column(2.0, 0.0, 1.0)
    parts = [float(bradley_terry(scores, [(0, 1)])), float(bradley_terry(scores, [], [(1, 2)]))]
    found = bradley_terry(scores, [(0, 1)], [(1, 2)], weights=[3.0, 0.5])
    assert float(found) == pytest.approx((3.0 * parts[0] + 0.5 * parts[1]) / 2)


def probability(scores: list[float], order: tuple[int, ...]) -> float:
    """Of choosing in this order, one after the other, each with probability in proportion to e^score."""
    left, p = list(range(len(scores))), 1.0
    for i in order:
        p *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in left)
        left.remove(i)
    return p


@given(st.lists(finite, min_size=2, max_size=5))
@settings(max_examples=60, deadline=None)
def test_plackett_luce_is_the_probability_of_the_order(scores: list[float]) -> None:
    choices = len(scores) - 1
    total = 0.0
    for order in itertools.permutations(range(len(scores))):
        ranks = [float(order.index(i)) for i in range(len(scores))]
        loss = float(plackett_luce(column(*scores), ranks, ties_equal=True))
        assert loss * choices == pytest.approx(-math.log(probability(scores, order)), rel=1e-9, abs=1e-9)
        total += math.exp(-loss * choices)
    assert total == pytest.approx(1.0)


@given(finite, finite)
@settings(max_examples=50, deadline=None)
def test_plackett_luce_of_two_is_bradley_terry(a: float, b: float) -> None:
    scores = column(a, b)
    assert float(plackett_luce(scores, [1.0, 2.0], ties_equal=True)) == pytest.approx(
        float(bradley_terry(scores, [(0, 1)]))
    )
    assert float(plackett_luce(scores, [1.0, 1.0], ties_equal=True)) == pytest.approx(
        float(bradley_terry(scores, [], [(0, 1)]))
    )


def test_ties_by_hand() -> None:
    """Scores log 3, log 2, log 1; the first two share the first rank."""
    scores, ranks = column(math.log(3), math.log(2), 0.0), [1.0, 1.0, 2.0]
    equal = -(math.log(3 / 6) + math.log(2 / 6)) / 2
    assert float(plackett_luce(scores, ranks, ties_equal=True)) == pytest.approx(equal)
    unknown = -(math.log(3 / 4) + math.log(2 / 3)) / 2  # each against the third alone
    assert float(plackett_luce(scores, ranks, ties_equal=False)) == pytest.approx(unknown)
    # The best of three, nothing said of the others: one choice.
    best = plackett_luce(scores, [1.0, 2.0, 2.0], ties_equal=False)
    assert float(best) == pytest.approx(-math.log(3 / 6))
    # The others said to be equally good: two more choices between them.
    level = plackett_luce(scores, [1.0, 2.0, 2.0], ties_equal=True)
    assert float(level) == pytest.approx(-(math.log(3 / 6) + math.log(2 / 3) + math.log(1 / 3)) / 3)


@pytest.mark.parametrize("ties_equal", [True, False])
def test_gradients(ties_equal: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    ranks = [2.0, 1.0, 2.0, 4.0, 4.0]
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, ranks, ties_equal=ties_equal), scores)
    settings_ = {"margin": 0.3, "smoothing": 0.1, "weights": [1.0, 2.0, 0.5]}
    assert torch.autograd.gradcheck(lambda s: bradley_terry(s, [(0, 1), (2, 3)], [(1, 4)], **settings_), scores)


def test_heads_do_not_meet() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 3, dtype=torch.float64)
    ranks, pairs = [1.0, 3.0, 2.0, 2.0], [(0, 1), (2, 3)]
    for k in range(3):
        alone = scores[:, k : k + 1]
        torch.testing.assert_close(
            plackett_luce(scores, ranks, ties_equal=True)[k], plackett_luce(alone, ranks, ties_equal=True)[0]
        )
        torch.testing.assert_close(bradley_terry(scores, pairs)[k], bradley_terry(alone, pairs)[0])


def test_length_weights_balance_what_pairs_count() -> None:
    """A ranking of 28 pairs counts as much as one of a single pair."""
    kinds, shares = [True] * 28 + [False] * 28, [1 / 28] * 28 + [1.0] * 28
    weights = length_weights(kinds, shares)
    sides = [sum(w * s for w, s, k in zip(weights, shares, kinds, strict=True) if k is side) for side in (True, False)]
    assert sides == pytest.approx([29 / 2, 29 / 2])


@given(st.lists(st.sampled_from([True, False, None]), max_size=30))
def test_length_weights_balance_and_have_mean_one(kinds: list[bool | None]) -> None:
    weights = length_weights(kinds)
    assert len(weights) == len(kinds)
    assert sum(weights) == pytest.approx(len(kinds))
    sides = [sum(w for w, k in zip(weights, kinds, strict=True) if k is side) for side in (True, False)]
    if True in kinds and False in kinds:
        assert sides[0] == pytest.approx(sides[1])
