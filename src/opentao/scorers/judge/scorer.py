"""The `judge` scorer: pointwise, pairwise or listwise verdicts of a language model, on a scale of 0 to 1.

Threat model: an answer can try to talk to the judge. It stands between marks that it cannot write (`questions`), and of
the judge's reply only the JSON counts; that lowers the odds and does not end them, so keep an audit that is no judge.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from opentao.builtin import cache_root
from opentao.scorers.judge import questions
from opentao.scorers.judge.client import Budget, Client, JudgeError, Pace, Structured
from opentao.scorers.plugin import Rating, unscored
from opentao.scorers.verifiers.base import ARGS
from opentao.types import Group, Prompt, content_hash

Verdict = Any  # what a mode's reader gives, or the JudgeError in its place


@dataclass(kw_only=True, config=ARGS)
class Judge:
    """Asks `model` at the OpenAI-compatible endpoint `url` (``http://localhost:8000/v1``).

    Modes:

    * `pointwise`: each answer alone, on `scale`; the mean of `repeats` askings;
    * `pairwise`: each answer against `opponents` others of its group, each pair with both sides first; the score is the
      share of those comparisons that it wins (a tie is half). A pair whose two askings disagree is a tie;
    * `listwise`: the whole group ranked at once, `repeats` times in different orders; the score is 1 for the best rank
      and 0 for the worst, averaged. At most `most` answers at once.

    Orders are drawn from `seed` and the group, so that scoring again asks the same. What has no valid verdict is
    unscored: refusal, timeout, deadline, budget, nonsense, cut_off, connection, http_429, and so on.
    """

    name: str
    url: str
    model: str
    mode: Literal["pointwise", "pairwise", "listwise"] = "listwise"
    rubric: str = questions.RUBRIC  # the text, or the path of its file
    scale: tuple[int, int] = (1, 10)
    repeats: PositiveInt = 2
    opponents: PositiveInt = 3
    most: PositiveInt = 16
    seed: int = 0
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key
    temperature: NonNegativeFloat = 0.0
    max_tokens: PositiveInt = 512
    structured: Structured = "json_schema"
    concurrency: PositiveInt = 8
    requests_per_minute: PositiveFloat | None = None
    timeout: PositiveFloat = 60.0
    deadline: PositiveFloat = 600.0  # seconds for the groups that are scored together
    tries: PositiveInt = 5
    first_wait: NonNegativeFloat = 1.0
    budget_tokens: PositiveInt | None = None
    budget_usd: PositiveFloat | None = None
    usd_per_million: tuple[float, float] = (0.0, 0.0)
    cache: str | None = None  # a folder; default: opentao's own in the user's cache; "": no cache
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    client: Any = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http:// or https://, got {self.url!r}")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: expected [low, high], got {list(self.scale)}")
        if self.budget_usd is not None and not any(self.usd_per_million):
            raise ValueError("budget_usd: needs usd_per_million, the prices of a million prompt and completion tokens")
        self.rubric = _text_or_file(self.rubric)
        self.client = Client(
            url=self.url,
            model=self.model,
            api_key=(os.environ.get(self.api_key_env) or "").strip() or None,  # a file's last newline is none of it
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            structured=self.structured,
            timeout=self.timeout,
            tries=self.tries,
            first_wait=self.first_wait,
            pace=Pace(self.requests_per_minute),
            budget=Budget(tokens=self.budget_tokens, usd=self.budget_usd, usd_per_million=self.usd_per_million),
            cache=cache_root() / "judge" if self.cache is None else Path(self.cache) if self.cache else None,
            extra=dict(self.extra),
        )

    @property
    def relative(self) -> bool:
        return self.mode != "pointwise"

    @property
    def largest_group(self) -> int | None:
        return self.most if self.mode == "listwise" else None

    def score(self, group: Group) -> list[Rating]:
        return self.score_many([group])[0]

    def score_many(self, groups: Sequence[Group]) -> list[list[Rating]]:
        """Groups side by side, `concurrency` requests at a time."""
        deadline = time.monotonic() + self.deadline
        mode = {"pointwise": self._pointwise, "pairwise": self._pairwise, "listwise": self._listwise}[self.mode]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                pending = [mode(group, lambda ask: pool.submit(self._verdict, ask, deadline)) for group in groups]
                return [finish() for finish in pending]
            except BaseException:  # Ctrl-C: what was not asked yet need not be paid for
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _verdict(self, ask: Callable[[float], Any], deadline: float) -> Verdict:
        try:
            return ask(deadline)
        except JudgeError as error:
            return error

    def _pointwise(self, group: Group, submit: Callable[..., Any]) -> Callable[[], list[Rating]]:
        asked = []
        for response in group.responses:
            messages, schema = questions.pointwise(group.prompt, response.text, self.rubric, self.scale)
            asked.append([submit(self._asker(messages, schema, self._read_score, i)) for i in range(self.repeats)])
        return lambda: [_mean([future.result() for future in futures]) for futures in asked]

    def _read_score(self, value: Any) -> float:
        return questions.read_score(value, self.scale)

    def _pairwise(self, group: Group, submit: Callable[..., Any]) -> Callable[[], list[Rating]]:
        texts = [r.text for r in group.responses]
        asked = []
        for i, j in self._pairs(group.prompt, len(texts)):
            sides = []
            for first, second in ((i, j), (j, i)):
                messages, schema = questions.pairwise(group.prompt, texts[first], texts[second], self.rubric)
                sides.append(submit(self._asker(messages, schema, questions.read_better)))
            asked.append((i, j, sides))
        return lambda: _win_shares(len(texts), [(i, j, [s.result() for s in sides]) for i, j, sides in asked])

    def _pairs(self, prompt: Prompt, count: int) -> list[tuple[int, int]]:
        """A ring in a drawn order: each answer meets the next ones, so that all meet about equally many."""
        order = list(range(count))
        random.Random(content_hash(self.seed, prompt.id, "pairs")).shuffle(order)
        steps = range(1, min(self.opponents // 2, count // 2) + 1)  # each is two opponents
        met = [(k, k + step) for step in steps for k in range(count)]
        met += [(k, k + count // 2) for k in range((count + 1) // 2) if self.opponents % 2]  # and one opposite
        ring = {tuple(sorted((order[a], order[b % count]))) for a, b in met}
        return sorted((i, j) for i, j in ring if i != j)

    def _listwise(self, group: Group, submit: Callable[..., Any]) -> Callable[[], list[Rating]]:
        texts = [r.text for r in group.responses]
        if len(texts) < 2 or len(texts) > self.most:
            reason = unscored("bad_size", f"{len(texts)} answers; listwise ranks 2 to {self.most} at once")
            return lambda: [reason] * len(texts)
        asked = []
        for k in range(self.repeats):
            order = list(range(len(texts)))
            random.Random(content_hash(self.seed, group.prompt.id, k // 2)).shuffle(order)
            order = order[:: -1 if k % 2 else 1]  # every second one is the one before, from behind
            messages, schema = questions.listwise(group.prompt, [texts[i] for i in order], self.rubric)
            asked.append(submit(self._asker(messages, schema, partial(_read_ranking, order))))
        return lambda: _mean_ranks(texts, [future.result() for future in asked])

    def _asker(
        self, messages: list[dict[str, str]], schema: dict[str, Any], read: Callable[[Any], Any], repeat: int = 0
    ) -> Callable[[float], Any]:
        """`repeat` is told to the judge only if it is above 0: otherwise the cache would answer every asking alike."""
        if repeat:
            *before, last = messages
            messages = [*before, last | {"content": f"{last['content']}\n\n(Asking {repeat + 1}.)"}]
        return lambda deadline: self.client.ask(messages, schema, read, deadline)


def _read_ranking(order: Sequence[int], value: Any) -> list[int]:
    """Indices of the group from best to worst, where `order` says which answer was shown at each place."""
    return [order[i] for i in questions.read_ranking(value, len(order))]


def _mean(verdicts: Sequence[Verdict]) -> Rating:
    """Of those that are numbers; without one the first error says why."""
    numbers = [v for v in verdicts if not isinstance(v, JudgeError)]
    return sum(numbers) / len(numbers) if numbers else _reason(verdicts)


def _win_shares(count: int, compared: Sequence[tuple[int, int, Sequence[Verdict]]]) -> list[Rating]:
    """Shares of comparisons won; an answer in no valid comparison is unscored. Both sides must have a verdict."""
    won: list[list[float]] = [[] for _ in range(count)]
    errors: list[list[Verdict]] = [[] for _ in range(count)]
    for i, j, (straight, swapped) in compared:
        failed = [v for v in (straight, swapped) if isinstance(v, JudgeError)]
        for side in (i, j):
            errors[side] += failed
        if not failed:
            first = (straight + 1 - swapped) / 2  # 0.5 if the sides decided, not the answers
            won[i].append(first)
            won[j].append(1 - first)
    return [sum(own) / len(own) if own else _reason(failed) for own, failed in zip(won, errors, strict=True)]


def _mean_ranks(texts: Sequence[str], verdicts: Sequence[Verdict]) -> list[Rating]:
    """1 for the first place, 0 for the last, over all rankings; equal answers share their places."""
    rankings = [v for v in verdicts if not isinstance(v, JudgeError)]
    if not rankings:
        return [_reason(verdicts)] * len(texts)
    places: dict[str, list[int]] = defaultdict(list)
    for ranking in rankings:
        for place, i in enumerate(ranking):
            places[texts[i]].append(place)
    return [1 - sum(places[text]) / len(places[text]) / (len(texts) - 1) for text in texts]


def _reason(errors: Sequence[Verdict]) -> Rating:
    if not errors:
        return unscored("bad_size", "there is no other answer to compare with")
    return unscored(errors[0].kind, str(errors[0]))


def _text_or_file(rubric: str) -> str:
    """A rubric of one line that names a file is that file. Raises ValueError for a file's name without the file."""
    if "\n" not in rubric and len(rubric) < 300 and os.path.isfile(rubric):
        return Path(rubric).read_text(encoding="utf-8")
    if rubric.endswith((".txt", ".md")) and len(rubric.split()) == 1:
        raise ValueError(f"rubric: there is no file {rubric}")
    return rubric
