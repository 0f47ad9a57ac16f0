"""The reward model: its head, its export, its training, its accuracy, the scorer and the commands."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHATML, SENTENCES
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)
from typer.testing import CliRunner

from opentao.cli import app
from opentao.config import ScorerConfig
from opentao.errors import ConfigError, ModelError, ScoreError, TrainError
from opentao.models import load_causal_lm, load_tokenizer
from opentao.optimise import NO_CHECKPOINT, Metrics
from opentao.preferences import Ranking, write_preferences
from opentao.progress import Progress
from opentao.reward_eval import accuracy
from opentao.reward_loss import bradley_terry
from opentao.reward_model import HEAD_SCALE, QUESTION, RewardModel
from opentao.reward_train import RewardTraining, lora_targets, train_reward_model, train_to_folder
from opentao.rows import Row
from opentao.scorers.registry import build_scorer
from opentao.scorers.run import run_scorer, run_scorer_many
from opentao.types import BatchScorer, Group, Message, Prompt, Response

PROSE, JSON = SENTENCES[:5], SENTENCES[5:8]
MESSAGES: list[Message] = [{"role": "user", "content": "My parcel is late."}]
ANSWERS = ["It is late.", '{"category": "delivery"}', "I", "It is late. Thank you, the new screen works very well!"]


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opentao.policy.native_bf16", lambda device: False)
    monkeypatch.setattr("opentao.optimise.native_bf16", lambda device: False)


@pytest.fixture
def guided(tiny_model_dir: Path) -> RewardModel:
    return RewardModel.from_causal_lm(str(tiny_model_dir))


def one_group(reward_model: RewardModel, answers: Sequence[str] = ANSWERS) -> list[float]:
    [(index, scores)] = reward_model.score([reward_model.encode(MESSAGES, answers)])
    assert index == 0
    return scores


def plain_scores(folder: Path, answers: Sequence[str] = ANSWERS, *, padded: str | None = None) -> list[float]:
    """What transformers alone makes of a saved folder: one by one, or as one batch padded on that side."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [[*MESSAGES, {"role": "assistant", "content": answer}] for answer in answers]
    settings = {"tokenize": True, "return_tensors": "pt", "return_dict": True}
    with torch.no_grad():
        if padded is None:
            one = [tokenizer.apply_chat_template(chat, **settings) for chat in chats]
            return [float(model(**inputs).logits[0, 0]) for inputs in one]
        tokenizer.padding_side = padded
        return model(**tokenizer.apply_chat_template(chats, padding=True, **settings)).logits[:, 0].tolist()


def toy_rankings(number: int, seed: int = 0) -> list[Ranking]:
    """JSON is preferred to prose, whatever the prompt."""
    rng = random.Random(seed)
    rankings = []
    for i in range(number):
        texts = (rng.choice(PROSE), rng.choice(JSON))
        prompt = Prompt.from_text(f"{rng.choice(PROSE)} {i}")
        rankings.append(
            Ranking(prompt=prompt, texts=texts if i % 2 else texts[::-1], ranks=(2.0, 1.0) if i % 2 else (1.0, 2.0))
        )
    return rankings


def train(reward_model: RewardModel, rankings: Sequence[Ranking], **settings: Any) -> list[Metrics]:
    return train_reward_model(reward_model, rankings, RewardTraining(**settings), NO_CHECKPOINT, lambda m: None)


# ---------------------------------------------------------------------------------------------------- head


def test_the_head_starts_along_the_difference_of_two_rows(guided: RewardModel, tiny_model_dir: Path) -> None:
    """Here " good" and " bad" are a space and a word: the rows are those of the first tokens that differ."""
    causal = load_causal_lm(str(tiny_model_dir), dtype=torch.float32)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    good, bad = (tokenizer(QUESTION + word).input_ids for word in (" good", " bad"))
    at = next(i for i in range(9) if good[i] != bad[i])
    head = causal.get_output_embeddings().weight
    torch.testing.assert_close(guided.model.score.weight[0], HEAD_SCALE * (head[good[at]] - head[bad[at]]))
    assert guided.model.score.weight.abs().max() > 0
    for name, weight in causal.base_model.state_dict().items():
        assert torch.equal(guided.model.base_model.state_dict()[name], weight)


