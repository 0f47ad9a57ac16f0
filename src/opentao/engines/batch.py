"""Continuous batching: rows that are decoded side by side, who enters, who leaves.

step: let waiting blocks enter, let finished streams leave, feed one token a row, draw the next
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from opentao.engines.drawing import draw, room_for, uniforms
from opentao.errors import BrokenModelError
from opentao.policy import LoadedPolicy, stop_tokens
from opentao.types import SamplingPlan

REFILL = 0.25  # of the rows must be free before blocks enter: prompts are computed several at once


@dataclass(slots=True, eq=False)
class Stream:
    """One response while it is being decoded."""

    index: int  # position in the group
    seed: int
    tail: list[int]  # the end of its sampler prompt, fed before the response starts
    prefix: list[int]  # the start of the response that its strategy asks for
    uniform_R: list[float] = field(default_factory=list)  # its random numbers, made when it enters
    tokens_R: list[int] = field(default_factory=list)
    logprobs_R: list[float] = field(default_factory=list)
    fed: int = 0  # tokens of the tail that have been chosen
    next: int = -1  # the token to feed
    stopped: bool = False

    @property
    def forced(self) -> int:
        """The token that it must go on with, of its tail or prefix; -1: one is drawn."""
        if self.fed < len(self.tail):
            return self.tail[self.fed]
        return self.prefix[len(self.tokens_R)] if len(self.tokens_R) < len(self.prefix) else -1


@dataclass(slots=True, eq=False)
class Block:
    """Streams whose sampler prompts start with the same tokens: a group, one strategy of it, or a part of either."""

    tokens_P: list[int]
    streams: list[Stream]

    def parts(self, rows: int) -> Iterable[Block]:
        """The block in parts that fit so many rows; the prompt is computed again for each."""
        for start in range(0, len(self.streams), rows):
            yield Block(self.tokens_P, self.streams[start : start + rows])


class Decoder(Protocol):
    """Runs the model on rows. Rows are numbered from 0 without gaps."""

    rows: int  # at most
    refills: bool  # rows may enter while others are live

    def fits(self, prompts: Sequence[Sequence[int]]) -> bool: ...
    def enter(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> Tensor: ...
    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None: ...
    def keep(self, order: Sequence[int]) -> None: ...


class ContinuousBatch:
    """Decodes blocks until all their streams are done. Blocks enter in order; none overtakes another."""

    def __init__(
        self, loaded: LoadedPolicy, plan: SamplingPlan, blocks: Iterable[Block], decoder: Decoder, *, ignore_end: bool
    ) -> None:
        self.plan = plan
        self.decoder = decoder
        self.waiting = deque(part for block in blocks for part in block.parts(decoder.rows))
        self.live: list[Stream] = []  # in the order of the decoder's rows
        self.device = loaded.device
        self.tokenizer = loaded.tokenizer
        self.stops = frozenset() if ignore_end else stop_tokens(loaded) | _special(loaded.tokenizer, plan.stop)
        self.room: Tensor | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.live)

    def step(self) -> list[Stream]:
        """Give every live stream its next token. Returns the streams that were done before it."""
        entering = self._entering()
        if entering:
            logits = self.decoder.enter([b.tokens_P for b in entering], [len(b.streams) for b in entering])
            new = [s for block in entering for s in block.streams]
            for s in new:
                s.uniform_R = uniforms(s.seed, self.plan.max_new_tokens).tolist()
            self._choose(new, logits)
            self.live += new
        finished = self._leave()
        if self.live:
            tokens_L = torch.tensor([s.next for s in self.live], device=self.device)
            drawing = any(s.fed >= len(s.tail) for s in self.live)
            self._choose(self.live, self.decoder.step(tokens_L, need_logits=drawing))
        return finished

    def _entering(self) -> list[Block]:
        free = self.decoder.rows - len(self.live)
        if self.live and (not self.decoder.refills or free < REFILL * self.decoder.rows):
            return []
        entering: list[Block] = []
        while self.waiting and len(self.waiting[0].streams) <= free:
            prompts = [block.tokens_P for block in (*entering, self.waiting[0])]
            if (self.live or entering) and not self.decoder.fits(prompts):
                break
            free -= len(self.waiting[0].streams)
            entering.append(self.waiting.popleft())
        return entering

    def _leave(self) -> list[Stream]:
        finished = [s for s in self.live if self._done(s)]
        if finished:
            order = without([self._done(s) for s in self.live])
            self.decoder.keep(order)
            self.live = [self.live[row] for row in order]
        return finished

    def _done(self, stream: Stream) -> bool:
        return stream.stopped or len(stream.tokens_R) >= self.plan.max_new_tokens

    def _choose(self, streams: Sequence[Stream], logits_LV: Tensor | None) -> None:
        """The token each stream goes on with: the next of its tail, or (kept) of its prefix, or one drawn."""
        forced = [s.forced for s in streams]
        if logits_LV is None:
            tokens, logprobs = forced, [0.0] * len(forced)
        else:
            if self.room is None:
                self.room = room_for(logits_LV, self.decoder.rows)
            uniform_L = torch.tensor([s.uniform_R[len(s.tokens_R)] for s in streams], device=self.device)
            forced_L = torch.tensor(forced, device=self.device) if max(forced) >= 0 else None
            drawn = draw(logits_LV, uniform_L, self.plan, forced_L, self.room)
            tokens, logprobs = drawn[0].tolist(), drawn[1].tolist()
        for s, token, logprob in zip(streams, tokens, logprobs, strict=True):
            s.next = token
            if s.fed < len(s.tail):
                s.fed += 1
            else:
                self._append(s, token, logprob)

    def _append(self, stream: Stream, token: int, logprob: float) -> None:
        if math.isnan(logprob):
            rounded = self.plan.dtype in ("int8", "bfloat16")
            advice = "generate.rollout_dtype: float32" if rounded else "a lower train.learning_rate"
            raise BrokenModelError(
                f"the model's logits are not finite at token {len(stream.tokens_R) + 1} of a response; try {advice}"
            )
        stream.tokens_R.append(token)
        stream.logprobs_R.append(logprob)
        stream.stopped = token in self.stops
        if self.plan.stop and not stream.stopped:
            text = self.tokenizer.decode(stream.tokens_R, skip_special_tokens=True)
            stream.stopped = any(s in text for s in self.plan.stop)


def _special(tokenizer: Any, stops: Sequence[str]) -> frozenset[int]:
    """Stop strings that are tokens of their own, such as ``<|im_end|>``: no text ever holds them."""
    added = tokenizer.get_added_vocab() if stops else {}
    return frozenset(added[stop] for stop in stops if stop in added)


def without(gone: Sequence[bool]) -> list[int]:
    """The rows that stay, the last ones in the places of those that are gone, so that few rows move.

    >>> without([False, True, False, True, False])
    [0, 4, 2]
    """
    num_stay = len(gone) - sum(gone)
    movers = [row for row in range(num_stay, len(gone)) if not gone[row]]
    return [movers.pop() if gone[row] else row for row in range(num_stay)]
