"""`tao reward train` and `tao reward eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from opentao.cli_common import AsJson, emit, guarded, prepare_process
from opentao.config import LoraLayers
from opentao.errors import ConfigError
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
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Train a reward model on people's choices (Bradley-Terry); writes an ordinary transformers folder."""
    from opentao.preferences import read_preferences
    from opentao.reward_model import RewardTraining, train_to_folder

    if out.exists():
        raise ConfigError(f"{out}: exists already; name a new folder")
    found = read_preferences(pairs)
    prepare_process()
    settings = RewardTraining(lr=learning_rate, epochs=epochs, lora_rank=lora_rank, lora_layers=lora_layers, seed=seed)
    with Progress() as progress:
        if found.set_aside:
            first = found.set_aside[0]
            progress.note(f"{len(found.set_aside)} rows set aside, first: line {first['line']}: {first['reason']}")
        facts = train_to_folder(model, found.rankings, settings, out, progress)
    emit(facts | {"set_aside": len(found.set_aside)}, as_json, f"{facts['rankings']} rankings -> {out}")


@reward_app.command("eval")
@guarded
def reward_eval(
    model: Annotated[str, typer.Option("--model", help="Reward model: folder or hub name.")],
    pairs: Annotated[Path, typer.Option("--pairs", metavar="FILE", help="Preferences, JSONL or Parquet.")],
    as_json: AsJson = False,
) -> None:
    """How often a reward model agrees with people's choices, beside the longer-answer baseline."""
    from opentao.preferences import read_preferences
    from opentao.reward_model import RewardModel, accuracy

    found = read_preferences(pairs)
    prepare_process()
    with Progress() as progress:
        facts = accuracy(RewardModel.load(model).for_scoring(), found.rankings, progress)
    a, b = facts["accuracy"], facts["longer_wins"]
    span = f"{a['low']:.3f} to {a['high']:.3f}, {facts['pairs']} pairs"
    text = f"accuracy {a['mean']:.3f} ({span}); the longer answer wins {b['mean']:.3f}"
    emit(facts | {"set_aside": len(found.set_aside)}, as_json, text)
