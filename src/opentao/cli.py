"""The `tao` command. Progress goes to standard error; `--json` prints one JSON object on standard output.

Exit status: 0 done, 1 failed with a one-line reason, 2 bad usage or bad config (file, line, key, what was expected).
Heavy imports happen inside the commands, so that `tao --help` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from opentao.cli_bench import bench
from opentao.cli_common import AsJson, emit, guarded, prepare_process
from opentao.cli_label import label_app
from opentao.cli_reward import reward_app
from opentao.config import Config, load_config
from opentao.errors import DataError
from opentao.progress import Progress
from opentao.show import visible

if TYPE_CHECKING:
    from opentao.session import Session

app = typer.Typer(
    help="Tune an LLM from prompts alone: make its first try as good as its best of N was.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML config; `tao init` writes one.")]
RunDir = Annotated[Path, typer.Option("--run", metavar="DIR", help="Run directory; an existing one is resumed.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one config key; may be repeated.")
]
Round = Annotated[int, typer.Option("--round", min=1, help="Which round.")]


@contextmanager
def _open(config: Path, run: Path, overrides: list[str] | None) -> Iterator[Session]:
    from opentao.session import open_session

    loaded = load_config(config, overrides or ())
    prepare_process()
    with Progress() as progress, open_session(loaded, run, progress) as session:
        yield session


def _finished(summary: dict[str, Any], run: Path, as_json: bool) -> None:
    from opentao.summary import summary_table

    if as_json:
        emit(summary, True)
        return
    Console().print(summary_table(summary))
    print(f"report: {run / 'report.html'}")


@app.command()
@guarded
def demo(
    run: RunDir = Path("tao-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Which tickets go where, and what is sampled.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Watch the whole method on a support desk, with the built-in model."""
    from opentao.demo import run_demo

    prepare_process()
    with Progress() as progress:
        summary = run_demo(run, seed, progress)
    _finished(summary, run, as_json)


@app.command()
@guarded
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")] = Path("tao.yaml"),
) -> None:
    """Write a commented config to start from."""
    from opentao.init import write_config

    write_config(path)
    print(f"{path} written; edit it, then: tao run {path}")


