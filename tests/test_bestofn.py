"""Hand-worked numbers, brute force over every tuple and subset, simulation, failure inputs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations, product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opentao.bestofn import (
    FEWEST,
    Interval,
    _tail,
    baked_fraction,
    best_of_curve,
    best_of_k,
    bootstrap,
    kl_bound,
    max_variance_subset,
    paired_difference,
    pass_at_k,
    target_log_ratio,
    weights,
)

NAN = float("nan")
few_scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=5)  # a small range, so that ties are common
some_scores = st.lists(st.integers(-3, 3).map(float) | st.just(NAN), min_size=1, max_size=12)


def brute_weights(scores: list[float], n: int) -> list[float]:
    """Every n-tuple of responses, with replacement; equally good ones share the win."""
    wins = [0.0] * len(scores)
    for draw in product(range(len(scores)), repeat=n):
        best = max(scores[i] for i in draw)
        level = [i for i, s in enumerate(scores) if s == best]
        for i in level:
            wins[i] += 1 / len(level)
    return [w / len(scores) ** n for w in wins]


def test_weights_by_hand() -> None:
    # F = 1/3, 2/3, 1: F^2 = 1/9, 4/9, 9/9
    np.testing.assert_allclose(weights([5.0, -1.0, 2.0], 2), [5 / 9, 1 / 9, 3 / 9])
    # the two upper ones tie: F = 1, F' = 1/3, m = 2: (1 - 1/9)/2 = 4/9 each
    np.testing.assert_allclose(weights([7.0, 1.0, 7.0], 2), [4 / 9, 1 / 9, 4 / 9])
    np.testing.assert_allclose(weights([0.0, NAN, 1.0], 2), [1 / 4, NAN, 3 / 4])
    np.testing.assert_allclose(weights([3.0, 3.0, 1.0], 1), [1 / 3] * 3)


def test_nothing_scored_stays_nan() -> None:
    assert np.isnan(weights([NAN, NAN], 4)).all()
    assert np.isnan(target_log_ratio([NAN, NAN], 4, floor=2.0)).all()
    assert weights([], 4).shape == target_log_ratio([], 4, floor=2.0).shape == (0,)


def test_infinite_scores_are_ranks_too() -> None:
    np.testing.assert_allclose(weights([-math.inf, 0.0, math.inf], 2), [1 / 9, 3 / 9, 5 / 9])


@given(few_scores, st.integers(1, 4))
def test_weights_are_brute_force(scores: list[float], n: int) -> None:
    np.testing.assert_allclose(weights(scores, n), brute_weights(scores, n), atol=1e-12)


@given(few_scores)
def test_weights_are_brute_force_beyond_the_group_size(scores: list[float]) -> None:
    np.testing.assert_allclose(weights(scores, 6), brute_weights(scores, 6), atol=1e-12)


@given(some_scores, st.integers(1, 10_000))
def test_weights_sum_to_one_over_the_scored(scores: list[float], n: int) -> None:
    w = weights(scores, n)
    assert (np.isnan(w) == np.isnan(scores)).all()
    assert np.isnan(scores).all() or math.isclose(np.nansum(w), 1.0, rel_tol=1e-9)


def test_weights_are_what_sampling_gives() -> None:
    scores, rng = np.array([0.3, 2.0, 2.0, -1.0, 0.9]), np.random.default_rng(0)
    draws = rng.integers(5, size=(200_000, 3))
    best = draws[np.arange(len(draws)), scores[draws].argmax(axis=1)]
    counts = np.bincount(best, minlength=5) / len(draws)
    np.testing.assert_allclose(counts, weights(scores, 3), atol=0.005)


@given(some_scores, st.integers(1, 64))
def test_ranks_alone_count(scores: list[float], n: int) -> None:
    stretched = [math.exp(3 * s) - 7 for s in scores]
    np.testing.assert_array_equal(weights(scores, n), weights(stretched, n))
    np.testing.assert_array_equal(target_log_ratio(scores, n, 2.0), target_log_ratio(stretched, n, 2.0))


@given(some_scores, st.integers(1, 32), st.randoms())
def test_the_order_of_responses_does_not_count(scores: list[float], n: int, random: object) -> None:
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(weights(scores, n)[order], weights([scores[i] for i in order], n))


def test_target_by_hand() -> None:
    # M w = 3/9, 9/9, 15/9
    np.testing.assert_allclose(
        target_log_ratio([-1.0, 2.0, 5.0], 2, floor=9.0), [math.log(1 / 3), 0.0, math.log(5 / 3)], atol=1e-15
    )
    np.testing.assert_allclose(target_log_ratio([-1.0, NAN, 2.0, 5.0], 2, floor=0.5)[:2], [-0.5, NAN])


@given(some_scores, st.integers(1, 40), st.floats(0, 20))
def test_target_is_the_floored_log_of_the_weights(scores: list[float], n: int, floor: float) -> None:
    scored = np.count_nonzero(~np.isnan(scores))
    expected = np.maximum(np.log(scored * weights(scores, n)), -floor)
    np.testing.assert_allclose(target_log_ratio(scores, n, floor), expected, atol=1e-9)


@given(st.integers(1, 200), st.integers(1, 10**6), st.floats(-5, 5))
def test_equal_scores_teach_exactly_nothing(size: int, n: int, score: float) -> None:
    assert target_log_ratio([score] * size, n, floor=2.0).tolist() == [0.0] * size


@pytest.mark.parametrize("n", [10**3, 10**6, 10**12])
def test_target_is_finite_where_weights_underflow(n: int) -> None:
    scores = np.arange(8.0)
    assert weights(scores, n)[0] == 0.0
    t = target_log_ratio(scores, n, floor=2.0)
    np.testing.assert_allclose(t, [-2.0] * 7 + [math.log(8)], atol=1e-9)
    assert np.isfinite(target_log_ratio(scores, n, floor=math.inf)).all()


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(1, 1000))
def test_kl_of_the_weights_is_within_the_bound(scores: list[float], n: int) -> None:
    w = weights(scores, n)
    kl = sum(p * math.log(len(w) * p) for p in w.tolist() if p > 0)
    assert -1e-9 <= kl <= min(kl_bound(n), math.log(len(w))) + 1e-9


def test_kl_bound_by_hand() -> None:
    assert kl_bound(1) == 0.0
    assert math.isclose(kl_bound(2), math.log(2) - 0.5)
    w = weights(np.arange(200_000.0), 16)  # no ties and a large group: the bound is reached
    assert math.isclose(float(np.sum(w * np.log(len(w) * w))), kl_bound(16), rel_tol=1e-3)


@pytest.mark.parametrize("n", [0, -1, 0.5, NAN])
def test_n_below_one_is_refused(n: float) -> None:
    for call in (lambda: weights([1.0], n), lambda: target_log_ratio([1.0], n, 2.0), lambda: kl_bound(n)):
        with pytest.raises(ValueError, match="n >= 1"):
            call()


@pytest.mark.parametrize("floor", [-1.0, NAN])
def test_a_negative_floor_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match="floor"):
        target_log_ratio([1.0, 2.0], 4, floor)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.data())
def test_best_of_k_is_the_mean_over_subsets(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    expected = np.mean([max(subset) for subset in combinations(scores, k)])
    assert math.isclose(best_of_k([*scores, NAN], k), expected, rel_tol=1e-9, abs_tol=1e-9)


def test_best_of_k_ends_at_mean_and_max() -> None:
    scores = np.random.default_rng(0).normal(size=1024)
    assert math.isclose(best_of_k(scores, 1), float(scores.mean()))
    assert best_of_k(scores, 1024) == scores.max()
    curve = best_of_curve(scores, [1, 2, 4, 500, 1024])
    assert list(curve.values()) == sorted(curve.values())
    assert best_of_k([-math.inf, 1.0, 2.0], 2) == pytest.approx(5 / 3)  # subsets' best: 1, 2, 2


def test_best_of_k_is_unbiased() -> None:
    """For uniform scores the expected best of k is k/(k+1), whatever N is."""
    rng = np.random.default_rng(1)
    estimates = [best_of_k(rng.random(6), 4) for _ in range(20_000)]
    assert abs(np.mean(estimates) - 4 / 5) < 4 * np.std(estimates) / math.sqrt(len(estimates))


@pytest.mark.parametrize("k", [0, -1, 3])
def test_best_of_k_outside_the_scored_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"best of {k} needs 1 <= k <= number of scored responses, which is 2"):
        best_of_k([1.0, NAN, 2.0], k)


def test_curve_leaves_out_what_is_too_large() -> None:
    assert best_of_curve([1.0, NAN, 3.0], [1, 2, 4]) == {1: 2.0, 2: 3.0}
    assert best_of_curve([NAN], [1, 2]) == {}
    with pytest.raises(ValueError, match="best of 0"):
        best_of_curve([1.0], [0])


@given(values=st.lists(st.integers(-5, 5).map(float) | st.just(NAN), min_size=1, max_size=9), m=st.integers(1, 9))
def test_max_variance_subset_is_the_best_of_all(values: list[float], m: int) -> None:
    found = max_variance_subset(values, m)
    scored = [i for i, v in enumerate(values) if not math.isnan(v)]
    assert found == sorted(set(found)) and set(found) <= set(scored) and len(found) == min(m, len(scored))
    if scored:
        every = [np.var([values[i] for i in s]) for s in combinations(scored, len(found))]
        assert np.var([values[i] for i in found]) == pytest.approx(max(every))


def test_max_variance_subset_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        max_variance_subset([1.0, 2.0], 0)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 2) == pytest.approx(7 / 10)  # 3 of the 10 pairs have no correct sample
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0  # only two wrong ones


@given(st.integers(1, 30), st.data())
def test_pass_at_k_is_best_of_k_of_zeros_and_ones(num: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, num)), data.draw(st.integers(1, num))
    scores = [1.0] * correct + [0.0] * (num - correct)
    assert math.isclose(pass_at_k(num, correct, k), best_of_k(scores, k), abs_tol=1e-12)


@pytest.mark.parametrize(("num", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_pass_at_k_refuses(num: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="number of"):
        pass_at_k(num, correct, k)


def test_bootstrap_by_hand() -> None:
    interval = bootstrap([1.0, NAN, 3.0] * 4, resamples=4000)
    # one of 256 resamples is all 1, eight of 256 hold one 3, and 0.57 % of them lie beyond the bound
    assert interval == Interval(mean=2.0, low=1.25, high=2.75, n=8)
    assert bootstrap([4.0] * 9) == Interval(mean=4.0, low=4.0, high=4.0, n=9)
    assert bootstrap([1.0, 2.0, 9.0], lambda v: float(np.median(v))).mean == 2.0


@pytest.mark.parametrize("num", range(1, FEWEST))
def test_few_prompts_have_no_interval(num: int) -> None:
    values = [float(i + 1) for i in range(num)]
    unknown = Interval(mean=(num + 1) / 2, low=-math.inf, high=math.inf, n=num)
    assert bootstrap(values) == unknown
    assert bootstrap(values * 4, clusters=[*range(num)] * 4) == replace(unknown, n=4 * num)


@pytest.mark.parametrize("num", [8, 12, 20, 60])
def test_chance_alone_is_above_zero_in_one_of_forty(num: int) -> None:
    """Values that mean nothing: how often does the whole 95 % interval lie above zero? At most 2.5 %, and noise."""
    rng = np.random.default_rng(num)
    found = [bootstrap(rng.normal(size=num), resamples=1000, seed=i).low > 0 for i in range(2000)]
    assert np.mean(found) < 0.025 + 3 * math.sqrt(0.025 * 0.975 / len(found))


@pytest.mark.parametrize(
    ("confidence", "n", "t"), [(0.95, 6, 2.5706), (0.95, 11, 2.2281), (0.9, 7, 1.9432), (0.99, 21, 2.8453)]
)
def test_percentiles_are_as_far_out_as_students_t(confidence: float, n: int, t: float) -> None:
    assert -NormalDist().inv_cdf(_tail(confidence, n)) == pytest.approx(math.sqrt(n / (n - 1)) * t, rel=2e-3)


def test_bootstrap_is_repeatable() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


@given(st.lists(st.floats(-5, 5) | st.just(NAN), min_size=1, max_size=12))
def test_clusters_of_one_prompt_each_change_nothing(values: list[float]) -> None:
    plain, own = bootstrap(values, resamples=100), bootstrap(values, resamples=100, clusters=range(len(values)))
    assert str(plain) == str(own)  # NaN is not equal to itself


@given(
    st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 4)), min_size=2, max_size=30),
    st.booleans(),
)
def test_means_drawn_at_once_are_those_drawn_one_by_one(rows: list[tuple[float, int]], clustered: bool) -> None:
    values, clusters = [value for value, _ in rows], [cluster for _, cluster in rows] if clustered else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opentao.bestofn.AT_ONCE", 100)  # several pieces
        fast = bootstrap(values, clusters=clusters, resamples=99)
    slow = bootstrap(values, lambda own: float(np.mean(own)), clusters=clusters, resamples=99)
    assert (fast.n, fast.mean) == (slow.n, slow.mean)
    np.testing.assert_allclose((fast.low, fast.high), (slow.low, slow.high), atol=1e-9)


def test_prompts_of_one_cluster_are_drawn_together() -> None:
    """Ten databases of ten equal prompts each say as much as ten prompts."""
    rng = np.random.default_rng(0)
    ten = rng.normal(size=10)
    clustered = bootstrap(np.repeat(ten, 10), clusters=np.repeat(range(10), 10).tolist())
    few = bootstrap(ten)
    assert (clustered.low, clustered.high) == pytest.approx((few.low, few.high))
    assert clustered.n == 100
    many = bootstrap(np.repeat(ten, 10))
    assert many.high - many.low < 0.5 * (few.high - few.low)
    alone = bootstrap([1.0, 2.0, NAN], clusters=["a", "a", "b"])
    assert (alone.low, alone.high, alone.n) == (-math.inf, math.inf, 2)
    with pytest.raises(ValueError, match="one cluster a prompt: got 1 for 2 prompts"):
        paired_difference([1.0, 2.0], [0.0, 0.0], clusters=["a"])


def test_cluster_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        levels = np.repeat(rng.normal(size=30), 5)
        values = levels + rng.normal(size=150)
        interval = bootstrap(
            values, confidence=0.9, resamples=200, seed=trial, clusters=np.repeat(range(30), 5).tolist()
        )
        inside += interval.low <= 0 <= interval.high
    assert 0.82 <= inside / 300 <= 0.96


def test_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for trial in range(400):
        interval = bootstrap(rng.exponential(size=40), confidence=0.9, resamples=200, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.83 <= hits / 400 <= 0.95  # nominal 0.9; standard error 0.015; skewed data cost a few points


def test_more_confidence_is_wider() -> None:
    values = np.random.default_rng(0).normal(size=30)
    narrow, wide = bootstrap(values, confidence=0.5), bootstrap(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_without_prompts_there_is_no_number() -> None:
    for interval in (bootstrap([]), bootstrap([NAN, NAN]), paired_difference([1.0, NAN], [NAN, 1.0])):
        assert interval.as_dict() == {"mean": None, "low": None, "high": None, "n": 0}
        json.dumps(interval.as_dict(), allow_nan=False)


def test_one_prompt_has_no_bounds() -> None:
    interval = bootstrap([2.5, NAN])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    assert interval.as_dict() == {"mean": 2.5, "low": None, "high": None, "n": 1}


@pytest.mark.parametrize("bad", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}])
def test_bootstrap_refuses(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="confidence"):
        bootstrap([1.0, 2.0], **bad)  # type: ignore[arg-type]


def test_paired_difference_takes_out_the_prompts() -> None:
    base = np.random.default_rng(0).normal(scale=100.0, size=40)
    interval = paired_difference(base + 1.0, base)
    assert interval.mean == pytest.approx(1.0)
    assert interval.high - interval.low < 1e-9
    assert paired_difference([3.0, NAN, 5.0], [1.0, 1.0, 1.0]).n == 2


def test_means_of_equal_scores_do_not_differ() -> None:
    """Three answers of 0.1 have another mean, in its last digit, than eight."""
    three, eight = float(np.mean([0.1] * 3)), float(np.mean([0.1] * 8))
    assert three != eight
    interval = paired_difference([three] * 20, [eight] * 20)
    assert (interval.mean, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert paired_difference([1e-6] * 20, [0.0] * 20).low == pytest.approx(1e-6)


def test_different_numbers_of_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), \(1,\)"):
        paired_difference([1.0, 2.0, 3.0], [1.0])


def test_baked_fraction_by_hand() -> None:
    # means over the prompts that have all three: tuned 4, first 2, best 7 -> 2/5
    interval = baked_fraction([3.0, 5.0, 9.0, NAN] * 4, [1.0, 3.0, NAN, 0.0] * 4, [6.0, 8.0, 9.0, 1.0] * 4)
    assert (interval.mean, interval.low, interval.high, interval.n) == pytest.approx((0.4, 0.4, 0.4, 8))


@settings(max_examples=25)
@given(st.floats(-0.5, 1.5), st.integers(FEWEST, 30))
def test_the_same_prompts_are_resampled_in_all_three(fraction: float, num: int) -> None:
    rng = np.random.default_rng(num)
    first, headroom = rng.normal(scale=10, size=num), rng.random(num) + 0.1
    interval = baked_fraction(first + fraction * headroom, first, first + headroom, resamples=50)
    for value in (interval.mean, interval.low, interval.high):
        assert value == pytest.approx(fraction, abs=1e-9)


def test_baked_fraction_without_headroom_is_undefined() -> None:
    for best in ([1.0, 2.0], [0.0, 2.0]):
        interval = baked_fraction([2.0, 3.0], [1.0, 2.0], best)
        assert interval.as_dict() == {"mean": None, "low": None, "high": None, "n": 2}


def test_the_last_digit_is_no_headroom() -> None:
    first = float(np.mean([0.7] * 3))
    assert first < 0.7
    assert math.isnan(baked_fraction([0.2] * 8, [0.0] * 7 + [first], [0.0] * 7 + [0.7]).mean)


def test_doubtful_headroom_makes_the_interval_unbounded() -> None:
    # a third of the resamples takes the first prompt never and has no headroom
    interval = baked_fraction([1.0] * 8, [0.0] * 8, [16.0] + [0.0] * 7)
    assert (interval.mean, interval.low, interval.high, interval.n) == (0.5, -math.inf, math.inf, 8)