def test_a_score_is_a_tenth_of_the_difference_of_two_logits(guided: RewardModel, tiny_model_dir: Path) -> None:
    """Before any training: how much more the model would go on with the one word than with the other."""
    causal = load_causal_lm(str(tiny_model_dir), dtype=torch.float32)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    chat = tokenizer.apply_chat_template([*MESSAGES, {"role": "assistant", "content": ANSWERS[0]}], tokenize=False)
    ids = tokenizer(f"{chat}{QUESTION}", add_special_tokens=False, return_tensors="pt").input_ids
    good, bad = (tokenizer(QUESTION + word).input_ids for word in (" good", " bad"))
    at = next(i for i in range(9) if good[i] != bad[i])
    with torch.no_grad():
        logits = causal(ids).logits[0, -1]
    apart = float(logits[good[at]] - logits[bad[at]])
    assert one_group(guided, ANSWERS[:1])[0] == pytest.approx(0.1 * apart, abs=1e-5)


def test_the_common_prefix_is_computed_once(guided: RewardModel) -> None:
    sequences = guided.encode(MESSAGES, ANSWERS)
    whole = guided.tokenizer.apply_chat_template(
        [[*MESSAGES, {"role": "assistant", "content": a}] for a in ANSWERS], tokenize=True, return_dict=False
    )
    assert [[*sequences.prompt_P, *r] for r in sequences.responses_NR] == whole
    assert len(sequences.prompt_P) > 10
    [row] = guided.rows([sequences], 2048)
    assert len(row.tokens_T) == sequences.num_tokens < sum(map(len, whole))


def test_equal_and_single_answers_keep_a_token_of_their_own(guided: RewardModel) -> None:
    twice = one_group(guided, ["It is late."] * 2)
    assert twice[0] == pytest.approx(twice[1], abs=1e-5)
    assert one_group(guided, ["It is late."]) == pytest.approx(twice[:1], abs=1e-5)
    assert one_group(guided)[0] == pytest.approx(twice[0], abs=1e-4)


def test_scores_do_not_depend_on_the_rows(guided: RewardModel) -> None:
    groups = [
        guided.encode(MESSAGES, ANSWERS),
        guided.encode(MESSAGES, ANSWERS[:1]),
        guided.encode(MESSAGES, ANSWERS[1:3]),
    ]
    wide = dict(guided.score(groups, 2048))
    assert list(wide) == [0, 1, 2]
    for row_tokens in (1, 90, 150):
        for index, scores in guided.score(groups, row_tokens):
            assert scores == pytest.approx(wide[index], abs=1e-4)


def test_scoring_does_not_switch_gradients_off_for_others(guided: RewardModel) -> None:
    groups = [guided.encode(MESSAGES, ANSWERS[:1])] * 3
    for _ in guided.score(groups, 1):
        assert torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_saved_folder_is_scored_alike_by_plain_transformers(
    guided: RewardModel, tmp_path: Path, lora_rank: int
) -> None:
    train(guided, toy_rankings(16), lr=1e-2, epochs=3, lora_rank=lora_rank)
    guided.save(tmp_path / "rm")
    ours = one_group(guided)
    assert max(ours) - min(ours) > 0.1
    assert plain_scores(tmp_path / "rm") == pytest.approx(ours, abs=1e-4)
    for side in ("right", "left"):
        assert plain_scores(tmp_path / "rm", padded=side) == pytest.approx(ours, abs=1e-4)
    assert one_group(RewardModel.load(str(tmp_path / "rm"))) == pytest.approx(ours, abs=1e-4)
    saved = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForSequenceClassification"]
    assert not list((tmp_path / "rm").glob("*.bin")) and not list((tmp_path / "rm").glob("adapter*"))


