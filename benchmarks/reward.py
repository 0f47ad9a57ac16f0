"""Reward models on people's choices: python benchmarks/reward.py WHAT [--data DIR]

Data: the three helpful files of hh-rlhf and pandalm-human, as `../shared/data` holds them; not part of the package. A
row of hh-rlhf tests if the first byte of the sha256 of what comes before the last answer is below 52, else it trains.

    curve    accuracy, calibration and loss after 250 to 4,000 training pairs, with the guided and the random head
    options  what balanced lengths and an ensemble change at 250 pairs
    peer     the same training steps by TRL's RewardTrainer: pairs a second in turn, accuracy on the same test rows
    people   the model of `curve` on pandalm-human: agreement with its three annotators, beside their own

Everything is kept in reward_results.json as it comes, and what is there is not done again; RESULTS.md shows it. One in
three test rows is scored at sizes before the last, all of them at the last.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from opentao.allocator import use_large_pages
from opentao.bestofn import bootstrap, paired_difference
from opentao.config import Head
from opentao.models import DEFAULT_MODEL
from opentao.optimise import Checkpoint, Metrics
from opentao.preferences import Ranking, write_preferences
from opentao.progress import Progress
from opentao.reward_eval import agreement_with_people, annotators, by_subset, calibration, length_bias, score_rankings
from opentao.reward_model import RewardModel
from opentao.reward_scale import comparisons, fit_scale
from opentao.reward_train import RewardTraining, calibrate, train_reward_model, train_to_folder
from opentao.store import Run
from opentao.types import Prompt, content_hash

sys.path.insert(0, str(Path(__file__).parent))
from run import write_page  # its neighbour

HERE = Path(__file__).parent
RESULTS = HERE / "reward_results.json"
FILES = {name: f"helpful-{name}.test.jsonl.gz" for name in ("base", "online", "rejection-sampled")}
TEST_BELOW = 52
SIZES = (250, 500, 1000, 2000, 4000)
LONGEST = 2000  # characters of a conversation; longer ones are left out of training, not of the test
SCALE_PAIRS = 100  # that set the scale of scores and train nothing
SKIPPED = 3  # every so manyth test row is scored at sizes before the last
HEADS: tuple[Head, ...] = ("guided", "random")
PEER = RewardTraining(lr=2e-4, lora_rank=16, lora_layers="attention", rankings_per_step=8, heldout=0.0)
CURVE = replace(PEER, lr=1e-3, schedule="cooldown", rankings_per_step=10)  # sizes are whole steps; dev/LOG.md
OPTION_PAIRS = 250
OPTIONS: dict[str, dict[str, Any]] = {
    "balanced": {"balance_length": True},
    "ensemble": {"ensemble": 4},
}
TRIAL_PAIRS = 16  # on which TRL chooses its micro-batch
SECONDS = 60 * 60


def read_hh(folder: Path) -> tuple[list[Ranking], list[Ranking]]:
    """(train, test) of the three files, each row with its file as `subset`."""
    sides: tuple[list[Ranking], list[Ranking]] = ([], [])
    for subset, name in FILES.items():
        with gzip.open(folder / "hh-rlhf" / name, "rt", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                context, cut, _ = row["chosen"].rpartition("\n\nAssistant:")
                if not cut or row["chosen"] == row["rejected"]:
                    continue
                first = hashlib.sha256(context.encode()).digest()[0]
                if (ranking := _ranking(context, row, subset)) is not None:
                    sides[first < TEST_BELOW].append(ranking)
    return sides


def _ranking(context: str, row: dict[str, str], subset: str) -> Ranking | None:
    """The dialogue as turns; None if the two answers do not share it."""
    if not row["rejected"].startswith(context + "\n\nAssistant:"):
        return None
    turns = []
    for part in context.split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": human.strip()})
        turns += [{"role": "assistant", "content": a.strip()} for a in answers]
    texts = tuple(row[side][len(context) + len("\n\nAssistant:") :].strip() for side in ("chosen", "rejected"))
    if not turns or turns[-1]["role"] != "user" or texts[0] == texts[1]:
        return None
    return Ranking(prompt=Prompt(messages=tuple(turns)), texts=texts, ranks=(1.0, 2.0), subset=subset)


def read_pandalm(folder: Path) -> list[Ranking]:
    """One ranking an item and annotator."""
    found = []
    for row in json.loads((folder / "pandalm-human" / "testset-v1.json").read_text(encoding="utf-8")):
        asked = "\n\n".join(str(part) for part in (row["instruction"], row["input"]) if part)
        texts = (str(row["response1"]), str(row["response2"]))
        if texts[0] == texts[1]:
            continue
        for name in ("annotator1", "annotator2", "annotator3"):
            ranks = {0: (1.0, 1.0), 1: (1.0, 2.0), 2: (2.0, 1.0)}[row[name]]
            found.append(Ranking(prompt=Prompt.from_text(asked), texts=texts, ranks=ranks, annotator=name))
    return found


def training_rows(rankings: list[Ranking], number: int) -> list[Ranking]:
    """The first `number` in an order that does not depend on the number, so that a larger set holds the smaller."""
    short = [r for r in rankings if sum(len(m["content"]) for m in r.prompt.messages) + len(r.texts[0]) < LONGEST]
    return sorted(short, key=lambda r: content_hash(r.prompt.id, r.texts))[:number]


def curve(folder: Path, work: Path) -> None:
    """One pass over the largest set with each head, tested after so many pairs on the way."""
    rows, dev, test = split(folder)
    for head in HEADS:
        learn(f"curve-{head}", rows, dev, test, SIZES, replace(CURVE, head=head), work)


def options(folder: Path, work: Path) -> None:
    """One setting changed at a time, the same pairs in the same order; the unchanged one is of `curve`."""
    rows, dev, test = split(folder)
    for option, changed in OPTIONS.items():
        learn(f"option-{option}", rows, dev, test, (OPTION_PAIRS,), replace(CURVE, **changed), work)


def split(folder: Path) -> tuple[list[Ranking], list[Ranking], list[Ranking]]:
    """Training rows, rows that only set the scale of scores, test rows."""
    train, test = read_hh(folder)
    rows = training_rows(train, SIZES[-1] + SCALE_PAIRS)
    return rows[: SIZES[-1]], rows[SIZES[-1] :], test


def learn(
    name: str,
    rows: list[Ranking],
    dev: list[Ranking],
    test: list[Ranking],
    sizes: Sequence[int],
    settings: RewardTraining,
    work: Path,
) -> None:
    """Train once over `rows` as far as the largest of `sizes`, and test at each of them; the rate falls after half.

    A pair's loss is taken before it is trained on, so `losses`, of the steps since the size before, are of pairs not
    yet seen, too. Goes on from its last checkpoint; what is kept already is not tested again.
    """
    if f"{name}-{sizes[-1]}" in kept():
        return
    model = RewardModel.from_causal_lm(DEFAULT_MODEL, head=settings.head, ensemble=settings.ensemble)
    losses: list[float] = []
    start = time.perf_counter()

    def look(metrics: Metrics) -> bool:
        losses.append(round(metrics.loss, 4))
        seen = len(losses) * settings.rankings_per_step
        if seen in sizes and (entry := f"{name}-{seen}") not in kept():
            chosen = test if seen == SIZES[-1] else test[::SKIPPED]
            before = max((size for size in sizes if size < seen), default=0) // settings.rankings_per_step
            keep(entry, {"losses": losses[before:], "test": judge(model, dev, chosen)})
            print(f"{time.perf_counter() - start:.0f} s", flush=True)
        return seen >= sizes[-1]

    with Run(work / "checkpoints") as run:
        checkpoint = Checkpoint(run=run, name=name, key=content_hash(repr(settings)), every=5)
        train_reward_model(model, rows, settings, checkpoint, look)
        checkpoint.discard()
    calibrate(model, dev)
    shutil.rmtree(work / name, ignore_errors=True)
    model.save(work / name)


def judge(model: RewardModel, dev: list[Ranking], test: list[Ranking]) -> dict[str, Any]:
    """Everything about the model as it is, its scores on the scale that `dev` sets."""
    found = comparisons(dev, score_rankings(model, dev, Progress(quiet=True)))
    scale = fit_scale(found.differences, found.wins)
    groups = [model.encode(r.prompt.messages, r.texts) for r in test]
    heads = [[[scale * s for s in own] for own in group] for _, group in model.score_heads(groups)]
    scores = [[statistics.fmean(own) for own in group] for group in heads]
    facts = agreement_with_people(test, scores)
    facts |= {"subsets": by_subset(test, scores), "calibration": calibration(test, scores)}
    facts |= {"length": length_bias(test, scores), "hits": [_hit(a, b) for a, b in scores], "scale": scale}
    if model.num_heads > 1:
        facts["agreeing"] = agreeing_heads(heads)
    return facts


def _hit(better: float, worse: float) -> float:
    """As accuracy counts: a tie is half right."""
    return 0.5 if better == worse else float(better > worse)


def agreeing_heads(heads: list[list[list[float]]]) -> dict[str, Any]:
    """Accuracy where all heads of an ensemble choose the same answer, and where they do not (the first is preferred).

    `heads`: of each pair [2][K].
    """
    votes = [[a > b for a, b in zip(*pair, strict=True)] for pair in heads]
    hits = [float(statistics.fmean(pair[0]) > statistics.fmean(pair[1])) for pair in heads]
    sides: dict[bool, list[float]] = {True: [], False: []}
    for own, hit in zip(votes, hits, strict=True):
        sides[len(set(own)) == 1].append(hit)
    names = {True: "all_agree", False: "some_differ"}
    return {names[side]: bootstrap(values).as_dict() for side, values in sides.items()}


def people(folder: Path, work: Path) -> None:
    """The largest guided model on the choices of three annotators, on prompts of another kind."""
    decided = [r for r in read_pandalm(folder) if r.pairs]
    model = RewardModel.load(str(work / "curve-guided")).for_scoring()
    items = {(r.prompt.id, frozenset(r.texts)): r for r in decided}
    found = score_rankings(model, list(items.values()), Progress(quiet=True))
    known = {key: dict(zip(r.texts, own, strict=True)) for (key, r), own in zip(items.items(), found, strict=True)}
    scores = [[known[r.prompt.id, frozenset(r.texts)][text] for text in r.texts] for r in decided]
    facts = annotators(decided, scores)
    keep("people", facts | {"accuracy": facts["model_majority"]})


def peer(folder: Path, work: Path, pairs: int, environment: Path) -> None:
    """The same pairs, steps, learning rate and adapter in both; three runs of each in turn for the time."""
    train, test = read_hh(folder)
    rows = training_rows(train, pairs)
    settings = PEER
    path = work / "peer.jsonl"
    write_preferences(path, rows)
    choice = _fastest(environment, rows, work, settings)
    seconds: dict[str, list[float]] = {"opentao": [], "trl": []}
    for turn in range(3):
        out = work / f"peer-opentao-{turn}"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        train_to_folder(DEFAULT_MODEL, rows, settings, out, Progress(quiet=True))
        seconds["opentao"].append(time.perf_counter() - start)
        seconds["trl"].append(_trl(environment, path, work / "peer-trl", settings, choice))
    models = (RewardModel.load(str(work / name)).for_scoring() for name in ("peer-opentao-0", "peer-trl"))
    ours, theirs = (judge(model, rows[:SCALE_PAIRS], test) for model in models)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    keep(
        "peer",
        {
            "pairs": pairs,
            "trl": choice,
            "seconds": seconds,
            "pairs_per_second": {name: pairs / s for name, s in medians.items()},
            "times_faster": medians["trl"] / medians["opentao"],
            "accuracy": {"opentao": ours["accuracy"], "trl": theirs["accuracy"]},
            "difference": paired_difference(ours["hits"], theirs["hits"]).as_dict(),
        },
    )


def _fastest(environment: Path, rows: list[Ranking], work: Path, settings: RewardTraining) -> dict[str, Any]:
    """TRL's best configuration: small micro-batches pad less, large ones multiply faster; bf16 products or fp32."""
    path = work / "peer-trial.jsonl"
    write_preferences(path, rows[:TRIAL_PAIRS])
    choices = [{"micro_batch": n, "bf16": bf16} for bf16 in (True, False) for n in (2, 4, 8)]
    return min(choices, key=lambda choice: _trl(environment, path, work / "peer-trial", settings, choice))


