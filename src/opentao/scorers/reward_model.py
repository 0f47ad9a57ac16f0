"""The `reward_model` scorer: any sequence-classification model of Hugging Face with one label, scored group-packed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from opentao.errors import ModelError, ScoreError
from opentao.models import resolve_model
from opentao.reward_model import RewardModel, together
from opentao.scorers.plugin import Rating, unscored
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

    def score(self, group: Group) -> list[Rating]:
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[Rating]]:
        """Several groups share a packed row, and what all their prompts start with is computed once.

        An answer that makes its conversation longer than the model reads is unscored, the others of its group are not.
        """
        if self._loaded is None:
            self._loaded = self._load()
        model, most = self._loaded, self._loaded.max_tokens
        asked = [
            model.conversations(g.prompt.messages, [r.text for r in g.responses], self.instruction) for g in groups
        ]
        read = [[ids for ids in own if len(ids) <= most] for own in asked]
        scored = model.score_heads([together(own) for own in read if own], self.row_tokens)
        heads = (heads_K for _, heads_NK in scored for heads_K in heads_NK)
        return [
            [
                self._value(next(heads)) if len(ids) <= most else unscored("too_long", f"{len(ids)} tokens, {most} fit")
                for ids in own
            ]
            for own in asked
        ]

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
