"""Multi-task: one run over all small tasks, beside one run for each on its share of the same number of prompts."""

from __future__ import annotations

from pathlib import Path

import small
from lab import SEEDS, Facts, Lab, made_of
from tasks import TASKS


def measure(lab: Lab, size: str = "3M", train: Facts | None = None) -> None:
    every = small.CONFIG["prompts_per_round"]
    for seed in SEEDS:
        for tasks in (TASKS, *((task,) for task in TASKS)):
            name = "all" if tasks == TASKS else tasks[0]
            folder = small.folder(lab, size, tasks)
            prompts = every * len(tasks) // len(TASKS)
            settings = {"rounds": 2, "scorers": small.EXACT, "prompts_per_round": prompts} | (train or {})
            directory = lab.work / "multi" / size / f"{name}-{seed}"

            def one(d: Path = directory, s: Facts = settings | {"seed": seed}, folder: Path = folder) -> Facts:
                return lab.run("tao.yaml", d, s, cwd=folder)

            lab.cell("multi-task", f"{name}/{seed}", one, [made_of(folder), settings], directory)
