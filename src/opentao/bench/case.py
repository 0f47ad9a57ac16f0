"""What a benchmark does: prompts of an exact length, responses, rewards. The same bytes every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "train", "score", "reward-train", "round"]
KINDS: tuple[Kind, ...] = ("generate", "train", "score", "reward-train", "round")

WORDS = (
    *("parcel", "ticket", "harbour", "window", "invoice", "garden", "engine", "letter", "morning", "copper"),
    *("signal", "bridge", "lantern", "market", "river", "driver", "kitchen", "meadow", "station", "winter"),
    *("pocket", "ribbon", "saddle", "thunder", "velvet", "walnut", "yellow", "anchor", "basket", "candle"),
)


@dataclass(kw_only=True, slots=True)
class Case:
    """One comparison. Every system makes exactly `new_tokens` a response, so that all do equal work.

    ``Case(kind="generate", model="…", prompt_ids=[[1, 5, …]], group_size=8, new_tokens=64)``
    """

    kind: Kind
    model: str  # a folder with safetensors and tokenizer
    prompt_ids: list[list[int]]  # token ids of each prompt, chat template applied
    group_size: int  # responses a prompt, N
    new_tokens: int  # tokens a response, R
    dtype: str = "float32"
    temperature: float = 1.0
    threads: int = 2
    lora: bool = False
    responses: list[list[list[int]]] = field(default_factory=list)  # [G][N][R] for train, score, reward-train
    rewards: list[list[float]] = field(default_factory=list)  # [G][N]
    options: dict[str, Any] = field(default_factory=dict)  # for one peer, e.g. where its weights are

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sentence(rng: random.Random) -> str:
    return " ".join(rng.sample(WORDS, 8)).capitalize() + ". "


def make_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` chat prompts of exactly `length` tokens that differ from the template's first free place on.

    Raises:
        ValueError: the chat template alone is longer.
    """
    frame = _chat(tokenizer, "")
    if len(frame) >= length:
        raise ValueError(f"the chat template alone has {len(frame)} tokens; prompts need more than that")
    prompts = []
    for i in range(count):
        rng = random.Random(i)
        text = "".join(sentence(rng) for _ in range(length // 4 + 4))
        body: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
        # The body is cut as token ids and put where the empty message was: decoding it again could change the length.
        start = next(k for k in range(len(frame), -1, -1) if frame[:k] == _chat(tokenizer, "x")[:k])
        prompts.append([*frame[:start], *body[: length - len(frame)], *frame[start:]])
    return prompts


def _chat(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def make_responses(case: Case, vocabulary: int) -> None:
    """Give the case responses of random ordinary tokens and rewards without ties."""
    rng = random.Random(case.new_tokens)
    low, high = min(1000, vocabulary // 2), min(20_000, vocabulary)
    for _ in case.prompt_ids:
        case.responses.append(
            [[rng.randrange(low, high) for _ in range(case.new_tokens)] for _ in range(case.group_size)]
        )
        case.rewards.append([float(r) for r in rng.sample(range(max(100, case.group_size)), case.group_size)])
