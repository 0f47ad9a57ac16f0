"""Group packing: one row is ``[prompt | response 1 | … | response N]`` with the prompt computed once.

Position ids go on from the prompt for each response; attention lets a response see the prompt and itself. The head and
the log-softmax run only at the positions that predict response tokens, in chunks. Several groups share a row, and what
all their prompts start with (an instruction, examples) stands in it once; a group over the row's limit is split by
responses, the prompt repeated. The cost of a group is P + N·R tokens instead of N·(P + R). Values and gradients equal
the plain layout's (tests/test_pack.py, float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opentao import liger
from opentao.engines.memory import default_row_tokens
from opentao.errors import ModelError
from opentao.packed_attention import FLEX_ATTENTION, PACKED_ATTENTION, flex_mask, flex_takes, row_layout
from opentao.policy import attention_of
from opentao.rows import Row, Sequences, plain_rows, planned_rows, sharing_pays

GPU_ATTENTION = FLEX_ATTENTION
CHECKED = 4  # responses of a group in the first-use self-check
HEAD_TOKENS = 4  # on which logits are compared with the model's own
CHUNK_TOKENS = 512  # rows of logits alive at once: 512 x 49,152 x 4 bytes = 100 MB for the built-in model


def rows_for(model: Any, groups: Sequence[Sequences], row_tokens: int) -> Iterator[Row]:
    """Packed rows if the model's attention allows it and they are less work; plain rows else. Built one by one."""
    longest = max((len(s.prompt_P) + max(map(len, s.responses_NR), default=0) for s in groups), default=0)
    if not shares_prompt(model, max(longest, row_tokens)):
        return plain_rows(groups)
    if len(groups) == 1 and not sharing_pays(groups[0], model.config.get_text_config().hidden_size):
        return plain_rows(groups)
    return planned_rows(groups, max(row_tokens, longest))


def shares_prompt(model: Any, length: int) -> bool:
    """True if full causal attention with an explicit mask is all that mixes tokens over `length` positions."""
    config = model.config.get_text_config()
    if not model._supports_attention_backend or config.model_type == "nemotron":  # nemotron drops our arguments
        return False
    if _rope_types(config) & {"dynamic", "longrope"}:  # how a position turns depends on the longest in the row
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


def _rope_types(config: Any) -> set[str]:
    """Of all layers: one set of parameters, or one a kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    return {str(part["rope_type"]) for part in parts if "rope_type" in part}


def hidden_states(model: Any, row: Row, attention: str | None = None) -> Tensor:
    """Final hidden states [T, hidden] of one row, through the decoder without its head.

    A row with one response is plain causal and goes through the model's own attention. Others go through attention in
    parts on a CPU, through FlexAttention on a GPU, or through the one that is named.
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
    attention = attention or (GPU_ATTENTION if device.type == "cuda" and flex_takes(model) else PACKED_ATTENTION)
    if attention == FLEX_ATTENTION:
        visible: dict[str, Any] = {"flex_mask": flex_mask(row, device)}
    else:
        visible = {"layouts": row_layout(row, device)}
    with attention_of(model, attention):
        hidden = decoder_of(model)(**inputs, **visible).last_hidden_state
    return hidden[0]


def decoder_of(model: Any) -> Any:
    """The stack below the head, with any adapter still in place."""
    return _causal_lm(model).base_model


