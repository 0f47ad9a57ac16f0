"""Multi-task: one run over all small tasks, beside one run for each on its share of the same number of prompts."""

from __future__ import annotations

import small
from lab import SEEDS, Facts, Lab
from tasks import TASKS


def measure(lab: Lab, size: str = "3M", train: Facts | None = None) -> None:
    every = small.CONFIG["prompts_per_round"]
    for seed in SEEDS:
        for tasks in (TASKS, *((task,) for task in TASKS)):

            def one(tasks: tuple[str, ...] = tasks, seed: int = seed) -> Facts:
                name = "all" if tasks == TASKS else tasks[0]
                directory = lab.work / "multi" / f"{name}-{seed}"
                prompts = every * len(tasks) // len(TASKS)
                settings = {"seed": seed, "rounds": 2, "scorers": small.EXACT, "prompts_per_round": prompts}
                folder = small.folder(lab, size, tasks)
                return lab.run("tao.yaml", directory, settings | (train or {}), cwd=folder)

            lab.cell("multi-task", f"{'all' if tasks == TASKS else tasks[0]}/{seed}", one)