def _trl(environment: Path, pairs: Path, out: Path, settings: RewardTraining, choice: dict[str, Any]) -> float:
    """One whole training by RewardTrainer in its own environment; returns the seconds that it says training took."""
    shutil.rmtree(out, ignore_errors=True)
    asked = {
        "pairs": str(pairs),
        "out": str(out),
        "model": _classifier(out.parent),
        "lr": settings.lr,
        "rank": settings.lora_rank,
        **choice,
        "accumulate": settings.rankings_per_step // choice["micro_batch"],
    }
    command = [str(environment / "bin" / "python"), str(HERE / "reward_trl.py"), json.dumps(asked)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def _classifier(work: Path) -> str:
    """The guided model before any training, so that both start from the same weights and the same template."""
    folder = work / "start"
    if not folder.exists():
        RewardModel.from_causal_lm(DEFAULT_MODEL).save(folder)
    return str(folder)


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return found


def keep(name: str, facts: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(kept() | {name: facts}, indent=1) + "\n")
    write_page()
    print(name, json.dumps(facts.get("test", facts).get("accuracy")), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "options", "peer", "people"])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "opentao-reward")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--peer-env", type=Path, default=HERE / "envs" / "trl")
    given = parser.parse_args()
    if not (given.data / "hh-rlhf").is_dir():
        sys.exit(f"{given.data}: no hh-rlhf there; see --data")
    given.work.mkdir(parents=True, exist_ok=True)
    use_large_pages()
    if given.what == "peer":
        peer(given.data, given.work, given.pairs, given.peer_env)
    else:
        {"curve": curve, "options": options, "people": people}[given.what](given.data, given.work)


if __name__ == "__main__":
    main()
