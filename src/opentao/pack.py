"""Group packing: one row is ``[prompt | response 1 | … | response N]`` with the prompt computed once.

Position ids go on from the prompt for each response; attention lets a response see the prompt and itself. The head and
the log-softmax run only at the positions that predict response tokens, in chunks. Several groups share a row, and what
all their prompts start with (an instruction, examples) stands in it once; a group over the row's limit is split by
responses, the prompt repeated. The cost of a group is P + N·R tokens instead of N·(P + R). Values and gradients equal
the plain layout's (tests/test_pack.py, float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from opentao.errors import ModelError

PREFIX = -1  # `group_T` of tokens that all prompts of a row start with
MIN_PREFIX = 16  # tokens from which a common start of prompts is computed once for the row
SMALL_SCORES = 4_000_000  # entries
CHUNK_TOKENS = 512  # rows of logits alive at once: 512 x 49,152 x 4 bytes = 100 MB for the built-in model


@dataclass(kw_only=True, slots=True, frozen=True)
class Sequences:
    """Token ids of one prompt and its responses: ``Sequences(prompt_P=(1, 5), responses_NR=((7, 2), (8,)))``."""

    prompt_P: tuple[int, ...]
    responses_NR: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_P) + sum(map(len, self.responses_NR))


@dataclass(slots=True)
class Row:
    """One packed row. `part_T` is 0 on the prompt and i + 1 on the row's i-th response of that group."""

    tokens_T: list[int] = field(default_factory=list)
    positions_T: list[int] = field(default_factory=list)
    group_T: list[int] = field(default_factory=list)
    part_T: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)  # where the prediction of each response token is read
    targets: list[int] = field(default_factory=list)  # the response tokens
    owners: list[tuple[int, int]] = field(default_factory=list)  # (group, response) in row order
    sizes: list[int] = field(default_factory=list)  # tokens of each response in `owners`
    ends: list[int] = field(default_factory=list)  # where the last token of each response in `owners` stands

    def add(self, group: int, sequences: Sequences, responses: Sequence[int], shared: int = 0) -> None:
        """Append one group's prompt, less the `shared` tokens in front of the row, and the chosen responses."""
        P = len(sequences.prompt_P)
        self.extend(sequences.prompt_P[shared:], shared, group, 0)
        before = len(self.tokens_T) - 1  # the prompt's last token
        for part, i in enumerate(responses, 1):
            tokens = sequences.responses_NR[i]
            first = len(self.tokens_T)
            self.extend(tokens, P, group, part)
            self.sources += [before, *range(first, first + len(tokens) - 1)][: len(tokens)]
            self.targets += tokens
            self.owners.append((group, i))
            self.sizes.append(len(tokens))
            self.ends.append(first + len(tokens) - 1 if tokens else before)

    def extend(self, tokens: Sequence[int], position: int, group: int, part: int) -> None:
        self.tokens_T += tokens
        self.positions_T += range(position, position + len(tokens))
        self.group_T += [group] * len(tokens)
        self.part_T += [part] * len(tokens)

    def layout(self, device: torch.device) -> RowLayout:
        """Where the shared prefix and each group's prompt and responses lie in the row."""
        group, part = torch.tensor(self.group_T), torch.tensor(self.part_T)
        prefix = (group == PREFIX).nonzero()[:, 0]
        parts = []
        for g in dict.fromkeys(g for g in self.group_T if g != PREFIX):
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
    yield _attend(q, context[0], context[1], layout.prompt_mask, scaling)
    if len(blocks) == 1:
        return
    q, *own = blocks[1]
    keys, values = (torch.cat([c.index_select(0, layout.group_N), x], 2) for c, x in zip(context, own, strict=True))
    yield _attend(q, keys, values, layout.mask, scaling)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """q [B, H, Q, D], k and v [B, Hk, K, D], mask [B or 1, 1, Q, K] -> [B, H, Q, Dv].

    Small score matrices on a CPU are made outright: fused attention's backward is slow there.
    """
    B, H, Q, D = q.shape
    Hk, K = k.shape[1:3]
    if q.device.type != "cpu" or B * H * Q * K > SMALL_SCORES:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, enable_gqa=Hk != H
        )
    q, k = q.to(v.dtype), k.to(v.dtype)  # normed queries and keys leave autocast's dtype
    grouped = (q * scaling).reshape(B, Hk, H // Hk * Q, D)
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    with torch.autocast("cpu", enabled=False):  # which would turn the softmax and its gradient to fp32 and back
        scores = (grouped @ k.transpose(-1, -2)).view(B, H, Q, K).add_(bias)
        return (scores.softmax(-1).view(B, Hk, H // Hk * Q, K) @ v).view(B, H, Q, -1)


PACKED_ATTENTION = "opentao_packed"
AttentionInterface.register(PACKED_ATTENTION, _packed_attention)


def plan_rows(groups: Sequence[Sequences], row_tokens: int) -> list[Row]:
    """Put groups into rows of at most `row_tokens`, in order; a group that is larger is split by responses.

    Raises:
        ValueError: a prompt and one response alone are longer than a row.
    """
    rows: list[list[tuple[int, list[int]]]] = []
    room = 0
    for g, sequences in enumerate(groups):
        for part in _split(sequences, row_tokens):
            size = len(sequences.prompt_P) + sum(len(sequences.responses_NR[i]) for i in part)
            if not rows or size > room:
                rows.append([])
                room = row_tokens
            rows[-1].append((g, part))
            room -= size
    return [_build_row(groups, parts) for parts in rows]


def _build_row(groups: Sequence[Sequences], parts: Sequence[tuple[int, list[int]]]) -> Row:
    """One row; what all its prompts start with (an instruction, examples) stands in front once, if it is worth it."""
    prompts = [groups[g].prompt_P for g, _ in parts]
    # A group keeps at least one prompt token of its own: the first response token is predicted there.
    shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
    shared = shared if len(parts) > 1 and shared >= MIN_PREFIX else 0
    row = Row()
    row.extend(prompts[0][:shared], 0, PREFIX, 0)
    for g, part in parts:
        row.add(g, groups[g], part, shared)
    return row


def _split(sequences: Sequences, row_tokens: int) -> Iterator[list[int]]:
    """Runs of response indices that fit a row together with the prompt."""
    part: list[int] = []
    size = len(sequences.prompt_P)
    for i, response in enumerate(sequences.responses_NR):
        if len(sequences.prompt_P) + len(response) > row_tokens:
            raise ValueError(
                f"a prompt of {len(sequences.prompt_P)} and a response of {len(response)} tokens do not fit"
                f" row_tokens = {row_tokens}"
            )
        if part and size + len(response) > row_tokens:
            yield part
            part, size = [], len(sequences.prompt_P)
        part.append(i)
        size += len(response)
    if part:
        yield part


def whole_groups(groups: Sequence[Sequences], row_tokens: int) -> list[list[int]]:
    """Indices of groups that fit one row together, in order; a group that is larger than a row comes alone."""
    batches: list[list[int]] = []
    room = 0
    for i, group in enumerate(groups):
        if not batches or group.num_tokens > room:
            batches.append([])
            room = row_tokens
        batches[-1].append(i)
        room -= group.num_tokens
    return batches


def plain_rows(groups: Sequence[Sequences]) -> list[Row]:
    """The ordinary layout: one response a row, prompt repeated. For models that cannot share prompts."""
    rows = []
    for g, sequences in enumerate(groups):
        for i in range(len(sequences.responses_NR)):
            row = Row()
            row.add(g, sequences, [i])
            rows.append(row)
    return rows


def rows_for(model: Any, groups: Sequence[Sequences], row_tokens: int) -> list[Row]:
    """Packed rows if the model's attention allows it, plain rows else."""
    longest = max((len(s.prompt_P) + max(map(len, s.responses_NR), default=0) for s in groups), default=0)
    if not shares_prompt(model, max(longest, row_tokens)):
        return plain_rows(groups)
    return plan_rows(groups, max(row_tokens, longest))


def shares_prompt(model: Any, length: int) -> bool:
    """True if full causal attention with an explicit mask is all that mixes tokens over `length` positions."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend or config.model_type == "nemotron":  # nemotron drops our arguments
        return False
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):  # one more term in the softmax
        return False
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    wide_enough = window is None or window >= length
    known = layers <= ({"full_attention", "sliding_attention"} if wide_enough else {"full_attention"})
    softcap = getattr(config, "attn_logit_softcapping", None)
    recurrent = any(
        hasattr(config, name) for name in ("ssm_cfg", "state_size", "mamba_d_state", "linear_num_key_heads")
    )
    return bool(known and not recurrent and softcap is None and (wide_enough or "layer_types" in config.to_dict()))


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]])
    2
    """
    length = 0
    for tokens in zip(*sequences, strict=False):  # the shortest one ends it
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def hidden_states(model: Any, row: Row) -> Tensor:
    """Final hidden states [T, hidden] of one row, through the decoder without its head.

    A row with one response is plain causal and goes through the model's own attention.
    """
    device = next(model.parameters()).device
    inputs = {
        "input_ids": torch.tensor(row.tokens_T, device=device)[None],
        "position_ids": torch.tensor(row.positions_T, device=device)[None],
        "use_cache": False,
    }
    if len(row.owners) == 1:
        hidden: Tensor = decoder_of(model)(**inputs).last_hidden_state
        return hidden[0]
    own_attention = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        hidden = decoder_of(model)(**inputs, layouts=row.layout(device)).last_hidden_state
    finally:
        model.set_attn_implementation(own_attention)
    return hidden[0]


def decoder_of(model: Any) -> Any:
    """The stack below the head, with any adapter still in place."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal_lm.base_model


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the scaling or capping that some families put after the head."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    logits: Tensor = causal_lm.get_output_embeddings()(hidden)
    config = causal_lm.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _chunk_logprobs(model: Any, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = head_logits(model, hidden).to(dtype) / temperature
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def row_logprobs(model: Any, row: Row, temperature: float = 1.0, chunk: int = CHUNK_TOKENS) -> list[Tensor]:
    """Log-probs in nats of every response token of a row, one tensor [R] per entry of `row.owners`.

    With gradients on and more than one chunk, chunks are recomputed in the backward pass, so only one chunk of
    logits is ever alive.
    """
    hidden = hidden_states(model, row)
    device = hidden.device
    wanted = hidden[torch.tensor(row.sources, device=device, dtype=torch.long)]
    targets = torch.tensor(row.targets, device=device, dtype=torch.long)
    recompute = torch.is_grad_enabled() and len(targets) > chunk
    pieces = []
    for h, t in zip(wanted.split(chunk), targets.split(chunk), strict=True):
        if recompute:
            pieces.append(checkpoint(_chunk_logprobs, model, h, t, temperature, use_reentrant=False))
        else:
            pieces.append(_chunk_logprobs(model, h, t, temperature))
    return list(torch.cat(pieces).split(row.sizes)) if pieces else []


@torch.no_grad()
def group_logprobs(
    model: Any, groups: Sequence[Sequences], *, row_tokens: int = 2048, temperature: float = 1.0
) -> Iterator[tuple[int, list[Tensor]]]:
    """Log-probs without gradients: yields (group index, N tensors [R]) in order, as groups are finished."""
    found: dict[int, dict[int, Tensor]] = {}
    done = 0
    for row in rows_for(model, groups, row_tokens):
        for (g, i), logprobs in zip(row.owners, row_logprobs(model, row, temperature), strict=True):
            found.setdefault(g, {})[i] = logprobs
        while done < len(groups) and len(found.get(done, {})) == len(groups[done].responses_NR):
            yield done, [found[done][i] for i in range(len(groups[done].responses_NR))]
            found.pop(done, None)
            done += 1


@torch.no_grad()
def check_packing(model: Any, sequences: Sequences, tolerance: float = 1e-2) -> float:
    """First-use self-check: packed log-probs against the model's own forward in the plain layout.

    Returns the largest difference in nats.

    Raises:
        ModelError: it is over `tolerance`.
    """
    differences = []
    device = next(model.parameters()).device
    [(_, packed)] = group_logprobs(model, [sequences], row_tokens=sequences.num_tokens)
    for response, logprobs in zip(sequences.responses_NR, packed, strict=True):
        ids = torch.tensor([*sequences.prompt_P, *response], device=device)[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(sequences.prompt_P) - 1 : -1].float()
        plain = logits.log_softmax(-1).gather(-1, ids[0, len(sequences.prompt_P) :, None])[:, 0]
        differences.append((plain - logprobs).abs().max())
    worst = float(torch.stack(differences).max())  # NaN stays NaN, and is over any tolerance
    if not worst <= tolerance:
        raise ModelError(
            f"{model.config.model_type}: packed and plain log-probs differ by {worst:.3g} nats (allowed {tolerance});"
            " this architecture cannot be packed, please report it"
        )
    return worst
