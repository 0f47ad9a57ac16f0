"""The maths of best-of-n: weights, targets, curves, and intervals over prompts. Pure functions on numpy arrays.

The scores of one group are treated as the whole distribution ("empirical"), so best-of-n is exact for any n, n > N
included, with ties shared evenly. An unscored response is NaN: it takes no part, and stays NaN in the result.

Left out: smoothing of the empirical distribution, and bias-corrected (BCa) intervals.

Shown by ``pytest tests/test_bestofn.py``: hand-worked numbers, brute force over every tuple and subset, simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opentao.types import NAN

AT_ONCE = 4_000_000  # numbers drawn at once by the bootstrap: 32 MB
FEWEST = 8  # prompts or clusters that an interval can be of: of fewer it is too often on one side of zero by chance
ROUNDING = 1e-12  # two numbers that differ by less, as a share of the larger or of 1, are equal

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]
"""Takes the values of some prompts, [P] or [P, columns], and returns one number; NaN where it is not defined."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Interval:
    """A number over prompts and how far it can be trusted.

    Example: ``Interval(mean=0.42, low=0.35, high=0.49, n=64)``. Without prompts all three are NaN; of fewer
    than `FEWEST` prompts the bounds are infinite, because so few do not show how much prompts differ.
    """

    mean: float  # the statistic on all prompts; NaN = undefined
    low: float  # lower bound; -inf = unbounded
    high: float  # upper bound; inf = unbounded
    n: int  # prompts behind it

    def as_dict(self) -> dict[str, float | int | None]:
        """Strict JSON: what is NaN or infinite becomes None."""
        values = {"mean": self.mean, "low": self.low, "high": self.high}
        return {k: v if math.isfinite(v) else None for k, v in values.items()} | {"n": self.n}


def _ranks(scores_N: ArrayLike, n: float) -> tuple[Floats, NDArray[np.bool_], Floats, Floats, int]:
    """Scores, which of them are scored, and for the M scored ones #{s_j <= s_i}, #{s_j < s_i}, and M itself."""
    if not n >= 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    scores = np.asarray(scores_N, dtype=np.float64)
    scored = ~np.isnan(scores)
    ordered = np.sort(scores[scored])
    at_most = np.searchsorted(ordered, scores[scored], side="right").astype(np.float64)
    below = np.searchsorted(ordered, scores[scored], side="left").astype(np.float64)
    return scores, scored, at_most, below, len(ordered)


def weights(scores_N: ArrayLike, n: float) -> Floats:
    """Probability that each response is the best of n draws (with replacement) from its group.

        w_i = (F_i^n - F'_i^n) / m_i,  F_i = #{s_j <= s_i}/M,  F'_i = #{s_j < s_i}/M,  m_i = #{s_j = s_i}

    over the M scored responses. Tied responses share evenly. Depends on ranks only.

    Args:
        scores_N: [N] any scale, higher is better; NaN = unscored.
        n: draws, >= 1; may exceed N.

    Returns:
        [N] weights that sum to 1 over the scored responses; NaN where unscored.

    Source: docs/method.md; the distribution function of a maximum, F^n, taken on the empirical distribution.

    >>> weights([0.1, 0.9], 2).tolist()
    [0.25, 0.75]
    """
    scores, scored, at_most, below, num_scored = _ranks(scores_N, n)
    result = np.full(scores.shape, NAN)
    if num_scored:
        result[scored] = ((at_most / num_scored) ** n - (below / num_scored) ** n) / (at_most - below)
    return result


def target_log_ratio(scores_N: ArrayLike, n: float, floor: float) -> Floats:
    """Log density ratio of the best-of-n policy to the policy that sampled the group, floored.

        t_i = max(log(M w_i), -floor) = max(log(M/m_i) + n log F_i + log(1 - (F'_i/F_i)^n), -floor)

    with `weights`' symbols. Worked out in logs: w_i of a low rank underflows for large n, its logarithm does not.

    Args:
        scores_N: [N] any scale, higher is better; NaN = unscored.
        n: which best-of-n, >= 1; may exceed N.
        floor: nats, >= 0.

    Returns:
        [N] nats; exact zeros if all scores are equal; NaN where unscored.

    Source: docs/method.md.

    >>> target_log_ratio([0.1, 0.9], 2, floor=5.0).round(4).tolist()  # log 0.5, log 1.5
    [-0.6931, 0.4055]
    """
    if not floor >= 0:
        raise ValueError(f"floor must be >= 0, got {floor}")
    scores, scored, at_most, below, num_scored = _ranks(scores_N, n)
    result = np.full(scores.shape, NAN)
    with np.errstate(divide="ignore"):  # the lowest rank has F' = 0: log 0 = -inf, and log(1 - 0) = 0 is right
        not_all_below = np.log(-np.expm1(n * np.log(below / at_most)))
    log_ratio = np.log(num_scored / (at_most - below)) + n * np.log(at_most / max(num_scored, 1)) + not_all_below
    result[scored] = np.maximum(log_ratio, -floor)
    return result


