"""Attention of packed rows: a response sees its prompt and itself, and nothing of the other responses.

On a CPU in parts, so that no [T, T] mask exists and the cost is about P² + N·R·(P + R) a group; on a GPU by
FlexAttention with a block mask. Both go through transformers' public attention interface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from opentao import long_prompt
from opentao.errors import ModelError
from opentao.rows import PREFIX, Row

SMALL_SCORES = 4_000_000  # entries
FLEX_LEAST_HEAD = 16
FLEX_VARIANTS = 64
LONG_PROMPT = 256  # tokens from which responses look at their prompt apart


def row_layout(row: Row, device: torch.device) -> RowLayout:
    """Where the shared prefix and each group's prompt and responses lie in the row."""
    group, part = torch.tensor(row.group_T), torch.tensor(row.part_T)
    prefix = (group == PREFIX).nonzero()[:, 0]
    parts = []
    for g in dict.fromkeys(g for g in row.group_T if g != PREFIX):
        own = [((group == g) & (part == i)).nonzero()[:, 0] for i in range(int(part[group == g].max()) + 1)]
        parts.append((own[0], [response for response in own[1:] if len(response)]))
    segments = [SegmentLayout(0, [(prefix, [])], device)] if len(prefix) else []
    segments += [SegmentLayout(len(prefix), together, device) for together in _of_like_length(parts)]
    order = torch.argsort(torch.cat([segment.covered for segment in segments])).to(device)
    return RowLayout(segments, len(prefix) > 0, order)


@dataclass(slots=True, frozen=True)
class RowLayout:
    """What attention needs to know of a row: its segments, and where each token's output stands in their order."""

    segments: list[SegmentLayout]
    has_prefix: bool  # the first segment is what all other segments see
    order_T: Tensor

    @property
    def blocks(self) -> list[Block]:
        return [block for segment in self.segments for block in segment.blocks]


@dataclass(slots=True, frozen=True)
class Block:
    """Runs of a row's tokens, padded to one length. Padding repeats the row's first token: computed, never read."""

    tokens_BL: Tensor
    padding_BL: Tensor
    real: Tensor  # indices into B·L, without the padding

    @staticmethod
    def of(runs: Sequence[Tensor], device: torch.device) -> Block:
        padded = torch.nn.utils.rnn.pad_sequence(list(runs), batch_first=True, padding_value=-1).to(device)
        return Block(padded.clamp(min=0), padded < 0, (padded >= 0).flatten().nonzero()[:, 0])


