"""Tiny random models of many families, and their log-probs by the ordinary forward pass, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from opentao.rows import Sequences

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough that the next-token distribution is far from uniform
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def random_model(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A causal LM of `family` (a transformers model type), the same weights every time."""
    config = CONFIG_MAPPING[family](**(SIZES | OWN_SIZES.get(family, {}) | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def in_float64(llama: Any) -> Any:
    """A Llama in float64 throughout: its own norm goes through float32, which shows in gradients from 1e-7 on."""

    def exact(norm: Any) -> Any:
        return lambda x: torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)

    for module in llama.double().modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = exact(module)
    return llama


def random_sequences(shape: Sequence[tuple[int, Sequence[int]]], seed: int = 0, common: int = 0) -> list[Sequences]:
    """Groups of random tokens; `shape` has a prompt length and the responses' lengths for each of them.

    `common` more tokens stand in front of every prompt, the same ones: an instruction.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    start = tokens(common)
    return [
        Sequences(prompt_P=start + tokens(P), responses_NR=tuple(tokens(R) for R in lengths)) for P, lengths in shape
    ]


def plain_logprobs(model: Any, sequences: Sequences, temperature: float = 1.0) -> list[Tensor]:
    """[R] nats a response: the model's own forward over prompt and response, nothing shared, nothing packed."""
    P = len(sequences.prompt_P)
    found = []
    for response in sequences.responses_NR:
        ids = torch.tensor([*sequences.prompt_P, *response], device=next(model.parameters()).device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, P - 1 : -1] / temperature
        found.append(logits.log_softmax(-1).gather(-1, ids[P:, None])[:, 0])
    return found
