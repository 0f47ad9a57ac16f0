"""The report: what it says, that hostile text stays text, and that it needs no network."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_files import HOSTILE, NOTHING, evaluation, hostile_run, mean, summary, write_run

from opentao.errors import DataError
from opentao.report import MOST_CHARACTERS, equal_k, write_report
from opentao.summary import Mean

VOID = {"meta", "br", "img", "link", "input", "hr", "base", "line", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Reads a page strictly: every element closed, in order. Keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


def test_promoted_run(tmp_path):
    text = report(write_run(tmp_path, summary())).text
    for expected in (
        "Promote round 2",
        "First try by reward rose from 0.14 to 0.74, and the audit rose with it",
        "its first try is worth the best of 6.1 tries of the base",
        "0.14 → 0.74",
        "0.08 to 0.20 before, 0.68 to 0.80 after, n = 64",
        "+0.60 on the same prompts (0.53 to 0.67)",
        "0.21 → 0.66",
        "94 %",
        "85 to 103 %, n = 64",
        "574,482 tokens, 2 rounds",
        "n = 64 held-out prompts; bands and bars are 95 % bootstrap intervals over the prompts",
        "majority class",
        "picked by reward",
        "k = 6.1",
        "27 of 32",
        "1.412 → 0.683",
        "Chosen at random with seed 0",
        "3 rows of the input could not be read, 1 group failed, and 4 scores could not be given",
        "`prompt` is empty",
        "prompt_too_long",
        "tickets.jsonl",
        "model: smollm2-135m-instruct",
    ):
        assert expected in text


def test_pictures(tmp_path):
    page = report(write_run(tmp_path, summary()))
    assert page.tags.count("svg") == 5  # reward and audit curves; reward, audit and KL by round
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert "Reward of the best of k tries, before and after" in labels


def test_every_picture_says_over_how_many_prompts(tmp_path):
    """Reward and audit may judge different held-out prompts."""
    own = summary()
    assert "Mean over n = 64 held-out prompts" in report(write_run(tmp_path / "same", own)).text
    for round_ in (own["base"], *own["rounds"]):
        for mean_ in (
            round_["audit"]["first_try"],
            *round_["audit"]["best_of"].values(),
            *round_["audit"]["selected_of"].values(),
        ):
            mean_["n"] = 30
    own["base"]["best_of"]["16"]["n"] = 39  # so many have 16 answers that could be scored
    own["rounds"][1]["first_try"]["n"] = 63
    write_run(tmp_path / "other", own)
    text = report(tmp_path / "other").text
    assert "Mean over n = 39 to 64, 30 (from left to right) held-out prompts" in text
    assert "n = 63 to 64, 30, 64 (from left to right);" in text
    assert re.search(r" 16 [0-9.]+ [0-9.]+ to [0-9.]+ n = 39 ", text)
    assert "after, n = 64, 63 (before, after)" in text


def test_predicted_and_achieved(tmp_path):
    text = report(write_run(tmp_path, summary())).text
    assert "if all of best-of-16 is baked" in text
    assert "reward 0.14 0.08 to 0.20 0.86 0.80 to 0.92 0.74 0.68 to 0.80 83 %" in text
    assert "base, by reward ≥ 1 11 % · 29 % · 60 %" in text
    assert "on how many of 64 prompts all, some or none of 4 tries reach the number of the row" in text


def test_a_prediction_says_which_best_of_n_it_is_of(tmp_path):
    numbers = summary()
    numbers["prediction"]["target_n"] = 64
    text = report(write_run(tmp_path, numbers)).text
    assert "if all of best-of-16 (all that was sampled; target_n is 64) is baked" in text


def test_prompts_that_were_not_used(tmp_path):
    numbers = summary()
    assert "not used" not in report(write_run(tmp_path / "all", numbers)).text
    numbers["prompts"] |= {"sampled": 40, "unused": 1200}
    text = report(write_run(tmp_path / "some", numbers)).text
    assert f"{numbers['prompts']['train']} training prompts (40 sampled), 64 held out" in text
    assert "1,200 prompts were not used: beyond max_heldout" in text


def test_small_gains_have_digits(tmp_path):
    numbers = summary()
    numbers["rounds"][1]["improvement"] = mean(0.004, 0.003)
    assert "+0.004 on the same prompts (0.001 to 0.007)" in report(write_run(tmp_path, numbers)).text


def test_what_after_is_where_the_base_is_kept(tmp_path):
    """A round that was stopped has the highest reward, and is not what the verdict was about."""
    numbers = summary() | {"best_round": 0, "verdict": "keep base", "policy": None}
    numbers["rounds"][1]["guard"]["tripped"] = "Round 2 was stopped as over-optimised"
    for round_ in (numbers["base"], *numbers["rounds"]):  # no curve: nothing to say about tries
        round_["best_of"] = {k: mean(0.5, 0.1) for k in round_["best_of"]}
    write_run(tmp_path / "first", numbers)
    assert "“After” is round 1, the best round that was tried; it is not kept." in report(tmp_path / "first").text
    numbers["rounds"][0]["guard"]["tripped"] = "Round 1 was stopped"
    write_run(tmp_path / "both", numbers)
    assert "“After” is round 2, which was stopped; it is not kept." in report(tmp_path / "both").text


def test_many_rounds_are_not_all_named():
    from opentao.report import MOST_ROUNDS_NAMED, _history

    means = {k: Mean(**mean(0.5, 0.1)) for k in range(21)}
    names = re.findall(r'class="tick middle">(\w+)</text>', _history("x", means, []).svg)
    assert names[:3] == ["base", "3", "6"]
    assert len(names) - 1 <= MOST_ROUNDS_NAMED  # and "round" below


def test_continuous_scores_are_not_called_solved(tmp_path):
    numbers = summary()
    for round_ in (numbers["base"], *numbers["rounds"]):
        round_["solved"] = round_["audit"]["solved"] = None
    page = report(write_run(tmp_path, numbers))
    assert "Predicted and achieved" in page.text
    assert "Which prompts are solved" not in page.text


def test_full_marks_that_are_not_one_are_named_by_their_own_scale(tmp_path):
    numbers = summary()
    for round_ in (numbers["base"], *numbers["rounds"]):
        round_["solved"]["at"] = 2.5
    text = report(write_run(tmp_path, numbers)).text
    assert "base, by reward ≥ 2.5 11 %" in text
    assert "base, by audit ≥ 1 15 %" in text


def test_a_flat_prediction_is_on_the_page(tmp_path):
    numbers = summary(rounds=0)
    numbers["prediction"]["flat"] = "Nothing to learn from: <b>on 0 of 64"
    text = report(write_run(tmp_path, numbers)).text
    assert "It said that training would not pay: Nothing to learn from: <b>on 0 of 64." in text
    assert "achieved" not in text


def test_a_run_of_an_older_version_has_no_prediction(tmp_path):
    numbers = summary()
    del numbers["prediction"]
    assert "Predicted" not in report(write_run(tmp_path, numbers)).text


def test_twenty_pairs_fall_as_they_fall(tmp_path):
    numbers, evals = summary(), {k: evaluation(k, 0.5, num_prompts=24) for k in range(3)}
    rewards = [(0.1, 0.9), (0.9, 0.1), (0.5, 0.5), (None, 0.5)] * 6
    for i, (before, after) in enumerate(rewards):
        evals[0]["samples"][i]["responses"][0]["reward"] = before
        evals[2]["samples"][i]["responses"][0]["reward"] = after
    page = report(write_run(tmp_path, numbers, evals))
    assert page.tags.count("article") == 20
    assert "6 better, 6 worse, 6 equal, 6 not scored on both sides on all 24 prompts" in page.text
    assert "reward unscored" in page.text


def test_the_same_twenty_prompts_however_they_came_out(tmp_path):
    def prompts(name: str, quality: float) -> list[str]:
        evals = {k: evaluation(k, quality) for k in range(3)}
        html = write_report(write_run(tmp_path / name, summary(), evals)).read_text(encoding="utf-8")
        return re.findall(r"\(ticket \d+\)", html)

    assert prompts("a", 0.1) == prompts("b", 0.9)
    assert len(prompts("a", 0.1)) == 20


def test_fewer_than_twenty_prompts_and_no_response(tmp_path):
    evals = {k: evaluation(k, 0.5, num_prompts=1) for k in range(3)}
    evals[2]["samples"][0]["responses"] = []
    evals[0]["samples"][0]["responses"][0]["text"] = "y" * (MOST_CHARACTERS + 1234)
    text = report(write_run(tmp_path, summary(), evals)).text
    assert "1 held-out prompt, side by side" in text
    assert "(no response)" in text
    assert "(1,234 more characters)" in text


def test_keep_base_without_audit(tmp_path):
    numbers = summary(3) | {"verdict": "keep base", "best_round": 0, "why": "No round beat the base.", "audit": None}
    numbers |= {"baselines": [], "set_aside": {"rows": 0, "reasons": {}}, "unscored": {}, "failures": {}}
    for r in (numbers["base"], *numbers["rounds"]):
        r["audit"] = None
    numbers["rounds"][1] |= {"first_try": mean(0.97), "improvement": mean(0.83)}
    page = report(write_run(tmp_path, numbers))
    assert "Keep the base" in page.text
    assert "No round beat the base." in page.text
    assert "“After” is round 2, the best round that was tried; it is not kept." in page.text
    assert "above the base’s best of 16, the most that was measured" in page.text
    assert "No audit scorer was set" in page.text
    assert "Nothing: every row was read" in page.text
    assert page.tags.count("svg") == 3


def test_worse_than_the_base(tmp_path):
    numbers = summary(1) | {"verdict": "keep base", "best_round": 0}
    numbers["rounds"][0] |= {"first_try": mean(0.05), "improvement": mean(-0.09, 0.02)}
    page = report(write_run(tmp_path, numbers))
    assert "its first try is below the base’s" in page.text
    assert "−0.09 on the same prompts (−0.11 to −0.07)" in page.text
    assert ("class", "bad") in page.attributes


def test_no_rounds(tmp_path):
    page = report(write_run(tmp_path, summary(0)))
    assert "Keep the base" in page.text
    assert "side by side" not in page.text
    assert "→" not in page.text
    assert page.tags.count("svg") == 2


def test_nothing_measured_is_a_dash_never_a_zero(tmp_path):
    numbers = summary()
    numbers["rounds"][1] |= {"kl": NOTHING, "first_try": {**NOTHING, "mean": math.nan}, "improvement": None}
    numbers["rounds"][1] |= {"best_of": {"1": NOTHING}, "baked_fraction": NOTHING, "audit": None, "train": None}
    numbers["base"]["audit"]["selected_of"] = {}
    text = report(write_run(tmp_path, numbers)).text
    assert "0.14 → –" in text
    assert "Baked fraction – –, n = 0" in text


def test_rewards_on_any_scale(tmp_path):
    numbers = summary(1)
    for r in (numbers["base"], numbers["rounds"][0]):
        r["best_of"] = {"1": mean(-7.25, 1.0), "2": mean(-6.5, 1.0), "3": mean(12.0, 30.0)}
        r["first_try"] = mean(-7.25, 1.0)
    text = report(write_run(tmp_path, numbers)).text
    assert "−7.25 → −7.25" in text
    assert "−8.25 to −6.25" in text


def test_set_aside_file_is_optional_config_too(tmp_path):
    write_run(tmp_path, summary())
    (tmp_path / "set_aside.jsonl").unlink()
    (tmp_path / "config.yaml").unlink()
    text = report(tmp_path).text
    assert "from set_aside.jsonl" not in text
    assert "whole configuration" not in text


@pytest.mark.parametrize("name", ["summary.json", "round-0/eval.json", "round-2/eval.json"])
def test_a_missing_file_is_named(name, tmp_path):
    write_run(tmp_path, summary())
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_broken_set_aside_row_is_named(tmp_path):
    write_run(tmp_path, summary())
    (tmp_path / "set_aside.jsonl").write_text(json.dumps({"file": "x"}))
    with pytest.raises(DataError, match=r"set_aside\.jsonl: expected rows with file, line and reason"):
        write_report(tmp_path)


def test_line_ends_of_other_kinds_inside_a_reason(tmp_path):
    write_run(tmp_path, summary())
    row = {"file": "logs.jsonl", "line": 3, "reason": "neither `prompt` nor `messages` (keys: a\u2028b\x85c)"}
    (tmp_path / "set_aside.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "neither `prompt` nor `messages`" in report(tmp_path).text


def test_the_same_run_gives_the_same_bytes(tmp_path):
    write_run(tmp_path, summary())
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_hostile_text_stays_text(tmp_path):
    page = report(hostile_run(tmp_path))
    assert not {"script", "img", "a", "base", "link", "iframe", "object", "form"} & set(page.tags)
    assert [name for name, _ in page.attributes if name.startswith("on") or name in {"href", "src", "srcset"}] == []
    policies = [value for name, value in page.attributes if name == "http-equiv"]
    assert policies == ["Content-Security-Policy"]
    shown = " ".join(HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").split())
    assert shown in page.text
    assert page.text.count(r"x</a>") > 20
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page.text)


@pytest.mark.parametrize("rounds", [0, 2])
def test_needs_no_network(rounds, tmp_path):
    html = write_report(write_run(tmp_path, summary(rounds))).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<script|<link", html, re.IGNORECASE)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html


def test_equal_k_is_interpolated_in_log2():
    curve = {k: Mean(mean=m, low=None, high=None, n=9) for k, m in {1: 0.0, 2: 0.4, 4: 0.6, 8: None}.items()}
    assert equal_k(curve, 0.0) == 1
    assert equal_k(curve, 0.4) == 2
    assert equal_k(curve, 0.5) == pytest.approx(2**1.5)
    assert equal_k(curve, -0.1) is None
    assert equal_k(curve, 0.61) is None
    assert equal_k(curve, math.nan) is None
