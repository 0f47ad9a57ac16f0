"""The reward model (DBRM): predicts which of several answers people prefer. Training is in `reward_train`.

A *guided* reward model asks for a verdict after the answer ("Verdict:") and reads a scalar head that starts along the
difference of the language-model head's rows for " good" and " bad", an idea for few preferences. The question stands in
the tokenizer's chat template, hence the saved folder is an ordinary `AutoModelForSequenceClassification` that plain
transformers scores alike. What counts as good ("cites the filing") may stand before the prompt: the template takes it
as `instruction`, so one reward model serves several tasks.

An *ensemble* is several heads on one backbone pass: several labels, whose mean is the score and whose spread says how
sure it is. All answers to one prompt share one packed row: their longest common token prefix is computed once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from opentao import liger
from opentao.config import Head
from opentao.engines.memory import default_row_tokens
from opentao.errors import ModelError
from opentao.models import load_causal_lm, load_classifier, load_tokenizer, resolve_model
from opentao.optimise import autocast
from opentao.pack import hidden_states, rows_for
from opentao.packed_linear import PackedLinear, packs, replace_linear
from opentao.policy import INSIDE_A_TEMPLATE, default_device, native_bf16, with_arguments
from opentao.rows import Row, Sequences, common_prefix, plain_rows
from opentao.types import Message

QUESTION = "Verdict:"  # short: every answer pays for its tokens (dev/LOG.md)
GOOD, BAD = " good", " bad"
INSTRUCTION = "What counts as good: "
ENSEMBLE = "opentao_ensemble"  # in a saved config: its labels are the heads of an ensemble, so many
ENSEMBLE_NOISE = 0.5  # how far heads of an ensemble start from the guided one, in its length
HEAD_SCALE = 0.1  # at full size scores start nats apart, and the first steps go into undoing that (dev/LOG.md)


class RewardModel:
    """A sequence classifier with one label (or an ensemble's heads as labels), and its tokenizer."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        liger.patch(model)
        self.tokenizer = tokenizer
        self.num_heads: int = model.config.num_labels
        if self.num_heads != 1 and getattr(model.config, ENSEMBLE, None) != self.num_heads:
            raise ModelError(f"a reward model has 1 label, this one has {self.num_heads}")

    @classmethod
    def load(cls, name: str, *, trust_remote_code: bool = False) -> RewardModel:
        """Any Hugging Face sequence-classification model with one label: a folder or a hub name."""
        where = str(resolve_model(name))
        model: Any = load_classifier(where, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
        return cls(model.to(default_device()).eval(), tokenizer)

    @classmethod
    def from_causal_lm(
        cls, name: str, *, head: Head = "guided", ensemble: int = 1, seed: int = 0, trust_remote_code: bool = False
    ) -> RewardModel:
        """A reward model on a causal LM's weights.

        `head`: "guided" starts at a tenth of row(" good") − row(" bad"), "random" at the model's own initialiser.
        `ensemble`: that many heads, which start at different places around it.
        """
        where = str(resolve_model(name))
        causal = load_causal_lm(where, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(where, num_labels=ensemble, trust_remote_code=trust_remote_code)
        if ensemble > 1:
            setattr(config, ENSEMBLE, ensemble)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(causal.base_model.state_dict())
        rows = causal.get_output_embeddings().weight
        with torch.no_grad():
            model.score.weight.copy_(_first_heads(rows, tokenizer, model.score.weight.shape[0], head, seed))
        if tokenizer.pad_token is None:  # without one, plain transformers refuses a batch; the question ends every text
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.chat_template = guided_template(tokenizer)
        return cls(model.to(default_device()).eval(), tokenizer)

    def for_scoring(self) -> RewardModel:
        """The same with weights packed where that multiplies faster; it cannot be trained or saved any more."""
        if self.reads_last_token and packs(self.model) and not native_bf16(default_device()):
            replace_linear(self.model, PackedLinear)
        return self

    def save(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def encode(self, messages: Sequence[Message], texts: Sequence[str], instruction: str = "") -> Sequences:
        """The conversations as whole token ids, cut after their longest common prefix.

        Raises:
            ModelError: as `conversations`, or one is longer than the model reads.
        """
        ids = self.conversations(messages, texts, instruction)
        if (longest := max(map(len, ids))) > self.max_tokens:
            raise ModelError(f"the conversation has {longest} tokens, the reward model reads {self.max_tokens}")
        return together(ids)

    def conversations(
        self, messages: Sequence[Message], texts: Sequence[str], instruction: str = ""
    ) -> list[list[int]]:
        """Token ids of the conversation with each text as its answer, however long.

        Raises:
            ModelError: the model's chat template has no place for the instruction, or refuses the conversation.
        """
        if instruction and not self.takes_instructions:
            raise ModelError("the reward model's chat template has no `instruction`: it was not trained with any")
        named = {"instruction": instruction} if instruction else {}
        try:
            rendered = [
                self.tokenizer.apply_chat_template(
                    [*map(with_arguments, messages), {"role": "assistant", "content": t}], tokenize=False, **named
                )
                for t in texts
            ]
        except (TemplateError, *INSIDE_A_TEMPLATE) as error:
            raise ModelError(f"the reward model's chat template does not take this conversation: {error}") from error
        # A template writes the beginning token where a decoder wants one; encoders want [CLS] and [SEP].
        first = self.tokenizer.bos_token or self.tokenizer.cls_token
        special = not self.reads_last_token and not (first and rendered[0].startswith(first))
        ids: list[list[int]] = self.tokenizer(rendered, add_special_tokens=special).input_ids
        return [self._as_read(tokens) for tokens in ids] if self.reads_last_token else ids

    @property
    def max_tokens(self) -> int:
        """Longest conversation. Decoders turn positions further than they were trained to; encoders look them up.

        DeBERTa mostly does not: it knows how far apart tokens are, and that in buckets, so any length has a place.
        """
        if self.reads_last_token:
            return sys.maxsize
        config = self.model.config.get_text_config()
        looked_up = getattr(config, "position_biased_input", True)
        limit: int = (looked_up and getattr(config, "max_position_embeddings", None)) or sys.maxsize
        return min(limit, self.tokenizer.model_max_length)

    @property
    def takes_instructions(self) -> bool:
        return "instruction" in str(self.tokenizer.chat_template)

    @property
    def reads_last_token(self) -> bool:
        """True for a decoder with a `score` head on the last token; False for encoders and other classifiers."""
        return hasattr(self.model, "score")

    def _as_read(self, tokens: list[int]) -> list[int]:
        """Without padding tokens at the end: transformers reads the last token that is not the padding token."""
        pad = self.model.config.get_text_config().pad_token_id
        end = max((i for i, token in enumerate(tokens) if token != pad), default=len(tokens) - 1)
        return tokens[: end + 1]

    def score(self, groups: Sequence[Sequences], row_tokens: int | None = None) -> Iterator[tuple[int, list[float]]]:
        """Scores without gradients, the mean over the heads: yields (group index, N scores) in order."""
        for index, heads_NK in self.score_heads(groups, row_tokens):
            yield index, [sum(heads_K) / len(heads_K) for heads_K in heads_NK]

    @torch.no_grad()
    def score_heads(
        self, groups: Sequence[Sequences], row_tokens: int | None = None
    ) -> Iterator[tuple[int, list[list[float]]]]:
        """Yields (group index, N lists of one score a head) in order."""
        found: dict[int, dict[int, list[float]]] = {}
        done = 0
        for row in self.rows(groups, row_tokens):
            with autocast(self.model):
                scores = self.row_scores(row).tolist()
            for (g, i), score in zip(row.owners, scores, strict=True):
                found.setdefault(g, {})[i] = score
            while done < len(groups) and len(found.get(done, {})) == len(groups[done].responses_NR):
                yield done, [found[done][i] for i in range(len(groups[done].responses_NR))]
                found.pop(done, None)
                done += 1

    def rows(self, groups: Sequence[Sequences], row_tokens: int | None) -> Iterator[Row]:
        """Rows of at most `row_tokens`; None: as `default_row_tokens` says."""
        if not self.reads_last_token:
            return plain_rows(groups)
        return rows_for(self.model, groups, row_tokens or default_row_tokens(self.model))

    def row_scores(self, row: Row) -> Tensor:
        """Scores [len(row.owners), heads] of one row, with gradients if they are on."""
        classifier = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not self.reads_last_token:
            return self._plain_score(row)
        hidden = hidden_states(self.model, row)
        ends = torch.tensor(row.ends, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 scores between 4 and 8 would be 1/32 apart
            scores: Tensor = classifier.score(hidden[ends].to(torch.promote_types(hidden.dtype, torch.float32)))
        return scores

    def _plain_score(self, row: Row) -> Tensor:
        """Encoders and other classifiers without a `score` head: their own forward, one conversation a row.

        In the precision of the weights: bf16 in the layer or two behind the encoder would round scores.
        """
        ids = torch.tensor(row.tokens_T, device=next(self.model.parameters()).device)[None]
        with torch.autocast(ids.device.type, enabled=False):
            logits: Tensor = self.model(input_ids=ids).logits
        return logits


def together(conversations_NT: Sequence[Sequence[int]]) -> Sequences:
    """What all start with, once; every conversation keeps at least one token, where its score is read."""
    shared = min(common_prefix(conversations_NT), min(map(len, conversations_NT)) - 1)
    return Sequences(
        prompt_P=tuple(conversations_NT[0][:shared]),
        responses_NR=tuple(tuple(tokens[shared:]) for tokens in conversations_NT),
    )


def guided_template(tokenizer: PreTrainedTokenizerBase, question: str = QUESTION) -> str:
    """The chat template after the instruction, if any, and before the question, whose answer the head reads at its end.

    The instruction comes first: there all answers to a prompt share it.
    """
    instruction = "{% if instruction %}" + INSTRUCTION + "{{ instruction }}\n{% endif %}"
    return f"{instruction}{tokenizer.get_chat_template()}{question}"


def _first_heads(rows_VD: Tensor, tokenizer: PreTrainedTokenizerBase, heads: int, kind: Head, seed: int) -> Tensor:
    """Weights [heads, D]. Heads of an ensemble differ by noise of half the guided head's length, or are drawn apart."""
    draw = torch.Generator().manual_seed(seed)
    noise_KD = torch.randn(heads, rows_VD.shape[1], generator=draw) / rows_VD.shape[1] ** 0.5  # of length about 1
    good, bad = _good_and_bad(tokenizer)
    guided_D = HEAD_SCALE * (rows_VD[good] - rows_VD[bad]).float().cpu()
    if kind == "random":
        return guided_D.norm() * noise_KD
    return guided_D + (ENSEMBLE_NOISE * guided_D.norm() * noise_KD if heads > 1 else 0 * noise_KD)


def _good_and_bad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens in which the two answers to the question differ; a tokeniser may split off their common space."""
    good, bad = (tokenizer(QUESTION + word, add_special_tokens=False).input_ids for word in (GOOD, BAD))
    return next((g, b) for g, b in zip(good, bad, strict=False) if g != b)
