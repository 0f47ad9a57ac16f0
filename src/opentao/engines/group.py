"""The built-in engine: samples groups in this process, each prompt computed once for its N responses.

Batching is continuous: finished responses leave at once and waiting ones take their rows, so short and long prompts and
answers mix. What is alive is bounded by rows and by a budget of keys and values that is found from free memory, never
by the number of prompts. A response has random numbers of its own: it depends on its seed and prompt, and on what else
was in the batch only through float rounding. Models whose attention cannot share a prompt are decoded the plain way.

Left out: keeping a prompt's keys and values beyond its group (a prompt comes once a round), speculative decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from opentao.engines.batch import Block, ContinuousBatch, Decoder, Stream
from opentao.engines.memory import cache_token_bytes, free_bytes
from opentao.engines.plain import PlainDecoder
from opentao.engines.pool import pool_width
from opentao.engines.precision import load_sampler
from opentao.engines.shared import ROOT_APART, SharedDecoder
from opentao.pack import shares_prompt
from opentao.policy import LoadedPolicy, Policy, context_length, encode_prompt
from opentao.rows import MIN_PREFIX, common_prefix
from opentao.types import Failure, Group, Prompt, Response, RolloutDtype, SamplingPlan, Strategy, response_id

MAX_TAIL = 32  # tokens by which strategies of a group may differ and still share their prompt's prefix
MIN_ROOT_SHARE = 0.1  # of the longest prompt, from which a common start is worth the mask that its attention needs
MEMORY_SHARE = 0.5  # of free memory, for keys and values


@dataclass(slots=True, eq=False)
class Pending:
    """A group that is being made."""

    prompt: Prompt
    blocks: list[Block]
    num_left: int  # streams that are not done

    @property
    def streams(self) -> list[Stream]:
        return sorted((s for block in self.blocks for s in block.streams), key=lambda s: s.index)


class GroupEngine:
    """In-process engine for transformers models.

    Args:
        batch_responses: responses decoded side by side, at most.
        prefill_tokens: prompt tokens computed in one forward pass, about.
        cache_tokens: tokens for which keys and values may be kept; None: as many as half of free memory holds.
        ignore_end: go on to `max_new_tokens` whatever is drawn (for benchmarks of equal work).
    """

    def __init__(
        self,
        *,
        batch_responses: int = 256,
        prefill_tokens: int = 2048,
        cache_tokens: int | None = None,
        ignore_end: bool = False,
    ) -> None:
        self.batch_responses = batch_responses
        self.prefill_tokens = prefill_tokens
        self.cache_tokens = cache_tokens
        self.ignore_end = ignore_end
        self.loaded: LoadedPolicy | None = None
        self.dtype: RolloutDtype = "auto"  # of the loaded weights
        self.on_progress: Callable[[float, int], None] = lambda groups, tokens: None  # see `ReportingEngine`

    def load(self, policy: Policy) -> None:
        if self.loaded is None or self.loaded.policy.hash != policy.hash:
            self._load(policy, self.dtype)

    def _load(self, policy: Policy, dtype: RolloutDtype) -> None:
        self.loaded = None  # frees the old weights before the new ones come
        self.loaded, self.dtype = load_sampler(policy, dtype), dtype

    @torch.inference_mode()
    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        """Yield one Group a prompt as it is finished; one that cannot be asked at all yields a failure."""
        if plan.dtype != self.dtype:
            self._load(self._policy().policy, plan.dtype)
        pending = []
        for prompt in prompts:
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
            pending.append(self._pending(prompt, asked, plan))
        if pending:
            yield from self._decode(pending, plan)

    def _policy(self) -> LoadedPolicy:
        if self.loaded is None:
            raise RuntimeError("GroupEngine: load a policy before sampling")
        return self.loaded

    def _encode(self, prompt: Prompt, strategy: Strategy) -> list[int]:
        return encode_prompt(self._policy().tokenizer, strategy.apply(prompt.messages), prompt.tools)

    def _pending(self, prompt: Prompt, asked: list[list[int]], plan: SamplingPlan) -> Pending:
        """One block for the group if its strategies' prompts differ only in a short tail, else one a strategy."""
        prefix = common_prefix(asked)
        tail = max(map(len, asked)) - prefix
        together = len(asked) > 1 and prefix > 0 and tail <= MAX_TAIL and self._shares(prefix + tail, plan)
        blocks = [Block(asked[0][:prefix], [])] if together else [Block(tokens, []) for tokens in asked]
        for index in range(plan.group_size):
            s = index % len(asked)
            start = self._policy().tokenizer.encode(plan.strategies[s].answer_prefix, add_special_tokens=False)
            stream = Stream(
                index=index,
                seed=plan.response_seed(prompt.id, index),
                tail=asked[s][prefix:] if together else [],
                prefix=start,
            )
            blocks[0 if together else s].streams.append(stream)
        return Pending(prompt, blocks, plan.group_size)

    def _shares(self, prompt_tokens: int, plan: SamplingPlan) -> bool:
        return _caches_prompt(self._policy().model, prompt_tokens + plan.max_new_tokens)

    def _decoder(self, blocks: Sequence[Block], plan: SamplingPlan) -> Decoder:
        """As many rows as are asked for, as there are streams, and as the budget of keys and values has room for."""
        model = self._policy().model
        budget = self.cache_tokens or int(MEMORY_SHARE * free_bytes(self._policy().device)) // cache_token_bytes(model)
        most = min(self.batch_responses, sum(len(b.streams) for b in blocks))
        longest = max(len(b.tokens_P) for b in blocks)
        own = plan.max_new_tokens + max(len(s.tail) for b in blocks for s in b.streams)
        if not self._shares(longest, plan):
            return PlainDecoder(model, max(1, min(most, budget // (longest + own))))
        # What all prompts start with is computed once; each keeps a token of its own, which gives its logits.
        prompts = [b.tokens_P for b in blocks]
        root = min(common_prefix(prompts), min(map(len, prompts)) - 1) if len(blocks) > 1 else 0
        root = root if root >= max(MIN_PREFIX, MIN_ROOT_SHARE * longest) else 0
        share = min(len(b.streams) for b in blocks)
        kept = longest - (root if root >= ROOT_APART else 0)
        rows = budget // (own + -(-pool_width(kept) // share))
        rows = max(1, min(most, rows))
        return SharedDecoder(
            model,
            rows=rows,
            own_tokens=own,
            root=prompts[0][:root],
            prompt_tokens=budget - rows * own,
            prefill_tokens=self.prefill_tokens,
        )

    def _decode(self, pending: Sequence[Pending], plan: SamplingPlan) -> Iterator[Group]:
        blocks = [block for p in pending for block in p.blocks]
        owner = {s: p for p in pending for b in p.blocks for s in b.streams}
        decoder = self._decoder(blocks, plan)
        batch = ContinuousBatch(self._policy(), plan, blocks, decoder, ignore_end=self.ignore_end)
        held: list[Stream] = []  # done, their groups are not
        while batch.busy:
            finished = batch.step()
            held += finished
            self._report(held, batch.live, plan)
            for stream in finished:
                owner[stream].num_left -= 1
                if owner[stream].num_left == 0:
                    yield self._group(owner[stream], plan)
            if finished:
                held = [s for s in held if owner[s].num_left > 0]

    def _report(self, held: Sequence[Stream], live: Sequence[Stream], plan: SamplingPlan) -> None:
        """How much of the groups that are not yet handed out is done."""
        work = len(held) + sum(len(s.tokens_R) for s in live) / plan.max_new_tokens
        self.on_progress(work / plan.group_size, sum(len(s.tokens_R) for s in (*held, *live)))

    def _group(self, pending: Pending, plan: SamplingPlan) -> Group:
        loaded, prompt = self._policy(), pending.prompt
        responses = []
        for s in pending.streams:
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


def _caches_prompt(model: Any, length: int) -> bool:
    """True if a prompt's keys and values can be shared; multi-head latent attention caches what they are made from."""
    return shares_prompt(model, length) and not hasattr(model.config.get_text_config(), "kv_lora_rank")
