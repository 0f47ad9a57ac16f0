"""The nouns of OpenTAO. Read this file first.

A `Group` is one prompt with its N responses and their scores. Every stage reads and writes Groups; a Group is never
split and never half-scored in silence. An unscored response is NaN in memory and null on disk, never 0.

Shape suffixes used everywhere: `_P` prompt tokens, `_R` response tokens, `_N` responses of a group, `_G` groups,
`_T` packed tokens, `_V` vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

Message = dict[str, Any]
"""One chat turn, e.g. ``{"role": "user", "content": "My parcel is late."}``."""

RolloutDtype = Literal["auto", "float32", "bfloat16", "int8"]

NAN = float("nan")


def content_hash(*parts: Any) -> str:
    """16 hex digits of the sha256 of the parts as canonical JSON (keys sorted, no spaces)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True, slots=True, frozen=True)
class Prompt:
    """What a user asked, in chat form, without any answer.

    >>> Prompt.from_text("My parcel is late.").id
    '6400427d6c87afd2'
    """

    messages: tuple[Message, ...]  # chat turns; the last one is not the assistant's
    tools: tuple[dict[str, Any], ...] = ()  # JSON schemas of tools, as the chat template takes them
    meta: dict[str, Any] = field(default_factory=dict)  # carried along, never shown to the model; labels live here

    @classmethod
    def from_text(cls, text: str, **meta: Any) -> Prompt:
        """A single user turn."""
        return cls(messages=({"role": "user", "content": text},), meta=meta)

    @property
    def id(self) -> str:
        """Hash of messages and tools; `meta` does not count."""
        return content_hash(list(self.messages), list(self.tools))

    @property
    def text(self) -> str:
        """The last user turn, for people."""
        return next((str(m["content"]) for m in reversed(self.messages) if m.get("role") == "user"), "")


def response_id(prompt_id: str, policy: str, strategy: str, seed: int) -> str:
    """Hash of what determines a response: prompt, policy weights, strategy, seed."""
    return content_hash(prompt_id, policy, strategy, seed)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """What stands before the first stop string.

    >>> before_stop("Paris.\\n\\nUser: And", ["User:", "Assistant:"])
    'Paris.\\n\\n'
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(kw_only=True, slots=True, frozen=True)
class Response:
    """One sampled answer. Text is for people, tokens are for training: sampled text is never re-tokenised.

    Example: ``Response(id="5f0c…", text="Hi!", tokens_R=(9, 17, 2), sampler_logprobs_R=(-0.1, -1.2, -0.3),
    finish="stop", strategy="plain", seed=71, policy="9a1b…")``
    """

    id: str  # response_id(prompt id, policy, strategy, seed)
    text: str  # decoded without special tokens, and without a stop string and what stands behind it
    tokens_R: tuple[int, ...]  # exactly what the engine sampled, stop token included
    sampler_logprobs_R: tuple[float, ...]  # nats; full distribution at the sampling temperature, before top-p / top-k
    finish: Literal["stop", "length"]  # "length": cut at max_new_tokens, there is no stop token
    strategy: str = "plain"  # what the sampler saw besides the prompt
    seed: int = 0  # of this response's own random stream
    policy: str = ""  # hash of the weights that sampled it


@dataclass(kw_only=True, slots=True, frozen=True)
class Score:
    """One scorer's raw number for one response. ``Score(value=NAN, error="timeout: 30 s")`` is unscored."""

    value: float  # any real scale, higher is better; NaN = unscored
    error: str | None = None  # why it is unscored: "kind: message"

    @property
    def scored(self) -> bool:
        return not math.isnan(self.value)


@dataclass(kw_only=True, slots=True, frozen=True)
class Failure:
    """What went wrong with a Group, kept as data: ``Failure(kind="prompt_too_long", message="9001 > 8192")``."""

    kind: str
    message: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Group:
    """One prompt, its N responses, their scores, their rewards: the unit of data, compute and credit.

    Example: two responses, one scorer, the second response unscored::

        Group(prompt=Prompt.from_text("2+2?"), prompt_tokens_P=(1, 5, 6), responses=(a, b),
              scores={"exact": (Score(value=1.0), Score(value=NAN, error="timeout: 30 s"))}, rewards_N=(1.0, NAN))
    """

    prompt: Prompt
    prompt_tokens_P: tuple[int, ...] = ()  # the *plain* prompt under the policy's chat template; what training sees
    responses: tuple[Response, ...] = ()
    scores: dict[str, tuple[Score, ...]] = field(default_factory=dict)  # scorer name -> N scores
    rewards_N: tuple[float, ...] = ()  # combined, used for credit; NaN = unscored
    failure: Failure | None = None

    def __post_init__(self) -> None:
        N = len(self.responses)
        for name, values in (*self.scores.items(), ("rewards_N", self.rewards_N or self.responses)):
            if len(values) != N:
                raise ValueError(f"group {self.prompt.id}: {name} has {len(values)} values for {N} responses")

    @classmethod
    def of_texts(cls, prompt: Prompt, texts: Sequence[str]) -> Group:
        """Answers from elsewhere, to be scored: their tokens are not known, so nothing can be trained on them."""
        responses = tuple(
            Response(id=str(i), text=text, tokens_R=(), sampler_logprobs_R=(), finish="stop")
            for i, text in enumerate(texts)
        )
        return cls(prompt=prompt, responses=responses)

    @property
    def scored(self) -> tuple[int, ...]:
        """Indices of the responses that have a reward."""
        return tuple(i for i, r in enumerate(self.rewards_N) if not math.isnan(r))

    @property
    def informative(self) -> bool:
        """True if at least two rewards differ: only then is there something to learn."""
        rewards = {self.rewards_N[i] for i in self.scored}
        return len(rewards) > 1

    def with_scores(self, scores: dict[str, tuple[Score, ...]], rewards_N: Sequence[float]) -> Group:
        return replace(self, scores=scores, rewards_N=tuple(rewards_N))


