"""An engine without a model, for tests and dry runs of a pipeline: the answers are given, everything else is real.

    from opentao.engines.fake import FakeEngine
    opentao.run(config, directory, progress, engine=FakeEngine(['{"answer": 4}', "I do not know."]))

It keeps the protocol's promises: a response depends on its prompt, strategy and seed only, it ends at a stop string or
at `max_new_tokens`, and its id names the policy that was loaded. Left out: truncation (`top_p`, `top_k`), temperature
apart from 0, and a context that a prompt could be too long for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from opentao.types import Group, Message, Prompt, Response, SamplingPlan, before_stop, response_id

STOP = 256  # the token after the 256 bytes
VOCABULARY = 257
BYTE_LOGPROB = -math.log(VOCABULARY)  # what a uniform sampler would report


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is needed; given a real one, its model can train on the groups."""

    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...
    def decode(self, tokens: Any, *, skip_special_tokens: bool = ...) -> Any: ...
    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any: ...


class ByteTokenizer:
    """UTF-8 bytes, and one token that ends an answer."""

    eos_token_id = STOP

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(t for t in tokens if t < STOP).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[Message], **_: Any) -> list[int]:
        return self.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages))


class FakeEngine:
    """Answers from a function of (prompt as the strategy asks it, seed), or from a list that the seed picks from.

    Greedy decoding (temperature 0) asks for seed 0. Without a `tokenizer` token ids are bytes, and 256 ends an answer.

    >>> engine = FakeEngine(lambda prompt, seed: prompt.text.upper())
    >>> [group] = engine.sample([Prompt.from_text("hi")], SamplingPlan(group_size=2))
    >>> group.responses[1].text, group.responses[1].tokens_R, group.responses[1].finish
    ('HI', (72, 73, 256), 'stop')
    """

    def __init__(
        self, answers: Callable[[Prompt, int], str] | Sequence[str], tokenizer: Tokenizer | None = None
    ) -> None:
        self._answers = answers
        self._tokenizer = tokenizer or ByteTokenizer()
        self._policy_hash = ""

    def load(self, policy: Any) -> None:
        """Responses carry this policy's hash from now on; its weights are not looked at."""
        self._policy_hash = policy.hash

    def sample(self, prompts: Sequence[Prompt], plan: SamplingPlan) -> Iterator[Group]:
        """Yield one unscored Group a prompt, in order."""
        for prompt in prompts:
            encoded = self._tokenizer.apply_chat_template(
                list(prompt.messages), tools=list(prompt.tools) or None, add_generation_prompt=True, return_dict=False
            )
            responses = tuple(self._respond(prompt, plan, index) for index in range(plan.group_size))
            yield Group(prompt=prompt, prompt_tokens_P=tuple(encoded), responses=responses)

    def _respond(self, prompt: Prompt, plan: SamplingPlan, index: int) -> Response:
        strategy = plan.strategies[index % len(plan.strategies)]
        seed = plan.response_seed(prompt.id, index)
        asked = replace(prompt, messages=tuple(strategy.apply(prompt.messages)))
        text = strategy.answer_prefix + self._answer(asked, seed if plan.temperature else 0)
        tokens_R, finish = self._cut(_until_stop(text, plan.stop), plan)
        return Response(
            id=response_id(prompt.id, self._policy_hash, strategy.name, seed),
            text=before_stop(self._tokenizer.decode(tokens_R, skip_special_tokens=True), plan.stop),
            tokens_R=tokens_R,
            sampler_logprobs_R=(BYTE_LOGPROB,) * len(tokens_R),
            finish="stop" if finish else "length",
            strategy=strategy.name,
            seed=seed,
            policy=self._policy_hash,
        )

    def _answer(self, prompt: Prompt, seed: int) -> str:
        return self._answers(prompt, seed) if callable(self._answers) else self._answers[seed % len(self._answers)]

    def _cut(self, text: str, plan: SamplingPlan) -> tuple[tuple[int, ...], bool]:
        """Token ids, and whether the answer ended by itself: with the end token, or with a stop string."""
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if not any(stop in text for stop in plan.stop):
            tokens = [*tokens, self._tokenizer.eos_token_id]
        return tuple(tokens[: plan.max_new_tokens]), len(tokens) <= plan.max_new_tokens


def _until_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the end of the stop string that ends first."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
