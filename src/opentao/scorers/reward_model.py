"""The `reward_model` scorer: any sequence-classification model of Hugging Face with one label, scored group-packed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from opentao.errors import ModelError, ScoreError
from opentao.models import resolve_model
from opentao.reward_model import RewardModel
from opentao.types import Group


class RewardModelScorer:
    """Loads on first use, so that naming a scorer costs little; a folder that is none is refused at once.

    A model that cannot be loaded, or not be used so, is a `ScoreError`: no answer can be scored without it.

    Args:
        model: a folder (such as `tao reward train` writes) or a hub name.
        squash: use σ(score) in place of the score, so that it lies between 0 and 1 beside other scorers.
        pessimism: k in mean − k·spread over the heads of an ensemble (standard deviation): what the heads do not agree
            on is worth less, so a policy gains nothing by going where no choices were seen.
        instruction: what counts as good, for a model that was trained with instructions.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        squash: bool = False,
        pessimism: float = 0.0,
        instruction: str = "",
        row_tokens: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not 0 <= pessimism < math.inf:
            raise ValueError(f"pessimism: expected a number of at least 0, got {pessimism!r}")
        try:
            resolve_model(model)
        except ModelError as error:
            raise ValueError(str(error)) from error
        self.name = name
        self.model = model
        self.squash = squash
        self.pessimism = pessimism
        self.instruction = instruction
        self.row_tokens = row_tokens
        self.trust_remote_code = trust_remote_code
        self._loaded: RewardModel | None = None

    def score(self, group: Group) -> list[float]:
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[float]]:
        """Several groups share a packed row, and what all their prompts start with is computed once."""
        if self._loaded is None:
            self._loaded = self._load()
        encoded = [
            self._loaded.encode(g.prompt.messages, [r.text for r in g.responses], self.instruction) for g in groups
        ]
        return [[self._value(h) for h in heads] for _, heads in self._loaded.score_heads(encoded, self.row_tokens)]

    def _load(self) -> RewardModel:
        try:
            loaded = RewardModel.load(self.model, trust_remote_code=self.trust_remote_code)
        except ModelError as error:
            raise ScoreError(f"scorer {self.name}: {error}") from error
        if self.pessimism and loaded.num_heads == 1:
            raise ScoreError(f"scorer {self.name}: pessimism needs an ensemble, {self.model} has one head")
        if self.instruction and not loaded.takes_instructions:
            raise ScoreError(f"scorer {self.name}: {self.model} was not trained with any `instruction`")
        return loaded.for_scoring()

    def _value(self, heads_K: Sequence[float]) -> float:
        score = statistics.fmean(heads_K) - self.pessimism * statistics.pstdev(heads_K)
        return (1 + math.tanh(score / 2)) / 2 if self.squash else score  # σ, without overflow