@app.command("run")
@guarded
def run_command(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    overrides: Overrides = None,
    stop_if_flat: Annotated[
        bool | None,
        typer.Option(
            "--stop-if-flat/--go-on-if-flat",
            help="Stop before any training if the base's groups show nothing to gain; default: ask, on a terminal.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Rounds of generate, score, train and evaluate, then the verdict. Resumes where it stopped."""
    loaded = load_config(config, overrides or ())
    from opentao import loop

    prepare_process()
    with Progress() as progress:
        summary = loop.run(loaded, run, progress, go_on=lambda why: _goes_on(why, stop_if_flat))
    _finished(summary, run, as_json)


def _goes_on(why: str, stop_if_flat: bool | None) -> bool:
    """Train although the curve is flat? What the option says; without it a person is asked, and a script goes on."""
    if stop_if_flat is not None:
        return not stop_if_flat
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return typer.confirm(f"{visible(why)}. Train all the same?", default=False, err=True)


@app.command()
@guarded
def predict(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run can gain, from the base's groups alone; `tao run` on the same directory uses them again."""
    from opentao.loop import measure, policy_before
    from opentao.predict import predict as predict_gain
    from opentao.predict import prediction_table

    with _open(config, run, overrides) as session:
        base = policy_before(session, 1)
        prediction = predict_gain(session, measure(session, 0, base, base, earlier=[], facts=None).evaluation)
        model = session.config.model
    if as_json:
        emit(prediction, True)
    else:
        Console().print(prediction_table(prediction, model))


@app.command("import")
@guarded
def import_command(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, Parquet or CSV; prompts or request logs.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL of prompts to write.")] = Path("prompts.jsonl"),
    as_json: AsJson = False,
) -> None:
    """Read prompts or request logs, say what was understood, and write them as JSONL."""
    from opentao.prompts import read_prompts

    if out.exists():
        raise DataError(f"{out}: exists already and is not overwritten; name another file with --out")
    reading = read_prompts(source)
    aside = out.with_suffix(".set_aside.jsonl")
    if reading.set_aside and aside.exists():
        raise DataError(f"{aside}: exists already and is not overwritten; name another file with --out")
    if reading.set_aside:
        _write_lines(aside, [row.as_dict() for row in reading.set_aside])
    _write_lines(out, [_prompt_line(p) for p in reading.prompts])
    facts = {"prompts": len(reading.prompts), "set_aside": len(reading.set_aside), "understood": reading.understood}
    emit(facts | {"out": str(out)}, as_json, f"{reading.understood}\n{len(reading.prompts)} prompts -> {out}")


def _prompt_line(prompt: Any) -> dict[str, Any]:
    line = {"messages": list(prompt.messages)}
    return (
        line | ({"tools": list(prompt.tools)} if prompt.tools else {}) | ({"meta": prompt.meta} if prompt.meta else {})
    )


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    from opentao.store import write_whole

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text)


@app.command()
@guarded
def generate(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    round_: Round = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Sample a round's groups."""
    with _open(config, run, overrides) as session:
        from opentao.loop import policy_before, sample_round

        shards = sample_round(session, round_, policy_before(session, round_))
    emit({"round": round_, "shards": shards}, as_json, f"{len(shards)} shards in {run}/round-{round_}/groups")


@app.command()
@guarded
def score(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    round_: Round = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score a round's groups; responses are never sampled again."""
    with _open(config, run, overrides) as session:
        from opentao.loop import policy_before, sampled_round
        from opentao.score import require_scores, unscored
        from opentao.score import score as score_groups

        shards = sampled_round(session, round_, policy_before(session, round_))
        groups = score_groups(session, shards, f"round {round_}: score")
        require_scores(session, groups, f"round {round_}")
        facts = {
            "round": round_,
            "groups": len(groups),
            "informative": sum(g.informative for g in groups),
            "unscored": dict(unscored(groups)),
        }
    missing = "".join(f"; {name}: {count} responses unscored" for name, count in facts["unscored"].items())
    emit(facts, as_json, f"{facts['groups']} groups scored, {facts['informative']} informative{missing}")


@app.command()
@guarded
def train(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    round_: Round = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train on a round's scored groups."""
    with _open(config, run, overrides) as session:
        from opentao.loop import policy_before, sampled_round
        from opentao.score import score as score_groups
        from opentao.train import train as train_round

        before = policy_before(session, round_)
        groups = score_groups(session, sampled_round(session, round_, before), f"round {round_}: score")
        policy, facts = train_round(session, round_, before, groups)
    facts |= {"round": round_, "policy": str(policy.path) if policy.path else None, "policy_hash": policy.hash}
    emit(facts, as_json, f"{facts['steps']} steps; policy: {facts['policy'] or 'unchanged'}")


@app.command()
@guarded
def evaluate(
    config: ConfigPath,
    run: RunDir = Path("tao-run"),
    round_: Annotated[int, typer.Option("--round", min=0, help="Which round's policy; 0 is the base.")] = 0,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Measure a round's policy and the base on the held-out prompts; `tao run` makes the report of it."""
    from opentao.summary import Mean, interval, number, parse

    with _open(config, run, overrides) as session:
        from opentao.loop import measure, policy_before

        base = policy_before(session, 1)
        outcome = measure(session, 0, base, base, earlier=[], facts=None)
        if round_:
            policy = policy_before(session, round_ + 1)
            outcome = measure(session, round_, policy, base, earlier=[outcome], facts=None)
    first = parse(Mean, outcome.numbers["first_try"], "first_try")
    emit(outcome.numbers, as_json, f"first try {number(first.mean, 3)} ({interval(first, 3)}, n = {first.n})")


@app.command()
@guarded
def report(run: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory.")]) -> None:
    """Write report.html again from the files of a `tao run`."""
    from opentao.report import write_report

    print(write_report(run))


@app.command()
@guarded
def show(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="Run directory, or a folder of groups inside one.")],
    limit: Annotated[int, typer.Option(min=1, help="How many groups.")] = 5,
) -> None:
    """Print groups for a person: prompt, responses ranked by reward, scores."""
    from opentao.show import show_groups
    from opentao.store import Run, attach_scores, table_to_groups

    root = next((p for p in (run, *run.resolve().parents) if (p / "manifest.jsonl").exists()), run)
    inside = "" if root == run else str(run.resolve().relative_to(root.resolve()))
    with Run(root, read_only=True) as opened:
        found = opened.names(f"{inside}/" if inside else "")
        names = [n for n in found if "/groups/" in n] or [n for n in found if "/greedy/" in n]
        if not names:
            raise DataError(f"{run}: no groups here; expected a run directory that `tao generate` has filled")
        shown = 0
        for name in names:
            groups = table_to_groups(opened.read_table(name))
            scores = name.replace("/groups/", "/scores/").replace("/greedy/", "/greedy-scores/")
            if opened.have(scores):
                groups = attach_scores(groups, opened.read_table(scores))
            show_groups(groups, limit - shown, Console())
            shown += len(groups)
            if shown >= limit:
                break


@app.command()
@guarded
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Also say what this config will cost.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Versions, cores, memory, GPU, cache, and what a config will cost, from a short measurement."""
    from opentao.doctor import diagnose, render
    from opentao.prompts import read_prompts

    loaded: Config | None = load_config(config) if config else None
    prompts = read_prompts(Path(loaded.prompts.path)).prompts if loaded else ()
    prepare_process()
    found = diagnose(loaded, prompts)
    if as_json:
        emit(found, True)
    else:
        render(found, Console())


app.command()(bench)
app.add_typer(reward_app, name="reward")
app.add_typer(label_app, name="label")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
