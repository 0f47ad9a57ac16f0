"""The table at the end of a run, and how strictly its numbers are read."""

import io
import json
import math

import pytest
from rich.console import Console
from run_files import HOSTILE, NOTHING, mean, summary

from opentao.errors import DataError
from opentao.summary import Mean, Summary, interval, number, parse, read, signed, summary_table


def table(numbers) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=120).print(summary_table(numbers))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_table_of_a_promoted_run():
    lines = table(summary())
    assert "majority class – – 0.24 0.24 to 0.24" in lines
    assert "base first try 0.14 0.08 to 0.20 0.21 0.15 to 0.27" in lines
    for k in (2, 4, 8, 16):
        assert any(line.startswith(f"base best of {k} ") for line in lines)
    assert "round 2 first try (kept) 0.74 0.68 to 0.80 0.66 0.60 to 0.72 94 %" in lines
    text = " ".join(lines)
    assert "generate 1 min 22 s" in text
    assert "whole run 6 min 43 s" in text
    assert "promote: First try by reward rose" in text


def test_table_without_audit_or_rounds():
    numbers = summary(0) | {"audit": None, "baselines": []}
    numbers["base"]["audit"] = None
    text = " ".join(table(numbers))
    assert "keep base: No round was run." in text
    assert "audit" not in text
    assert "kept" not in text


def test_hostile_names_in_the_table_stay_characters():
    lines = table(summary() | {"model": HOSTILE, "why": HOSTILE + "[bold]"})
    assert "\x1b" not in "".join(lines)
    assert r"\x1b[2J" in "".join(lines)


def test_nan_and_null_are_nothing_measured():
    numbers = summary()
    numbers["base"]["greedy"] = {"mean": math.nan, "low": -math.inf, "high": None, "n": 0}
    assert parse(Summary, numbers, "x").base.greedy == Mean(**NOTHING)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"model": None}, "summary.json: model: "),
        ({"verdict": "maybe"}, "summary.json: verdict: "),
        ({"best_round": 7}, "best_round 7 is not among the rounds"),
        ({"rounds": [{}]}, "summary.json: rounds.0.round: Field required"),
    ],
)
def test_a_wrong_shape_names_file_and_key(broken, message, tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary() | broken))
    with pytest.raises(DataError, match=message):
        read(Summary, path)


def test_missing_file_and_broken_json(tmp_path):
    with pytest.raises(DataError, match=r"summary\.json: cannot be read"):
        read(Summary, tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read(Summary, tmp_path / "summary.json")


def test_stages_are_summed_over_all_rounds_in_loop_order():
    totals = parse(Summary, summary(), "x").stage_totals()
    assert list(totals) == ["generate", "score", "train", "evaluate"]
    assert totals["generate"] == (2 * 48211, 82.0)
    assert totals["evaluate"][0] == 3 * 35880


def test_after_is_the_kept_round_or_the_best_that_was_tried():
    numbers = summary(3)
    assert parse(Summary, numbers | {"best_round": 2}, "x").shown.round == 2
    numbers["rounds"][2]["improvement"] = NOTHING
    assert parse(Summary, numbers | {"best_round": 0}, "x").shown.round == 2
    assert parse(Summary, summary(0), "x").shown is None


def test_numbers_in_words():
    assert [number(v) for v in (0.125, -1.5, None)] == ["0.12", "−1.50", "–"]
    assert number(-0.001) == "0.00"
    assert [signed(Mean(**m)) for m in (mean(0.2, 0.1), mean(-0.2, 0.1), NOTHING)] == ["+0.20", "−0.20", "–"]
    assert signed(Mean(**mean(0.004, 0.003))) == "+0.004"
    assert interval(Mean(**mean(0.004, 0.003))) == "0.001 to 0.007"
    assert interval(Mean(**mean(0.5, 0.1))) == "0.40 to 0.60"
    assert interval(Mean(**NOTHING)) == interval(None) == "–"
