"""What a long step does, done / total, tokens per second and time left, on standard error.

A terminal gets a live bar that gives way to one line when the stage ends. Anything else gets plain lines: one at the
start, at most one in `every` seconds, one at the end. Standard output is never touched, so `--json` stays one object.

>>> with Progress(quiet=True) as progress, progress.stage("generate", total=2, unit="prompts") as step:
...     step.advance(1, tokens=812)
...     step.reuse(1)
>>> progress.tokens
{'generate': 812}

Left out: threads (a stage is advanced by the loop that owns it) and a time left for the whole run (stages differ too
much; `tao doctor` measures instead).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from opentao.show import visible

Clock = Callable[[], float]


def duration(seconds: float) -> str:
    """Three forms that people read at a glance: ``8.4 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


@dataclass(kw_only=True, slots=True)
class Stage:
    """One running stage. ``Stage(label="round 1: generate", total=32, unit="prompts", ...)``"""

    label: str
    total: int | None  # None = not known beforehand
    unit: str  # plural noun of what is counted
    clock: Clock
    on_change: Callable[[Stage], None]
    started: float  # seconds on the clock
    done: int = 0
    reused: int = 0  # part of `done` that an earlier run had made; says nothing about today's speed
    tokens: int = 0
    part: float = 0.0  # units' worth of work in what is being made side by side and not done yet
    part_tokens: int = 0
    said: float = field(default=0.0)  # when the last plain line was written

    def advance(self, count: int = 1, *, tokens: int = 0) -> None:
        """`count` more units are done; they cost `tokens`."""
        self.done += count
        self.tokens += tokens
        self.part = max(0.0, self.part - count)
        self.part_tokens = max(0, self.part_tokens - tokens)
        self.on_change(self)

    def underway(self, part: float, tokens: int) -> None:
        """Of the units that are being made side by side, `part` units' worth of work is done: `tokens` so far."""
        self.part, self.part_tokens = part, tokens
        self.on_change(self)

    def reuse(self, count: int = 1) -> None:
        """`count` units were there already (a resumed run): done, but left out of speed and time left."""
        self.reused += count
        self.advance(count)

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @property
    def speed(self) -> float:
        """Tokens per second since the stage began; 0 if no tokens were counted."""
        return (self.tokens + self.part_tokens) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None until something is made, or without a total."""
        made = self.done - self.reused + self.part
        if self.total is None or made <= 0:
            return None
        return max(0.0, self.total - self.done - self.part) * self.seconds / made

    @property
    def count(self) -> str:
        total = "" if self.total is None else f"/{self.total:,}"
        return f"{self.done:,}{total} {self.unit}".strip()

    def facts(self) -> list[str]:
        """What a running stage shows besides its label: count, speed, time left."""
        speed = [f"{self.speed:,.0f} tok/s"] if self.tokens or self.part_tokens else []
        left = [f"{duration(self.seconds_left)} left"] if self.seconds_left is not None else []
        return [self.count, *speed, *left]

    def outcome(self, finished: bool) -> str:
        """What an ended stage leaves behind."""
        count = self.count if self.done != self.total else f"{self.done:,} {self.unit}".strip()
        text = f"{count} in {duration(self.seconds)}" if finished else f"stopped at {count}"
        reused = [f"{self.reused:,} reused"] if self.reused else []
        speed = [f"{self.tokens:,} tokens, {self.speed:,.0f} tok/s"] if self.tokens else []
        return " · ".join([text, *reused, *speed])


class _Facts(ProgressColumn):
    """Our own numbers beside the bar: rich would measure units, and count reused ones."""

    def render(self, task: Task) -> Text:
        stage: Stage = task.fields["stage"]
        return Text(" · ".join(stage.facts()), style="dim")


class Progress:
    """Where every stage reports. Keeps `seconds` and `tokens` by stage name, and the `notes`, for the summary.

    `quiet` keeps the sums and writes nothing. `every`: seconds between two plain lines of a stage.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        every: float = 5.0,
        clock: Clock = time.monotonic,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.notes: list[str] = []
        self._console = console or _stderr_console()
        self._quiet = quiet
        self._every = every
        self._clock = clock
        self._bars: Bars | None = None  # live only while a stage runs

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bars()

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "", *, label: str | None = None
    ) -> Iterator[Stage]:
        """Report one stage. Its seconds and tokens are added to `name`; people read `label`."""
        stage = self._begin(visible(label or name), total, unit)
        task = self._show(stage)
        finished = False
        try:
            yield stage
            finished = True
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + stage.seconds
            self.tokens[name] = self.tokens.get(name, 0) + stage.tokens
            self._hide(task)
            self._end_line(stage, finished)

    def note(self, text: str) -> None:
        """One line for people, e.g. "3 rows set aside"; also kept in `notes`."""
        self.notes.append(text)
        self._write(Text.assemble(("note ", "yellow"), visible(text)))

    def _begin(self, label: str, total: int | None, unit: str) -> Stage:
        now = self._clock()
        return Stage(
            label=label, total=total, unit=unit, clock=self._clock, on_change=self._changed, started=now, said=now
        )

    @property
    def _live(self) -> bool:
        return self._console.is_interactive and not self._quiet

    def _show(self, stage: Stage) -> TaskID | None:
        """Add a bar (terminal) or write the first line (elsewhere)."""
        if not self._live:
            self._line(stage, stage.count if stage.total is not None else "started")
            return None
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        return self._bars.add_task(stage.label, total=stage.total, stage=stage)

    def _changed(self, stage: Stage) -> None:
        if self._bars is not None:
            task = next(t for t in self._bars.tasks if t.fields["stage"] is stage)
            self._bars.update(task.id, completed=stage.done + stage.part)
        elif self._clock() - stage.said >= self._every and stage.done != stage.total:
            stage.said = self._clock()
            self._line(stage, " · ".join(stage.facts()))

    def _hide(self, task: TaskID | None) -> None:
        if self._bars is None or task is None:
            return
        self._bars.remove_task(task)
        if not self._bars.tasks:
            self._stop_bars()

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _end_line(self, stage: Stage, finished: bool) -> None:
        mark = ("done ", "green") if finished else ("stopped ", "red")
        prefix = [mark] if self._live else []
        self._write(Text.assemble(*prefix, (stage.label, "bold"), "  ", stage.outcome(finished)))

    def _line(self, stage: Stage, text: str) -> None:
        self._write(Text.assemble((stage.label, "bold"), "  ", text))

    def _write(self, text: Text) -> None:
        if not self._quiet:
            self._console.print(text, soft_wrap=True)


def _stderr_console() -> Console:
    """A bar only where a person watches: FORCE_COLOR in a CI job must not turn a log into escape codes."""
    return Console(stderr=True, force_interactive=sys.stderr.isatty())


def _bars(console: Console) -> Bars:
    """Standard output is left alone (`--json`); what libraries write to standard error appears above the bar."""
    label = TextColumn("{task.description}", markup=False)
    return Bars(
        SpinnerColumn(),
        label,
        BarColumn(16),
        _Facts(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
