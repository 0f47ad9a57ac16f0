"""The examples run, and the method in one file reaches what the package reaches."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_prompts

from opentao import loop
from opentao.config import Config
from opentao.models import load_tokenizer
from opentao.policy import encode_prompt
from opentao.progress import Progress
from opentao.store import Run, table_to_prompts

LOOP = Path(__file__).parent.parent / "examples" / "loop_from_scratch.py"
TOLERANCE = 0.02  # of a mean share of even tokens over 32 prompts


FromScratch = Callable[..., list[float]]


@pytest.fixture
def from_scratch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FromScratch:
    """What the one file prints: base first try, base best of 8, then each round's first try."""

    def call(*args: object) -> list[float]:
        monkeypatch.setattr(sys, "argv", [str(LOOP), *map(str, args)])
        capsys.readouterr()
        runpy.run_path(str(LOOP), run_name="__main__")
        return [float(number) for number in re.findall(r"\b\d\.\d{3}\b", capsys.readouterr().out)]

    return call


def test_it_is_short_and_stands_alone() -> None:
    text = LOOP.read_text()
    assert len(text.splitlines()) <= 200
    modules = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert modules - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_on_its_own_case(from_scratch: FromScratch) -> None:
    first, best, *rounds = from_scratch()
    assert len(rounds) == 4
    assert rounds[-1] >= best - TOLERANCE
    assert best > first + 0.1  # there was something to gain


def test_reaches_what_the_package_reaches(from_scratch: FromScratch, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Same model, same prompts on the same side, same reward: both make the first try as good as the best of 8 was."""
    summary = loop.run(even_tokens(tiny_model_dir, tmp_path), tmp_path / "run", Progress(quiet=True))
    base, tuned = summary["base"], summary["rounds"][-1]
    assert tuned["first_try"]["mean"] >= base["best_of"]["8"]["mean"] - TOLERANCE
    assert summary["verdict"] == "promote"

    prompts = tmp_path / "tokens.json"
    prompts.write_text(json.dumps(tokens_of(tiny_model_dir, tmp_path / "run")))
    first, best, *rounds = from_scratch("--model", tiny_model_dir, "--prompts", prompts)
    assert rounds[-1] >= best - TOLERANCE
    assert first == pytest.approx(base["first_try"]["mean"], abs=0.03)
    assert best == pytest.approx(base["best_of"]["8"]["mean"], abs=0.03)
    assert rounds[-1] == pytest.approx(tuned["first_try"]["mean"], abs=0.2)


def even_tokens(model: Path, folder: Path) -> Config:
    """The settings of the one file."""
    return Config.model_validate(
        {
            "model": str(model),
            "prompts": {
                "path": str(write_prompts(folder / "prompts.jsonl", 96)),
                "heldout_fraction": 0.34,
                "max_heldout": 32,
                "max_train": 64,
                "near_duplicate": 1.0,
            },
            "scorers": [{"type": "toy_scorers:EvenTokens", "name": "even"}],
            "rounds": 4,
            "generate": {"group_size": 8, "max_new_tokens": 16},
            "train": {"objective": "distill", "target_n": 8, "learning_rate": 1e-2, "epochs": 2, "prompts_per_step": 4},
            "evaluate": {"base_group_size": 8, "group_size": 8, "bootstrap": 500},
        }
    )


def tokens_of(model: Path, run_directory: Path) -> dict[str, list[list[int]]]:
    """The run's prompts as the model sees them."""
    tokenizer = load_tokenizer(str(model))
    with Run(run_directory, read_only=True) as run:
        sides = {side: table_to_prompts(run.read_table(f"prompts/{side}.parquet")) for side in ("train", "heldout")}
    return {side: [encode_prompt(tokenizer, p.messages) for p in prompts] for side, prompts in sides.items()}
