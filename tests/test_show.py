"""What a person sees of groups, and that text from a model cannot do anything to the terminal."""

import io
import math

import pytest
from rich.console import Console

from opentao.show import show_groups, visible
from opentao.types import NAN, Failure, Group, Prompt, Response, Score


def response(text: str, **changes) -> Response:
    values = {"id": text, "text": text, "tokens_R": (1, 2), "sampler_logprobs_R": (-1.0, -1.0), "finish": "stop"}
    return Response(**(values | changes))


def shown(groups: list[Group], limit: int | None = None, **console) -> str:
    out = io.StringIO()
    show_groups(groups, limit, Console(file=out, width=100, **console))
    return out.getvalue()


def scored_group() -> Group:
    return Group(
        prompt=Prompt.from_text("My parcel is late."),
        responses=(response("worst"), response("no score"), response("best", finish="length", strategy="think")),
        scores={"exact": (Score(value=0.0), Score(value=NAN, error="timeout: 30 s"), Score(value=1.0))},
        rewards_N=(-0.25, NAN, 0.75),
    )


def test_responses_are_ranked_by_reward_and_unscored_ones_come_last():
    text = shown([scored_group()])
    assert "My parcel is late." in text
    assert text.index("best") < text.index("worst") < text.index("no score")
    assert "#1   reward 0.75  exact 1  think · cut at the length limit · 2 tokens" in text
    assert "reward unscored  exact unscored (timeout: 30 s)" in text


def test_group_without_rewards_keeps_the_sampled_order():
    group = Group(prompt=Prompt.from_text("Hi"), responses=(response("first"), response("second")))
    text = shown([group])
    assert text.index("first") < text.index("second")
    assert text.count("reward unscored") == 2


def test_failure_and_limit():
    failed = Group(prompt=Prompt.from_text("Long"), failure=Failure(kind="prompt_too_long", message="9001 > 8192"))
    text = shown([failed, scored_group()], limit=1)
    assert "failed: prompt_too_long: 9001 > 8192" in text
    assert "1 of 2 groups shown" in text
    assert "parcel" not in text


def test_prompt_without_user_turn_and_empty_response():
    prompt = Prompt(messages=({"role": "system", "content": "Be brief."},))
    text = shown([Group(prompt=prompt, responses=(response(""),))])
    assert "(no user turn)" in text
    assert "(empty)" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("a\x9bm", r"a\x9bm"),  # one-character form of the escape sequence
        ("safe\rEVIL", r"safe\x0dEVIL"),
        ("windows\r\nlines", "windows\nlines"),
        ("tab\tstays", "tab\tstays"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("half \ud800", r"half \ud800"),
        ("tag \U000e0041", r"tag \U000e0041"),
        ("क्‍ष 👩‍🚀 é ü", "क्‍ष 👩‍🚀 é ü"),  # joiners are part of real writing
    ],
)
def test_visible_spells_out_what_could_act(text: str, expected: str):
    assert visible(text) == expected


def test_hostile_response_is_printed_as_plain_characters():
    group = Group(
        prompt=Prompt.from_text("\x1b[31mprompt [bold]x[/bold]"),
        responses=(response("[red]markup[/red] [/nothing] :smile: \x1b[2J [link=http://x]y[/link]", strategy="\x07s"),),
        scores={"[blink]s\x1b": (Score(value=math.nan, error="\x1b]8;;http://x\x07"),)},
        rewards_N=(NAN,),
        failure=Failure(kind="\x1b[1m", message="[/bold]"),
    )
    text = shown([group], force_terminal=False)
    assert "\x1b" not in text
    assert "\x07" not in text
    for literal in ("[red]markup[/red] [/nothing] :smile:", "[bold]x[/bold]", "[blink]s", r"\x1b[2J"):
        assert literal in text
    assert "\x1b[2J" not in shown([group], force_terminal=True)
