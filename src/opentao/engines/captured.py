"""Decoding on a GPU: a step is one captured CUDA graph, launched at once instead of a thousand kernels one by one.

A graph needs shapes and addresses that stay. So prompts lie in pages, own tokens in slots, and who looks at what is
data (`paged_attention`); the graph depends only on how many rows there are, rounded up. Rows that come and go change
numbers, nothing is copied.

Left out: pages for own tokens (a slot has room for the longest answer), computing long prompts between steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from opentao.engines.paged_attention import PAGE, attend_own, attend_prompts, slots_for
from opentao.engines.shared import run_prompts
from opentao.pack import head_logits
from opentao.policy import attention_of

log = logging.getLogger(__name__)

SPLIT_PAGES = 4  # of a prompt, that one program reads
MOST_SPLITS = 8
MOST_COPIES = 4  # keys and values held while prompts are computed, in `prefill_tokens`


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)


@dataclass(slots=True, eq=False)
class PagedPrompt:
    """Where a prompt's keys and values lie, and how many rows continue it."""

    index: int  # in the table
    length: int
    pages: list[int]  # its own: without those of the root
    num_rows: int


@dataclass(slots=True)
class Row:
    prompt: PagedPrompt
    slot: int
    length: int  # own tokens


@dataclass(kw_only=True, slots=True, frozen=True)
class Room:
    """What a decoder has, or is to have, room for: ``Room(rows=512, own_tokens=64, slots=8, pages=80, longest=2)``"""

    rows: int  # responses side by side
    own_tokens: int  # of each
    slots: int  # rows of one prompt that are computed together
    pages: int  # of prompts, together
    longest: int  # pages of one prompt

    def holds(self, other: Room) -> bool:
        enough = all(getattr(self, name) >= getattr(other, name) for name in ("rows", "own_tokens", "pages", "longest"))
        return enough and self.slots >= other.slots  # places that are not filled count for nothing

    @classmethod
    def needed(
        cls, model: Any, *, rows: int, own_tokens: int, group_size: int, prompts: Sequence[int], root: int, budget: int
    ) -> Room:
        """For prompts of these lengths that share `root` tokens, in at most `budget` tokens beside the own ones."""
        text = model.config.get_text_config()
        rep = text.num_attention_heads // (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        shared = root // PAGE
        longest = pages_for(max(prompts))
        wanted = shared + sum(pages_for(length) - shared for length in prompts)
        # With some to spare: a decoder for a page more than the last call's records all its steps again.
        return cls(
            rows=rows,
            own_tokens=own_tokens,
            slots=slots_for(min(group_size, rows), rep),
            pages=max(min(wanted + wanted // 4, budget // PAGE), longest),
            longest=1 << (longest - 1).bit_length(),
        )


class CapturedDecoder:
    """At most `room.rows` responses side by side. `begin` comes first; it may be used again and again.

    Args:
        prefill_tokens: about how many prompt tokens are computed in one forward pass.
        capture: record graphs; without it every step launches its kernels one by one.
    """

    refills = True

    def __init__(self, model: Any, room: Room, *, prefill_tokens: int, capture: bool = True) -> None:
        self.model = model
        self.room = room
        self.prefill_tokens = prefill_tokens
        self.capture = capture
        self.device = next(model.parameters()).device
        self.cache = PagedCache(room, self.device)
        self.token_L = torch.zeros(room.rows, dtype=torch.long, device=self.device)
        self.graphs: dict[Shape, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seen: set[Shape] = set()
        self.memory: Any = None  # of all graphs: only one of them runs at a time
        self.logits_LV: Tensor | None = None  # where they leave their result
        self.begin(room.rows, [])

    def begin(self, rows: int, root: Sequence[int]) -> None:
        """Forget all prompts and rows; graphs and memory stay.

        Args:
            rows: responses side by side, at most those that there is room for.
            root: tokens that all prompts start with and that are computed once; whole pages of it are kept once. May
                be empty.
        """
        self.rows = rows
        self.root = list(root)
        self.root_cache: DynamicCache | None = None
        self.root_pages: list[int] = []
        self.live: list[Row] = []
        self.free = list(range(self.room.pages))
        self.slots = list(range(self.room.rows))  # free ones
        self.places = list(range(self.room.rows))
        self.shape: Shape = (0, 0)
        self.changed = False

    def fits(self, prompts: Sequence[Sequence[int]]) -> bool:
        """True if there are pages for these prompts beside those that are there."""
        shared = len(self.root) // PAGE
        new = sum(pages_for(len(prompt)) - shared for prompt in prompts) + (0 if self.root_pages else shared)
        return new <= len(self.free)

    @torch.inference_mode()
    def enter(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> Tensor:
        """Compute prompts and append `counts[i]` rows that continue prompt i. Returns logits_LV of the new rows."""
        if self.root and self.root_cache is None:
            _, self.root_cache = run_prompts(self.model, [self.root], self.device)
            whole = len(self.root) // PAGE * PAGE
            self.root_pages = self._take(whole)
            self.cache.store(self.root_cache, [(0, 0, whole, self.root_pages, 0)])
        logits: list[Tensor] = [torch.empty(0)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda b: -len(prompts[b]))  # of like length: little padding
        placed: dict[int, PagedPrompt] = {}
        while order:
            longest = len(prompts[order[0]])
            most = min(
                self.prefill_tokens // max(1, longest - len(self.root)),
                MOST_COPIES * self.prefill_tokens // longest,  # the root's keys and values are there once a row
            )
            most = max(1, most)
            chunk, order = order[:most], order[most:]
            own = [prompts[b][len(self.root) :] for b in chunk]
            hidden, cache = run_prompts(self.model, own, self.device, self.root_cache)
            for b, row_logits in zip(chunk, head_logits(self.model, hidden[:, -1]), strict=True):
                logits[b] = row_logits
            self._store(cache, {b: prompts[b] for b in chunk}, placed)
        for b, count in enumerate(counts):
            placed[b].num_rows = count
            self.live += [Row(placed[b], self.slots.pop(), 0) for _ in range(count)]
        self.changed = True
        return torch.stack(logits).repeat_interleave(torch.tensor(counts, device=self.device), 0)

    def _store(self, cache: DynamicCache, chunk: dict[int, list[int]], placed: dict[int, PagedPrompt]) -> None:
        """Copy a chunk's keys and values from where they were computed, left-padded behind the root, into pages."""
        whole, before = len(self.root_pages) * PAGE, len(self.root)
        width = max(len(prompt) for prompt in chunk.values())
        runs: list[Run] = []
        for row, (b, prompt) in enumerate(chunk.items()):
            placed[b] = PagedPrompt(self.places.pop(), len(prompt), self._take(len(prompt) - whole), 0)
            pages = placed[b].pages
            runs.append((row, whole, before - whole, pages, 0))
            runs.append((row, before + width - len(prompt), len(prompt) - before, pages, before - whole))
        self.cache.store(cache, runs)
        self.cache.describe({p.index: (p.length, [*self.root_pages, *p.pages]) for p in (placed[b] for b in chunk)})

    def _take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(pages_for(tokens))]

    def keep(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was; rows that are not named are gone."""
        stay = set(order)
        for i, row in enumerate(self.live):
            if i not in stay:
                self.slots.append(row.slot)
                row.prompt.num_rows -= 1
                if row.prompt.num_rows == 0:
                    self.free += row.prompt.pages
                    self.places.append(row.prompt.index)
        self.live = [self.live[i] for i in order]
        self.changed = True

    @torch.inference_mode()
    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None:
        """Feed one token a row. Returns logits_LV of the next; they are overwritten by the next step."""
        if self.changed:
            self.shape = self.cache.arrange(self.live)
            self.changed = False
        self.token_L[: len(tokens_L)] = tokens_L
        for row in self.live:
            row.length += 1
        if self.shape in self.graphs:
            graph, logits = self.graphs[self.shape]
            graph.replay()
        elif self.capture and self.shape in self.seen:
            logits = self._capture(self.shape)
        else:
            logits = self._first(self.shape)
        return logits[: len(tokens_L)] if need_logits else None

    def _first(self, shape: Shape) -> Tensor:
        """A step one kernel at a time, which compiles what has to be, and shows whether it can be recorded."""
        self.seen.add(shape)
        if self.capture:
            torch.cuda.set_sync_debug_mode("error")
            try:
                logits = self._run(*shape)
                if self.logits_LV is None:
                    self.logits_LV = logits.new_empty(self.room.rows, logits.shape[1])
                return logits
            except RuntimeError as error:  # the model waits for the GPU; nothing of the step counts yet
                log.warning("%s: steps are not captured: %s", self.model.config.model_type, error)
                self.capture = False
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return self._run(*shape)

    def _capture(self, shape: Shape) -> Tensor:
        """Record a step of this shape, and do it. All graphs leave their logits in the same place."""
        assert self.logits_LV is not None
        graph = torch.cuda.CUDAGraph()
        try:  # whatever happens in there, this stream is the current one afterwards
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.memory):
                self.logits_LV[: shape[0]] = self._run(*shape)
        except RuntimeError as error:  # nothing of it was done yet
            log.warning("%s: steps are not captured: %s", self.model.config.model_type, error)
            self.capture = False
            return self._run(*shape)
        self.memory = graph.pool()
        self.graphs[shape] = (graph, self.logits_LV)
        graph.replay()
        return self.logits_LV

    def _run(self, rows: int, tiles: int) -> Tensor:
        cache = self.cache
        cache.begin_step(rows, tiles)
        with attention_of(self.model, CAPTURED_ATTENTION):
            output = self.model.base_model(
                input_ids=self.token_L[:rows, None],
                position_ids=cache.position_L[:rows, None].long(),
                use_cache=False,
                paged_cache=cache,
            )
        logits = head_logits(self.model, output.last_hidden_state[:, 0])
        cache.end_step(rows)
        return logits


Shape = tuple[int, int]
"""Rows and tiles of a step, rounded up."""

Run = tuple[int, int, int, list[int], int]
"""Row and first place in a computed cache, how many tokens, and the pages and first place there that they go to."""


class PagedCache:
    """Pages of prompts, slots of own tokens, and what the kernels of a step need to know of both."""

    def __init__(self, room: Room, device: torch.device) -> None:
        self.room, self.device = room, device
        rows, slots = room.rows, room.slots
        self.splits = min(MOST_SPLITS, max(1, math.ceil(room.longest / SPLIT_PAGES)))
        self.pages: list[tuple[Tensor, Tensor]] = []  # a layer: keys and values [pages, Hk, PAGE, D]
        self.own: list[tuple[Tensor, Tensor]] = []  # a layer: [rows + 1, Hk, own_tokens, D]; the last slot is no one's
        self.table = torch.zeros(rows, room.longest, dtype=torch.int32, device=device)
        self.prompt_length = torch.zeros(rows, dtype=torch.int32, device=device)
        # One copy to the device a change: slots, lengths and positions of rows, then tiles.
        self.state = torch.zeros(rows * (4 + slots), dtype=torch.int32, device=device)
        self.slot_L, self.length_L, self.position_L = self.state[: 3 * rows].view(3, rows)
        self.tiles = self.state[3 * rows :].view(rows, 1 + slots)

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for layer in (*self.pages, *self.own) for x in layer)

    def store(self, cache: DynamicCache, runs: Sequence[Run]) -> None:
        """Copy runs of a computed cache into pages."""
        row, source, page, place = (
            torch.from_numpy(np.concatenate(x)).to(self.device)
            for x in zip(*(_places(*run) for run in runs), strict=True)
        )
        for i, layer in enumerate(cache.layers):
            if len(self.pages) == i:
                self._allocate(layer.keys, layer.values)
            for kept, new in zip(self.pages[i], (layer.keys, layer.values), strict=True):
                kept[page, :, place] = new[row, :, source].to(kept.dtype)

    def _allocate(self, *like: Tensor) -> None:
        own, pages = [], []
        for x in like:
            Hk, D = x.shape[1], x.shape[3]
            pages.append(x.new_zeros(self.room.pages, Hk, PAGE, D))
            own.append(x.new_zeros(self.room.rows + 1, Hk, self.room.own_tokens, D))
        self.pages.append((pages[0], pages[1]))
        self.own.append((own[0], own[1]))

    def describe(self, prompts: dict[int, tuple[int, list[int]]]) -> None:
        """Say of prompts how long they are and which pages they have."""
        where = torch.tensor(list(prompts), device=self.device)
        table = np.zeros((len(prompts), self.table.shape[1]), np.int32)
        for row, (_, pages) in zip(table, prompts.values(), strict=True):
            row[: len(pages)] = pages
        self.table[where] = torch.from_numpy(table).to(self.device)
        lengths = [length for length, _ in prompts.values()]
        self.prompt_length[where] = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def arrange(self, live: Sequence[Row]) -> tuple[int, int]:
        """Say who the rows are and which of them share a prompt. Returns their number and the tiles', rounded up."""
        most = self.room.rows
        state = np.zeros(self.state.shape, np.int32)
        slot, length, position = state[: 3 * most].reshape(3, most)
        tiles = state[3 * most :].reshape(self.tiles.shape)
        tiles[:] = -1
        slot[:] = most
        by_prompt: dict[int, list[int]] = {}
        for i, row in enumerate(live):
            slot[i], length[i], position[i] = row.slot, row.length, row.prompt.length + row.length
            by_prompt.setdefault(row.prompt.index, []).append(i)
        used, slots = 0, tiles.shape[1] - 1
        for index, rows in by_prompt.items():
            for start in range(0, len(rows), slots):
                part = rows[start : start + slots]
                tiles[used, 0], tiles[used, 1 : 1 + len(part)] = index, part
                used += 1
        self.state.copy_(torch.from_numpy(state))
        return rounded(len(live), most), rounded(used, most)

    def begin_step(self, rows: int, tiles: int) -> None:
        self.num_rows, self.num_tiles = rows, tiles

    def end_step(self, rows: int) -> None:
        self.length_L[:rows] += 1
        self.position_L[:rows] += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [L, H, 1, D], k and v [L, Hk, 1, D] -> [L, 1, H, D]."""
        tiles = self.tiles[: self.num_tiles]
        parts = attend_prompts(q, *self.pages[layer], self.table, self.prompt_length, tiles, scaling, self.splits)
        slots, lengths = self.slot_L[: self.num_rows], self.length_L[: self.num_rows]
        return attend_own(q, (k, v), self.own[layer], slots, lengths, parts, scaling)[:, None]


def _places(row: int, source: int, count: int, pages: Sequence[int], first: int) -> tuple[np.ndarray, ...]:
    """For each token of a run: row and place in the computed cache, page and place in it."""
    tokens = np.arange(count)
    at = first + tokens
    return np.full(count, row), source + tokens, np.asarray(pages, np.int64)[at // PAGE], at % PAGE


def rounded(count: int, most: int) -> int:
    """Up to the next of 8, 12, 16, 24, 32, 48 …, at most `most`: few shapes, little padding.

    >>> [rounded(count, 500) for count in (1, 9, 33, 100, 400)]
    [8, 12, 48, 128, 500]
    """
    power = 8
    while power < count:
        power *= 2
    wanted = power if power == 8 or count > power * 3 // 4 else power * 3 // 4
    return min(wanted, most)


def _captured_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    cache: PagedCache = kwargs["paged_cache"]
    return cache.attend(module.layer_idx, q, k, v, scaling), None


CAPTURED_ATTENTION = "opentao_captured"
AttentionInterface.register(CAPTURED_ATTENTION, _captured_attention)
