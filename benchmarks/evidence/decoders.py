"""Small decoders, trained here in minutes on a module's corpus: `python decoders.py OUT tasks|records [SIZE …]`."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PIECES = Regex(r"\d| ?[^\W\d]+|\s+|[^\w\s]")  # digits one by one, or nothing can be worked out with them
SIZES = {"1M": (128, 4), "3M": (192, 6)}  # hidden size, layers
EXAMPLES = 60_000
BATCH = 64
RATE = 2e-3
Corpus = Callable[[random.Random], Iterator[tuple[str, str]]]  # (question, answer) without end


def tokenizer(corpus: Corpus) -> Any:
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    own.decoder = decoders.ByteLevel()
    texts = (f"{q}\n{a}" for q, a in itertools.islice(corpus(random.Random(1)), 5000))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE
    )


def model(hidden: int, layers: int, vocabulary: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def train(corpus: Corpus, size: str, out: Path, examples: int = EXAMPLES) -> dict[str, float]:
    """One pass over fresh examples; the loss is on answers. Writes the model's folder, returns size, loss, seconds."""
    own = tokenizer(corpus)
    policy = model(*SIZES[size], len(own))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    steps = examples // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.05)
    rows = corpus(random.Random(0))
    start, recent = time.perf_counter(), 0.0
    for _ in range(steps):
        batch = [_encoded(own, q, a) for q, a in itertools.islice(rows, BATCH)]
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([i + [0] * (longest - len(i)) for i, _ in batch])
        labels = torch.tensor([[-100] * at + i[at:] + [-100] * (longest - len(i)) for i, at in batch])
        loss = policy(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        recent = 0.95 * recent + 0.05 * loss.item() if recent else loss.item()
    policy.save_pretrained(out)
    own.save_pretrained(out)
    parameters = sum(p.numel() for p in policy.parameters())
    return {"parameters": parameters, "loss": recent, "seconds": round(time.perf_counter() - start, 1)}


def _encoded(own: Any, question: str, answer: str) -> tuple[list[int], int]:
    """Token ids of the whole exchange, and where the answer begins."""
    asked = own.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    before = own(asked, add_special_tokens=False).input_ids
    return before + own(f"{answer}<|end|>", add_special_tokens=False).input_ids, len(before)


if __name__ == "__main__":
    place, module, *sizes = sys.argv[1:]
    for size in sizes or SIZES:
        print(size, train(importlib.import_module(module).corpus, size, Path(place) / size), flush=True)
