"""Measure every comparison and write RESULTS.md: python benchmarks/run.py [NAME ...]

Without names all of it, about an hour and a half on two cores; with names those alone, the others keep their figures. A
comparison is one `tao bench` command, whose systems take turns in one run. What a comparison gives is kept in
results.json as soon as it is there, so that a run that is stopped loses one comparison at most.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opentao.bench.case import Case, make_prompts
from opentao.bench.command import run_bench
from opentao.bench.run import BenchError, Worker, as_text
from opentao.bestofn import paired_difference
from opentao.models import DEFAULT_MODEL, load_tokenizer, resolve_model

HERE = Path(__file__).parent
REPEATS = 3
SHORT, LONG = 62, 842


@dataclass(kw_only=True, slots=True)
class Comparison:
    """One `tao bench` command and what it should show."""

    kind: Any
    prompts: int
    prompt_tokens: int
    peers: tuple[str, ...]
    dtype: str = "float32"
    bars: dict[str, float] = field(default_factory=dict)  # peer: how many times faster we should be
    options: dict[str, Any] = field(default_factory=dict)  # of the peer

    def run(self) -> dict[str, Any]:
        sizes = {"prompts": self.prompts, "prompt_tokens": self.prompt_tokens, "group_size": 8, "new_tokens": 64}
        settings = {"dtype": self.dtype, "lora": True, "repeats": REPEATS, "options": dict(self.options)}
        return run_bench(self.kind, sizes, DEFAULT_MODEL, self.peers, (), settings)


ALL = ("transformers", "vllm", "llama.cpp")
COMPARISONS = {
    "generate-short": Comparison(
        kind="generate",
        prompts=16,
        prompt_tokens=SHORT,
        peers=("vllm", "llama.cpp"),
        bars={"vllm": 3, "llama.cpp": 1},
    ),
    "generate-short-transformers": Comparison(  # apart: its batch was once chosen wrongly, and measured again alone
        kind="generate", prompts=16, prompt_tokens=SHORT, peers=("transformers",), bars={"transformers": 3}
    ),
    "generate-long": Comparison(
        kind="generate",
        prompts=4,
        prompt_tokens=LONG,
        peers=ALL,
        bars={"transformers": 8, "vllm": 2, "llama.cpp": 1},
    ),
    "generate-long-16": Comparison(  # transformers takes the better part of an hour to choose its batch here
        kind="generate", prompts=16, prompt_tokens=LONG, peers=("vllm", "llama.cpp"), bars={"vllm": 2, "llama.cpp": 1}
    ),
    "generate-short-bf16": Comparison(
        kind="generate", prompts=16, prompt_tokens=SHORT, peers=("vllm",), dtype="bfloat16"
    ),
    "generate-short-int8": Comparison(
        kind="generate", prompts=16, prompt_tokens=SHORT, peers=("llama.cpp",), dtype="int8", bars={"llama.cpp": 1}
    ),
    "generate-long-int8": Comparison(
        kind="generate", prompts=4, prompt_tokens=LONG, peers=("llama.cpp",), dtype="int8", bars={"llama.cpp": 1}
    ),
    "train-short": Comparison(kind="train", prompts=4, prompt_tokens=SHORT, peers=("trl",), bars={"trl": 2}),
    "train-long": Comparison(  # with micro-batches of 8 TRL was slower or killed: 22 GB
        kind="train", prompts=1, prompt_tokens=LONG, peers=("trl",), bars={"trl": 8}, options={"micro_batch": 4}
    ),
    "score-long": Comparison(
        kind="score", prompts=2, prompt_tokens=LONG, peers=("transformers",), bars={"transformers": 5}
    ),
    "reward-train-long": Comparison(kind="reward-train", prompts=4, prompt_tokens=LONG, peers=("trl",)),
    # The micro-batch that TRL chose in the train comparisons: trying both again would take as long as the rest.
    "round-short": Comparison(
        kind="round", prompts=4, prompt_tokens=SHORT, peers=("trl",), bars={"trl": 3}, options={"micro_batch": 4}
    ),
    "round-long": Comparison(
        kind="round", prompts=1, prompt_tokens=LONG, peers=("trl",), bars={"trl": 8}, options={"micro_batch": 4}
    ),
}


@dataclass(kw_only=True, slots=True)
class Growth:
    """The same work in two sizes, (prompts, N, new tokens), and how much the second may cost of the first."""

    what: str
    sizes: tuple[tuple[int, int, int], tuple[int, int, int]]
    measure: str  # "seconds" or "memory"
    bound: float
    repeats: int = REPEATS

    def run(self) -> dict[str, Any]:
        """Two processes in turn. Returns seconds of each run and peak memory in bytes, of both."""
        model = str(resolve_model(DEFAULT_MODEL))
        prompts = make_prompts(load_tokenizer(model), max(count for count, _, _ in self.sizes), LONG)
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            workers = []
            for count, group_size, new_tokens in self.sizes:
                case = Case(
                    kind="generate",
                    model=model,
                    prompt_ids=prompts[:count],
                    group_size=group_size,
                    new_tokens=new_tokens,
                    threads=os.cpu_count() or 1,
                )
                label = f"{count}x{group_size}"
                path = Path(folder) / f"{label}.json"
                path.write_text(json.dumps(case.as_dict()))
                workers.append(Worker([sys.executable, "-m", "opentao.bench.worker", str(path)], Path(folder), label))
                stack.callback(workers[-1].close)
            seconds: list[list[float]] = [[], []]
            for _ in range(self.repeats):
                for worker, times in zip(workers, seconds, strict=True):
                    times.append(worker.turn()["seconds"])
            peaks = [worker.peak_bytes for worker in workers]
        small, large = peaks if self.measure == "memory" else map(statistics.median, seconds)
        return {"kind": "growth", "what": self.what, "seconds": seconds, "peak_bytes": peaks, "ratio": large / small}


GROWTH = {
    "growth-responses": Growth(
        what="N from 8 to 16, 842-token prompts", sizes=((2, 8, 64), (2, 16, 64)), measure="seconds", bound=1.5
    ),
    "growth-prompts": Growth(
        what="8 to 16 prompts of 842 tokens", sizes=((8, 8, 64), (16, 8, 64)), measure="seconds", bound=2.05
    ),
    "growth-memory": Growth(
        what="32 to 64 prompts of 842 tokens, 4 new tokens",
        sizes=((32, 8, 4), (64, 8, 4)),
        measure="memory",
        bound=1.1,
        repeats=1,
    ),
}
LIMIT_SHARE = 0.6
MEMORY_SHARE = 0.5


# ---------------------------------------------------------------------------------------------------- the page


def bars(name: str, result: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """Rows of the first table: what, measured, bar, held."""
    if result["kind"] == "growth":
        growth = GROWTH[name]
        what = f"generate, {growth.what}: {growth.measure}"
        return [(what, result["ratio"], f"at most {growth.bound:g}×", result["ratio"] <= growth.bound)]
    comparison = COMPARISONS[name]
    what = f"{comparison.kind}, {comparison.prompts} × {comparison.prompt_tokens}-token prompts, {comparison.dtype}"
    rows = []
    for peer, least in comparison.bars.items():
        if (times := result["times_faster"].get(peer)) is not None:
            rows.append((f"{what}: faster than {peer}", times, f"at least {least:g}×", times >= least))
    ours = result["systems"][0]
    if name == "generate-short":
        share = ours["tokens_per_second"] / max(result["limit_tokens_per_second"].values())
        text = "share of the matrix-product limit"
        rows.append((f"{what}: {text}", share, f"at least {LIMIT_SHARE:g}", share >= LIMIT_SHARE))
    if name == "train-long" and len(result["systems"]) > 1:
        share = ours["peak_bytes"] / result["systems"][1]["peak_bytes"]
        rows.append((f"{what}: peak memory over TRL's", share, f"at most {MEMORY_SHARE:g}", share <= MEMORY_SHARE))
    return rows


def page(results: dict[str, Any], gpu: dict[str, Any], reward: dict[str, Any]) -> str:
    """RESULTS.md."""
    parts = [
        "# Measured\n\nWritten by `benchmarks/run.py`, `benchmarks/gpu.py`, `benchmarks/reward.py` and"
        " `benchmarks/run_all.py`; do not edit. How to repeat it: [README.md](README.md). Systems took turns in one"
        " run, at equal work: every system made exactly as many tokens. Seconds are medians, with the range of all"
        " runs. Memory is the most that a system's processes held.\n"
    ]
    for title, found in (("On a CPU", results), ("On a GPU", gpu)):
        parts.append(f"## {title}\n")
        if not found:
            parts.append("Not measured: no device was at hand.\n")
            continue
        rows = [row for name in (*COMPARISONS, *GROWTH) if name in found for row in bars(name, found[name])]
        if rows and found is results:
            lines = [
                f"| {what} | {value:.2f} | {bar} | {'yes' if held else '**no**'} |" for what, value, bar, held in rows
            ]
            parts.append("\n".join(["| | measured | bar | held |", "|---|---|---|---|", *lines]) + "\n")
        for name, result in found.items():
            parts.append(f"### {name}\n\n{result['machine']}, {result['date']}.\n\n{_section(result)}")
    return "\n".join([*parts, *reward_sections(reward), *evidence_sections()])


def evidence_sections() -> list[str]:
    """What `benchmarks/run_all.py` measured, if it did."""
    sys.path.insert(0, str(HERE / "evidence"))
    from lab import Lab
    from page import evidence

    sys.path.pop(0)
    return evidence(Lab(work=HERE))


def evidence_documents() -> dict[Path, str]:
    """Pages that show some of it."""
    sys.path.insert(0, str(HERE / "evidence"))
    from lab import Lab
    from page import documents

    sys.path.pop(0)
    return documents(Lab(work=HERE))


def reward_sections(found: dict[str, Any]) -> list[str]:
    """What `benchmarks/reward.py` measured, if it did."""
    parts = ["## Reward models on people's choices\n"]
    if not found:
        return [*parts, "Not measured: `benchmarks/reward.py` needs the data beside the project.\n"]
    curve = {name: facts for name, facts in found.items() if name.startswith(("curve-", "option-"))}
    if curve:
        parts.append(
            "hh-rlhf, helpful: a model of 135M after so many training pairs of one pass, beside “the longer answer"
            " wins” on the same test rows (a third of them before the last size). The learning rate is constant over"
            " the first half of 4,000 pairs and then falls to 0. Intervals are over rows. “On the way”: nats a pair"
            " since the size before, each before it was trained on; a coin’s are 0.693.\n\n"
            "| head, or what differs | pairs | accuracy | rows | over “longer” | longer preferred | shorter preferred |"
            " calibration error | nats a choice | on the way |\n|---|---|---|---|---|---|---|---|---|---|"
        )
        parts += [_curve_row(name, facts) for name, facts in curve.items()]
        test = max((facts["test"] for facts in curve.values()), key=lambda own: own["pairs"])
        subsets = ", ".join(f"{n} {own['longer_wins']['mean']:.2f}" for n, own in test["subsets"].items())
        own = ", ".join(f"{n} {own['accuracy']['mean']:.2f}" for n, own in test["subsets"].items())
        parts.append(
            f"\nOn {test['pairs']} rows “the longer answer wins” is right in {_mean(test['longer_wins'])}: {subsets};"
            f" the model in {_mean(test['accuracy'])}: {own}.\n"
        )
        notes = [f"* {name}: {facts['note']}" for name, facts in curve.items() if "note" in facts]
        parts += ["\n".join(notes) + "\n"] if notes else []
        parts += _heads_compared(curve)
    if peer := found.get("peer"):
        speed = ", ".join(f"{name} {value:.2f}" for name, value in peer["pairs_per_second"].items())
        paired = f", paired difference {_mean(peer['difference'])}" if "difference" in peer else ""
        parts.append(
            f"Against TRL's RewardTrainer, the same {peer['pairs']} pairs, steps, adapter and start: pairs a second"
            f" {speed}, **{peer['times_faster']:.2f}×**; held-out accuracy {_mean(peer['accuracy']['opentao'])} against"
            f" {_mean(peer['accuracy']['trl'])}{paired}.\n"
        )
    if people := found.get("people"):
        names = ", ".join(f"{name} {_mean(own)}" for name, own in people["model_human"].items())
        parts.append(
            f"pandalm-human, {people['pairs']} pairs that several people judged: people with each other"
            f" {_mean(people['human_human'])}; the model with their majority {_mean(people['model_majority'])}, with"
            f" each: {names}; the longer answer with their majority {_mean(people['longer_majority'])}."
            f"{' Note: ' + people['note'] + '.' if 'note' in people else ''}\n"
        )
    return parts


def _heads_compared(curve: dict[str, Any]) -> list[str]:
    """Guided against random head, paired, at every size that both have; and what an ensemble's agreement says."""
    lines = []
    for name, facts in curve.items():
        guided = curve.get(name.replace("-random-", "-guided-"))
        if guided is not None and guided is not facts:
            way = paired_difference(guided["losses"], facts["losses"]).as_dict()
            hits = [own["test"].get("hits") for own in (guided, facts)]
            test = f"accuracy {_mean(paired_difference(*hits).as_dict())}, " if all(hits) else ""
            lines.append(f"* {name.rpartition('-')[2]} pairs: {test}nats a pair on the way {_mean(way)}")
        if agreeing := facts["test"].get("agreeing"):
            some, all_ = agreeing["some_differ"], agreeing["all_agree"]
            lines.append(
                f"* {name}: where all heads choose the same answer it is right in {_mean(all_)} of {all_['n']} rows,"
                f" else in {_mean(some)} of {some['n']}"
            )
    title = "Guided less random head, on the same rows and the same steps; and the ensemble:"
    return [title + "\n\n" + "\n".join(lines) + "\n"] if lines else []


