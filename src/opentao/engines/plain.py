"""Decoding the ordinary way, prompt repeated for every response: right for any model that transformers can run.

Used where a prompt's keys and values cannot be shared: state-space and linear-attention layers, short sliding windows,
latent attention. Rows leave as they finish; new ones enter when all are done.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opentao.engines.shared import cache_argument, run_prompts
from opentao.pack import head_logits

log = logging.getLogger(__name__)


class PlainDecoder:
    """At most `rows` responses side by side."""

    refills = False

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.rows = rows
        self.cache_argument = cache_argument(model)
        takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.stateful = not takes_positions and hasattr(model.config.get_text_config(), "state_size")
        log.warning("%s: attention cannot share prompts; decoding the plain way", model.config.model_type)

    def fits(self, prompts: Sequence[Sequence[int]]) -> bool:
        return True  # rows are counted with their prompts

    def enter(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> Tensor:
        """Compute prompts, `counts[i]` rows of prompt i. Returns logits_LV. Only when no row is left."""
        device = next(self.model.parameters()).device
        repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        hidden, self.cache = run_prompts(self.model, repeated, device)
        width = hidden.shape[1]
        self.position_L = torch.tensor([len(p) for p in repeated], device=device)
        self.mask = (torch.arange(width, device=device) >= width - self.position_L[:, None]).long()
        return head_logits(self.model, hidden[:, -1])

    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None:
        """Feed one token a row. Returns logits_LV of the next, if needed."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        past = {self.cache_argument: self.cache}
        if not self.stateful:  # else nothing but the state knows of the past
            past |= {"attention_mask": self.mask, "position_ids": self.position_L[:, None]}
        output = self.model.base_model(input_ids=tokens_L[:, None], use_cache=True, **past)
        self.position_L = self.position_L + 1
        return head_logits(self.model, output.last_hidden_state[:, 0]) if need_logits else None

    def keep(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was; rows that are not named are gone."""
        if not order:
            return
        index = torch.tensor(order, device=self.mask.device)
        self.cache.reorder_cache(index)  # unlike batch_select_indices, it knows recurrent states too
        self.mask, self.position_L = self.mask[index], self.position_L[index]
