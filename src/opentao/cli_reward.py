"""`tao reward train` and `tao reward eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from opentao.cli_common import AsJson, emit, guarded, prepare_process, writable
from opentao.config import Head, LoraLayers, RewardLoss
from opentao.errors import ConfigError, DataError
from opentao.progress import Progress

reward_app = typer.Typer(help="Train and test a reward model on people's choices.", no_args_is_help=True)


@reward_app.command("train")
@guarded
def reward_train(
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Preferences, JSONL or Parquet.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write; must not exist.")],
    model: Annotated[str, typer.Option("--model", help="Causal LM or sequence classifier to start from.")] = (
        "smollm2-135m-instruct"
    ),
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(min=0)] = 3e-5,
    lora_rank: Annotated[int, typer.Option(min=0, help="0 trains all weights.")] = 0,
    lora_layers: Annotated[LoraLayers, typer.Option(help="Which layers get the adapter.")] = "all-linear",
    loss: Annotated[RewardLoss, typer.Option(help="auto: Plackett-Luce for more than two answers.")] = "auto",
    margin: Annotated[float, typer.Option(min=0, help="By how much the better answer should score higher.")] = 0.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.5, help="Share of choices that may be wrong.")] = 0.0,
    balance_length: Annotated[
        bool, typer.Option(help="Weigh pairs so that the longer answer is right half of the time.")
    ] = False,
    head: Annotated[Head, typer.Option(help="How the head of a causal LM starts.")] = "guided",
    ensemble: Annotated[int, typer.Option(min=1, help="Heads, each trained on its own bootstrap.")] = 1,
    instruction_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Share of times a row's instruction is left out.")
    ] = 0.3,
    heldout: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of prompts for early stop and calibration.")
    ] = 0.1,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Rankings with a longer prompt and answer are left out.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a reward model on people's choices; writes an ordinary transformers folder."""
    from opentao.preferences import read_preferences
    from opentao.reward_train import RewardTraining, train_to_folder

    _check_usage(out, loss, of_pairs=bool(margin or label_smoothing or balance_length))
    found = read_preferences(pairs)
    prepare_process()
    settings = RewardTraining(
        lr=learning_rate,
        epochs=epochs,
        lora_rank=lora_rank,
        lora_layers=lora_layers,
        loss=loss,
        margin=margin,
        label_smoothing=label_smoothing,
        balance_length=balance_length,
        head=head,
        ensemble=ensemble,
        instruction_dropout=instruction_dropout,
        heldout=heldout,
        max_tokens=max_tokens,
        seed=seed,
    )
    with Progress() as progress:
        if found.set_aside:
            progress.note(found.said_aside)
        facts = train_to_folder(model, found.rankings, settings, out, progress)
    emit(facts | {"set_aside": len(found.set_aside)}, as_json, f"{facts['rankings']} rankings -> {out}")


def _check_usage(out: Path, loss: RewardLoss, *, of_pairs: bool) -> None:
    """`of_pairs`: are there options that only losses of pairs have?"""
    if out.exists():
        raise ConfigError(f"{out}: exists already; name a new folder")
    writable(out)
    if of_pairs and loss == "plackett_luce":
        raise ConfigError(
            "--loss plackett_luce: has no --margin, --label-smoothing or --balance-length; those are of pairs"
        )


@reward_app.command("eval")
@guarded
def reward_eval(
    model: Annotated[str, typer.Option("--model", help="Reward model: folder or hub name.")],
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Preferences, JSONL or Parquet.")],
    truth: Annotated[
        Path | None, typer.Option("--truth", metavar="FILE", help="Rows with prompt, responses and their values.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write a page and a model card.")] = None,
    as_json: AsJson = False,
) -> None:
    """Test a reward model: people, calibration, length, alarms, answers that cheat."""
    from opentao.preferences import read_preferences
    from opentao.reward_eval import evaluate_reward_model
    from opentao.reward_model import RewardModel
    from opentao.reward_report import headline, write_reward_report
    from opentao.truth import read_truths

    found = read_preferences(pairs)
    if not any(r.pairs for r in found.rankings):
        raise DataError(f"{pairs}: no two answers of different rank")
    truths = read_truths(truth) if truth else []
    writable(out)
    prepare_process()
    with Progress() as progress:
        if found.set_aside:
            progress.note(found.said_aside)
        facts = evaluate_reward_model(RewardModel.load(model).for_scoring(), found.rankings, progress, truths)
    facts["set_aside"] = len(found.set_aside)
    text = headline(facts)
    if out is not None:
        page = write_reward_report(out, Path(model).name, pairs.name, facts)
        text += f" -> {page}"
    emit(facts, as_json, "\n".join([text, *(f"alarm: {alarm}" for alarm in facts["alarms"])]))


@reward_app.command("calibrate")
@guarded
def reward_calibrate(
    scorer: Annotated[Path, typer.Option("--scorer", metavar="FILE", help="YAML of one scorer: type, args.")],
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Preferences, JSONL or Parquet.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Calibration file to write.")],
    as_json: AsJson = False,
) -> None:
    """Put any scorer on the scale of people's choices, so that a difference of scores is a probability."""
    from opentao.config import load_scorer
    from opentao.preferences import read_preferences
    from opentao.reward_scale import calibrate_scorer
    from opentao.scorers.registry import build_scorer
    from opentao.scorers.run import is_relative
    from opentao.store import write_whole

    config = load_scorer(scorer)
    found = read_preferences(pairs)
    writable(out)
    prepare_process()
    built = build_scorer(config.model_copy(update={"calibration": None}))
    if is_relative(built):
        raise ConfigError(
            f"{scorer}: {built.name} judges inside a group, where a difference of scores depends on the group's size;"
            " calibrate one that judges each answer alone (a judge with `mode: pointwise`)"
        )
    with Progress() as progress:
        if found.set_aside:
            progress.note(found.said_aside)
        facts = calibrate_scorer(built, found.rankings, progress)
    facts |= {"set_aside": len(found.set_aside), "scorer": config.model_dump(mode="json", exclude_defaults=True)}
    if facts["scale"] is None:
        raise DataError(f"{pairs}: no two compared answers have a score: {facts['unscored'] or 'nothing was compared'}")
    write_whole(out, json.dumps(facts, indent=1) + "\n")
    loss = facts["log_loss"] if facts["log_loss"] is not None else facts["log_loss_uncalibrated"]
    unscored = f"; {sum(facts['unscored'].values())} answers unscored" if facts["unscored"] else ""
    text = f"scale {facts['scale']:.4g} from {facts['pairs']} comparisons, {loss:.3f} nats each (a coin's: 0.693)"
    left_out = facts["other_instructions"]
    text += unscored + (f"; {left_out} rows by other instructions left out" if left_out else "")
    emit(facts | {"out": str(out)}, as_json, f"{text} -> {out}")
