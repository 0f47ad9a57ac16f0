"""The label page in a real browser: fifty pairs by keyboard alone, and hostile answers that do nothing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from test_label import serving
from typer.testing import CliRunner

from opentao.cli import app
from opentao.web.choices import Choices

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="no chromium with its driver on this machine"),
]
PROSE = "The parcel is late, and we are sorry for that."
JSON = '{"category": "delivery", "priority": "high"}'


@contextmanager
def browser(profile: Path, width: int = 1280) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.add_argument(f"--window-size={width},900")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


def press(driver: webdriver.Chrome, key: str) -> None:
    """Press a key and wait until the page that follows has another task, or none."""
    before = driver.find_element(By.TAG_NAME, "html")
    driver.find_element(By.TAG_NAME, "body").send_keys(key)
    wait_until(driver, lambda d: d.find_element(By.TAG_NAME, "html") != before)
    wait_until(driver, lambda d: d.execute_script("return document.readyState") == "complete")


def wait_until(driver: webdriver.Chrome, holds: Callable[[webdriver.Chrome], bool]) -> None:
    WebDriverWait(driver, 20, poll_frequency=0.02).until(holds)


def answers(driver: webdriver.Chrome) -> list[str]:
    return [e.text for e in driver.find_elements(By.CSS_SELECTOR, "article > .text")]


def test_fifty_pairs_by_keyboard_train_a_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A person who prefers JSON never touches the mouse; the exported file trains a reward model that agrees."""
    rows = [{"prompt": f"Ticket {i}: my parcel is late.", "responses": [PROSE, JSON]} for i in range(50)]
    source, db = tmp_path / "rows.jsonl", tmp_path / "c.sqlite"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--db", str(db), "--annotator", "ann", "--repeats", "0"]
    with serving(source, *options) as (links, _), browser(tmp_path / "profile") as driver:
        driver.get(links["ann"])
        press(driver, "s")
        press(driver, Keys.ARROW_DOWN)
        press(driver, "u")  # a tie taken back
        seen = 0
        while not driver.find_elements(By.CSS_SELECTOR, "main.message"):
            left, _right = answers(driver)
            press(driver, Keys.ARROW_LEFT if left.startswith("{") else "2")
            seen += 1
        assert seen == 49
        assert "All done" in driver.find_element(By.TAG_NAME, "main").text
        assert "50 of 50, 1 skipped" in driver.find_element(By.TAG_NAME, "header").text
    made = Choices(db).choices()
    assert len(made) == 50
    assert 10 < sum(c.task.shown == (0, 1) for c in made) < 40  # both orders, and which one is on record
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "reward"
    run = CliRunner().invoke
    assert run(app, ["label", "export", "--db", str(db), "--out", str(pairs)]).exit_code == 0
    command = ["reward", "train", "--pairs", str(pairs), "--model", str(tiny_model_dir), "--out", str(out)]
    result = run(app, [*command, "--epochs", "3", "--learning-rate", "0.003", "--json"])
    assert result.exit_code == 0, result.output
    result = run(app, ["reward", "eval", "--model", str(out), "--pairs", str(pairs), "--json"])
    assert json.loads(result.stdout)["accuracy"]["mean"] == 1.0


FORBIDDEN = ("script", "img", "iframe", "object", "embed", "style", "svg", "video", "audio", "base", "link", "meta")


