"""A tiny random model that needs no hub and a small case to run on it, for tests and scripts. Always the same bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = (
    "My parcel is late and nobody answers. Where is it?",
    "I was charged twice for the same order, please refund one of them.",
    "The app crashes when I open the settings on my phone.",
    "How do I change my password? The link in the mail has expired.",
    "Thank you, the new screen works very well!",
    '{"category": "billing", "priority": "high", "summary": "The customer was charged twice."}',
    '{"category": "delivery", "priority": "low", "summary": "The parcel is late."}',
    '{"category": "account", "priority": "medium", "summary": "The customer cannot log in."}',
    '{"answer": 42, "why": ["six", "times", "seven"], "sure": true, "other": null}',
    "system user assistant Answer with a JSON object. What is 2 + 2? It is 4. Count: 0 1 2 3 4 5 6 7 8 9.",
)


def build_tiny_model(folder: Path) -> Path:
    """Write a random Llama (hidden 32, 2 layers, 4 heads, 2 key-value heads) with a 400-token byte-level BPE tokenizer.

    ChatML template; `<|im_end|>` ends an answer, `<|pad|>` pads; context 512 tokens.
    """
    _tiny_tokenizer().save_pretrained(folder)
    _tiny_model().save_pretrained(folder)
    return folder


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


def _tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # large enough that the next-token distribution is far from uniform
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


WORDS = ("parcel", "late", "refund", "charge", "password", "link", "order", "phone", "app", "invoice", "mail", "price")


def write_prompts(path: Path, count: int = 40, extra: tuple[str, ...] = ()) -> Path:
    """JSONL of `count` different prompts of five words, and of the `extra` ones."""
    rng = random.Random(0)
    texts = [" ".join(rng.sample(WORDS, 5)) for _ in range(count)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (*texts, *extra)))
    return path


def tiny_config(model: Path, prompts: Path) -> dict[str, Any]:
    """A config tree that runs in seconds and learns: answers should be letters. `toy_scorers` must be importable."""
    return {
        "model": str(model),
        "prompts": {"path": str(prompts), "heldout_fraction": 0.4, "max_heldout": 8},
        "scorers": [{"type": "python", "name": "letters", "args": {"function": "toy_scorers:letters"}}],
        "audit": {"type": "python", "args": {"function": "toy_scorers:readable"}},
        "rounds": 2,
        "generate": {"group_size": 8, "max_new_tokens": 12, "shard_prompts": 4, "batch_responses": 16},
        "train": {
            "objective": "distill",
            "learning_rate": 3e-2,
            "epochs": 3,
            "prompts_per_step": 2,
            "save_every_steps": 2,
        },
        "evaluate": {"base_group_size": 8, "group_size": 4, "kl_responses": 2, "bootstrap": 200},
    }
