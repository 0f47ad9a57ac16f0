"""What every stage of a run shares: the run directory, the config, prompts, engine and scorers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from opentao.bestofn import FEWEST
from opentao.config import Config, PromptsConfig, ScorerConfig, dump_config
from opentao.errors import ConfigError, StoreError
from opentao.models import hub_commit, resolve_model
from opentao.progress import Progress
from opentao.prompts import Reading, counted, read_prompts
from opentao.scorers.plugin import source_file
from opentao.scorers.registry import build_scorer, module_path
from opentao.scorers.run import Gate, is_relative, largest_group
from opentao.split import Split, clusters, split, split_given
from opentao.store import Run, file_hash, prompts_to_table, table_to_prompts, write_whole
from opentao.types import Engine, Prompt, SamplingPlan, Scorer, content_hash

Item = TypeVar("Item")

FEW_CLUSTERS = 10  # of held-out prompts; fewer are said
STAGES = ("generate", "score", "train", "evaluate")
IMPORTED = ("prompts/train.parquet", "prompts/heldout.parquet", "set_aside.jsonl", "import.json")
AUDIT = "audit"  # the audit's label in score files, whatever its own name


@dataclass(slots=True)
class Session:
    """An open run. Stages take it as their first argument."""

    run: Run
    config: Config
    progress: Progress
    engine: Engine
    scorers: list[Scorer]
    audit: Scorer | None
    train_prompts: list[Prompt]
    heldout: list[Prompt]
    scorers_key: str  # hash of the scorers that make the reward, and of the files they name
    audit_key: str  # the same of the audit; "" without one
    alike: list[int] | None = None  # of each held-out prompt the cluster (`split.clusters`); None: no two are in one
    counted: dict[str, dict[str, float]] = field(default_factory=lambda: {"seconds": {}, "tokens": {}})
    """What `spent` has seen of `progress`; shared by rounds."""

    @property
    def weights(self) -> dict[str, float]:
        return {s.label: s.weight for s in self.config.scorers}

    @property
    def gates(self) -> dict[str, Gate]:
        return {s.label: Gate(at_least=s.gate.at_least, cap=s.gate.cap) for s in self.config.scorers if s.gate}

    @property
    def interval_args(self) -> dict[str, Any]:
        """How intervals over the held-out prompts are made: near-duplicates, and what `split_by` joins, are one."""
        settings = self.config.evaluate
        return {
            "confidence": settings.confidence,
            "resamples": settings.bootstrap,
            "seed": self.config.seed,
            "clusters": self.alike,
        }

    @property
    def relative(self) -> bool:
        """Does any scorer, the audit among them, judge an answer by the others of its group?"""
        return any(is_relative(s) for s in (*self.scorers, *([self.audit] if self.audit else [])))

    def spent(self, round_: str, *, made: bool = False) -> dict[str, dict[str, float]]:
        """Seconds and tokens by stage that a round (``round-1``) has cost so far, earlier starts included.

        Every stage calls it when it ends, so a kill loses what the stage that it struck had spent, and no more. `made`:
        something was, though no token was counted.
        """
        path = self.run.path(f"{round_}/spent.json")  # a record, made from nothing: the manifest does not know it
        total = _record(path) or {w: dict.fromkeys(STAGES, 0) for w in self.counted}
        now = counts(self.progress)
        new = {w: {s: now[w].get(s, 0) - self.counted[w].get(s, 0) for s in STAGES} for w in now}
        self.counted.update(now)
        if made or any(new["tokens"].values()):  # else nothing was made: only the time to see that it is there
            total = {w: {s: total[w][s] + new[w][s] for s in STAGES} for w in total}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(total))
        return total

    def of_round(self, round_: int) -> Session:
        """The same, with the config by which a round samples and trains."""
        return replace(self, config=self.config.of_round(round_))

    def plan_of_round(self, round_: int) -> SamplingPlan:
        """How a round's groups are sampled."""
        return self.config.of_round(round_).generate.plan(int(content_hash(self.config.seed, round_), 16) % 2**31)

    def prompts_of_round(self, round_: int) -> list[Prompt]:
        """Round 1 starts at the first training prompt; rounds go on from there, around the end."""
        prompts = self.train_prompts
        size = min(self.config.prompts_per_round or -(-len(prompts) // self.config.rounds), len(prompts))
        start = (round_ - 1) * size
        return [prompts[(start + i) % len(prompts)] for i in range(size)]


@contextmanager
def open_session(
    config: Config, directory: Path, progress: Progress, engine: Engine | None = None
) -> Iterator[Session]:
    """Lock the run directory, import the prompts, build scorers and engine.

    Raises:
        DataError, ConfigError: bad prompts or scorers.
        StoreError: the directory is in use, or holds the run of another config.
    """
    scorers = [build_scorer(s) for s in config.scorers]
    audit = build_scorer(config.audit.model_copy(update={"name": AUDIT})) if config.audit else None
    _check_group_sizes(config, scorers, audit)
    with Run(directory) as run:
        _same_config(run, config)
        train, heldout = _import_prompts(run, config, progress)
        alike = _alike(heldout, config.prompts)
        if (independent := len(set(alike) if alike else heldout)) < FEW_CLUSTERS:
            progress.note(
                f"the {counted(len(heldout), 'held-out prompt')} are {counted(independent, 'cluster')} of like ones"
                f" (prompts.near_duplicate, prompts.split_by): intervals over so few say little, below {FEWEST} nothing"
            )
        yield Session(
            run=run,
            config=config,
            progress=progress,
            engine=engine or _default_engine(config),
            scorers=scorers,
            audit=audit,
            train_prompts=train,
            heldout=heldout,
            alike=alike,
            counted=counts(progress),
            scorers_key=content_hash([_fingerprint(s) for s in config.scorers]),
            audit_key=content_hash(_fingerprint(config.audit)) if config.audit else "",
        )


def _record(path: Path) -> dict[str, dict[str, float]] | None:
    """What the file holds; None without one, or if it is broken: a machine that lost power may leave it empty."""
    try:
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def counts(progress: Progress) -> dict[str, dict[str, float]]:
    """Seconds and tokens by stage so far."""
    return {"seconds": dict(progress.seconds), "tokens": dict(progress.tokens)}


def _alike(prompts: Sequence[Prompt], config: PromptsConfig) -> list[int] | None:
    found = clusters(prompts, config)
    if len(found) == len(prompts):
        return None
    number = {prompt.id: i for i, cluster in enumerate(found) for prompt in cluster}
    return [number[prompt.id] for prompt in prompts]


def _check_group_sizes(config: Config, scorers: Sequence[Scorer], audit: Scorer | None) -> None:
    trained = {
        "generate.group_size": config.generate.group_size,
        "later_rounds.generate.group_size": config.of_round(2).generate.group_size,
    }
    heldout = {"evaluate.base_group_size": config.evaluate.base_group_size}
    for scorer in (*scorers, *([audit] if audit else [])):
        most = largest_group(scorer)
        for key, size in (heldout if scorer is audit else trained | heldout).items():
            if most is not None and size > most:
                raise ConfigError(f"{key}: {size} answers, but scorer {scorer.name} takes at most {most} at once")


def _default_engine(config: Config) -> Engine:
    from opentao.engines.group import GroupEngine

    return GroupEngine(batch_responses=config.generate.batch_responses)


def _same_config(run: Run, config: Config) -> None:
    """A run directory belongs to one task: model and prompts may not change under it; other settings remake stages.

    Where nothing was sampled yet, they may: a mistake in the first config is no reason for another directory.
    """
    text = dump_config(config)
    path = run.path("config.yaml")
    identity = content_hash(config.model, config.prompts.model_dump(mode="json"))
    if run.have("identity.json") and run.read_json("identity.json") != identity:
        if run.names("round-"):
            raise StoreError(
                f"{run.root}: holds a run of another model or other prompts ({path}); use another directory"
            )
        for name in IMPORTED:
            run.discard(name)
    run.write_json("identity.json", identity, identity)
    run.commit("config.yaml", content_hash(text), lambda p: _write(p, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _import_prompts(run: Run, config: Config, progress: Progress) -> tuple[list[Prompt], list[Prompt]]:
    """Read and split once; later starts use what the run directory holds, so the user's file may grow meanwhile."""
    names = IMPORTED
    if not all(run.have(name) for name in names):
        with progress.stage("import", total=1, unit="files") as step:
            readings, sides = _read_and_split(config.prompts)
            files = [config.prompts.path, config.prompts.heldout_path]
            key = content_hash([file_hash(Path(f)) for f in files if f], config.prompts.model_dump(mode="json"))
            understood = "; held out: ".join(r.understood for r in readings)
            run.write_table(names[0], key, prompts_to_table(sides.train))
            run.write_table(names[1], key, prompts_to_table(sides.heldout))
            lines = "".join(
                json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for r in readings for row in r.set_aside
            )
            run.commit(names[2], key, lambda p: _write(p, lines))
            run.write_json(names[3], key, {"understood": understood, "rows": sum(r.num_rows for r in readings)})
            step.advance(1)
        progress.note(understood)
    return tuple(table_to_prompts(run.read_table(name)) for name in names[:2])  # type: ignore[return-value]


def _read_and_split(config: PromptsConfig) -> tuple[list[Reading], Split]:
    """The files as they were read, and both sides."""
    readings = [read_prompts(Path(config.path))]
    if config.heldout_path is None:
        return readings, split(readings[0].prompts, config)
    readings.append(read_prompts(Path(config.heldout_path)))
    return readings, split_given(readings[0].prompts, readings[1].prompts, config)


def _fingerprint(config: ScorerConfig) -> dict[str, Any]:
    """The scorer's config; a file, a model folder or a module (``checks:polite``) that it names counts by its content.

    So does the module of an installed scorer, and a reward model of a hub by its commit. What a module itself imports
    does not count.

    Raises:
        ModelError: the config of a hub's reward model cannot be had.
    """
    named = {
        key: file_hash(Path(path))
        for key, value in [("type", module_path(config)), *sorted(config.args.items())]
        if isinstance(value, str) and (path := _named_file(value))
    }
    if config.calibration:
        named["calibration"] = file_hash(Path(config.calibration))
    if config.type == "reward_model" and "model" not in named:
        where = resolve_model(config.args["model"])
        named["model"] = hub_commit(where) if isinstance(where, str) else file_hash(where)
    return {"config": config.model_dump(mode="json"), "files": named}


def _named_file(value: str) -> str | None:
    if os.path.isfile(value) or os.path.isfile(os.path.join(value, "config.json")):
        return value
    return source_file(value)


def scores_of(groups: str) -> str:
    """The shard of scores beside a shard of groups."""
    return groups.replace("/groups/", "/scores/").replace("/greedy/", "/greedy-scores/")


def shards(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