def payloads(elsewhere: str) -> list[str]:
    """Answers that would run a script, fetch something, or leave, if anything let them."""
    own = "document.title='owned'"
    return [
        f"<script>{own}</script>",
        f'<img src={elsewhere}/img onerror="{own}">',
        f"<svg onload=\"{own}\"><image href='{elsewhere}/svg'/></svg>",
        f"<iframe src='{elsewhere}/frame'></iframe>",
        f"<link rel=stylesheet href='{elsewhere}/css'>",
        f"<style>@import '{elsewhere}/import'; body {{ background: url({elsewhere}/style) }}</style>",
        f"<meta http-equiv='refresh' content='0;url={elsewhere}/refresh'>",
        f"<base href='{elsewhere}/'><form action='{elsewhere}/form'><button autofocus>go</button></form>",
        f"<object data='{elsewhere}/object'></object><embed src='{elsewhere}/embed'>",
        f"<video src='{elsewhere}/video' autoplay></video><audio src='{elsewhere}/audio' autoplay></audio>",
        f"<a href='javascript:{own}' id=x>x</a><input autofocus onfocus=\"{own}\">",
        f'<details open ontoggle="{own}">x</details>',
        f"</div></article></form></main><script>{own}</script>",
        f"<!--><script>{own}</script>-->",
        f"<![CDATA[<script>{own}</script>]]>",
        f"![image]({elsewhere}/markdown.png)",
        f"![image][ref]\n\n[ref]: {elsewhere}/reference.png",
        f"[![image]({elsewhere}/nested.png)]({elsewhere}/nested)",
        f"[link](javascript:{own})",
        f"[link](JaVaScRiPt:{own})",
        f"[link](  javascript:{own})",
        f"[link](java\nscript:{own})",
        f"[link](&#106;avascript:{own})",
        f"[link](data:text/html,<script>{own}</script>)",
        f"[link](vbscript:{own})",
        f'[link]({elsewhere}/click "title\\" onmouseover=\'{own}\'")',
        f"<javascript:{own}>",
        f"<{elsewhere}/autolink>",
        f"[a]({elsewhere}/{{{{7*7}}}})",
        f"```html\n<script>{own}</script>\n```",
        f'```"><script>{own}</script>\nx\n```',
        f"`<script>{own}</script>`",
        f'| a |\n|---|\n| <img src={elsewhere}/table onerror="{own}"> |',
        f"<scr\x00ipt>{own}</script>",
        f"\ud800<script>{own}</script>".encode("utf-8", "replace").decode(),
        f"\u202e<script>{own}</script>",
        "{{ 7 * 7 }} {% raw %} ${7*7} <%= 7*7 %>",
        f"<template><script>{own}</script></template><noscript><img src={elsewhere}/noscript></noscript>",
        f"<math><mi xlink:href='javascript:{own}'>x</mi></math>",
        f'<body onload="{own}"><div style="background:url({elsewhere}/div)">',
        f"<textarea></textarea><script>{own}</script>",
        "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    ]


@contextmanager
def another_server() -> Iterator[tuple[str, list[str]]]:
    """Somewhere else on the network: remembers who came."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def test_hostile_answers_do_nothing(tmp_path: Path) -> None:
    with another_server() as (elsewhere, seen):
        hostile = payloads(elsewhere)
        rows = [{"prompt": f"{p} {i}", "responses": [p, f"{p} "]} for i, p in enumerate(hostile)]
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ["--db", str(tmp_path / "c.sqlite"), "--annotator", "ann", "--repeats", "0"]
        with serving(source, *options) as (links, _), browser(tmp_path / "profile") as driver:
            driver.get(links["ann"])
            count = 0
            while not driver.find_elements(By.CSS_SELECTOR, "main.message"):
                assert driver.title == "tao label"
                main = driver.find_element(By.TAG_NAME, "main")
                assert main.find_elements(By.CSS_SELECTOR, ", ".join(FORBIDDEN)) == []
                assert len(main.find_elements(By.CSS_SELECTOR, "article")) == 2
                for link in main.find_elements(By.TAG_NAME, "a"):
                    assert str(link.get_attribute("href")).startswith(("http://", "https://", "mailto:"))
                    assert "noopener" in str(link.get_attribute("rel")) and link.get_attribute("target") == "_blank"
                press(driver, Keys.ARROW_LEFT)
                count += 1
            assert count == len(hostile)
        assert seen == []


def test_the_test_would_notice_a_request(tmp_path: Path) -> None:
    """The other server is seen by a page without our two walls."""
    with another_server() as (elsewhere, seen), browser(tmp_path / "profile") as driver:
        page = tmp_path / "page.html"
        page.write_text(f"<title>safe</title><img src='{elsewhere}/img'><script>document.title='owned'</script>")
        driver.get(page.as_uri())
        wait_until(driver, lambda d: d.title == "owned")
        wait_until(driver, lambda d: seen == ["/img"])


def test_ranking_by_keyboard_and_a_narrow_window(tmp_path: Path) -> None:
    source, db = tmp_path / "rows.jsonl", tmp_path / "c.sqlite"
    source.write_text(json.dumps({"prompt": "x", "responses": ["one", "two", "three " * 200]}) + "\n")
    options = ["--db", str(db), "--annotator", "ann", "--kind", "rank"]
    with serving(source, *options) as (links, _), browser(tmp_path / "profile", width=500) as driver:
        driver.get(links["ann"])
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        body = driver.find_element(By.TAG_NAME, "body")
        for key in ("3", "1", "2", "1", "9"):  # 1 is taken out again; there is no ninth
            body.send_keys(key)
        marks = [e.text for e in driver.find_elements(By.CSS_SELECTOR, ".place")]
        assert marks == ["", "place 2", "place 1"]
        press(driver, Keys.ENTER)
    (made,) = Choices(db).choices()
    assert made.answer == {"order": [made.task.shown[2], made.task.shown[1]]}
