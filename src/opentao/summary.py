"""What a run came to: the shapes of `summary.json` and `round-K/eval.json`, read strictly; the table on the terminal.

A key that must be there and is not is an error that names file and key. A number may be null (or NaN): there was
nothing to measure, and it is shown as "–", never as 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from opentao.errors import DataError
from opentao.progress import duration
from opentao.show import visible

SHOWN_K = (2, 4, 8, 16)
STAGES = ("generate", "score", "train", "evaluate")
MISSING = "–"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Facts(BaseModel):
    """Read-only; keys that a later version adds are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Mean(Facts):
    """``{"mean": 0.42, "low": 0.35, "high": 0.49, "n": 64}``: over n prompts, with its interval."""

    mean: Number
    low: Number
    high: Number
    n: int


NO_MEAN = Mean(mean=None, low=None, high=None, n=0)


class Solved(Facts):
    """Shares of prompts on which all, some or none of so many answers reach `at`."""

    at: float
    tries: int
    always: Mean
    sometimes: Mean
    never: Mean


class Audit(Facts):
    """The same numbers by the scorer that was never trained on."""

    first_try: Mean
    greedy: Mean = NO_MEAN
    best_of: dict[int, Mean]
    selected_of: dict[int, Mean] = {}  # audit of the response that the reward would pick among k
    solved: Solved | None = None


class Training(Facts):
    steps: int
    informative: int  # groups with at least two different rewards
    groups: int
    loss_first: Number
    loss_last: Number
    sampler_mismatch: Mean = NO_MEAN  # KL of the sampler from the learner, nats a token


class Guard(Facts):
    """What was watched for over-optimisation."""

    canaries: dict[str, Number] = {}  # share of prompts on which each scores as high as the policy's own answers
    canary_share: Number = None
    tripped: str | None = None  # why the run was stopped after this round


class Round(Facts):
    """One policy on the held-out prompts; round 0 is the base."""

    round: int
    first_try: Mean
    greedy: Mean = NO_MEAN
    best_of: dict[int, Mean]
    audit: Audit | None
    kl: Mean  # nats from the base, a response
    length: Mean  # tokens a response
    distinct: Mean = NO_MEAN  # share of runs of four words that have not stood before in the response
    guard: Guard = Guard()
    solved: Solved | None = None  # of as many tries as the policy with the fewer of them has
    baked_fraction: Mean
    baked_k: int = 8
    improvement: Mean | None = None
    audit_improvement: Mean | None = None
    tokens: dict[str, int]
    seconds: dict[str, float]
    train: Training | None = None

    @property
    def name(self) -> str:
        return "base" if self.round == 0 else f"round {self.round}"


class AuditPrediction(Facts):
    """What the audit makes of the answers that the reward would pick."""

    first_try: Mean
    curve: dict[int, Mean]
    target: Mean
    gain: Mean
    solved: Solved | None = None


class Prediction(Facts):
    """What the base's groups say before any training; `target` is the first try if all of best-of-n is baked."""

    target_n: int
    responses: int  # the base's tries per prompt
    first_try: Mean
    curve: dict[int, Mean]
    target: Mean
    gain: Mean
    informative: Mean
    solved: Solved | None = None
    audit: AuditPrediction | None = None
    flat: str | None = None  # why training would not pay

    @property
    def best_of(self) -> str:
        """Which best-of-n the target is: of all tries, if there are fewer than `target_n`."""
        capped = self.responses < self.target_n
        return f"{self.responses} (all that was sampled; target_n is {self.target_n})" if capped else f"{self.target_n}"


class SetAside(Facts):
    rows: int
    reasons: dict[str, int]


class Prompts(Facts):
    train: int  # there to train on
    heldout: int
    sampled: int | None = None  # of those to train on, in the rounds that were judged
    unused: int | None = None  # rows that were read as prompts, and neither sampled nor held out


