"""Fixtures for all tests: a tiny random model that needs no hub, and the built-in model where it can be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opentao.errors import ModelError

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may reach a network by accident
os.environ["TOKENIZERS_PARALLELISM"] = "false"

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


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (hidden 32, 2 layers, 4 heads, 2 key-value heads) with a 400-token byte-level BPE tokenizer.

    The same bytes every time. ChatML template; `<|im_end|>` ends an answer, `<|pad|>` pads; context 512 tokens.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    _tiny_tokenizer().save_pretrained(folder)
    _tiny_model().save_pretrained(folder)
    return folder


def _tiny_tokenizer():
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


def _tiny_model():
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


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in model's folder; the test is skipped, with the reason, where its weights cannot be downloaded."""
    from opentao.models import DEFAULT_MODEL, resolve_model

    try:
        return Path(resolve_model(DEFAULT_MODEL))
    except ModelError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
