"""Solved always, sometimes, never: where a policy stands on each prompt, not just on average.

Best-of-n helps on prompts that are solved sometimes; on those solved never there is nothing to select, and those solved
always are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opentao.bestofn import Floats, bootstrap
from opentao.types import NAN

FULL_MARKS = 0.01  # share of answers that must have the highest score exactly, for it to mean "solved"


def full_marks(values: Sequence[Floats]) -> float | None:
    """The highest score, if it is one that answers share exactly and not all have; None: "solved" means nothing.

    Scores that are continuous have no full marks, and scores that are all equal do not say whether they are the highest
    or the lowest.

    Args:
        values: of each prompt, its answers' scores; NaN = unscored.

    >>> full_marks([np.array([0.0, 1.0, 1.0])]), full_marks([np.array([0.3, 0.7, 0.2])])
    (1.0, None)
    """
    every = np.concatenate([own[~np.isnan(own)] for own in values]) if values else np.array([])
    if not every.size:
        return None
    top = float(every.max())
    count = int((every == top).sum())
    return top if count > 1 and count >= FULL_MARKS * len(every) and every.min() < top else None


def solved(
    values: Sequence[Floats], at: float | None, args: dict[str, Any], tries: int | None = None
) -> dict[str, Any] | None:
    """Shares of prompts all, some or none of whose scored answers reach `at`, each with its interval, as a SOLVED.

    Args:
        values: of each prompt, its answers' scores; NaN = unscored. A prompt without any is left out.
        at: score from which an answer is right; None: full marks, and None is returned if there are none.
        args: of `bootstrap`.
        tries: look at so many answers of each prompt only, so that groups of different sizes compare.
    """
    at = full_marks(values) if at is None else at
    if at is None:
        return None
    reached = [own[~np.isnan(own)][:tries] >= at for own in values]
    rules: dict[str, Callable[[NDArray[np.bool_]], bool]] = {
        "always": lambda own: bool(own.all()),
        "sometimes": lambda own: bool(own.any() and not own.all()),
        "never": lambda own: not own.any(),
    }
    kinds = {name: [float(rule(own)) if own.size else NAN for own in reached] for name, rule in rules.items()}
    means = {name: bootstrap(own, **args).as_dict() for name, own in kinds.items()}
    return {"at": at, "tries": max(map(len, reached), default=0)} | means
