"""The reward model (DBRM): predicts which of several answers people prefer. Training, scoring, export.

A *guided* reward model asks for a verdict after the answer ("Verdict:") and reads a scalar head that starts along the
difference of the language-model head's rows for " good" and " bad", so few preferences go far. The question stands in
the tokenizer's chat template, hence the saved folder is an ordinary `AutoModelForSequenceClassification` that plain
transformers scores alike.

All answers to one prompt share one packed row: their longest common token prefix is computed once.
Loss: Bradley-Terry, mean over a group's pairs of −log σ(s_better − s_worse).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from opentao.bestofn import bootstrap
from opentao.config import LoraLayers, Schedule
from opentao.errors import ModelError
from opentao.models import load_causal_lm, load_classifier, load_tokenizer, resolve_model
from opentao.optimise import NO_CHECKPOINT, Checkpoint, Metrics, autocast, batches, num_steps, optimise
from opentao.pack import hidden_states, rows_for
from opentao.packed_linear import PackedLinear, packs, replace_linear
from opentao.policy import default_device, native_bf16
from opentao.preferences import Ranking
from opentao.progress import Progress
from opentao.rows import Row, Sequences, common_prefix, plain_rows, whole_groups
from opentao.types import Message

QUESTION = "Verdict:"  # short: every answer pays for its tokens (dev/LOG.md)
GOOD, BAD = " good", " bad"
HEAD_SCALE = 0.1  # at full size scores start nats apart, and the first steps go into undoing that (dev/LOG.md)


@dataclass(kw_only=True, slots=True, frozen=True)
class RewardTraining:
    """Settings of reward-model training; the defaults suit about a hundred rankings (dev/LOG.md)."""

    lr: float = 3e-5
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    rankings_per_step: int = 4
    max_tokens: int = 2048  # a longer prompt with its answer is an error
    lora_rank: int = 0  # 0 = full fine-tuning
    lora_layers: LoraLayers = "all-linear"
    seed: int = 0


class RewardModel:
    """A sequence classifier with one label, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer
        if model.config.num_labels != 1:
            raise ModelError(f"a reward model has 1 label, this one has {model.config.num_labels}")

    @classmethod
    def load(cls, name: str, *, trust_remote_code: bool = False) -> RewardModel:
        """Any Hugging Face sequence-classification model with one label: a folder or a hub name."""
        where = str(resolve_model(name))
        model: Any = load_classifier(where, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
        return cls(model.to(default_device()).eval(), tokenizer)

    @classmethod
    def from_causal_lm(cls, name: str, *, trust_remote_code: bool = False) -> RewardModel:
        """A guided reward model on a causal LM's weights: the head is a tenth of row(" good") − row(" bad")."""
        where = str(resolve_model(name))
        causal = load_causal_lm(where, dtype=torch.float32, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.from_pretrained(where, num_labels=1, trust_remote_code=trust_remote_code), dtype=torch.float32
        )
        model.base_model.load_state_dict(causal.base_model.state_dict())
        head = causal.get_output_embeddings().weight
        good, bad = _good_and_bad(tokenizer)
        with torch.no_grad():
            model.score.weight.copy_(HEAD_SCALE * (head[good] - head[bad])[None])
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

    def encode(self, messages: Sequence[Message], texts: Sequence[str]) -> Sequences:
        """The conversations as whole token ids, cut after their longest common prefix."""
        rendered = [
            self.tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": t}], tokenize=False)
            for t in texts
        ]
        ids: list[list[int]] = self.tokenizer(rendered, add_special_tokens=False).input_ids
        if self.reads_last_token:
            ids = [self._as_read(tokens) for tokens in ids]
        # Every conversation keeps at least one own token: that is where its score is read.
        shared = min(common_prefix(ids), min(map(len, ids)) - 1)
        return Sequences(prompt_P=tuple(ids[0][:shared]), responses_NR=tuple(tuple(i[shared:]) for i in ids))

    @property
    def reads_last_token(self) -> bool:
        """True for a decoder with a `score` head on the last token; False for encoders and other classifiers."""
        return hasattr(self.model, "score")

    def _as_read(self, tokens: list[int]) -> list[int]:
        """Without padding tokens at the end: transformers reads the last token that is not the padding token."""
        pad = self.model.config.get_text_config().pad_token_id
        end = max((i for i, token in enumerate(tokens) if token != pad), default=len(tokens) - 1)
        return tokens[: end + 1]

    @torch.no_grad()
    def score(self, groups: Sequence[Sequences], row_tokens: int = 2048) -> Iterator[tuple[int, list[float]]]:
        """Scores without gradients: yields (group index, N scores) in order."""
        found: dict[int, dict[int, float]] = {}
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

    def rows(self, groups: Sequence[Sequences], row_tokens: int) -> list[Row]:
        return rows_for(self.model, groups, row_tokens) if self.reads_last_token else plain_rows(groups)

    def row_scores(self, row: Row) -> Tensor:
        """Scores [len(row.owners)] of one row, with gradients if they are on."""
        classifier = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if not self.reads_last_token:
            return self._plain_score(row)
        hidden = hidden_states(self.model, row)
        ends = torch.tensor(row.ends, device=hidden.device)
        scores: Tensor = classifier.score(hidden[ends])[:, 0]
        return scores.float() if scores.dtype == torch.bfloat16 else scores

    def _plain_score(self, row: Row) -> Tensor:
        """Encoders and other classifiers without a `score` head: their own forward, one conversation a row."""
        ids = torch.tensor(row.tokens_T, device=next(self.model.parameters()).device)[None]
        logits: Tensor = self.model(input_ids=ids).logits[0]
        return logits


def guided_template(tokenizer: PreTrainedTokenizerBase, question: str = QUESTION) -> str:
    """The chat template, followed by the question whose answer the head reads at the last token."""
    return f"{tokenizer.get_chat_template()}{question}"


def _good_and_bad(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The tokens in which the two answers to the question differ; a tokeniser may split off their common space."""
    good, bad = (tokenizer(QUESTION + word, add_special_tokens=False).input_ids for word in (GOOD, BAD))
    return next((g, b) for g, b in zip(good, bad, strict=False) if g != b)


def train_reward_model(
    reward_model: RewardModel,
    rankings: Sequence[Ranking],
    config: RewardTraining,
    checkpoint: Checkpoint,
    on_step: Callable[[Metrics], None],
) -> list[Metrics]:
    """Bradley-Terry on rankings, all answers to a prompt in one packed row.

    Raises:
        TrainError: loss or gradient is not finite.
        ModelError: an answer with its prompt is longer than `max_tokens`.
    """
    model = reward_model.model
    if config.lora_rank:
        torch.manual_seed(config.seed)
        lora = PeftConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules=lora_targets(model, config.lora_layers),
            modules_to_save=["score"],
            task_type="SEQ_CLS",
        )
        model = reward_model.model = get_peft_model(model, lora)
    else:  # a few rankings say little of single tokens, and a dense gradient of the whole table costs a 20th of a step
        model.get_input_embeddings().requires_grad_(False)
    items = [(reward_model.encode(r.prompt.messages, r.texts), r) for r in rankings]
    longest = max(len(s.prompt_P) + max(map(len, s.responses_NR)) for s, _ in items)
    if longest > config.max_tokens:
        raise ModelError(f"a prompt with its answer has {longest} tokens, max_tokens is {config.max_tokens}")

    def step(batch: list[tuple[Sequences, Ranking]]) -> tuple[float, int]:
        total = 0.0
        for indices in whole_groups([s for s, _ in batch], config.max_tokens):
            rankings = [batch[i][1] for i in indices]
            with autocast(model):
                scores = _scores(reward_model, [batch[i][0] for i in indices], config.max_tokens)
            losses = [bradley_terry(s, r.pairs) for s, r in zip(scores, rankings, strict=True)]
            loss = torch.stack(losses).sum() / len(batch)
            loss.backward()
            total += float(loss.detach())
        return total, sum(s.num_tokens for s, _ in batch)

    steps = batches(items, config.epochs, config.rankings_per_step, config.seed)
    history = optimise(model, steps, step, config, checkpoint, on_step)
    if config.lora_rank:
        reward_model.model = model.merge_and_unload()
    return history


def lora_targets(model: Any, layers: LoraLayers) -> str | list[str]:
    """Which layers get an adapter, in peft's terms.

    Raises:
        ModelError: the model has no linear layer inside a module called attention.
    """
    if layers == "all-linear":
        return layers
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found = [name for name in linear if re.search("att(n|ention)", name)]
    if not found:
        raise ModelError(f"{model.config.model_type}: no attention layers found for LoRA; use all-linear")
    return found


def _scores(reward_model: RewardModel, groups: Sequence[Sequences], row_tokens: int) -> list[Tensor]:
    """Scores [N] of each group, with gradients."""
    found: list[dict[int, Tensor]] = [{} for _ in groups]
    for row in reward_model.rows(groups, row_tokens):
        for (g, i), score in zip(row.owners, reward_model.row_scores(row), strict=True):
            found[g][i] = score
    return [torch.stack([own[i] for i in sorted(own)]) for own in found]


def train_to_folder(
    model: str, rankings: Sequence[Ranking], config: RewardTraining, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train from a causal LM (guided head) or a sequence classifier (its own head) and save; whole or not at all."""
    reward_model = RewardModel.load(model) if _is_classifier(model) else RewardModel.from_causal_lm(model)
    total = num_steps(len(rankings), config.epochs, config.rankings_per_step)
    with progress.stage("reward model", total=total, unit="steps", label="train reward model") as step:
        history = train_reward_model(
            reward_model, rankings, config, NO_CHECKPOINT, lambda m: step.advance(1, tokens=m.tokens)
        )
    temporary = out.with_name(f".{out.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    reward_model.save(temporary)
    temporary.rename(out)
    return {"rankings": len(rankings), "steps": len(history), "loss_last": history[-1].loss, "out": str(out)}


def _is_classifier(model: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(str(resolve_model(model)))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return any("SequenceClassification" in name for name in config.architectures or ())


def accuracy(reward_model: RewardModel, rankings: Sequence[Ranking], progress: Progress) -> dict[str, Any]:
    """Share of pairs in which the preferred answer scores higher (a tie counts half), beside "the longer answer wins".

    Intervals are over prompts, since pairs of one prompt are not independent.
    """
    groups = [reward_model.encode(r.prompt.messages, r.texts) for r in rankings]
    hits, longer = [], []
    with progress.stage("score", total=len(groups), unit="prompts", label="score preferences") as step:
        for i, scores in reward_model.score(groups):
            lengths = [float(len(t)) for t in rankings[i].texts]
            hits.append(_share_of_wins(scores, rankings[i].pairs))
            longer.append(_share_of_wins(lengths, rankings[i].pairs))
            step.advance(1, tokens=groups[i].num_tokens)
    return {
        "accuracy": bootstrap(hits).as_dict(),
        "longer_wins": bootstrap(longer).as_dict(),
        "prompts": len(rankings),
        "pairs": sum(len(r.pairs) for r in rankings),
    }


def _share_of_wins(values: Sequence[float], pairs: Sequence[tuple[int, int]]) -> float:
    wins = [1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0 for i, j in pairs]
    return sum(wins) / len(wins)


def bradley_terry(scores_N: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Mean over (better, worse) pairs of −log σ(s_better − s_worse). Source: Bradley & Terry 1952."""
    better, worse = (torch.tensor(side, device=scores_N.device) for side in zip(*pairs, strict=True))
    return -torch.nn.functional.logsigmoid(scores_N[better] - scores_N[worse]).mean()