class Baseline(Facts):
    """Something to compare with, e.g. always answering the majority class."""

    name: str
    value: Mean
    on: Literal["audit", "reward"]


class Summary(Facts):
    """A whole run."""

    model: str
    base: Round
    rounds: list[Round]
    verdict: Literal["promote", "keep base"]
    why: str
    best_round: int
    policy: str | None
    seconds: float
    set_aside: SetAside
    scorers: list[str]
    audit: str | None
    unscored: dict[str, int]
    failures: dict[str, int]
    prompts: Prompts
    baselines: list[Baseline] = []
    prediction: Prediction | None = None
    config: str | None = None  # the resolved one, as YAML
    confidence: float | None = None  # of every interval, e.g. 0.95
    intervals_over: str = "prompt"  # what is resampled: prompts, near-duplicates together, or the meta of `split_by`

    @model_validator(mode="after")
    def _best_round_exists(self) -> Summary:
        if self.best_round not in {0, *(r.round for r in self.rounds)}:
            raise ValueError(f"best_round {self.best_round} is not among the rounds")
        return self

    @property
    def shown(self) -> Round | None:
        """The round that "after" means: the kept one, or the best that was tried; None without rounds.

        Of the rounds that were tried, as the verdict looks at them: one that was stopped comes last.
        """
        if self.best_round:
            return next(r for r in self.rounds if r.round == self.best_round)
        return max(self.rounds, key=_rank, default=None)

    def stage_totals(self) -> dict[str, tuple[int, float]]:
        """Tokens and seconds of every stage over all rounds, base included; in the order of the loop."""
        every = [self.base, *self.rounds]
        found = dict.fromkeys([*STAGES, *(name for r in every for name in (*r.seconds, *r.tokens))])
        totals = {s: (sum(r.tokens.get(s, 0) for r in every), sum(r.seconds.get(s, 0.0) for r in every)) for s in found}
        return {name: total for name, total in totals.items() if any(total)}


def _rank(round_: Round) -> tuple[bool, bool, float, int]:
    gain = round_.improvement or NO_MEAN
    mean = -math.inf if gain.mean is None else gain.mean
    return not round_.guard.tripped, gain.low is not None and gain.low > 0, mean, -round_.round


class Answer(Facts):
    """One response of a held-out prompt."""

    text: str
    reward: Number
    audit: Number
    finish: str


class Sample(Facts):
    """One held-out prompt with its responses."""

    prompt_id: str
    prompt: str
    responses: list[Answer]
    greedy: Answer | None = None


class Evaluation(Facts):
    """What the report needs of `round-K/eval.json`."""

    samples: list[Sample]


Model = TypeVar("Model", bound=Facts)


def parse(model: type[Model], value: Any, where: str) -> Model:
    """Check the shape of `value`.

    Raises:
        DataError: the file, the key and what was expected.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {key or 'file'}: {first['msg']}") from error


def read(model: type[Model], path: Path) -> Model:
    """Read one JSON file of a run directory.

    Raises:
        DataError: it is missing, is not JSON, or lacks a key.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return parse(model, value, str(path))


# ------------------------------------------------------------------------------------------------- numbers in words


def number(value: float | None, digits: int = 2) -> str:
    """``0.42``; a minus sign that is as wide as a plus, and none before 0.00; "–" for nothing measured."""
    return MISSING if value is None else f"{value:z.{digits}f}".replace("-", "−")


def digits_of(mean: Mean) -> int:
    """Decimal places at which its interval has a width."""
    width = 0.0 if mean.low is None or mean.high is None else mean.high - mean.low
    return min(6, max(2, math.ceil(-math.log10(width)))) if width > 0 else 2


def measured(mean: Mean | None) -> str:
    """``0.42``, with as many digits as its interval."""
    return MISSING if mean is None else number(mean.mean, digits_of(mean))


def share(value: float | None) -> str:
    """``42 %``; "–" for nothing measured."""
    return MISSING if value is None else f"{number(100 * value, 0)} %"


