"""Calibrated scorers: scores on the scale of people's choices.

``tao reward calibrate`` finds the factor b for which σ(b·(s_a − s_b)) is the probability that people prefer a to b, and
writes it to a small file. A scorer whose config names that file multiplies its scores by b; then all calibrated scorers
are on one scale, and weights say what they seem to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opentao.errors import ConfigError
from opentao.scorers.run import is_relative, largest_group, run_scorer, run_scorer_many
from opentao.types import BatchScorer, Group, Score, Scorer


@dataclass(slots=True)
class Scaled:
    """A scorer whose scores are multiplied by `scale`; what is unscored stays so, with its reason."""

    name: str
    scorer: Scorer
    scale: float

    @property
    def relative(self) -> bool:
        return is_relative(self.scorer)

    @property
    def largest_group(self) -> int | None:
        return largest_group(self.scorer)

    def score(self, group: Group) -> list[Score]:
        return self._scaled(run_scorer(self.scorer, group))

    def _scaled(self, scores: Sequence[Score]) -> list[Score]:
        return [Score(value=s.value * self.scale, error=s.error) for s in scores]


class ScaledBatch(Scaled):
    """The same for a scorer that takes several groups at once."""

    def score_many(self, groups: Sequence[Group]) -> list[list[Score]]:
        return [self._scaled(scores) for scores in run_scorer_many(self.scorer, groups)]


def calibrated(scorer: Scorer, path: Path) -> Scorer:
    """`scorer` on the scale that the file says.

    Raises:
        ConfigError: the file cannot be read or holds no scale.
    """
    scale = read_scale(path)
    kind = ScaledBatch if isinstance(scorer, BatchScorer) else Scaled
    return kind(name=scorer.name, scorer=scorer, scale=scale)


def read_scale(path: Path) -> float:
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: calibration cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: calibration is not JSON: {error}") from error
    scale = facts.get("scale") if isinstance(facts, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ConfigError(f"{path}: scale: expected a number above 0, got {scale!r}")
    return float(scale)