def selection_probabilities(scores_N: ArrayLike, k: int) -> Floats:
    """p_i: how often response i is the best of k drawn without replacement; ties share evenly; NaN stays NaN.

        P(the i-th smallest of M is the best of k) = C(i-1, k-1) / C(M, k),  i from 1

    so Σ p_i s_i is `best_of_k`, and Σ p_i a_i is what an audit a makes of the response that the scores would pick.

    Raises:
        ValueError: k < 1, or fewer than k scored responses.

    >>> selection_probabilities([1.0, 5.0, 5.0], 2)
    array([0. , 0.5, 0.5])
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    scored = np.flatnonzero(~np.isnan(scores))
    if not 1 <= k <= len(scored):
        raise ValueError(f"best of {k} needs 1 <= k <= number of scored responses, which is {len(scored)}")
    subsets = math.comb(len(scored), k)  # exact integers: a quotient of factorials overflows from 171 responses
    shares = np.array([math.comb(i, k - 1) / subsets for i in range(len(scored))])
    order = scored[np.argsort(scores[scored], kind="stable")]
    _, tie_of = np.unique(scores[order], return_inverse=True)
    probabilities = np.full(scores.shape, np.nan)
    probabilities[order] = (np.bincount(tie_of, shares) / np.bincount(tie_of))[tie_of]
    return probabilities


def best_of_k(scores_N: ArrayLike, k: int) -> float:
    """Unbiased estimate of the expected best of k responses, from the M >= k scored ones of a group.

        E[max of k] = sum_{i=k..M} C(i-1, k-1) / C(M, k) * s_(i),  s sorted ascending, i from 1

    the mean of the maximum over all subsets of size k (drawn without replacement).

    Source: docs/method.md; with 0/1 scores it is pass@k of Chen et al. 2021, arXiv:2107.03374, equation 1.

    Raises:
        ValueError: k < 1, or fewer than k scored responses.

    >>> round(best_of_k([1.0, 2.0, 5.0], 2), 6)  # pairs (1,2), (1,5), (2,5): (2 + 5 + 5) / 3
    4.0
    """
    scores = np.asarray(scores_N, dtype=np.float64)
    ordered = np.sort(scores[~np.isnan(scores)])
    num_scored = len(ordered)
    if not 1 <= k <= num_scored:
        raise ValueError(f"best of {k} needs 1 <= k <= number of scored responses, which is {num_scored}")
    subsets = math.comb(num_scored, k)  # exact integers: a quotient of factorials overflows from 171 responses
    shares = [math.comb(i, k - 1) / subsets for i in range(k - 1, num_scored)]
    return float(np.dot(shares, ordered[k - 1 :]))


def best_of_curve(scores_N: ArrayLike, ks: Iterable[int]) -> dict[int, float]:
    """`best_of_k` for every k of `ks` that the number of scored responses allows; the others are left out."""
    num_scored = int(np.count_nonzero(~np.isnan(np.asarray(scores_N, dtype=np.float64))))
    return {k: best_of_k(scores_N, k) for k in ks if k <= num_scored}


def max_variance_subset(values_N: ArrayLike, m: int) -> list[int]:
    """Indices, ascending, of the `m` values whose variance is largest among all subsets of that size; never of NaN.

    Such a subset consists of the lowest i and the highest m − i values for some i, so m + 1 candidates are compared.
    Source: PODS (2504.13818), theorem 1.

    >>> max_variance_subset([0.9, 0.5, 0.1, 0.4], 2)
    [0, 2]
    """
    if m < 1:
        raise ValueError(f"a subset needs at least 1 value, got {m}")
    values = np.asarray(values_N, dtype=np.float64)
    order = [int(i) for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
    if len(order) <= m:
        return sorted(order)
    candidates = [order[:i] + order[len(order) - (m - i) :] for i in range(m + 1)]
    return sorted(max(candidates, key=lambda indices: float(np.var(values[np.array(indices)]))))


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased probability that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.

    Raises:
        ValueError: k outside 1..num_samples, or num_correct outside 0..num_samples.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs 1 <= k <= number of samples, which is {num_samples}")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"number of correct samples must be in 0..{num_samples}, got {num_correct}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def kl_bound(n: float) -> float:
    """Upper bound, in nats, of KL(best-of-n || base): log n - (n - 1)/n. Equality without ties, in the continuum.

    Source: Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv:2401.01879.

    >>> round(kl_bound(4), 4)
    0.6363
    """
    if not n >= 1:
        raise ValueError(f"best-of-n needs n >= 1, got {n}")
    return math.log(n) - (n - 1) / n


def mean(values_P: Floats) -> float:
    """The plain mean over prompts."""
    return float(np.mean(values_P))


def bootstrap(
    values_P: ArrayLike,
    statistic: Statistic = mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Percentile bootstrap over prompts: the statistic on all of them, and its spread over resampled sets of them.

    Percentiles of few prompts lie too close together, so they are taken further out, by as much as Student's t is wider
    than the normal distribution (the *expanded* percentile interval). Of fewer than `FEWEST` prompts or clusters the
    bounds are infinite: by chance alone all of five lie on one side of zero in one of 32 cases, of two in one of four.

    A prompt with a NaN (in any column) is removed first; `n` counts the ones left. A resample on which the statistic
    is NaN says nothing, so it counts as -inf for the lower bound and as +inf for the upper one: too many of them make
    the interval unbounded, never narrower. Bounds are order statistics, rounded outwards.

    Args:
        values_P: [P], or [P, columns] when several numbers belong to one prompt and are resampled together.
        statistic: of such an array.
        clusters: [P] what each prompt belongs to (a database, a document). Prompts of one are alike, so whole clusters
            are drawn, as many as there are. None: each prompt by itself.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; Davison & Hinkley 1997, "Bootstrap
    Methods and their Application", section 3.8; Hesterberg 2015, "What Teachers Should Know About the Bootstrap",
    arXiv:1411.5279 (expanded percentiles).
    """
    if not (0 < confidence < 1 and resamples >= 1):
        raise ValueError(f"need 0 < confidence < 1 and resamples >= 1, got {confidence} and {resamples}")
    values = np.asarray(values_P, dtype=np.float64)
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"one cluster a prompt: got {len(clusters)} for {len(values)} prompts")
    there = np.atleast_1d(~np.isnan(values).any(axis=tuple(range(1, values.ndim))))  # a prompt is whole or out
    values = values[there]
    n = len(values)
    point = statistic(values) if n else NAN
    if math.isnan(point):
        return Interval(mean=NAN, low=NAN, high=NAN, n=n)
    own = None if clusters is None else [c for c, kept in zip(clusters, there.tolist(), strict=True) if kept]
    if (independent := n if own is None else len(set(own))) < FEWEST:
        return Interval(mean=point, low=-math.inf, high=math.inf, n=n)
    if statistic is mean and values.ndim == 1:
        draws = _means(values, own, resamples, seed)
    else:
        draws = np.array([statistic(values[chosen]) for chosen in _resamples(n, own, resamples, seed)])
    tail = _tail(confidence, independent)
    low = np.quantile(np.where(np.isnan(draws), -np.inf, draws), tail, method="lower")
    high = np.quantile(np.where(np.isnan(draws), np.inf, draws), 1 - tail, method="higher")
    return Interval(mean=point, low=float(low), high=float(high), n=n)


