"""Decoding with a prompt's keys and values computed and kept once for all its responses.

Three things can stand before a token: the *root* (what all prompts start with: an instruction, examples), the rest of
its *prompt*, and the response's *own* tokens. Attention over each is computed apart, for all rows that share it in one
matrix product, and the parts are merged by their softmax sums, which is exact. It goes through transformers' public
attention interface, so any decoder with standard attention works without model code.

Rows come and go: a finished row's place is taken by the last row, a prompt without rows gives up its memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from opentao.engines.pool import Place, PromptPool, pool_width
from opentao.pack import head_logits
from opentao.policy import attention_of

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of transformers, newest first; the last is state-space

ALONE = 256  # tokens from which a prompt is computed alone: without padding attention is causal and half the work
ROOT_APART = 128  # tokens from which a root is attended by itself; a shorter one is copied to its prompts

Part = tuple[Tensor, Tensor, Tensor]
"""Attention over some keys: peak of the scores and sum of exp(scores − peak) [..., 1], values mixed by their softmax
[..., D]; fp32."""


class SharedDecoder:
    """At most `rows` responses side by side, each with up to `own_tokens` tokens of its own.

    Args:
        root: tokens that all prompts start with and that are computed once; may be empty.
        prompt_tokens: for how many tokens of prompts keys and values may be kept, padding included.
        prefill_tokens: about how many prompt tokens are computed in one forward pass.
    """

    refills = True

    def __init__(
        self, model: Any, *, rows: int, own_tokens: int, root: Sequence[int], prompt_tokens: int, prefill_tokens: int
    ) -> None:
        self.model = model
        self.rows = rows
        self.prompt_tokens = prompt_tokens
        self.prefill_tokens = prefill_tokens
        self.root = list(root)
        self.copied = len(self.root) if len(self.root) < ROOT_APART else 0  # tokens of it that each prompt keeps
        self.cache = SharedCache(rows, own_tokens, len(self.root) - self.copied)
        self.root_cache: DynamicCache | None = None

    def fits(self, prompts: Sequence[Sequence[int]]) -> bool:
        """True if there is room for these prompts beside those that are there."""
        new = sum(pool_width(len(prompt) - self.cache.root_tokens) for prompt in prompts)
        return self.cache.prompt_tokens + new <= self.prompt_tokens

    def enter(self, prompts: Sequence[list[int]], counts: Sequence[int]) -> Tensor:
        """Compute prompts and append `counts[i]` rows that continue prompt i. Returns logits_LV of the new rows."""
        device = next(self.model.parameters()).device
        if self.root and self.root_cache is None:
            _, self.root_cache = run_prompts(self.model, [self.root], device)
            if not self.copied:
                self.cache.store_root(self.root_cache)
        own = [prompt[len(self.root) :] for prompt in prompts]
        places: list[Place | None] = [None] * len(own)
        logits: list[Tensor] = [torch.empty(0)] * len(own)
        order = sorted(range(len(own)), key=lambda b: -len(own[b]))  # rows of a forward pass are of like length
        while order:
            longest = len(own[order[0]])
            rows = 1 if longest >= ALONE else max(1, self.prefill_tokens // longest)
            chunk, order = order[:rows], order[rows:]
            hidden, cache = run_prompts(self.model, [own[b] for b in chunk], device, self.root_cache)
            for row, b in enumerate(chunk):
                places[b] = self.cache.store_prompt(cache, row, len(own[b]), self.copied)
            for b, row_logits in zip(chunk, head_logits(self.model, hidden[:, -1]), strict=True):
                logits[b] = row_logits
        for place, count in zip(places, counts, strict=True):
            assert place is not None
            self.cache.append(place, count)
        return torch.stack(logits).repeat_interleave(torch.tensor(counts, device=device), 0)

    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None:
        """Feed one token a row. Returns logits_LV of the next, if needed."""
        position_L = self.cache.begin_step(tokens_L.device)
        with attention_of(self.model, SHARED_ATTENTION):
            output = self.model.base_model(
                input_ids=tokens_L[:, None], position_ids=position_L[:, None], use_cache=False, shared_cache=self.cache
            )
        self.cache.end_step()
        return head_logits(self.model, output.last_hidden_state[:, 0]) if need_logits else None

    def keep(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was; rows that are not named are gone."""
        self.cache.keep(order)


def run_prompts(
    model: Any, prompts: Sequence[Sequence[int]], device: torch.device, start: DynamicCache | None = None
) -> tuple[Tensor, DynamicCache]:
    """Left-padded forward of a few prompts, each after the one that `start` holds.

    Returns hidden states [B, P, hidden] and all keys and values, those of `start` in front.
    """
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    before, past = 0, {}
    if start is not None:
        before, cache = start.get_seq_length(), DynamicCache()
        for i, layer in enumerate(start.layers):
            cache.update(*(x.expand(len(prompts), -1, -1, -1) for x in (layer.keys, layer.values)), i)
        past = {cache_argument(model): cache}
    positions = before + (mask.cumsum(-1) - 1).clamp(min=0)
    mask = torch.cat([mask.new_ones(len(prompts), before), mask], 1)
    output = model.base_model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=True,
        **past,
    )
    return output.last_hidden_state, next(output[name] for name in CACHE_NAMES if name in output)