def signed(mean: Mean) -> str:
    """``+0.42``, a difference, with as many digits as its interval."""
    return measured(mean) if mean.mean is None or mean.mean < 0 else f"+{measured(mean)}"


def interval(mean: Mean | None, digits: int | None = None) -> str:
    """``0.35 to 0.49``; "–" without bounds."""
    if mean is None or mean.low is None or mean.high is None:
        return MISSING
    digits = digits_of(mean) if digits is None else digits
    return f"{number(mean.low, digits)} to {number(mean.high, digits)}"


def percent(mean: Mean) -> str:
    return MISSING if mean.mean is None else f"{number(100 * mean.mean, 0)} %"


def percent_interval(mean: Mean) -> str:
    if mean.low is None or mean.high is None:
        return MISSING
    return f"{number(100 * mean.low, 0)} to {number(100 * mean.high, 0)} %"


# ------------------------------------------------------------------------------------------------- terminal


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table at the end of a run; `summary` is what `summary.json` holds.

    Raises:
        DataError: the key that is missing or has the wrong shape.
    """
    run = parse(Summary, summary, "summary")
    after = run.shown
    table = Table(
        title=Text(f"{visible(run.model)}: {_counted(run.base.first_try.n, run.prompts.heldout)} held-out prompts"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("", "reward", "interval", *(("audit", "interval") if run.audit else ()), "baked"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    _base_rows(table, run)
    for round_ in run.rounds:
        audit = round_.audit.first_try if round_.audit else None
        _add(table, run, f"{round_.name} first try", round_.first_try, audit, round_)
    table.caption = Text("\n").join(_caption(run, after))
    table.caption_justify = "left"
    return table


def _counted(scored: int, all_: int) -> str:
    return f"{all_}" if scored == all_ else f"{scored} of {all_}"


def _base_rows(table: Table, run: Summary) -> None:
    """Baselines, the base's first try, what more tries give: the reward picks among k, the audit judges the pick."""
    base = run.base
    for line in run.baselines:
        on_audit = line.on == "audit"
        _add(table, run, visible(line.name), NO_MEAN if on_audit else line.value, line.value if on_audit else None)
    _add(table, run, "base first try", base.first_try, base.audit.first_try if base.audit else None)
    ks = [k for k in SHOWN_K if k in base.best_of]
    for k in ks:
        picked = base.audit.selected_of.get(k) if base.audit else None
        _add(table, run, f"base best of {k}", base.best_of[k], picked)
    table.add_section()


def _add(table: Table, run: Summary, name: str, reward: Mean, audit: Mean | None, round_: Round | None = None) -> None:
    kept = round_ is not None and round_.round == run.best_round
    cells = [name + (" (kept)" if kept else ""), measured(reward), interval(reward)]
    if run.audit:
        cells += [measured(audit), interval(audit)]
    table.add_row(*cells, percent(round_.baked_fraction) if round_ else "", style="bold" if kept else None)


def _caption(run: Summary, after: Round | None) -> list[Text]:
    """Baked fraction, time and the verdict, each on its line."""
    lines = []
    if after is not None:
        baked = f"{percent(after.baked_fraction)} ({percent_interval(after.baked_fraction)})"
        lines.append(f"baked fraction of {after.name}, against the base's best of {after.baked_k}: {baked}")
    stages = [f"{name} {duration(seconds)}" for name, (_, seconds) in run.stage_totals().items()]
    lines.append(" · ".join([*stages, f"whole run {duration(run.seconds)}"]))
    left_out = [f"{name} {count} unscored" for name, count in run.unscored.items() if count]
    left_out += [f"{kind} {count}" for kind, count in run.failures.items() if count]
    if left_out:
        lines.append(f"in no mean: {', '.join(left_out)}")
    verdict = Text(f"{run.verdict}: {visible(run.why)}", style="bold green" if run.verdict == "promote" else "bold")
    return [*map(Text, lines), verdict]