def test_a_base_without_a_padding_token_is_exported_with_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Plain transformers refuses a batch else. The end token will do: every text ends with the question."""
    load_causal_lm(str(tiny_model_dir), dtype=torch.float32).save_pretrained(tmp_path / "base")
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "base")
    reward_model = RewardModel.from_causal_lm(str(tmp_path / "base"))
    reward_model.save(tmp_path / "rm")
    assert plain_scores(tmp_path / "rm", padded="right") == pytest.approx(one_group(reward_model), abs=1e-4)


def foreign_folder(tiny_model_dir: Path, folder: Path, model: Any, template: str) -> Path:
    """A reward model that somebody else has made."""
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    tokenizer.chat_template = template
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_that_ends_with_the_padding_token(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Where the end token pads, transformers reads the token before it; so must we."""
    config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=1, pad_token_id=2)
    template = CHATML.replace("'<|im_end|>\n'", "'<|im_end|>'")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", model, template)
    assert one_group(RewardModel.load(str(folder))) == pytest.approx(plain_scores(folder), abs=1e-4)
    assert one_group(RewardModel.load(str(folder)), ["x"]) == pytest.approx(plain_scores(folder, ["x"]), abs=1e-4)


SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_another_decoder(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        **SMALL, num_key_value_heads=2, head_dim=8, num_labels=1, pad_token_id=0, initializer_range=0.3
    )
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", Qwen3ForSequenceClassification(config), CHATML)
    reward_model = RewardModel.load(str(folder))
    assert len(list(reward_model.rows([reward_model.encode(MESSAGES, ANSWERS)], 2048))) == 1
    assert one_group(reward_model) == pytest.approx(plain_scores(folder), abs=1e-4)


def test_an_encoder_reads_one_conversation_at_a_time(tiny_model_dir: Path, tmp_path: Path) -> None:
    """It looks both ways and has no `score` head: nothing to share."""
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=1, pad_token_id=0, initializer_range=0.3)
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", BertForSequenceClassification(config), CHATML)
    reward_model = RewardModel.load(str(folder))
    scores = one_group(reward_model)
    assert scores == pytest.approx(plain_scores(folder), abs=1e-4)
    assert max(scores) - min(scores) > 1e-3
    assert train(reward_model, toy_rankings(4), lr=1e-3)[-1].loss > 0


def test_an_answer_too_long_for_an_encoder_leaves_the_others_their_scores(tiny_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=1, pad_token_id=0, initializer_range=0.3)
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", BertForSequenceClassification(config), CHATML)
    scorer = build_scorer(ScorerConfig(type="reward_model", args={"model": str(folder)}))
    prompt, long = Prompt(messages=tuple(MESSAGES)), "late " * config.max_position_embeddings
    groups = [Group.of_texts(prompt, [long, *ANSWERS]), Group.of_texts(prompt, [long])]
    (first, *others), alone = run_scorer_many(scorer, groups)
    assert [s.value for s in others] == pytest.approx(plain_scores(folder), abs=1e-4)
    assert all(re.fullmatch(r"too_long: \d+ tokens, \d+ fit", str(s.error)) for s in (first, *alone))


def test_an_encoder_of_distances_reads_any_length(tiny_model_dir: Path, tmp_path: Path) -> None:
    """DeBERTa without absolute positions has a limit in its config and does not mean it."""
    torch.manual_seed(0)
    distances = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**SMALL, **distances, position_buckets=8, num_labels=1, initializer_range=0.3)
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", DebertaV2ForSequenceClassification(config), CHATML)
    scorer = build_scorer(ScorerConfig(type="reward_model", args={"model": str(folder)}))
    prompt, long = Prompt(messages=tuple(MESSAGES)), "late " * config.max_position_embeddings
    scores = run_scorer(scorer, Group.of_texts(prompt, [long, *ANSWERS]))
    assert [s.value for s in scores] == pytest.approx(plain_scores(folder, [long, *ANSWERS]), abs=1e-4)