def cache_argument(model: Any) -> str:
    """How this model's forward calls its cache; transformers renames it."""
    known = inspect.signature(model.base_model.forward).parameters
    return next(name for name in CACHE_NAMES if name in known)


def own_capacity(length: int, most: int) -> int:
    """Places for a response's own tokens: steps of 8, and of an eighth for long ones.

    >>> [own_capacity(length, 1000) for length in (1, 9, 100, 500, 999)]
    [8, 16, 108, 558, 1000]
    """
    step = max(8, length // 8)
    return min(most, -(-length // step) * step)


@dataclass(slots=True)
class PoolRows:
    """Which rows look at the prompts of one pool: row ``gather[b * slots + s]`` is slot s of prompt b."""

    pool: PromptPool
    slots: int
    gather: Tensor  # [B * slots]; a slot without a row names row 0: computed, never read


class SharedCache:
    """Keys and values of the root, of prompts and of rows, and attention over all three with one softmax."""

    def __init__(self, rows: int, own_tokens: int, root_tokens: int) -> None:
        self.rows, self.own_tokens, self.root_tokens = rows, own_tokens, root_tokens
        self.root: list[tuple[Tensor, Tensor]] = []  # a layer: keys [Hk, D, C], values [Hk, C, D]
        self.pools: dict[int, PromptPool] = {}
        self.own_k: list[Tensor] = []  # a layer: [rows, Hk, capacity, D]
        self.own_v: list[Tensor] = []
        self.places: list[Place] = []  # of each live row
        self.lengths: list[int] = []  # own tokens of each live row
        self.layout: tuple[list[PoolRows], Tensor] | None = None  # None: rows have come or gone

    def store_root(self, cache: DynamicCache) -> None:
        self.root = [(layer.keys[0].mT.contiguous(), layer.values[0].contiguous()) for layer in cache.layers]

    def store_prompt(self, cache: DynamicCache, row: int, length: int, start: int = 0) -> Place:
        if not self.own_k:
            self.own_k = [self._own(layer.keys) for layer in cache.layers]
            self.own_v = [self._own(layer.values) for layer in cache.layers]
        width = pool_width(start + length)
        pool = self.pools.setdefault(width, PromptPool(width))
        return pool.add(cache.layers, row, length, start)

    def _own(self, like: Tensor) -> Tensor:
        # Zeros: what a masked place holds is multiplied by 0, and 0 times NaN is NaN.
        return like.new_zeros(self.rows, like.shape[1], own_capacity(1, self.own_tokens), like.shape[3])

    def _grow(self) -> None:
        """Make room for one more own token. Room that is not used would be skipped over at every read: slow."""
        for kept in (self.own_k, self.own_v):
            for i, old in enumerate(kept):
                used = old.shape[2]
                kept[i] = old.new_zeros(*old.shape[:2], own_capacity(used + 1, self.own_tokens), old.shape[3])
                kept[i][:, :, :used] = old

    def append(self, place: Place, count: int) -> None:
        place.num_rows += count
        self.places += [place] * count
        self.lengths += [0] * count
        self.layout = None

    def keep(self, order: Sequence[int]) -> None:
        """See `SharedDecoder.keep`. Only rows that move are copied."""
        moved = [i for i, old in enumerate(order) if i != old]
        if moved:
            to = torch.tensor(moved, device=self.own_k[0].device)
            source = torch.tensor([order[i] for i in moved], device=to.device)
            used = max(self.lengths[order[i]] for i in moved)
            for x in (*self.own_k, *self.own_v):
                x[to, :, :used] = x[source, :, :used]
        stay = set(order)
        for row, place in enumerate(self.places):
            if row not in stay:
                place.num_rows -= 1
                if place.num_rows == 0:
                    self._forget(place)
        self.places = [self.places[old] for old in order]
        self.lengths = [self.lengths[old] for old in order]
        self.layout = None

    def _forget(self, place: Place) -> None:
        place.pool.remove(place)
        if not place.pool.places:
            del self.pools[place.pool.width]

    @property
    def prompt_tokens(self) -> int:
        """For how many prompt tokens there are keys and values, padding included."""
        return sum(pool.width * len(pool.places) for pool in self.pools.values())

    def begin_step(self, device: torch.device) -> Tensor:
        """Set up what all layers of a step share. Returns the position [L] of each row's token."""
        if self.layout is None:
            self.layout = self._arrange(device)
        self.num_own = max(self.lengths) + 1
        if self.num_own > self.own_k[0].shape[2]:
            self._grow()
        self.length_L = torch.tensor(self.lengths, device=device)
        self.row_L = torch.arange(len(self.lengths), device=device)
        self.uniform = min(self.lengths) + 1 == self.num_own
        hidden = torch.arange(self.num_own, device=device) > self.length_L[:, None]
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        self.own_bias = None if self.uniform else bias[:, None, None]
        before = torch.tensor([place.length for place in self.places], device=device)
        return self.root_tokens + before + self.length_L

    def end_step(self) -> None:
        self.lengths = [length + 1 for length in self.lengths]

    def _arrange(self, device: torch.device) -> tuple[list[PoolRows], Tensor]:
        """For each pool its rows by prompt; and where each row's result stands behind one another."""
        rows: dict[Place, list[int]] = {}
        for row, place in enumerate(self.places):
            rows.setdefault(place, []).append(row)
        where = torch.zeros(len(self.places), dtype=torch.long)
        arranged, before = [], 0
        for pool in self.pools.values():
            slots = max(len(rows[place]) for place in pool.places)
            gather = torch.zeros(len(pool.places), slots, dtype=torch.long)
            for place in pool.places:
                own = torch.tensor(rows[place])
                gather[place.index, : len(own)] = own
                where[own] = before + place.index * slots + torch.arange(len(own))
            arranged.append(PoolRows(pool, slots, gather.flatten().to(device)))
            before += gather.numel()
        return arranged, where.to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [L, H, 1, D], k and v [L, Hk, 1, D] -> [L, 1, H, D]."""
        L, H, _, D = q.shape
        Hk = k.shape[1]
        q = (q * scaling).view(L, Hk, H // Hk, D)
        parts = [self._own_part(layer, q, k, v), self._prompt_part(layer, q)]
        if self.root:
            parts.append(self._root_part(layer, q))
        return _merged(parts).to(v.dtype).view(L, 1, H, v.shape[-1])

    def _own_part(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Part:
        own_k, own_v = self.own_k[layer], self.own_v[layer]
        if self.uniform:
            own_k[: len(q), :, self.num_own - 1], own_v[: len(q), :, self.num_own - 1] = k[:, :, 0], v[:, :, 0]
        else:
            own_k[self.row_L, :, self.length_L], own_v[self.row_L, :, self.length_L] = k[:, :, 0], v[:, :, 0]
        return _part(q, own_k[: len(q), :, : self.num_own].mT, own_v[: len(q), :, : self.num_own], self.own_bias)

    def _prompt_part(self, layer: int, q: Tensor) -> Part:
        """All rows of a prompt look at it in one matrix product."""
        assert self.layout is not None
        arranged, where = self.layout
        found: list[Part] = []
        for rows in arranged:
            B, S = len(rows.pool.places), rows.slots
            _, Hk, rep, D = q.shape
            by_prompt = q.index_select(0, rows.gather).view(B, S, Hk, rep, D).transpose(1, 2).reshape(B, Hk, S * rep, D)
            k, v = rows.pool.k[layer][:B, ..., : rows.pool.longest], rows.pool.v[layer][:B, :, : rows.pool.longest]
            part = _part(by_prompt, k, v, rows.pool.bias)
            found.append(tuple(x.view(B, Hk, S, rep, -1).transpose(1, 2).reshape(B * S, Hk, rep, -1) for x in part))
        together = found[0] if len(found) == 1 else tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))
        peak, total, mixed = (x.index_select(0, where) for x in together)
        return peak, total, mixed

    def _root_part(self, layer: int, q: Tensor) -> Part:
        L, Hk, rep, D = q.shape
        k, v = self.root[layer]
        part = _part(q.transpose(0, 1).reshape(Hk, L * rep, D), k, v, None)
        peak, total, mixed = (x.view(Hk, L, rep, -1).transpose(0, 1) for x in part)
        return peak, total, mixed


def _part(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Part:
    """q [..., Q, D], k [..., D, K], v [..., K, D]. The sum is 1/(the largest probability): softmax is one fast pass."""
    scores = (q @ k).float()
    if bias is not None:
        scores += bias
    probs = scores.softmax(-1)
    return scores.amax(-1, keepdim=True), probs.amax(-1, keepdim=True).reciprocal_(), (probs.to(v.dtype) @ v).float()


def _merged(parts: Sequence[Part]) -> Tensor:
    """One softmax over all keys: out = Σ w·mixed / Σ w with w = total·exp(peak − top)."""
    top = parts[0][0]
    for peak, _, _ in parts[1:]:
        top = torch.maximum(top, peak)
    out, norm = None, None
    for peak, total, mixed in parts:
        weight = (peak - top).exp_().mul_(total)
        out = mixed * weight if out is None else out.addcmul_(mixed, weight)
        norm = weight if norm is None else norm + weight
    assert out is not None
    return out / norm


def _shared_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    cache: SharedCache = kwargs["shared_cache"]
    return cache.attend(module.layer_idx, q, k, v, scaling), None


SHARED_ATTENTION = "opentao_shared"
AttentionInterface.register(SHARED_ATTENTION, _shared_attention)