def _curve_row(name: str, facts: dict[str, Any]) -> str:
    _, head, pairs = name.split("-")
    test = facts["test"]
    cells = [head, pairs, _mean(test["accuracy"]), str(test["pairs"]), _mean(test["over_longer"])]
    cells += [f"{test['length'][side]['mean']:.2f}" for side in ("longer_preferred", "shorter_preferred")]
    cells += [f"{test['calibration']['error']:.3f}", f"{test['calibration']['loss']:.3f}"]
    cells.append(f"{statistics.fmean(facts['losses']):.3f}")
    return f"| {' | '.join(cells)} |"


def _mean(mean: dict[str, Any]) -> str:
    return f"{mean['mean']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})"


def _section(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"Not measured: {result['error']}\n"
    if result["kind"] == "growth":
        small, large = (f"{statistics.median(s):.1f} s ({min(s):.1f} to {max(s):.1f})" for s in result["seconds"])
        a, b = (f"{peak / 1e9:.2f} GB" for peak in result["peak_bytes"])
        return f"{result['what']}: {small} to {large}, {result['ratio']:.2f}×; peak memory {a} to {b}.\n"
    sizes = (
        f"{result['prompts']} prompts of {result['prompt_tokens']} tokens, N = {result['group_size']},"
        f" {result['new_tokens']} tokens a response, {result['dtype']}"
    )
    return f"{sizes}.\n\n{as_text(result)}"


def machine() -> str:
    """Processor, cores, what it multiplies natively, torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if f in flags]
    model = facts.get("model name", platform.processor() or platform.machine())
    return f"{os.cpu_count()} cores of {model} ({', '.join(wide)}), torch {torch.__version__}"


def keep(path: Path, name: str, result: dict[str, Any], where: str) -> None:
    """Add one result to the file, then write the page again."""
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = result | {"machine": where, "date": time.strftime("%Y-%m-%d")}
    path.write_text(json.dumps(results, indent=1) + "\n")
    write_page()


def write_page() -> None:
    files = [HERE / "results.json", HERE / "results-gpu.json", HERE / "reward_results.json"]
    (HERE / "RESULTS.md").write_text(page(*(json.loads(p.read_text()) if p.exists() else {} for p in files)))
    for path, text in evidence_documents().items():
        path.write_text(text, encoding="utf-8")


def main() -> None:
    names = [*COMPARISONS, *GROWTH]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(names)}; none: all")
    parser.add_argument("--page", action="store_true", help="only write RESULTS.md again")
    given = parser.parse_args()
    if unknown := set(given.name) - set(names):
        parser.error(f"no such comparison: {', '.join(sorted(unknown))}")
    os.chdir(HERE.parent)  # the peers' environments are looked for from here
    write_page()
    for name in [] if given.page else given.name or names:
        start = time.perf_counter()
        try:
            result = (COMPARISONS.get(name) or GROWTH[name]).run()
        except BenchError as error:
            print(f"{name}: {error}", flush=True)
            continue
        keep(HERE / "results.json", name, result, machine())
        shown = result.get("times_faster", result.get("ratio"))
        print(f"{name}: {shown} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