class _Spread(torch.autograd.Function):
    """[T, H, D] -> one [B, L, H, D] a block. Every token stands in one block, so the gradient is gathered, not added.

    Indexing's own backward adds into zeros of full size once a block, which took a tenth of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: RowLayout) -> tuple[Tensor, ...]:
        ctx.layout = layout
        return tuple(x[block.tokens_BL] for block in layout.blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _gathered(grads, ctx.layout), None


class _Collect(torch.autograd.Function):
    """The blocks back as [T, H, D]: the inverse of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, layout: RowLayout, *blocks: Tensor) -> Tensor:
        ctx.layout = layout
        return _gathered(blocks, layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks = ctx.layout.blocks
        return None, *(grad[b.tokens_BL].masked_fill_(b.padding_BL[..., None, None], 0) for b in blocks)


def _gathered(blocks: Sequence[Tensor], layout: RowLayout) -> Tensor:
    real = [x.flatten(0, 1)[block.real] for x, block in zip(blocks, layout.blocks, strict=True)]
    return torch.cat(real)[layout.order_T]


Parts = tuple[Tensor, list[Tensor]]
"""Where one group's tokens lie in the row: the prompt's, and those of each response that has any."""


def _of_like_length(groups: Sequence[Parts]) -> list[list[Parts]]:
    """Runs of groups that are attended together, padded to one length, at most doubling the work of the responses."""
    runs: list[list[Parts]] = []
    for group in groups:
        if runs and _padding([*runs[-1], group]) <= 2.0:
            runs[-1].append(group)
        else:
            runs.append([group])
    return runs


def _padding(groups: Sequence[Parts]) -> float:
    """Padded over real work of attention: tokens times what each sees."""
    prompts, lengths = [len(p) for p, _ in groups], [[len(r) for r in responses] for _, responses in groups]
    real = sum(r * (p + r) for p, own in zip(prompts, lengths, strict=True) for r in own) + sum(p * p for p in prompts)
    longest = max((r for own in lengths for r in own), default=0)
    num = sum(map(len, lengths))
    return (num * longest * (max(prompts) + longest) + len(prompts) * max(prompts) ** 2) / max(real, 1)


class SegmentLayout:
    """Some groups of a row: a block of their prompts and a block of their responses, and who sees what.

    Attention is computed apart for the prompts (over prefix and prompt) and for the responses (over prefix, prompt and
    the own tokens), so its cost is about P² + N·R·(P + R) a group and no [T, T] mask exists.
    """

    def __init__(self, prefix_tokens: int, groups: Sequence[Parts], device: torch.device) -> None:
        responses = [r for _, own in groups for r in own]
        prompts = Block.of([p for p, _ in groups], device)
        C, P = prefix_tokens, prompts.tokens_BL.shape[1]
        self.prompt_mask = _causal(P, C)[None, None].to(device)
        self.covered = torch.cat([*(p for p, _ in groups), *responses])
        self.blocks = [prompts]
        if not responses:
            return
        self.blocks.append(Block.of(responses, device))
        N, R = self.blocks[1].tokens_BL.shape
        self.group_N = torch.tensor([g for g, (_, own) in enumerate(groups) for _ in own], device=device)
        context = torch.ones(N, R, C, dtype=torch.bool, device=device)
        own_prompt = ~prompts.padding_BL[self.group_N][:, None].expand(N, R, P)
        self.mask = torch.cat([context, own_prompt, _causal(R, 0).to(device).expand(N, R, R)], 2)[:, None]


def _causal(length: int, before: int) -> Tensor:
    """Mask [length, before + length] of tokens that see all `before` them, and themselves."""
    return torch.ones(length, before + length, dtype=torch.bool).tril(before)


def _packed_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """q and k [1, H or Hk, T, D], v [1, Hk, T, Dv] -> [1, T, H, Dv]."""
    if "layouts" not in kwargs:
        raise ModelError(f"{module.config.model_type}: does not hand arguments to its attention; it cannot be packed")
    layout: RowLayout = kwargs["layouts"]
    spread = [_Spread.apply(x[0].transpose(0, 1), layout) for x in (q, k, v)]
    # [B, L, H, D] -> [B, H, L, D]
    blocks = [tuple(x.transpose(1, 2) for x in qkv) for qkv in zip(*spread, strict=True)]
    prefix: list[Tensor] = []
    outputs = []
    for segment in layout.segments:
        own, blocks = blocks[: len(segment.blocks)], blocks[len(segment.blocks) :]
        outputs += _attend_segment(segment, prefix, own, scaling)
        if segment is layout.segments[0] and layout.has_prefix:
            prefix = list(own[0][1:])
    return _Collect.apply(layout, *(out.transpose(1, 2) for out in outputs))[None], None


def _attend_segment(
    layout: SegmentLayout, prefix: Sequence[Tensor], blocks: Sequence[tuple[Tensor, ...]], scaling: float
) -> Iterator[Tensor]:
    """Yield the outputs [B, H, L, D] of a segment's blocks; `prefix` is the keys and values of what stands before."""
    q, *context = blocks[0]
    if prefix:
        context = [torch.cat([c.expand(len(q), -1, -1, -1), x], 2) for c, x in zip(prefix, context, strict=True)]
    yield _attend(q, context[0], context[1], layout.prompt_mask, scaling, causal=not prefix)
    if len(blocks) == 1:
        return
    q, *own = blocks[1]
    if len(context[0]) == 1 and context[0].shape[2] >= LONG_PROMPT and long_prompt.works(q, own[1]):
        q, keys, own_keys = (x.to(own[1].dtype) for x in (q, context[0], own[0]))
        yield long_prompt.attend_responses(q, keys, context[1], own_keys, own[1], scaling)
        return
    keys, values = (torch.cat([c.index_select(0, layout.group_N), x], 2) for c, x in zip(context, own, strict=True))
    yield _attend(q, keys, values, layout.mask, scaling)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, *, causal: bool = False) -> Tensor:
    """q [B, H, Q, D], k and v [B, Hk, K, D], mask [B or 1, 1, Q, K] -> [B, H, Q, Dv]; `causal`: as the mask says.

    Small score matrices on a CPU are made outright: fused attention's backward is slow there.
    """
    B, H, Q, D = q.shape
    Hk, K = k.shape[1:3]
    q, k = q.to(v.dtype), k.to(v.dtype)  # normed queries and keys leave autocast's dtype
    if q.device.type == "cuda" and not causal:  # of the fused kernels that take a mask, none shares key heads
        k, v = (x.repeat_interleave(H // Hk, 1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    if q.device.type != "cpu" or B * H * Q * K > SMALL_SCORES:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else mask, is_causal=causal, scale=scaling, enable_gqa=Hk != H
        )
    grouped = (q * scaling).reshape(B, Hk, H // Hk * Q, D)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    with torch.autocast("cpu", enabled=False):  # which would turn the softmax and its gradient to fp32 and back
        scores = (grouped @ k.transpose(-1, -2)).view(B, H, Q, K).add_(bias)
        return (scores.softmax(-1).view(B, Hk, H // Hk * Q, K) @ v).view(B, H, Q, -1)


PACKED_ATTENTION = "opentao_packed"
AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


def flex_mask(row: Row, device: torch.device) -> BlockMask:
    """The same visibility as one block mask: a token sees what stands before it of the prefix, its prompt, itself."""
    # int32: the mask is found for all T² pairs before it is made into blocks
    group_T = torch.tensor(row.group_T, device=device, dtype=torch.int32)
    part_T = torch.tensor(row.part_T, device=device, dtype=torch.int32)

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (group_T[k] == group_T[q]) & ((part_T[k] == 0) | (part_T[k] == part_T[q]))
        return (k <= q) & (own | (group_T[k] == PREFIX))

    T = len(row.tokens_T)
    return create_block_mask(sees, None, None, T, T, device=device.type)


def flex_takes(model: Any) -> bool:
    """False for heads narrower than its smallest product."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return bool(width >= FLEX_LEAST_HEAD)


@cache
def _compiled_flex() -> Any:
    # Variants: with gradients or not, fp32 or bf16, short or long rows, each model's heads; past the limit it would
    # run uncompiled, with a score matrix of the whole row.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_VARIANTS)
    return torch.compile(flex_attention, dynamic=True)


def _flex_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """q [1, H, T, D], k and v [1, Hk, T, D] -> [1, T, H, D]."""
    if "flex_mask" not in kwargs:
        raise ModelError(f"{module.config.model_type}: does not hand arguments to its attention; it cannot be packed")
    cuda = q.device.type == "cuda"
    attend = _compiled_flex() if cuda else flex_attention  # slow, to compare with
    # The variant for decoding, which short rows would get, has no tile that fits some of them.
    options = {"kernel_options": {"FORCE_USE_FLEX_ATTENTION": True}} if cuda else {}
    q, k = q.to(v.dtype), k.to(v.dtype)
    out = attend(q, k, v, block_mask=kwargs["flex_mask"], scale=scaling, enable_gqa=q.shape[1] != k.shape[1], **options)
    return out.transpose(1, 2), None


FLEX_ATTENTION = "opentao_flex"
AttentionInterface.register(FLEX_ATTENTION, _flex_attention)