@dataclass(kw_only=True, slots=True, frozen=True)
class Strategy:
    """A way to ask that is used for sampling only; training always sees the plain prompt.

    ``Strategy(name="think", template="{prompt}\\nThink step by step.")`` rewrites the last user turn;
    `system` replaces or adds a system turn; `examples` are earlier turns shown before the prompt (few-shot).
    `replace` swaps pieces of the last user turn: ``{"red, green": "green, red"}``. `answer_prefix` is put into the
    answer's mouth: the response starts with it and goes on from there, so a group can cover answers that the policy
    would hardly start by itself: ``Strategy(name="yes", answer_prefix="Yes, ")``.
    """

    name: str = "plain"
    template: str | None = None  # must contain "{prompt}"
    system: str | None = None
    examples: tuple[Message, ...] = ()
    replace: dict[str, str] = field(default_factory=dict)
    answer_prefix: str = ""

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that the sampler sees instead of `messages`. The plain strategy changes nothing."""
        turns = [dict(m) for m in messages]
        last = next((m for m in reversed(turns) if m["role"] == "user"), None)
        if last is not None:
            for old, new in self.replace.items():
                last["content"] = last["content"].replace(old, new)
            if self.template is not None:
                last["content"] = self.template.replace("{prompt}", last["content"])
        system = [m for m in turns if m["role"] == "system"]
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        return [*system, *self.examples, *(m for m in turns if m["role"] != "system")]


PLAIN = Strategy()


@dataclass(kw_only=True, slots=True, frozen=True)
class SamplingPlan:
    """How to sample one group a prompt. Response i uses ``strategies[i % len(strategies)]``.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 mean no truncation. `stop` strings end a response; the token
    that completes one is kept, the text ends before it. `dtype` is the sampler's precision: "auto" (bf16 where the
    hardware multiplies it, else fp32), or one by name; "int8" rounds the weights of linear layers.
    """

    group_size: int = 8  # N
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    strategies: tuple[Strategy, ...] = (PLAIN,)
    seed: int = 0
    dtype: RolloutDtype = "auto"

    @property
    def truncated(self) -> bool:
        """True if the sampled distribution is not the policy's own: unusable for importance weights."""
        return self.top_p < 1.0 or self.top_k > 0

    def response_seed(self, prompt_id: str, index: int) -> int:
        """Seed of response `index`'s own random stream: a function of plan seed, prompt and index only."""
        return int(content_hash(self.seed, prompt_id, index), 16) >> 1


class Engine(Protocol):
    """Samples groups from a policy. Final: later engines keep these two calls."""

    def load(self, policy: Any) -> None:
        """Use this policy's weights from now on (an `opentao.policy.Policy`)."""

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        """Yield one unscored Group a prompt, in any order; one that cannot be sampled has a `failure`."""


@runtime_checkable
class ReleasingEngine(Protocol):
    """An engine that can give back its memory between uses."""

    def release(self) -> None: ...


@runtime_checkable
class ReportingEngine(Protocol):
    """An engine that makes many groups side by side and says meanwhile how far it is."""

    on_progress: Callable[[float, int], None]  # groups' worth of work done in what it is making, tokens so far


class Scorer(Protocol):
    """Plug-in: anything with a name and this method. None or NaN means unscored; never return 0 for a failure.

    Two attributes are read if they are there. `relative`: true if a score says what an answer is worth among the others
    of its group (a vote, a rank), so that scores of different groups do not compare; where policies are compared, each
    answer is then scored among the base's answers to the prompt. `largest_group`: how many answers it takes at once.
    """

    name: str

    def score(self, group: Group) -> Sequence[float | Score | None]: ...


@runtime_checkable
class BatchScorer(Scorer, Protocol):
    """A scorer that is faster on several groups at once. What it gives for a group does not depend on the others."""

    def score_many(self, groups: Sequence[Group]) -> Sequence[Sequence[float | Score | None]]: ...
