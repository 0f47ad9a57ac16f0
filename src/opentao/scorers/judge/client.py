"""Ask an OpenAI-compatible endpoint for JSON, and take nothing for granted.

A request is tried again, after a wait that grows and is random in part, when the server is busy or broken (408, 409,
429, 5xx, no connection, time-out, half a body, a body that is not JSON); the server's own Retry-After is honoured.
There are limits of requests a minute, of seconds a request, of seconds a group, of tokens and of money. Answers are
kept on disk by the content of the question, so scoring again costs nothing. Whatever goes wrong is a `JudgeError`,
which leaves responses unscored.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from opentao.types import content_hash

BUSY = {408, 409, 425, 429}
MAX_BODY = 1 << 20  # bytes
MAX_WAIT = 60.0  # seconds between two tries

Structured = Literal["json_schema", "json_object", "none"]


class JudgeError(Exception):
    """No usable verdict. `kind` is what the unscored response will say; `again`: trying again may help."""

    def __init__(self, kind: str, message: str, *, again: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.again = again
        self.wait = wait  # seconds that the server asked for


@dataclass(kw_only=True, slots=True)
class Budget:
    """Tokens and money spent so far, and how much there is; shared by threads."""

    tokens: int | None = None
    usd: float | None = None
    usd_per_million: tuple[float, float] = (0.0, 0.0)  # prompt, completion
    spent_tokens: int = 0
    spent_usd: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def check(self) -> None:
        """Raises JudgeError if nothing is left. Requests under way may still go over it, by their own size."""
        if self.tokens is not None and self.spent_tokens >= self.tokens:
            raise JudgeError("budget", f"{self.spent_tokens} of {self.tokens} tokens are spent")
        if self.usd is not None and self.spent_usd >= self.usd:
            raise JudgeError("budget", f"{self.spent_usd:.2f} of {self.usd:.2f} USD are spent")

    def add(self, usage: Any) -> None:
        """`usage` as the endpoint reports it; one that reports none cannot be held to a budget."""
        usage = usage if isinstance(usage, dict) else {}
        prompt, completion = (_count(usage.get(k)) for k in ("prompt_tokens", "completion_tokens"))
        with self.lock:
            self.spent_tokens += prompt + completion
            self.spent_usd += (prompt * self.usd_per_million[0] + completion * self.usd_per_million[1]) / 1e6


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


class Pace:
    """At most so many requests a minute, evenly spaced; `wait` blocks until it is one's turn."""

    def __init__(self, per_minute: float | None) -> None:
        self.gap = 60 / per_minute if per_minute else 0.0
        self.next = 0.0
        self.lock = threading.Lock()

    def wait(self, deadline: float) -> None:
        """Raises JudgeError if one's turn comes after the deadline."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next)
            if turn > deadline:
                raise JudgeError("deadline", "the next request allowed would come too late")
            self.next = turn + self.gap
        time.sleep(max(0.0, turn - now))


@dataclass(kw_only=True, slots=True)
class Client:
    """One endpoint and one model. Safe to use from several threads."""

    url: str
    model: str
    api_key: str | None = None
    temperature: float = 0.0
    max_tokens: int = 512
    structured: Structured = "json_schema"
    timeout: float = 60.0  # seconds for one try
    tries: int = 5
    first_wait: float = 1.0  # seconds; doubles with every try, times a random number from 0 to 1
    pace: Pace = field(default_factory=lambda: Pace(None))
    budget: Budget = field(default_factory=Budget)
    cache: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of the request
    _http: httpx.Client | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ask(
        self, messages: list[dict[str, str]], schema: dict[str, Any], check: Callable[[Any], Any], deadline: float
    ) -> Any:
        """What `check` makes of the model's JSON. `check` raises ValueError if it is not what was asked for.

        `deadline`: time.monotonic() after which nothing is sent any more.

        Raises:
            JudgeError: there is no such answer.
        """
        body = self._body(messages, schema)
        path = self._cached(body)
        with suppress(OSError):  # a cache that cannot be used costs a request, not a verdict
            if path is not None and path.exists():
                try:
                    return check(json.loads(path.read_text(encoding="utf-8")))
                except ValueError:
                    path.unlink(missing_ok=True)  # damaged, or of an older way to ask
        value, content = self._try_until(body, check, deadline)
        with suppress(OSError):
            if path is not None:
                _write(path, content)
        return value

    def _body(self, messages: list[dict[str, str]], schema: dict[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        if self.structured == "json_schema":
            asked = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": asked}
        elif self.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body | self.extra

    def _cached(self, body: dict[str, Any]) -> Path | None:
        return self.cache / f"{content_hash(self.url, body)}.json" if self.cache else None

    def _try_until(self, body: dict[str, Any], check: Callable[[Any], Any], deadline: float) -> tuple[Any, str]:
        random_wait = wait_random_exponential(multiplier=self.first_wait, max=MAX_WAIT)

        def wait(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.wait if isinstance(error, JudgeError) and error.wait is not None else 0.0
            seconds = max(random_wait(state), asked)
            if time.monotonic() + seconds > deadline and error is not None:
                raise error  # waiting would only delay the same end
            return seconds

        for attempt in Retrying(
            stop=stop_after_attempt(self.tries),
            wait=wait,
            retry=retry_if_exception(lambda e: isinstance(e, JudgeError) and e.again),
            reraise=True,
        ):
            with attempt:
                return self._once(body, check, deadline)
        raise AssertionError("tenacity raises the last error")

    def _once(self, body: dict[str, Any], check: Callable[[Any], Any], deadline: float) -> tuple[Any, str]:
        self.budget.check()
        self.pace.wait(deadline)
        left = deadline - time.monotonic()
        if left <= 0:
            raise JudgeError("deadline", "no time left")
        reply = self._post(body, min(self.timeout, left))
        self.budget.add(reply.get("usage"))
        content = content_of(reply)
        try:
            return check(parse_content(content)), json.dumps(parse_content(content))
        except ValueError as error:
            # At temperature 0 the same question gives the same nonsense: asking again would only cost.
            raise JudgeError("nonsense", str(error), again=self.temperature > 0) from error

    def _post(self, body: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The reply's JSON object, read with a limit of size and of the time for all of it."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        end = time.monotonic() + seconds
        try:
            with self.http.stream(
                "POST", f"{self.url.rstrip('/')}/chat/completions", json=body, headers=headers, timeout=seconds
            ) as reply:
                raw = bytearray()
                for piece in reply.iter_bytes():
                    raw += piece
                    if len(raw) > MAX_BODY:
                        raise JudgeError("nonsense", f"a reply of over {MAX_BODY} bytes")
                    if time.monotonic() > end:
                        raise JudgeError("timeout", f"over {seconds:.3g} s", again=True)
        except httpx.TimeoutException as error:
            raise JudgeError("timeout", f"over {seconds:.3g} s", again=True) from error
        except httpx.LocalProtocolError as error:  # its text may be the key, which must not be stored
            raise JudgeError("request", "a header that HTTP does not allow; see the API key") from error
        except httpx.HTTPError as error:
            raise JudgeError("connection", f"{type(error).__name__}: {error}", again=True) from error
        if reply.status_code != 200:
            raise _http_error(reply, bytes(raw))
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise JudgeError("nonsense", "the reply is not JSON", again=True) from error
        if not isinstance(value, dict):
            raise JudgeError("nonsense", "the reply is not an object", again=True)
        return value

    @property
    def http(self) -> httpx.Client:
        with self._lock:
            if self._http is None:
                self._http = httpx.Client(follow_redirects=False)
            return self._http


def _http_error(reply: httpx.Response, raw: bytes) -> JudgeError:
    again = reply.status_code in BUSY or reply.status_code >= 500
    try:
        wait = min(float(reply.headers.get("retry-after", "")), MAX_WAIT)
    except ValueError:  # none, or a date, which no model server sends
        wait = None
    return JudgeError(f"http_{reply.status_code}", raw[:200].decode("utf-8", "replace"), again=again, wait=wait)


def content_of(reply: dict[str, Any]) -> str:
    """The text of the first choice.

    Raises:
        JudgeError: refusal (the model or its provider declines), cut_off, nonsense (another shape).
    """
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise JudgeError("nonsense", "the reply has no choices[0].message", again=True) from error
    if refusal or finish == "content_filter":
        raise JudgeError("refusal", str(refusal or "content filter"))
    if finish == "length":
        raise JudgeError("cut_off", "the verdict is longer than max_tokens")
    if not isinstance(content, str) or not content.strip():
        raise JudgeError("nonsense", "an empty verdict", again=True)
    return content


def parse_content(content: str) -> Any:
    """The JSON that the model wrote: all of its text, or all of one Markdown fence in it; nothing is searched for.

    Raises:
        ValueError: neither is JSON.
    """
    text = content.strip()
    if text.count("```") == 2 and text.endswith("```"):
        text = text.split("```")[1].removeprefix("json")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {content[:100]!r}") from error


def _write(path: Path, text: str) -> None:
    """Whole or not at all; two threads that write one question write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