def _tail(confidence: float, n: int) -> float:
    """Share of the resamples beyond each bound: Φ(−√(n/(n−1)) t), t the quantile of Student's t with n − 1 degrees.

    That quantile by its expansion around the normal one, good to 0.1 % here (Abramowitz & Stegun 26.7.5).

    >>> [round(_tail(0.95, n), 4) for n in (8, 20, 1000)]
    [0.0057, 0.0159, 0.0248]
    """
    normal, v = NormalDist(), n - 1
    z = -normal.inv_cdf((1 - confidence) / 2)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return normal.cdf(-math.sqrt(n / v) * t)


def _means(values_P: Floats, clusters: Sequence[Hashable] | None, resamples: int, seed: int) -> Floats:
    """The mean of each resample, many resamples at once; the same draws as `_resamples`."""
    rng = np.random.default_rng(seed)
    numbers: dict[Hashable, int] = {}
    which_P = [numbers.setdefault(c, len(numbers)) for c in (range(len(values_P)) if clusters is None else clusters)]
    sums_B, counts_B = np.bincount(which_P, values_P), np.bincount(which_P)
    B = len(numbers)
    found = []
    for start in range(0, resamples, rows := max(1, AT_ONCE // B)):
        drawn_RB = rng.integers(B, size=(min(rows, resamples - start), B))
        found.append(sums_B[drawn_RB].sum(1) / counts_B[drawn_RB].sum(1))
    return np.concatenate(found)


def _resamples(n: int, clusters: Sequence[Hashable] | None, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Indices of each resample: n prompts with replacement, or as many whole clusters as there are."""
    rng = np.random.default_rng(seed)
    if clusters is None:
        for _ in range(resamples):
            yield rng.integers(n, size=n)
        return
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    blocks = [np.array(own, dtype=np.int64) for own in members.values()]
    for _ in range(resamples):
        yield np.concatenate([blocks[b] for b in rng.integers(len(blocks), size=len(blocks))])


def _columns(*arrays_P: ArrayLike) -> Floats:
    """[P, columns]: what belongs to one prompt side by side. Numpy would stretch a length of 1; here it is an error."""
    columns = [np.asarray(array, dtype=np.float64) for array in arrays_P]
    if len({column.shape for column in columns}) > 1:
        raise ValueError(f"one value per prompt each, in the same order; got shapes {[c.shape for c in columns]}")
    return np.stack(columns, axis=1)


def paired_difference(
    tuned_P: ArrayLike,
    base_P: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Mean of tuned - base over the prompts that have both: prompts vary far more than policies do.

    Two means of equal scores, of which one is over more answers, may differ in their last digit: that is no difference.

    Args:
        tuned_P: [P] one value a prompt; NaN = not available.
        base_P: [P] of the same prompts in the same order.
    """
    columns = _columns(tuned_P, base_P)
    difference_P = columns[:, 0] - columns[:, 1]
    difference_P[np.abs(difference_P) <= ROUNDING * np.maximum(1.0, np.abs(columns).max(axis=1))] = 0.0
    return bootstrap(difference_P, confidence=confidence, resamples=resamples, seed=seed, clusters=clusters)


def last_digit(a: float, b: float) -> float:
    """By how much equal numbers may differ that were averaged over different counts."""
    return ROUNDING * max(1.0, abs(a), abs(b))


def _fraction(columns_P3: Floats) -> float:
    """Ratio of mean gains; NaN if best-of-N is not better than the first try."""
    tuned, first, best = np.mean(columns_P3, axis=0).tolist()
    return float((tuned - first) / (best - first)) if best - first > last_digit(best, first) else NAN


def baked_fraction(
    tuned_first_P: ArrayLike,
    base_first_P: ArrayLike,
    base_best_P: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """How much of the base's best-of-N gain the tuned policy's first try has.

        (mean tuned first - mean base first) / (mean base best - mean base first)

    A ratio of means, not a mean of ratios: prompts without headroom would divide by 0. One resample takes the same
    prompts in all three. A prompt with a NaN in any of them is dropped. If the denominator is <= 0 on all prompts, the
    fraction is undefined (NaN, n kept). A *resample* with a denominator <= 0 is kept, as -inf for the lower and +inf
    for the upper bound: once their share passes (1 - confidence)/2 the interval is unbounded, because the headroom
    itself is not established. Dropping them would make the interval narrow just where it should be wide.

    Args:
        tuned_first_P: [P] mean first-try score of each prompt, tuned.
        base_first_P: [P] the same of the base; same prompts, same order.
        base_best_P: [P] the base's best of N.

    Source: docs/method.md.
    """
    columns = _columns(tuned_first_P, base_first_P, base_best_P)
    return bootstrap(columns, _fraction, confidence=confidence, resamples=resamples, seed=seed, clusters=clusters)
