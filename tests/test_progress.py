"""What every long step says on standard error."""

import io
import re

import pytest
from rich.console import Console

from opentao.progress import Progress, duration


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    return Progress(console=Console(file=out, width=60), clock=clock), out


def test_plain_lines_at_start_every_five_seconds_and_at_the_end():
    clock = Clock()
    progress, out = plain(clock)
    with progress, progress.stage("generate", total=32, unit="prompts", label="round 1: generate") as step:
        for _ in range(32):
            clock.now += 0.5
            step.advance(1, tokens=100)
    assert out.getvalue().splitlines() == [
        "round 1: generate  0/32 prompts",
        "round 1: generate  10/32 prompts · 200 tok/s · 11 s left",
        "round 1: generate  20/32 prompts · 200 tok/s · 6.0 s left",
        "round 1: generate  30/32 prompts · 200 tok/s · 1.0 s left",
        "round 1: generate  32 prompts in 16 s · 3,200 tokens, 200 tok/s",
    ]


def test_work_under_way_counts_for_speed_and_time_left_until_its_units_are_done():
    clock = Clock()
    progress, out = plain(clock)
    with progress, progress.stage("generate", total=48, unit="prompts") as step:
        clock.now += 6
        step.underway(12.0, 600)  # half of the work on 24 prompts side by side
        clock.now += 6
        step.underway(24.0, 1000)
        for _ in range(24):
            step.advance(1, tokens=50)
        assert (step.done, step.part, step.part_tokens, step.seconds_left) == (24, 0.0, 0, 12.0)
        clock.now += 12
        step.advance(24, tokens=1200)
    assert out.getvalue().splitlines() == [
        "generate  0/48 prompts",
        "generate  0/48 prompts · 100 tok/s · 18 s left",
        "generate  0/48 prompts · 83 tok/s · 12 s left",
        "generate  48 prompts in 24 s · 2,400 tokens, 100 tok/s",
    ]


def test_seconds_and_tokens_are_summed_by_stage_name():
    clock = Clock()
    progress, _ = plain(clock)
    for round_ in (1, 2):
        with progress.stage("train", 4, "steps", label=f"round {round_}: train") as step:
            clock.now += 2
            step.advance(4, tokens=50)
    with progress.stage("evaluate"):
        clock.now += 1
    assert progress.seconds == {"train": 4.0, "evaluate": 1.0}
    assert progress.tokens == {"train": 100, "evaluate": 0}


def test_reused_units_do_not_count_for_speed_or_time_left():
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("generate", total=40, unit="prompts") as step:
        step.reuse(20)
        assert step.seconds_left is None
        clock.now += 10
        step.advance(10, tokens=1000)
        assert step.seconds_left == pytest.approx(10)
        step.advance(10)
    assert out.getvalue().splitlines()[-1] == ("generate  40 prompts in 10 s · 20 reused · 1,000 tokens, 100 tok/s")


def test_an_error_passes_through_and_the_line_says_where_it_stopped():
    clock = Clock()
    progress, out = plain(clock)

    def interrupted() -> None:
        with progress.stage("train", total=9, unit="steps") as step:
            step.advance(3)
            clock.now += 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "stopped at 3/9 steps" in out.getvalue()
    assert progress.seconds == {"train": 1.0}


def test_unknown_total():
    clock = Clock()
    progress, out = plain(clock)
    with progress.stage("import", unit="rows") as step:
        clock.now += 6
        step.advance(7)
    assert out.getvalue().splitlines() == ["import  started", "import  7 rows", "import  7 rows in 6.0 s"]


def test_notes_are_kept_and_cannot_carry_escapes_or_markup():
    progress, out = plain(Clock())
    progress.note("3 rows set aside: [bold]x\x1b[2J")
    assert progress.notes == ["3 rows set aside: [bold]x\x1b[2J"]
    assert out.getvalue() == "note 3 rows set aside: [bold]x\\x1b[2J\n"


def test_quiet_writes_nothing_but_keeps_the_sums():
    out = io.StringIO()
    with Progress(quiet=True, console=Console(file=out, force_terminal=True)) as progress:
        with progress.stage("score", total=1) as step:
            step.advance(1, tokens=5)
        progress.note("fact")
    assert out.getvalue() == ""
    assert progress.tokens == {"score": 5}
    assert progress.notes == ["fact"]


def test_goes_to_standard_error_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI services set it: colours, but no live bar in a log
    with Progress() as progress, progress.stage("generate", total=1, unit="prompts") as step:
        step.advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 prompts in" in captured.err
    assert not re.search(r"\x1b\[\d*[ABCDKJ]|\x1b\[\?25", captured.err)


def test_terminal_shows_a_bar_and_leaves_one_line(capsys: pytest.CaptureFixture[str]):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, force_interactive=True, width=100, _environ={"TERM": "xterm"})
    with Progress(console=console) as progress:
        with progress.stage("generate", total=2, unit="[b]prompts") as step:
            step.advance(1, tokens=812)
            print("{}")  # noqa: T201  what --json prints must not be taken over by the bar
            progress.note("half way")
            step.advance(1)
        with progress.stage("score", total=1), progress.stage("inner", total=1):
            pass
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "━" in text
    assert "note half way" in text
    assert "done generate  2 [b]prompts in" in text
    assert "done inner" in text
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (9.96, "10 s"), (59.9, "60 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text
