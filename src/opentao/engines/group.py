"""The built-in engine: samples groups in this process, each prompt computed once for its N responses.

Batching is continuous: finished responses leave at once and waiting ones take their rows, so short and long prompts and
answers mix. What is alive is bounded by rows and by a budget of keys and values that is found from free memory, never
by the number of prompts. A response has random numbers of its own: it depends on its seed and prompt, and on what else
was in the batch only through float rounding. Models whose attention cannot share a prompt are decoded the plain way.

Left out: keeping a prompt's keys and values beyond its group (a prompt comes once a round), speculative decoding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from opentao.engines.batch import Block, ContinuousBatch, Decoder, Stream
from opentao.engines.memory import cache_token_bytes, default_rows, free_bytes
from opentao.engines.plain import PlainDecoder
from opentao.engines.pool import pool_width
from opentao.engines.precision import load_sampler
from opentao.engines.shared import ROOT_APART, SharedDecoder
from opentao.pack import check_head, shares_prompt
from opentao.policy import LoadedPolicy, Policy, context_length, encode_prompt, free_memory
from opentao.rows import MIN_PREFIX, common_prefix
from opentao.types import (
    Failure,
    Group,
    Prompt,
    Response,
    RolloutDtype,
    SamplingPlan,
    Strategy,
    before_stop,
    response_id,
)

if TYPE_CHECKING:
    from opentao.engines.captured import CapturedDecoder

MAX_TAIL = 32  # tokens by which strategies of a group may differ and still share their prompt's prefix
MIN_ROOT_SHARE = 0.1  # of the longest prompt, from which a common start is worth the mask that its attention needs
MEMORY_SHARE = 0.5  # of free memory, for keys and values
PREFILL_TOKENS, GPU_PREFILL_TOKENS = 2048, 16_384


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
        batch_responses: responses decoded side by side, at most; None: 256, on a GPU 1,024.
        prefill_tokens: prompt tokens computed in one forward pass, about; None: 2,048, on a GPU 16,384.
        cache_tokens: tokens for which keys and values may be kept; None: as many as half of free memory holds.
        ignore_end: go on to `max_new_tokens` whatever is drawn (for benchmarks of equal work).
        paged: decode with pages of keys and values and captured graphs (needs Triton); None: on a GPU that has it.
    """

    def __init__(
        self,
        *,
        batch_responses: int | None = None,
        prefill_tokens: int | None = None,
        cache_tokens: int | None = None,
        ignore_end: bool = False,
        paged: bool | None = None,
    ) -> None:
        self.batch_responses = batch_responses
        self.prefill_tokens = prefill_tokens
        self.cache_tokens = cache_tokens
        self.ignore_end = ignore_end
        self.paged = paged
        self.captured: CapturedDecoder | None = None  # kept for the next call, with its graphs
        self.loaded: LoadedPolicy | None = None
        self.dtype: RolloutDtype = "auto"  # of the loaded weights
        self.on_progress: Callable[[float, int], None] = lambda groups, tokens: None  # see `ReportingEngine`

    def load(self, policy: Policy) -> None:
        if self.loaded is None or self.loaded.policy.hash != policy.hash:
            self._load(policy, self.dtype)

    def _load(self, policy: Policy, dtype: RolloutDtype) -> None:
        self.release()  # frees the old weights before the new ones come
        loaded = load_sampler(policy, dtype)
        check_head(loaded.model)
        self.loaded, self.dtype = loaded, dtype

    def release(self) -> None:
        """Give back the memory of weights, graphs, keys and values; `load` brings the weights again."""
        self.loaded = self.captured = None
        free_memory()

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
        model, device = self._policy().model, self._policy().device
        kept = self.captured.cache.num_bytes if self.captured else 0
        budget = self.cache_tokens or int(MEMORY_SHARE * (free_bytes(device) + kept)) // cache_token_bytes(model)
        most = min(self.batch_responses or default_rows(device), sum(len(b.streams) for b in blocks))
        prompts = [b.tokens_P for b in blocks]
        longest = max(map(len, prompts))
        own = plan.max_new_tokens + max(len(s.tail) for b in blocks for s in b.streams)
        if not self._shares(longest, plan):
            return PlainDecoder(model, max(1, min(most, budget // (longest + own))))
        # What all prompts start with is computed once; each keeps a token of its own, which gives its logits.
        root = min(common_prefix(prompts), min(map(len, prompts)) - 1) if len(blocks) > 1 else 0
        root = root if root >= max(MIN_PREFIX, MIN_ROOT_SHARE * longest) else 0
        share = min(len(b.streams) for b in blocks)
        if _pages(device) if self.paged is None else self.paged:
            return self._captured(blocks, root=root, own=own, most=most, budget=budget)
        kept_tokens = pool_width(longest - (root if root >= ROOT_APART else 0))
        rows = max(1, min(most, budget // (own + -(-kept_tokens // share))))
        return SharedDecoder(
            model,
            rows=rows,
            own_tokens=own,
            root=prompts[0][:root],
            prompt_tokens=budget - rows * own,
            prefill_tokens=self.prefill_tokens or PREFILL_TOKENS,
        )

    def _captured(self, blocks: Sequence[Block], *, root: int, own: int, most: int, budget: int) -> Decoder:
        """The decoder of the call before, if there is room in it; so its graphs serve again."""
        from opentao.engines.captured import CapturedDecoder, Room, pages_for  # needs Triton
        from opentao.engines.paged_attention import PAGE

        model = self._policy().model
        lengths = [len(b.tokens_P) for b in blocks]
        streams = [len(b.streams) for b in blocks]
        kept_tokens = PAGE * (pages_for(max(lengths)) - root // PAGE)
        rows = max(1, min(most, budget // (own + -(-kept_tokens // min(streams)))))
        room = Room.needed(
            model,
            rows=rows,
            own_tokens=own,
            group_size=max(streams),
            prompts=lengths,
            root=root,
            budget=budget - rows * own,
        )
        if self.captured is None or self.captured.model is not model or not self.captured.room.holds(room):
            self.captured = None
            prefill_tokens = self.prefill_tokens or GPU_PREFILL_TOKENS
            self.captured = CapturedDecoder(
                model, room, prefill_tokens=prefill_tokens, capture=model.device.type == "cuda"
            )
        self.captured.begin(rows, blocks[0].tokens_P[:root])
        return self.captured

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
                    text=before_stop(loaded.tokenizer.decode(s.tokens_R, skip_special_tokens=True), plan.stop),
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


def _pages(device: torch.device) -> bool:
    """True if a step can be captured here."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _caches_prompt(model: Any, length: int) -> bool:
    """True if a prompt's keys and values can be shared.

    Not where multi-head latent attention caches what they are made from, or layers have none and use another one's.
    """
    config = model.config.get_text_config()
    return shares_prompt(model, length) and not (
        hasattr(config, "kv_lora_rank") or "reuse" in (getattr(config, "kv_sharing_modes", None) or [])
    )
