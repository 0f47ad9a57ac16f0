"""Train a reward model on people's choices: ``tao reward train``.

Bradley-Terry on pairs, Plackett-Luce on rankings of more; ties count. Some prompts are held out: the weights kept are
those of the least loss on them, and the scale of the scores is set by them, so that σ(s_a − s_b) is the probability
that people prefer a to b. The split is by prompt, never by row. Left out: soft targets from several annotators; each
choice is a row.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig

from opentao.config import Head, LoraLayers, RewardLoss, Schedule
from opentao.errors import ModelError
from opentao.models import resolve_model
from opentao.optimise import NO_CHECKPOINT, Checkpoint, Metrics, autocast, batches, num_steps, optimise
from opentao.preferences import Ranking
from opentao.progress import Progress
from opentao.reward_loss import bradley_terry, length_weights, plackett_luce
from opentao.reward_model import RewardModel
from opentao.reward_scale import comparisons, fit_scale
from opentao.rows import Sequences, whole_groups
from opentao.store import full_disk_as_os_error
from opentao.types import content_hash

LEAST_HELDOUT = 8  # prompts; with fewer nothing is held out, and the scale of scores is left as trained


@dataclass(kw_only=True, slots=True, frozen=True)
class RewardTraining:
    """Settings of reward-model training; the defaults suit about a hundred rankings (dev/LOG.md)."""

    lr: float = 3e-5
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int = 1
    rankings_per_step: int = 4
    max_tokens: int = 2048  # a longer prompt with its answer is an error; `train_to_folder` leaves such rankings out
    lora_rank: int = 0  # 0 = full fine-tuning
    lora_layers: LoraLayers = "all-linear"
    seed: int = 0
    loss: RewardLoss = "auto"  # Plackett-Luce for more than two answers, else Bradley-Terry
    margin: float = 0.0  # by how much the better answer should score higher; times a row's own `margin`
    label_smoothing: float = 0.0  # the share of choices that may be wrong
    balance_length: bool = False  # weigh pairs so that the longer answer is right half of the time
    head: Head = "guided"
    ensemble: int = 1  # heads on one backbone pass, each trained on its own bootstrap of the rankings
    instruction_dropout: float = 0.3  # share of times that a ranking is shown without its instruction
    heldout: float = 0.1  # share of prompts for early stop and calibration
    evaluate_times: int = 5  # looks at the held-out prompts in all; each costs their forward pass
    patience: int = 2  # looks without improvement after which training stops


@dataclass(kw_only=True, slots=True)
class Item:
    """One ranking, ready to train on."""

    ranking: Ranking
    guided: Sequences  # with its instruction
    plain: Sequences  # without
    pair_weights: list[float] | None  # of its pairs, then its ties
    head_weights_K: Tensor  # how often each head's bootstrap holds it


def train_reward_model(
    reward_model: RewardModel,
    rankings: Sequence[Ranking],
    config: RewardTraining,
    checkpoint: Checkpoint,
    on_step: Callable[[Metrics], bool | None],
    heldout: Sequence[Ranking] = (),
) -> list[Metrics]:
    """All answers to a prompt in one packed row. With `heldout` the best weights on them are kept.

    Raises:
        TrainError: loss or gradient is not finite.
        ModelError: an answer with its prompt is longer than `max_tokens`, or an instruction has no place.
    """
    model = _trainable(reward_model, config)
    items = _items(reward_model, rankings, config)
    watch = _Watch(reward_model, _items(reward_model, heldout, config), config) if heldout else None
    per_epoch = num_steps(len(items), 1, config.rankings_per_step)
    every = max(1, per_epoch * config.epochs // config.evaluate_times)

    def step(batch: list[tuple[Item, Sequences]]) -> tuple[float, int]:
        total = 0.0
        for indices in whole_groups([s for _, s in batch], config.max_tokens):
            with autocast(model):
                scores = _scores(reward_model, [batch[i][1] for i in indices], config.max_tokens)
            losses = [item_loss(s, batch[i][0], config) for s, i in zip(scores, indices, strict=True)]
            loss = torch.stack(losses).sum() / len(batch)
            loss.backward()
            total += float(loss.detach())
        return total, sum(s.num_tokens for _, s in batch)

    def after(metrics: Metrics) -> bool:
        stop = on_step(metrics)
        return bool(stop) or (watch is not None and (metrics.step + 1) % every == 0 and watch.look())

    shuffled = batches(range(len(items)), config.epochs, config.rankings_per_step, config.seed)
    steps = [[_shown(items[i], i, n // per_epoch, config) for i in batch] for n, batch in enumerate(shuffled)]
    history = optimise(model, steps, step, config, checkpoint, after)
    if watch is not None:
        watch.restore()
    if config.lora_rank:
        reward_model.model = model.merge_and_unload()
    return history


def item_loss(scores_NK: Tensor, item: Item, config: RewardTraining) -> Tensor:
    """One number: the mean over the heads, each weighed as its bootstrap says."""
    ranking = item.ranking
    if uses_plackett_luce(ranking, config):
        losses_K = plackett_luce(scores_NK, ranking.ranks, ties_equal=ranking.ties_equal)
    else:
        losses_K = bradley_terry(
            scores_NK,
            ranking.pairs,
            ranking.tied,
            margin=config.margin * ranking.margin,
            smoothing=config.label_smoothing,
            weights=item.pair_weights,
        )
    return (losses_K * item.head_weights_K.to(losses_K)).mean()


def uses_plackett_luce(ranking: Ranking, config: RewardTraining) -> bool:
    """Margins, smoothing and length weights are of pairs, so with them rankings are taken apart into pairs."""
    if config.loss != "auto":
        return config.loss == "plackett_luce"
    pairwise = config.margin or config.label_smoothing or config.balance_length
    return len(ranking.texts) > 2 and not pairwise


def split_by_prompt(rankings: Sequence[Ranking], share: float, seed: int) -> tuple[list[Ranking], list[Ranking]]:
    """(training, held out): a prompt's rankings stay together. Nothing is held out of fewer than LEAST_HELDOUT / share
    prompts."""
    ids = sorted({r.prompt.id for r in rankings}, key=lambda i: content_hash(seed, i))
    count = round(share * len(ids))
    if count < LEAST_HELDOUT:
        return list(rankings), []
    chosen = set(ids[:count])
    return [r for r in rankings if r.prompt.id not in chosen], [r for r in rankings if r.prompt.id in chosen]


def calibrate(reward_model: RewardModel, heldout: Sequence[Ranking]) -> float | None:
    """Stretch the head by what the held-out choices say. Returns the factor; None: there is no linear head."""
    if not reward_model.reads_last_token:
        return None
    groups = [reward_model.encode(r.prompt.messages, r.texts, r.instruction) for r in heldout]
    found = comparisons(heldout, [scores for _, scores in reward_model.score(groups)])
    scale = fit_scale(found.differences, found.wins)
    with torch.no_grad():
        reward_model.model.score.weight.mul_(scale)
    return scale


class _Watch:
    """The held-out loss now and then; remembers the best weights."""

    def __init__(self, reward_model: RewardModel, items: Sequence[Item], config: RewardTraining) -> None:
        self.reward_model = reward_model
        self.items = items
        self.config = config
        self.best = math.inf
        self.kept: dict[str, Tensor] = {}
        self.worse = 0

    @torch.no_grad()
    def look(self) -> bool:
        """True if training should stop."""
        total = 0.0
        for item in self.items:  # one at a time: rows of all would not fit
            with autocast(self.reward_model.model):
                (scores,) = _scores(self.reward_model, [item.guided], self.config.max_tokens)
            every_head = replace(item, head_weights_K=torch.ones(scores.shape[1]))
            total += float(item_loss(scores, every_head, self.config))
        if total < self.best:
            self.best, self.worse = total, 0
            self.kept = {n: p.detach().clone() for n, p in self._parameters()}
        else:
            self.worse += 1
        return self.worse >= self.config.patience

    @torch.no_grad()
    def restore(self) -> None:
        self.look()  # the last weights may be the best
        for name, parameter in self._parameters() if self.kept else ():
            parameter.copy_(self.kept[name])

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return [(n, p) for n, p in self.reward_model.model.named_parameters() if p.requires_grad]


def _trainable(reward_model: RewardModel, config: RewardTraining) -> Any:
    """The model with what will be trained switched on."""
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
    return model


def _items(reward_model: RewardModel, rankings: Sequence[Ranking], config: RewardTraining) -> list[Item]:
    """Encoded, weighed, and checked for length."""
    heads = reward_model.num_heads
    draw = np.random.default_rng([config.seed, 7])
    counts = draw.poisson(1.0, (len(rankings), heads)) if heads > 1 else np.ones((len(rankings), 1))
    weights = _pair_weights(rankings) if config.balance_length else [None] * len(rankings)
    items = []
    for ranking, own, pair_weights in zip(rankings, counts, weights, strict=True):
        guided = plain = reward_model.encode(ranking.prompt.messages, ranking.texts, ranking.instruction)
        if ranking.instruction:
            plain = reward_model.encode(ranking.prompt.messages, ranking.texts)
        if (longest := _longest(guided)) > config.max_tokens:
            raise ModelError(f"a prompt with its answer has {longest} tokens, max_tokens is {config.max_tokens}")
        head_weights_K = torch.from_numpy(own).float()
        items.append(
            Item(
                ranking=ranking,
                guided=guided,
                plain=plain,
                pair_weights=pair_weights,
                head_weights_K=head_weights_K,
            )
        )
    return items


def _longest(tokens: Sequences) -> int:
    return len(tokens.prompt_P) + max(map(len, tokens.responses_NR))


def _pair_weights(rankings: Sequence[Ranking]) -> list[list[float] | None]:
    """`length_weights` over all pairs of all rankings, dealt out again; a tie weighs 1.

    A pair counts as in the loss, which is a mean over the pairs and ties of its ranking.
    """
    kinds = [_longer_better(r, i, j) for r in rankings for i, j in r.pairs]
    shares = [1 / (len(r.pairs) + len(r.tied)) for r in rankings for _ in r.pairs]
    weights = iter(length_weights(kinds, shares))
    return [[*(next(weights) for _ in r.pairs), *(1.0 for _ in r.tied)] for r in rankings]


def _longer_better(ranking: Ranking, better: int, worse: int) -> bool | None:
    a, b = len(ranking.texts[better]), len(ranking.texts[worse])
    return None if a == b else a > b


def _shown(item: Item, index: int, epoch: int, config: RewardTraining) -> tuple[Item, Sequences]:
    """The item as one epoch sees it: now and then without its instruction."""
    drawn = int(content_hash(config.seed, index, epoch), 16) / 16**16
    return item, item.plain if drawn < config.instruction_dropout else item.guided


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
    """Scores [N, heads] of each group, with gradients."""
    found: list[dict[int, Tensor]] = [{} for _ in groups]
    for row in reward_model.rows(groups, row_tokens):
        for (g, i), scores_K in zip(row.owners, reward_model.row_scores(row), strict=True):
            found[g][i] = scores_K
    return [torch.stack([own[i] for i in sorted(own)]) for own in found]


def fitting(reward_model: RewardModel, rankings: Sequence[Ranking], max_tokens: int) -> tuple[list[Ranking], list[str]]:
    """Rankings whose prompt with each answer has at most `max_tokens` tokens, and as many as the model reads; of each
    other one, what is wrong."""
    kept, reasons = [], []
    most = min(max_tokens, reward_model.max_tokens)
    for ranking in rankings:
        ids = reward_model.conversations(ranking.prompt.messages, ranking.texts, ranking.instruction)
        longest = max(map(len, ids))
        if longest <= most:
            kept.append(ranking)
        else:
            start = " ".join(ranking.prompt.text.split())[:40]
            reasons.append(f"{longest:,} tokens with the prompt {start!r}")
    if not kept:
        raise ModelError(f"no ranking has at most {most:,} tokens, prompt with answer: {reasons[0]}")
    return kept, reasons


def train_to_folder(
    model: str, rankings: Sequence[Ranking], config: RewardTraining, out: Path, progress: Progress
) -> dict[str, Any]:
    """Train from a causal LM (guided head) or a sequence classifier (its own head) and save; whole or not at all."""
    if _is_classifier(model):
        reward_model = RewardModel.load(model)
        if config.ensemble not in (1, reward_model.num_heads):
            raise ModelError(f"model {model!r} has {reward_model.num_heads} heads of its own, not {config.ensemble}")
    else:
        reward_model = RewardModel.from_causal_lm(model, head=config.head, ensemble=config.ensemble, seed=config.seed)
    rankings, too_long = fitting(reward_model, rankings, config.max_tokens)
    if too_long:
        most = min(config.max_tokens, reward_model.max_tokens)
        progress.note(f"{len(too_long)} rankings are longer than {most:,} tokens and left out, first: {too_long[0]}")
    train, heldout = split_by_prompt(rankings, config.heldout, config.seed)
    total = num_steps(len(train), config.epochs, config.rankings_per_step)
    with progress.stage("reward model", total=total, unit="steps", label="train reward model") as step:
        history = train_reward_model(
            reward_model, train, config, NO_CHECKPOINT, lambda m: step.advance(1, tokens=m.tokens), heldout
        )
    scale = calibrate(reward_model, heldout) if heldout else None
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    try:
        with full_disk_as_os_error():
            reward_model.save(temporary)
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {
        "rankings": len(train),
        "heldout": len(heldout),
        "too_long": len(too_long),
        "steps": len(history),
        "steps_planned": total,
        "loss_last": history[-1].loss,
        "calibration": scale,
        "out": str(out),
    }


def _is_classifier(model: str) -> bool:
    try:
        config = AutoConfig.from_pretrained(str(resolve_model(model)))
    except (OSError, ValueError) as error:
        raise ModelError(f"model {model!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    return any("SequenceClassification" in name for name in config.architectures or ())