def test_an_encoder_gets_its_own_special_tokens(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Its head reads [CLS], which no chat template of ours writes; and it reads so many tokens and no more."""
    torch.manual_seed(0)
    config = BertConfig(**SMALL, num_labels=1, pad_token_id=0, initializer_range=0.3)
    folder = foreign_folder(tiny_model_dir, tmp_path / "rm", BertForSequenceClassification(config), CHATML)
    own = AutoTokenizer.from_pretrained(tiny_model_dir)
    first, last = 3, 4
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    own.chat_template = None
    own.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    reward_model = RewardModel.load(str(folder))
    sequences = reward_model.encode(MESSAGES, ANSWERS)
    assert sequences.prompt_P[0] == first
    assert all(response[-1] == last for response in sequences.responses_NR)
    with pytest.raises(ModelError, match=rf"has \d+ tokens, the reward model reads {config.max_position_embeddings}"):
        reward_model.encode(MESSAGES, ["late " * config.max_position_embeddings])
    reward_model.tokenizer.add_special_tokens({"cls_token": "[CLS]"})
    reward_model.tokenizer.bos_token = None
    reward_model.tokenizer.chat_template = "[CLS]{{ messages[0].content }}{{ messages[-1].content }}"
    [ids] = reward_model.conversations(MESSAGES, ["It is late."])
    assert (
        ids.count(reward_model.tokenizer.cls_token_id) + ids.count(first) == 1
    )  # what the template writes, and no more


def test_what_is_not_a_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir, num_labels=2)
    folder = foreign_folder(tiny_model_dir, tmp_path / "two", LlamaForSequenceClassification(config), CHATML)
    with pytest.raises(ModelError, match="a reward model has 1 label, this one has 2"):
        RewardModel.load(str(folder))
    with pytest.raises(ModelError, match=r"no config\.json"):
        RewardModel.load(str(tmp_path))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded"):
        RewardModel.load(str(folder))


# ---------------------------------------------------------------------------------------------------- training


def test_tied_answers_make_no_pair() -> None:
    prompt = Prompt.from_text("x")
    ranking = Ranking(prompt=prompt, texts=("a", "b", "c", "d"), ranks=(2.0, 1.0, 2.0, 3.0))
    assert sorted(ranking.pairs) == [(0, 3), (1, 0), (1, 2), (1, 3), (2, 3)]
    assert ranking.tied == [(0, 2)] and replace(ranking, ties_equal=False).tied == []
    assert Ranking(prompt=prompt, texts=("a", "b"), ranks=(1.0, 1.0)).pairs == []


def test_it_learns_a_preference(guided: RewardModel) -> None:
    rankings = toy_rankings(24)
    history = train(guided, rankings, lr=3e-3, epochs=4)
    assert len(history) == 24
    assert history[-1].loss < 0.2 * history[0].loss
    assert accuracy(guided, rankings, Progress(quiet=True))["accuracy"]["mean"] > 0.9
    unseen = accuracy(guided, toy_rankings(12, seed=5), Progress(quiet=True))
    assert unseen["accuracy"]["mean"] > 0.9
    assert (unseen["prompts"], unseen["pairs"]) == (12, 12)


def test_it_learns_from_ranked_groups(guided: RewardModel) -> None:
    """Two good answers, two bad ones; nobody said which of the two good ones is better."""
    rankings = [
        Ranking(
            prompt=Prompt.from_text(f"{p} {i}"),
            texts=(JSON[i], p, JSON[(i + 1) % 3], PROSE[i]),
            ranks=(1, 2, 1, 2),
            ties_equal=False,
        )
        for i in range(3)
        for p in PROSE
        if p != PROSE[i]
    ]
    history = train(guided, rankings, lr=3e-3, epochs=6)
    assert history[-1].loss < 0.2 * history[0].loss
    facts = accuracy(guided, rankings, Progress(quiet=True))
    assert facts["accuracy"]["mean"] > 0.9
    assert facts["pairs"] == 4 * len(rankings)


def test_rows_do_not_change_the_training(tiny_model_dir: Path) -> None:
    rankings = toy_rankings(8)
    histories = []
    for spare in (0, 4096):
        reward_model = RewardModel.from_causal_lm(str(tiny_model_dir))
        longest = max(
            len(s.prompt_P) + max(map(len, s.responses_NR))
            for s in (reward_model.encode(r.prompt.messages, r.texts) for r in rankings)
        )
        histories.append(train(reward_model, rankings, lr=1e-3, max_tokens=longest + spare))
    for one, other in zip(*histories, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3)


def test_the_loss_of_a_step_is_the_mean_over_its_rankings(guided: RewardModel) -> None:
    """Of the mean over each ranking's pairs: a prompt with many answers counts as much as one with two."""
    prompt = Prompt(messages=tuple(MESSAGES))
    rankings = [*toy_rankings(3), Ranking(prompt=prompt, texts=tuple(ANSWERS), ranks=(1.0, 2.0, 3.0, 3.0))]
    encoded = [guided.encode(r.prompt.messages, r.texts) for r in rankings]
    scores = [torch.tensor(s) for _, s in guided.score(encoded)]
    losses = [float(bradley_terry(s[:, None], r.pairs)) for s, r in zip(scores, rankings, strict=True)]
    losses[-1] = float(bradley_terry(scores[-1][:, None], rankings[-1].pairs, rankings[-1].tied))
    [metrics] = train(guided, rankings, rankings_per_step=4, loss="bradley_terry")
    assert metrics.loss == pytest.approx(sum(losses) / 4, rel=1e-4)


def test_lora_trains_the_adapter_and_the_head(guided: RewardModel) -> None:
    before = {n: p.detach().clone() for n, p in guided.model.named_parameters()}
    history = train(guided, toy_rankings(16), lr=1e-2, epochs=3, lora_rank=4)
    assert history[-1].loss < 0.5 * history[0].loss
    after = dict(guided.model.named_parameters())  # merged: an ordinary classifier again
    assert after.keys() == before.keys()
    changed = {n.split(".")[-2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "score"}


def test_lora_on_attention_leaves_other_layers_alone(guided: RewardModel) -> None:
    before = {n: p.detach().clone() for n, p in guided.model.named_parameters()}
    history = train(guided, toy_rankings(16), lr=1e-2, epochs=3, lora_rank=4, lora_layers="attention")
    assert history[-1].loss < 0.5 * history[0].loss
    after = dict(guided.model.named_parameters())
    changed = {n.split(".")[-2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "score"}


def test_lora_on_attention_needs_attention_layers(guided: RewardModel) -> None:
    class NoAttention(torch.nn.Module):
        config = guided.model.config

        def __init__(self) -> None:
            super().__init__()
            self.mixer = torch.nn.Linear(2, 2)

    with pytest.raises(ModelError, match="no attention layers found for LoRA; use all-linear"):
        lora_targets(NoAttention(), "attention")


def test_full_training_changes_everything_but_the_token_embeddings(guided: RewardModel) -> None:
    before = {n: p.detach().clone() for n, p in guided.model.named_parameters()}
    train(guided, toy_rankings(4), lr=1e-3)
    same = [n for n, p in guided.model.named_parameters() if torch.equal(before[n], p)]
    assert same == ["model.embed_tokens.weight"]


def test_what_stops_training(guided: RewardModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a prompt with its answer has \d+ tokens, max_tokens is 20"):
        train(guided, toy_rankings(2), max_tokens=20)
    with torch.no_grad():
        guided.model.score.weight.fill_(float("nan"))
    with pytest.raises(TrainError, match="loss nan"):
        train(guided, toy_rankings(2))


def test_nothing_is_written_unless_training_ends(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opentao.reward_train.item_loss", lambda scores, *_: scores.sum() * float("nan"))
    with pytest.raises(TrainError):
        train_to_folder(str(tiny_model_dir), toy_rankings(2), RewardTraining(), tmp_path / "rm", Progress(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_from_a_reward_model(guided: RewardModel, tmp_path: Path) -> None:
    """A classifier keeps its own head and its own template: the question is not asked twice."""
    guided.save(tmp_path / "first")
    train_to_folder(
        str(tmp_path / "first"), toy_rankings(4), RewardTraining(lr=0.0), tmp_path / "second", Progress(quiet=True)
    )
    second = RewardModel.load(str(tmp_path / "second"))
    assert second.tokenizer.chat_template == guided.tokenizer.chat_template
    assert one_group(second) == pytest.approx(one_group(guided), abs=1e-5)


# ---------------------------------------------------------------------------------------------------- accuracy


def test_accuracy_by_hand(guided: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Prompt.from_text("x")
    rankings = [
        Ranking(prompt=prompt, texts=("aa", "b"), ranks=(1.0, 2.0)),  # right; the longer one is preferred
        Ranking(prompt=prompt, texts=("aa", "b", "cc"), ranks=(2.0, 1.0, 3.0)),  # one of three pairs right
        Ranking(prompt=prompt, texts=("aa", "bb"), ranks=(1.0, 2.0)),  # a tie counts half
    ]
    scores = [[1.0, 0.0], [1.0, 0.5, 2.0], [3.0, 3.0]]  # pairs (1,0) (1,2) (0,2): wrong, wrong, wrong
    monkeypatch.setattr(RewardModel, "score", lambda self, groups: enumerate(scores))
    facts = accuracy(guided, rankings, Progress(quiet=True))
    assert facts["accuracy"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    # lengths 2 1; pairs (1,0): 1 < 2 wrong, (1,2): wrong, (0,2): tie, 0.5/3; tie
    assert facts["longer_wins"]["mean"] == pytest.approx((1 + 0.5 / 3 + 0.5) / 3)
    assert (facts["prompts"], facts["pairs"], facts["accuracy"]["n"]) == (1, 5, 3)  # all of one prompt


# ---------------------------------------------------------------------------------------------------- scorer


def group_of(answers: Sequence[str]) -> Group:
    responses = tuple(
        Response(id=str(i), text=text, tokens_R=(1,), sampler_logprobs_R=(-1.0,), finish="stop")
        for i, text in enumerate(answers)
    )
    return Group(prompt=Prompt(messages=tuple(MESSAGES)), responses=responses)


def test_the_scorer(guided: RewardModel, tmp_path: Path) -> None:
    guided.save(tmp_path / "rm")
    expected = one_group(guided)
    args = {"model": str(tmp_path / "rm")}
    scorer = build_scorer(ScorerConfig(type="reward_model", name="people", args=args))
    assert scorer.name == "people"
    assert scorer.score(group_of(ANSWERS)) == pytest.approx(expected, abs=1e-5)
    assert scorer.score(group_of(ANSWERS[:1])) == pytest.approx(expected[:1], abs=1e-4)
    squashed = build_scorer(ScorerConfig(type="reward_model", args=args | {"squash": True, "row_tokens": 8}))
    assert squashed.score(group_of(ANSWERS)) == pytest.approx([1 / (1 + math.exp(-s)) for s in expected], abs=1e-4)


def test_several_groups_in_one_row_score_as_alone(guided: RewardModel, tmp_path: Path) -> None:
    guided.save(tmp_path / "rm")
    scorer = build_scorer(ScorerConfig(type="reward_model", args={"model": str(tmp_path / "rm")}))
    assert isinstance(scorer, BatchScorer)
    groups = [group_of(ANSWERS), group_of(ANSWERS[:1]), group_of(ANSWERS[1:])]
    alone = [scorer.score(g) for g in groups]
    for together, expected in zip(scorer.score_many(groups), alone, strict=True):
        assert together == pytest.approx(expected, abs=1e-4)


def test_squash_of_extreme_scores(guided: RewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guided.save(tmp_path / "rm")
    scorer = build_scorer(ScorerConfig(type="reward_model", args={"model": str(tmp_path / "rm"), "squash": True}))
    monkeypatch.setattr(RewardModel, "row_scores", lambda self, row: torch.tensor([[-1000.0], [0.0], [1000.0]]))
    assert scorer.score(group_of(ANSWERS[:3])) == [0.0, 0.5, 1.0]


def test_a_reward_model_that_cannot_work_ends_the_run(guided: RewardModel, tmp_path: Path) -> None:
    """At once where no folder is there; else when it is loaded. It is not a failure of the answers."""
    with pytest.raises(ConfigError, match=r"^scorer reward_model: model '.*none': expected a built-in name"):
        build_scorer(ScorerConfig(type="reward_model", args={"model": str(tmp_path / "none")}))
    (folder := tmp_path / "rm").mkdir()
    guided.save(folder)
    for args, complaint in (
        ({"model": "opentao-tests/absent"}, "model 'opentao-tests/absent' cannot be loaded"),
        ({"model": str(folder), "pessimism": 1.0}, "pessimism needs an ensemble"),
    ):
        scorer = build_scorer(ScorerConfig(type="reward_model", name="rm", args=args))
        for groups in ([group_of(ANSWERS)], [group_of(ANSWERS)] * 2):
            with pytest.raises(ScoreError, match=f"^scorer rm: {complaint}"):
                run_scorer_many(scorer, groups)


def test_a_conversation_that_the_template_refuses_is_unscored(guided: RewardModel, tmp_path: Path) -> None:
    guided.tokenizer.chat_template = "{{ raise_exception('no') }}" + str(guided.tokenizer.chat_template)
    guided.save(tmp_path / "rm")
    scores = run_scorer(
        build_scorer(ScorerConfig(type="reward_model", args={"model": str(tmp_path / "rm")})), group_of(ANSWERS)
    )
    assert [s.scored for s in scores] == [False] * 4
    assert str(scores[0].error).startswith("ModelError: the reward model's chat template does not take this")


# ---------------------------------------------------------------------------------------------------- commands


def test_train_and_eval_from_the_command_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "deep" / "rm"
    write_preferences(pairs, toy_rankings(16))
    with pairs.open("a") as file:
        file.write('{"prompt": "x", "chosen": "y"}\n')
    runner = CliRunner()
    command = ["reward", "train", "--pairs", str(pairs), "--model", str(tiny_model_dir), "--out", str(out)]
    done = runner.invoke(app, [*command, "--epochs", "5", "--learning-rate", "3e-3", "--json"])
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == facts | {"rankings": 16, "steps": 20, "set_aside": 1, "out": str(out)}
    assert facts["loss_last"] < 0.2
    assert "1 rows set aside, first: line 17: rejected: expected text" in done.stderr

    judged = runner.invoke(app, ["reward", "eval", "--model", str(out), "--pairs", str(pairs), "--json"])
    assert judged.exit_code == 0, judged.stderr
    facts = json.loads(judged.stdout)
    assert facts["accuracy"]["mean"] > 0.9 and facts["accuracy"]["n"] == 16
    assert facts["longer_wins"].keys() == facts["accuracy"].keys() == {"mean", "low", "high", "n"}
    text = runner.invoke(app, ["reward", "eval", "--model", str(out), "--pairs", str(pairs)])
    assert text.stdout.startswith("accuracy ") and "16 pairs" in text.stdout

    again = runner.invoke(app, command)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr.strip() == f"tao: {out}: exists already; name a new folder"

    nowhere = pairs / "reward"  # said before anything is trained
    for command in (["train", "--model", str(tiny_model_dir)], ["eval", "--model", str(out)]):
        refused = runner.invoke(app, ["reward", *command, "--pairs", str(pairs), "--out", str(nowhere)])
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr.startswith(f"tao: {nowhere}: nothing can be written there: ")


@pytest.mark.parametrize(
    ("model", "pairs", "reason"),
    [
        ("{tiny}", "no-such.jsonl", "tao: no-such.jsonl: cannot be read: No such file or directory"),
        ("{tmp}/none", "{good}", "tao: model '{tmp}/none': expected a built-in name"),
        ("someone/model-not-in-the-cache", "{good}", "tao: model 'someone/model-not-in-the-cache' cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(tiny_model_dir: Path, tmp_path: Path, model: str, pairs: str, reason: str) -> None:
    good = tmp_path / "pairs.jsonl"
    write_preferences(good, toy_rankings(2))
    model, pairs, reason = (x.format(tiny=tiny_model_dir, tmp=tmp_path, good=good) for x in (model, pairs, reason))
    command = ["reward", "train", "--pairs", pairs, "--model", model, "--out", str(tmp_path / "rm"), "--json"]
    failed = CliRunner().invoke(app, command)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith(reason)
    assert len(failed.stderr.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.jsonl"]


def test_row_ends_are_where_scores_are_read(guided: RewardModel) -> None:
    sequences = guided.encode(MESSAGES, ANSWERS)
    [row] = guided.rows([sequences], 2048)
    assert isinstance(row, Row)
    assert [row.tokens_T[e] for e in row.ends] == [r[-1] for r in sequences.responses_NR]
    assert len(set(row.ends)) == len(ANSWERS)


def test_scores_are_not_rounded_to_bf16(guided: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between 4 and 8 bf16 numbers lie 1/32 apart: answers would tie that are not equally good."""
    with torch.no_grad():
        guided.model.score.weight.mul_(100)
    monkeypatch.setattr("opentao.reward_model.autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
    scores = torch.tensor(one_group(guided))
    assert scores.abs().max() > 1
    assert (scores != scores.bfloat16().float()).any()
