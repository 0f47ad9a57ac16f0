"""The built-in engine: decodes groups with the prompt's keys and values computed and kept once per group.

Attention over the shared prompt and over a response's own tokens is computed apart and merged by their softmax
sums, which is exact. It goes through transformers' public attention interface, so any decoder with standard attention
works without model code; others (see `pack.shares_prompt`) are decoded the plain way, prompt repeated.

A token is drawn by inverse CDF with one uniform number from the response's own random stream, so a response depends on
its seed and prompt, and on the batch it was decoded in only through float rounding.
Left out for now: refilling a batch before it is done, a token budget from free memory, int8 (see dev/LOG.md).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from opentao.pack import MIN_PREFIX, common_prefix, head_logits, shares_prompt
from opentao.policy import LoadedPolicy, Policy, context_length, encode_prompt, load_policy, stop_tokens
from opentao.types import Failure, Group, Prompt, Response, SamplingPlan, Strategy, response_id

log = logging.getLogger(__name__)


MAX_OWN_TOKENS = 131_072  # of all responses that are decoded side by side: 3 GB for the built-in model in bf16
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # of transformers, newest first; the last is state-space
MAX_TAIL = 32  # tokens by which strategies of a group may differ and still share their prompt's prefix


@dataclass(slots=True)
class Block:
    """Responses that start with the same sampler tokens: a group, or one strategy of it."""

    prompt_index: int
    tokens_P: list[int]


@dataclass(slots=True)
class Stream:
    """One response while it is being decoded."""

    block: int
    prompt_index: int
    index: int  # position in the group
    seed: int
    tail: list[int]  # the end of its sampler prompt, fed before the response starts
    prefix: list[int]  # the start of the response that its strategy asks for
    tokens_R: list[int] = field(default_factory=list)
    logprobs_R: list[float] = field(default_factory=list)
    stopped: bool = False


class GroupEngine:
    """In-process engine for transformers models. At most `batch_responses` responses are decoded side by side."""

    def __init__(self, *, batch_responses: int = 256, prefill_tokens: int = 2048) -> None:
        self.batch_responses = batch_responses
        self.prefill_tokens = prefill_tokens
        self.loaded: LoadedPolicy | None = None
        self.on_progress: Callable[[float, int], None] = lambda groups, tokens: None  # see `ReportingEngine`

    def load(self, policy: Policy) -> None:
        if self.loaded is None or self.loaded.policy.hash != policy.hash:
            self.loaded = None  # frees the old weights before the new ones come
            self.loaded = load_policy(policy)

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        """Yield one Group a prompt; one that does not fit the context or the chat template yields a failure."""
        batch_responses = min(self.batch_responses, MAX_OWN_TOKENS // plan.max_new_tokens)
        waiting: list[tuple[int, list[list[int]]]] = []
        for i, prompt in enumerate(prompts):
            try:
                asked = [self._encode(prompt, strategy) for strategy in plan.strategies[: plan.group_size]]
            except TemplateError as error:  # e.g. a system turn for a model that takes none
                yield Group(prompt=prompt, failure=Failure(kind="chat_template", message=str(error)))
                continue
            limit = context_length(self._policy().model) - plan.max_new_tokens
            if (longest := max(map(len, asked))) > limit:
                message = f"{longest} tokens; the context leaves {limit} beside {plan.max_new_tokens} new ones"
                yield Group(prompt=prompt, failure=Failure(kind="prompt_too_long", message=message))
                continue
            waiting.append((i, asked))
            if (len(waiting) + 1) * plan.group_size > batch_responses:
                yield from self._finish(prompts, waiting, plan)
                waiting = []
        if waiting:
            yield from self._finish(prompts, waiting, plan)

    def _policy(self) -> LoadedPolicy:
        if self.loaded is None:
            raise RuntimeError("GroupEngine: load a policy before sampling")
        return self.loaded

    def _encode(self, prompt: Prompt, strategy: Strategy) -> list[int]:
        return encode_prompt(self._policy().tokenizer, strategy.apply(prompt.messages), prompt.tools)

    @torch.inference_mode()
    def _finish(
        self, prompts: Sequence[Prompt], waiting: list[tuple[int, list[list[int]]]], plan: SamplingPlan
    ) -> Iterator[Group]:
        """Decode one batch of prompts, each with its sampler prompts by strategy."""
        longest = max(len(tokens) for _, asked in waiting for tokens in asked)
        shared = _caches_prompt(self._policy().model, longest + plan.max_new_tokens)
        blocks: list[Block] = []
        streams: list[Stream] = []
        for i, asked in waiting:
            prefix = common_prefix(asked) if shared else 0
            together = len(asked) > 1 and prefix > 0 and max(map(len, asked)) - prefix <= MAX_TAIL
            first = len(blocks)
            blocks += [Block(i, asked[0][:prefix])] if together else [Block(i, tokens) for tokens in asked]
            for index in range(plan.group_size):
                s = index % len(asked)
                seed = plan.response_seed(prompts[i].id, index)
                tail = asked[s][prefix:] if together else []
                start = self._policy().tokenizer.encode(plan.strategies[s].answer_prefix, add_special_tokens=False)
                streams.append(Stream(first if together else first + s, i, index, seed, tail, start))
        streams.sort(key=lambda stream: (stream.block, stream.index))
        own_attention = self._policy().model.config._attn_implementation
        try:
            self._decode(SharedDecoder if shared else PlainDecoder, blocks, streams, plan)
        finally:
            self._policy().model.set_attn_implementation(own_attention)
        for i, _ in waiting:
            own = sorted((s for s in streams if s.prompt_index == i), key=lambda s: s.index)
            yield self._group(prompts[i], own, plan)

    def _group(self, prompt: Prompt, streams: list[Stream], plan: SamplingPlan) -> Group:
        loaded = self._policy()
        responses = []
        for s in streams:
            strategy = plan.strategies[s.index % len(plan.strategies)].name
            responses.append(
                Response(
                    id=response_id(prompt.id, loaded.policy.hash, strategy, s.seed),
                    text=loaded.tokenizer.decode(s.tokens_R, skip_special_tokens=True),
                    tokens_R=tuple(s.tokens_R),
                    sampler_logprobs_R=tuple(s.logprobs_R),
                    finish="stop" if s.stopped else "length",
                    strategy=strategy,
                    seed=s.seed,
                    policy=loaded.policy.hash,
                )
            )
        plain = encode_prompt(loaded.tokenizer, prompt.messages, prompt.tools)
        return Group(prompt=prompt, prompt_tokens_P=tuple(plain), responses=tuple(responses))

    def _decode(
        self, kind: type[SharedDecoder | PlainDecoder], blocks: list[Block], streams: list[Stream], plan: SamplingPlan
    ) -> None:
        """Fill `tokens_R` of every stream. Finished streams leave the batch as soon as a quarter of it is done."""
        loaded = self._policy()
        decoder = kind(loaded.model)
        stops = stop_tokens(loaded)
        uniforms = torch.stack([_uniforms(s.seed, plan.max_new_tokens) for s in streams]).to(loaded.device)
        steps = max(len(s.tail) for s in streams) + plan.max_new_tokens
        logits = decoder.prefill(blocks, streams, steps, self.prefill_tokens)
        room = room_for(logits)
        live = list(range(len(streams)))
        for step in range(steps):
            tokens = self._next_tokens([streams[i] for i in live], logits, uniforms[live], step, stops, plan, room)
            self._report((step + 1) / steps, streams, plan)
            going = [k for k, i in enumerate(live) if not _done(streams[i], plan)]
            if not going:
                break
            if len(going) <= 0.75 * len(live):
                decoder.keep(going)
                live, tokens = [live[k] for k in going], tokens[going]
            drawing = any(step + 1 >= len(streams[i].tail) for i in live)
            logits = decoder.step(tokens, need_logits=drawing)
        self._report(1.0, streams, plan)

    def _report(self, share: float, streams: list[Stream], plan: SamplingPlan) -> None:
        self.on_progress(share * len(streams) / plan.group_size, sum(len(s.tokens_R) for s in streams))

    def _next_tokens(
        self,
        live: list[Stream],
        logits_LV: Tensor | None,
        uniforms_LR: Tensor,
        step: int,
        stops: frozenset[int],
        plan: SamplingPlan,
        room: Tensor,
    ) -> Tensor:
        """The token each live stream goes on with: the next of its tail, or (kept) of its prefix, or one drawn."""
        forced = [(s.tail + s.prefix)[step] if step < len(s.tail) + len(s.prefix) else -1 for s in live]
        forced_L = torch.tensor(forced, device=uniforms_LR.device)
        if logits_LV is None:
            return forced_L
        number = torch.tensor([min(max(step - len(s.tail), 0), plan.max_new_tokens - 1) for s in live])
        uniform_L = uniforms_LR.gather(1, number.to(uniforms_LR.device)[:, None])[:, 0]
        tokens, logprobs = draw(logits_LV, uniform_L, plan, forced_L, room)
        for s, token, logprob in zip(live, tokens.tolist(), logprobs.tolist(), strict=True):
            if step >= len(s.tail) and not _done(s, plan):
                self._append(s, token, logprob, stops, plan.stop)
        return tokens

    def _append(
        self, stream: Stream, token: int, logprob: float, stops: frozenset[int], stop_strings: Sequence[str]
    ) -> None:
        stream.tokens_R.append(token)
        stream.logprobs_R.append(logprob)
        stream.stopped = token in stops
        if stop_strings and not stream.stopped:
            text = self._policy().tokenizer.decode(stream.tokens_R, skip_special_tokens=True)
            stream.stopped = any(s in text for s in stop_strings)


def _caches_prompt(model: Any, length: int) -> bool:
    """True if a prompt's keys and values can be shared; multi-head latent attention caches what they are made from."""
    return shares_prompt(model, length) and not hasattr(model.config.get_text_config(), "kv_lora_rank")


