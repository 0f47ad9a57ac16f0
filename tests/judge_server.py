"""A real HTTP server on loopback with the chat-completions call, which answers as it is told, well or badly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler", dict[str, Any]], None]


@dataclass
class Server:
    url: str
    replies: list[Reply] = field(default_factory=list)  # one a request, in order; then `usual`
    usual: Reply | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, body: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            if self.replies:
                return self.replies.pop(0)
        assert self.usual is not None
        return self.usual


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        self.server.script.headers.append({name.lower(): value for name, value in self.headers.items()})
        assert self.path == "/v1/chat/completions"
        self.server.script.next(json.loads(raw))(self, json.loads(raw))

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:  # clients that hang up are what the tests are about
        pass


@contextmanager
def serving(usual: Reply | None = None) -> Iterator[Server]:
    http = _Quiet(("127.0.0.1", 0), Handler)
    script = Server(url=f"http://127.0.0.1:{http.server_address[1]}/v1", usual=usual)
    http.script = script  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        http.shutdown()
        http.server_close()


def says(content: Any, **more: Any) -> Reply:
    """A proper reply whose text is `content` (made JSON if it is no text)."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}} | more
    usage = {"prompt_tokens": 100, "completion_tokens": 10}

    def reply(handler: Handler, body: dict[str, Any]) -> None:
        handler.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())

    return reply


def decides(function: Callable[[str], Any]) -> Reply:
    """A proper reply that depends on the last user turn."""
    return lambda handler, body: says(function(body["messages"][-1]["content"]))(handler, body)


def fails(status: int, body: str = "no", **headers: str) -> Reply:
    return lambda handler, _: handler.send(status, body.encode(), **headers)


def raw(body: bytes) -> Reply:
    return lambda handler, _: handler.send(200, body)


def half(handler: Handler, _: dict[str, Any]) -> None:
    """Announces more than it sends, then hangs up."""
    handler.send(200, b'{"choices": [{"mess', length=1000)
    handler.close_connection = True
    handler.connection.shutdown(2)


def drips(handler: Handler, _: dict[str, Any]) -> None:
    """A byte now and then: no single read takes long, all of it takes for ever."""
    handler.send(200, b"", length=1000)
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def hangs(seconds: float = 5.0) -> Reply:
    return lambda handler, _: time.sleep(seconds)