def _causal_lm(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states, with the scaling or capping that some families put after the head."""
    causal_lm = _causal_lm(model)
    logits: Tensor = causal_lm.get_output_embeddings()(hidden)
    config = causal_lm.config.get_text_config()
    for name in ("logit_scale", "lm_head_multiplier"):
        if scale := getattr(config, name, None):
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):
        logits = logits * scale if config.model_type.startswith("hyperclovax") else logits / scale
    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if cap := getattr(config, name, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(model: Any, tolerance: float = 0.05) -> None:
    """Are these the model's own logits? A family may do after its head what `head_logits` does not know.

    Raises:
        ModelError: on a few tokens log-probs differ by more than `tolerance` nats.
    """
    ids = torch.arange(HEAD_TOKENS, device=next(model.parameters()).device)[None]
    own = model(input_ids=ids, use_cache=False).logits[0]
    ours = head_logits(model, decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0])
    worst = float((own.float().log_softmax(-1) - ours.float().log_softmax(-1)).abs().max())
    if worst > tolerance:  # not so if NaN: weights that are broken are said where they are used
        raise ModelError(
            f"{model.config.model_type}: OpenTAO would sample from other logits than the model's (by {worst:.3g} nats);"
            " this architecture is not supported, please report it"
        )


def _chunk_logprobs(model: Any, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = head_logits(model, hidden).to(dtype)
    if temperature != 1.0:
        logits = logits / temperature
    if logits.dtype == torch.float32 and liger.uses_liger(logits.device):
        return liger.logprobs(logits, targets)
    logprobs: Tensor = _Logprobs.apply(logits, targets)
    return logprobs


class _Logprobs(torch.autograd.Function):
    """log softmax of logits [T, V] at targets [T]; keeps the probabilities, and makes one [T, V] backwards."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        probs = logits.softmax(-1)
        ctx.save_for_backward(probs, targets)
        # The sum of exp(logit − peak) is one over the largest probability.
        return logits.gather(-1, targets[:, None])[:, 0] - logits.amax(-1) + probs.amax(-1).log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """dlogits = grad·(onehot − probs)"""
        probs, targets = ctx.saved_tensors
        out = probs * -grads[0][:, None]
        return out.scatter_add_(-1, targets[:, None], grads[0][:, None]), None


class _HeadLogprobs(torch.autograd.Function):
    """`_chunk_logprobs` under a head that is not trained, its gradient made at once.

    A token's log-prob depends on its own hidden state alone, so dlogprob_t/dhidden_t is one vector a token: what is
    kept is [T, hidden] instead of [T, V], and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, model: Any, targets: Tensor, temperature: float) -> Tensor:
        with torch.enable_grad():
            inputs = hidden.detach().requires_grad_()
            logprobs = _chunk_logprobs(model, inputs, targets, temperature)
            [slope] = torch.autograd.grad(logprobs.sum(), inputs)
        ctx.save_for_backward(slope)
        return logprobs.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        [slope] = ctx.saved_tensors
        return slope * grads[0][:, None].to(slope.dtype), None, None, None


def row_logprobs(model: Any, row: Row, temperature: float = 1.0, chunk: int = CHUNK_TOKENS) -> list[Tensor]:
    """Log-probs in nats of every response token of a row, one tensor [R] per entry of `row.owners`.

    Only one chunk of logits is ever alive. If the head is trained and there are more chunks than one, they are
    recomputed in the backward pass.
    """
    hidden = hidden_states(model, row)
    device = hidden.device
    wanted = hidden[torch.tensor(row.sources, device=device, dtype=torch.long)]
    targets = torch.tensor(row.targets, device=device, dtype=torch.long)
    pieces = chunked_logprobs(model, wanted, targets, temperature, chunk)
    return list(torch.cat(pieces).split(row.sizes)) if pieces else []


def chunked_logprobs(model: Any, wanted: Tensor, targets: Tensor, temperature: float, chunk: int) -> list[Tensor]:
    """Log-probs of targets [T] after hidden states [T, hidden], in pieces of at most `chunk` tokens."""
    with_gradient = torch.is_grad_enabled() and wanted.requires_grad
    frozen = not any(p.requires_grad for p in _causal_lm(model).get_output_embeddings().parameters())
    pieces = []
    for h, t in zip(wanted.split(chunk), targets.split(chunk), strict=True):
        if with_gradient and frozen:
            pieces.append(_HeadLogprobs.apply(h, model, t, temperature))
        elif with_gradient and len(targets) > chunk:
            pieces.append(checkpoint(_chunk_logprobs, model, h, t, temperature, use_reentrant=False))
        else:
            pieces.append(_chunk_logprobs(model, h, t, temperature))
    return pieces


@torch.no_grad()
def group_logprobs(
    model: Any, groups: Sequence[Sequences], *, row_tokens: int | None = None, temperature: float = 1.0
) -> Iterator[tuple[int, list[Tensor]]]:
    """Log-probs without gradients: yields (group index, N tensors [R]) in order, as groups are finished.

    `row_tokens` None: as `default_row_tokens` says.
    """
    found: dict[int, dict[int, Tensor]] = {}
    done = 0
    for row in rows_for(model, groups, row_tokens or default_row_tokens(model)):
        for (g, i), logprobs in zip(row.owners, row_logprobs(model, row, temperature), strict=True):
            found.setdefault(g, {})[i] = logprobs
        while done < len(groups) and len(found.get(done, {})) == len(groups[done].responses_NR):
            yield done, [found[done][i] for i in range(len(groups[done].responses_NR))]
            found.pop(done, None)
            done += 1


@torch.no_grad()
def check_packing(model: Any, sequences: Sequences, tolerance: float = 1e-2) -> float:
    """First-use self-check: packed log-probs against the model's own forward in the plain layout.

    Of the group's first `CHECKED` responses: more would show nothing else, and on a GPU the mask of so long a row is
    large. One alone stands there twice, for it would go through the model's own attention; and they are packed wherever
    rows may be, even if for this one group it does not pay. Returns the largest difference in nats.

    Raises:
        ModelError: it is over `tolerance`.
    """
    differences = []
    device = next(model.parameters()).device
    responses = sequences.responses_NR[:CHECKED]
    sequences = replace(sequences, responses_NR=responses * 2 if len(responses) == 1 else responses)
    size = sequences.num_tokens
    rows = planned_rows([sequences], size) if shares_prompt(model, size) else plain_rows([sequences])
    packed = [logprobs for row in rows for logprobs in row_logprobs(model, row)]
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
