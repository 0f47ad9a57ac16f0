"""The `reward_model` scorer: any sequence-classification model of Hugging Face with one label, scored group-packed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opentao.reward_model import RewardModel
from opentao.types import Group


class RewardModelScorer:
    """Loads on first use, so that naming a scorer costs nothing.

    Args:
        model: a folder (such as `tao reward train` writes) or a hub name.
        squash: use σ(score) in place of the score, so that it lies between 0 and 1 beside other scorers.
    """

    def __init__(
        self, *, name: str, model: str, squash: bool = False, row_tokens: int = 2048, trust_remote_code: bool = False
    ) -> None:
        self.name = name
        self.model = model
        self.squash = squash
        self.row_tokens = row_tokens
        self.trust_remote_code = trust_remote_code
        self._loaded: RewardModel | None = None

    def score(self, group: Group) -> list[float]:
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[float]]:
        """Several groups share a packed row, and what all their prompts start with is computed once."""
        if self._loaded is None:
            self._loaded = RewardModel.load(self.model, trust_remote_code=self.trust_remote_code).for_scoring()
        encoded = [self._loaded.encode(g.prompt.messages, [r.text for r in g.responses]) for g in groups]
        return [[self._value(s) for s in scores] for _, scores in self._loaded.score(encoded, self.row_tokens)]

    def _value(self, score: float) -> float:
        return (1 + math.tanh(score / 2)) / 2 if self.squash else score  # σ, without overflow