def _done(stream: Stream, plan: SamplingPlan) -> bool:
    return stream.stopped or len(stream.tokens_R) >= plan.max_new_tokens


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def draw(
    logits_LV: Tensor,
    uniform_L: Tensor,
    plan: SamplingPlan,
    forced_L: Tensor | None = None,
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse CDF. Log-probs are of the full distribution at the temperature (1 if greedy).

    Args:
        logits_LV: unscaled logits of L rows.
        uniform_L: one number in [0, 1) a row.
        forced_L: tokens to take instead of drawing; -1 = draw.
        room: what `room_for` gave for as many rows or more, to be used again at every step.
    """
    mass, peak, width = _masses(logits_LV, plan.temperature or 1.0, room if room is not None else room_for(logits_LV))
    total = mass.sum(-1, keepdim=True)
    if plan.truncated:
        mass = truncate(mass, plan.top_k, plan.top_p)
    token = logits_LV.argmax(-1, keepdim=True) if plan.temperature == 0 else _inverse_cdf(mass, uniform_L, width)
    if forced_L is not None:
        token = torch.where(forced_L[:, None] < 0, token, forced_L[:, None])
    logprob = logits_LV.gather(-1, token).float() / (plan.temperature or 1.0) - peak - total.log()
    return token[:, 0], logprob[:, 0]


def room_for(logits_LV: Tensor) -> Tensor:
    """Memory for the work of `draw`, [rows, vocabulary padded to whole blocks], fp32.

    Fresh pages for it at every step cost several times the arithmetic on them.
    """
    L, V = logits_LV.shape
    width = _block_width(V)
    return torch.empty(L, math.ceil(V / width) * width, dtype=torch.float32, device=logits_LV.device)


def _block_width(vocabulary: int) -> int:
    return math.ceil(math.sqrt(vocabulary))


def _masses(logits_LV: Tensor, temperature: float, room: Tensor) -> tuple[Tensor, Tensor, int]:
    """exp(logit/temperature − peak) in `room`, padded with zeros to whole blocks; the peak; the block width."""
    L, V = logits_LV.shape
    mass = room[:L]
    scaled = mass[:, :V].copy_(logits_LV)
    if temperature != 1.0:
        scaled.div_(temperature)
    peak = scaled.amax(-1, keepdim=True)
    scaled.sub_(peak).exp_()
    mass[:, V:] = 0
    return mass, peak, _block_width(V)


def _inverse_cdf(mass_LV: Tensor, uniform_L: Tensor, width: int) -> Tensor:
    """Token [L, 1] at which the cumulative mass passes `uniform_L`: the block of `width` tokens first, then in it.

    A token of zero mass is never hit: places are strictly below the sum, and the first sum above a place is taken.
    """
    blocks_LBW = mass_LV.view(len(mass_LV), -1, width)
    sums = blocks_LBW.sum(-1)
    ends = sums.cumsum(-1)
    place = _below(uniform_L[:, None] * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, place, right=True)
    inside = blocks_LBW[torch.arange(len(mass_LV), device=mass_LV.device), block[:, 0]].cumsum(-1)
    rest = _below(place - (ends - sums).gather(-1, block), inside[:, -1:])
    return block * width + torch.searchsorted(inside, rest, right=True)


def _below(place: Tensor, end: Tensor) -> Tensor:
    """`place`, kept between 0 and the largest number below `end` against rounding."""
    return torch.minimum(place.clamp(min=0), torch.nextafter(end, torch.zeros_like(end)))


def truncate(mass_LV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Zero what is outside the `top_k` largest, then outside the smallest set that holds `top_p` of the rest."""
    ordered, order = mass_LV.sort(-1, descending=True)
    if top_k > 0:
        ordered[:, top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(mass_LV).scatter_(-1, order, ordered)


class SharedDecoder:
    """Keys and values of a prompt once per block, of a response once per stream."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = GroupAttention()

    def prefill(self, blocks: list[Block], streams: list[Stream], new_tokens: int, budget: int) -> Tensor:
        """Run every prompt once, longest first so that rows of a chunk are of like length. Returns logits_LV."""
        device = next(self.model.parameters()).device
        prompts = [b.tokens_P for b in blocks]
        width = max(map(len, prompts))
        # What all prompts start with (an instruction, examples) is run once; each keeps a token that gives its logits.
        shared = min(common_prefix(prompts), min(map(len, prompts)) - 1) if len(blocks) > 1 else 0
        shared = shared if shared >= MIN_PREFIX else 0
        start = _run_prompts(self.model, [prompts[0][:shared]], device)[1] if shared else None
        order = sorted(range(len(blocks)), key=lambda b: -len(prompts[b]))
        logits: list[Tensor] = [torch.empty(0)] * len(blocks)
        while order:
            rows = max(1, budget // (len(prompts[order[0]]) - shared))
            chunk, order = order[:rows], order[rows:]
            hidden, cache = _run_prompts(self.model, [prompts[b][shared:] for b in chunk], device, start)
            for b, row in zip(chunk, head_logits(self.model, hidden[:, -1]), strict=True):
                logits[b] = row
            self.state.store_prompts(cache, chunk, len(blocks), width, shared)
        lengths = torch.tensor([len(b.tokens_P) for b in blocks], device=device)
        self.state.start(torch.tensor([s.block for s in streams], device=device), lengths, width, shared, new_tokens)
        self.model.set_attn_implementation(GROUP_ATTENTION)
        return torch.stack([logits[s.block] for s in streams])

    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None:
        """Feed one token a stream. Returns logits_LV of the next, if needed."""
        positions = self.state.positions()
        output = self.model.base_model(
            input_ids=tokens_L[:, None], position_ids=positions[:, None], use_cache=False, group_state=self.state
        )
        self.state.length += 1
        return head_logits(self.model, output.last_hidden_state[:, 0]) if need_logits else None

    def keep(self, rows: list[int]) -> None:
        self.state.keep(torch.tensor(rows, device=self.state.block_L.device))


def _run_prompts(
    model: Any, prompts: list[list[int]], device: torch.device, start: DynamicCache | None = None
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
        past = {_cache_argument(model): cache}
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


def _cache_argument(model: Any) -> str:
    """How this model's forward calls its cache; transformers renames it."""
    known = inspect.signature(model.base_model.forward).parameters
    return next(name for name in CACHE_NAMES if name in known)


class GroupAttention:
    """Keys and values of one batch of blocks, and attention over prompt and own tokens with one softmax."""

    def __init__(self) -> None:
        self.prompt_k: list[Tensor] = []  # a layer: [B, Hk, P, D], padding after the tokens that all prompts start with
        self.prompt_v: list[Tensor] = []
        self.own_k: list[Tensor] = []  # a layer: [L, Hk, R, D]
        self.own_v: list[Tensor] = []
        self.length = 0  # own tokens so far, the same for every row

    def store_prompts(self, cache: DynamicCache, chunk: list[int], num_blocks: int, width: int, shared: int) -> None:
        """Keep the prompts of the blocks `chunk`: the `shared` tokens of all in front, the rest at the right end."""
        for i, layer in enumerate(cache.layers):
            Hk, P, D = layer.keys.shape[1:]
            if len(self.prompt_k) == i:
                self.prompt_k.append(layer.keys.new_zeros(num_blocks, Hk, width, D))
                self.prompt_v.append(layer.keys.new_zeros(num_blocks, Hk, width, D))
            for kept, new in ((self.prompt_k[i], layer.keys), (self.prompt_v[i], layer.values)):
                kept[chunk, :, :shared] = new[:, :, :shared]
                kept[chunk, :, width - (P - shared) :] = new[:, :, shared:]

    def start(self, block_L: Tensor, lengths_B: Tensor, width: int, shared: int, new_tokens: int) -> None:
        """`block_L` says which block's prompt each stream continues."""
        self.lengths_B = lengths_B
        place = torch.arange(width, device=block_L.device)
        hidden = (place >= shared) & (place < shared + width - lengths_B[:, None])
        self.bias = torch.zeros(hidden.shape, device=block_L.device).masked_fill_(hidden, float("-inf"))[:, None, None]
        _, Hk, _, D = self.prompt_k[0].shape
        for k in self.prompt_k:
            self.own_k.append(k.new_empty(len(block_L), Hk, new_tokens, D))
            self.own_v.append(k.new_empty(len(block_L), Hk, new_tokens, D))
        self._index(block_L)

    def _index(self, block_L: Tensor) -> None:
        """Give each stream a slot in a [blocks, slots] layout; `slot_L` is None when the layout is full already."""
        self.block_L = block_L
        counts = torch.bincount(block_L, minlength=len(self.lengths_B))
        self.num_slots = int(counts.max())
        rank = torch.arange(len(block_L), device=block_L.device) - (counts.cumsum(0) - counts)[block_L]
        slots = block_L * self.num_slots + rank
        self.slot_L = None if len(block_L) == len(counts) * self.num_slots else slots

    def keep(self, rows: Tensor) -> None:
        """Drop all other streams; blocks without streams give up their prompts too."""
        for i in range(len(self.own_k)):
            self.own_k[i], self.own_v[i] = self.own_k[i][rows], self.own_v[i][rows]
        block_L = self.block_L[rows]
        used, renumbered = torch.unique(block_L, return_inverse=True)
        if len(used) < len(self.lengths_B):
            self.lengths_B, self.bias = self.lengths_B[used], self.bias[used]
            for i in range(len(self.prompt_k)):
                self.prompt_k[i], self.prompt_v[i] = self.prompt_k[i][used], self.prompt_v[i][used]
        self._index(renumbered)

    def positions(self) -> Tensor:
        return self.lengths_B[self.block_L] + self.length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [L, H, 1, D], k and v [L, Hk, 1, D] -> [L, 1, H, D]."""
        L, H, _, D = q.shape
        Hk = k.shape[1]
        own_k, own_v = self.own_k[layer], self.own_v[layer]
        own_k[:, :, self.length], own_v[:, :, self.length] = k[:, :, 0], v[:, :, 0]
        q = (q * scaling).view(L, Hk, H // Hk, D)
        scores = q @ own_k[:, :, : self.length + 1].transpose(-1, -2)
        peak, total, mixed = _partial_softmax(scores, own_v[:, :, : self.length + 1])
        prompt_peak, prompt_total, prompt_mixed = self._attend_prompt(layer, q)
        top = torch.maximum(peak, prompt_peak)
        a, b = (peak - top).exp_(), (prompt_peak - top).exp_()
        out = (mixed * a + prompt_mixed * b) / (total * a + prompt_total * b)
        return out.to(v.dtype).view(L, 1, H, D)

    def _attend_prompt(self, layer: int, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All streams of a block look at its prompt in one matrix product."""
        _, Hk, rep, D = q.shape
        B, S = len(self.lengths_B), self.num_slots
        if self.slot_L is not None:
            q = q.new_zeros(B * S, Hk, rep, D).index_copy_(0, self.slot_L, q)
        by_block = q.view(B, S, Hk, rep, D).transpose(1, 2).reshape(B, Hk, S * rep, D)
        scores = by_block @ self.prompt_k[layer].transpose(-1, -2) + self.bias
        parts = _partial_softmax(scores, self.prompt_v[layer])
        flat = [p.view(B, Hk, S, rep, -1).transpose(1, 2).reshape(B * S, Hk, rep, -1) for p in parts]
        if self.slot_L is not None:
            flat = [p[self.slot_L] for p in flat]
        return flat[0], flat[1], flat[2]


def _partial_softmax(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Peak, sum and value mix of exp(scores − peak), in fp32; parts over disjoint keys merge exactly."""
    scores = scores.float()
    peak = scores.amax(-1, keepdim=True)
    mass = (scores - peak).exp_()
    return peak, mass.sum(-1, keepdim=True), (mass.to(values.dtype) @ values).float()


def _group_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    state: GroupAttention = kwargs["group_state"]
    return state.attend(module.layer_idx, q, k, v, scaling), None


GROUP_ATTENTION = "opentao_group"
AttentionInterface.register(GROUP_ATTENTION, _group_attention)


class PlainDecoder:
    """Prompt repeated for every stream: right for any model, used where sharing the prompt is not valid."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache_argument = _cache_argument(model)
        takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.stateful = not takes_positions and hasattr(model.config.get_text_config(), "state_size")
        log.warning("%s: attention cannot share prompts; decoding the plain way", model.config.model_type)

    def prefill(self, blocks: list[Block], streams: list[Stream], new_tokens: int, budget: int) -> Tensor:
        device = next(self.model.parameters()).device
        prompts = [blocks[s.block].tokens_P for s in streams]
        hidden, self.cache = _run_prompts(self.model, prompts, device)
        width = hidden.shape[1]
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        self.position_L = lengths
        return head_logits(self.model, hidden[:, -1])

    def step(self, tokens_L: Tensor, *, need_logits: bool = True) -> Tensor | None:
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        past = {self.cache_argument: self.cache}
        if not self.stateful:  # else nothing but the state knows of the past
            past |= {"attention_mask": self.mask, "position_ids": self.position_L[:, None]}
        output = self.model.base_model(input_ids=tokens_L[:, None], use_cache=True, **past)
        self.position_L = self.position_L + 1
        return head_logits(self.model, output.last_hidden_state[:, 0])

    def keep(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.reorder_cache(index)  # unlike batch_select_indices, it knows recurrent states too
        self.mask, self.position_L = self.mask[index], self.position_L[index]
