"""The page on which people choose between answers: ``tao label``.

FastAPI and templates; the page works by plain forms, and twenty lines of script press its buttons for the keyboard.
That keeps a strict content security policy possible (no inline script, no image, no connection elsewhere), the second
wall behind `markdown.py`: what is shown is written by models. Everybody has a token; the first visit turns it into a
cookie.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Cookie, FastAPI, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, StrictUndefined
from starlette.middleware.trustedhost import TrustedHostMiddleware

from opentao.errors import DataError
from opentao.web.agreement import alpha, between, with_oneself
from opentao.web.choices import Choices, Task
from opentao.web.markdown import plain_html, safe_html
from opentao.web.next_task import Plan, for_everybody, next_task, units

COOKIE = "opentao_label"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; form-action 'self'; base-uri 'none';"
        " frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
STATIC = {"label.js": "text/javascript; charset=utf-8", "label.css": "text/css; charset=utf-8"}
DENIED = "This page needs your own link, the one with ?token= in it. Whoever started `tao label` has it."


def build_app(choices: Choices, plan: Plan, *, hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")) -> FastAPI:
    """The application. `hosts`: names under which it may be asked for, so that a stranger's page cannot rebind one."""
    app = FastAPI(title="tao label", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.middleware("http")(_with_headers)
    pages = Pages(choices, plan)
    app.add_api_route("/", pages.show, methods=["GET"], response_model=None)
    app.add_api_route("/choose", pages.choose, methods=["POST"], response_model=None)
    app.add_api_route("/undo", pages.undo, methods=["POST"], response_model=None)
    app.add_api_route("/static/{name}", static, methods=["GET"], response_model=None)
    return app


async def _with_headers(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    response.headers.update(HEADERS)
    return response


def static(name: str) -> Response:
    """Script and style sheet; nothing else of the data folder."""
    if name not in STATIC:
        return Response(status_code=404)
    return Response((files("opentao") / "data" / name).read_bytes(), media_type=STATIC[name])


class Pages:
    """The page and its two forms. Every answer is a redirect back to the page, so a reload sends nothing again."""

    def __init__(self, choices: Choices, plan: Plan) -> None:
        self.choices = choices
        self.plan = plan
        self.template = _template()

    def show(self, token: str | None = None, opentao_label: Annotated[str | None, Cookie()] = None) -> Response:
        """The next task; with a valid `token` first a cookie, and an address without it."""
        if token is not None and self.choices.annotator_of(token) is not None:
            response = RedirectResponse("/", status_code=303)
            # lax: strict would not be sent to where this leads if the link stood on a page of another site
            response.set_cookie(COOKIE, token, httponly=True, samesite="lax", max_age=30 * 86400)
            return response
        annotator = self.choices.annotator_of(opentao_label or "")
        if annotator is None:
            return self._denied()
        task = next_task(self.choices, annotator, self.plan)
        return HTMLResponse(self.template.render(denied=None, **_facts(self.choices, self.plan, annotator, task)))

    def choose(
        self,
        task: Annotated[str, Form()],
        answer: Annotated[str, Form()],
        opentao_label: Annotated[str | None, Cookie()] = None,
    ) -> Response:
        """Record the answer of the pressed button. A task is its owner's alone, and its id cannot be guessed."""
        annotator = self.choices.annotator_of(opentao_label or "")
        found = self.choices.task(task)
        if annotator is None or found is None or found.annotator != annotator:
            return self._denied()
        try:
            self.choices.choose(found, parse_answer(found, answer))
        except DataError as error:
            return Response(str(error), status_code=422, media_type="text/plain")
        return RedirectResponse("/", status_code=303)

    def undo(self, opentao_label: Annotated[str | None, Cookie()] = None) -> Response:
        annotator = self.choices.annotator_of(opentao_label or "")
        if annotator is None:
            return self._denied()
        self.choices.undo(annotator, self.plan.fits)
        return RedirectResponse("/", status_code=303)

    def _denied(self) -> Response:
        return HTMLResponse(self.template.render(denied=DENIED), status_code=403)


def parse_answer(task: Task, text: str) -> dict[str, Any]:
    """The value of the pressed button as an answer; `first` and `second` are places on the page.

    Raises:
        DataError: no button of this task has that value.
    """
    fixed: dict[str, dict[str, Any]] = {"skip": {"skip": True}}
    if task.kind == "pair":
        first, second = task.shown
        fixed |= {
            "first": {"better": first, "worse": second},
            "second": {"better": second, "worse": first},
            "tie": {"tie": True},
            "both bad": {"tie": True, "both_bad": True},
        }
    elif task.kind == "mark":
        fixed |= {"right": {"right": True}, "wrong": {"right": False}}
    if text in fixed:
        return fixed[text]
    places = text.split(",")
    if task.kind == "rank" and all(p.isascii() and p.isdigit() and int(p) < len(task.shown) for p in places):
        return {"order": [task.shown[int(p)] for p in places]}
    raise DataError(f"not an answer to a {task.kind} task: {text[:100]!r}")


def _facts(choices: Choices, plan: Plan, annotator: str, task: Task | None) -> dict[str, Any]:
    """What the template needs."""
    own = [c for c in choices.choices(annotator) if plan.fits(c.task)]
    judged = [c for c in own if c.task.policy not in ("repeat", "import")]
    every = [u for item in choices.items() if plan.asks_of(item) for u in units(item, plan)]
    mine = {(c.task.item, *sorted(c.task.shown)) for c in own}
    others = {(c.task.item, *sorted(c.task.shown)) for c in choices.choices() if "skip" not in c.answer} - mine
    total = len([u for u in every if u not in others or for_everybody(u, plan)])
    everybody = choices.choices()
    item = choices.item(task.item) if task else None
    return {
        "annotator": annotator,
        "task": task,
        "turns": item.messages if item else (),
        "answers": [item.responses[i] for i in task.shown] if item and task else [],
        "done": len(judged),
        "total": total,
        "skipped": sum("skip" in c.answer for c in own),
        "alpha": alpha(everybody),
        "between": between(everybody).get(annotator),
        "with_oneself": with_oneself(everybody).get(annotator),
        "can_undo": any(c.task.policy != "import" for c in own),
    }


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"markdown": safe_html, "plain": plain_html}
    return environment.from_string((files("opentao") / "data" / "label.html.j2").read_text(encoding="utf-8"))
