"""Tuning compute: first try and audit against N and rounds, and which target_n for which N.

A budget is a number of generated answers: N times the rounds, at the same number of prompts a round. What a run of
fewer rounds would give is read off the run of more.
"""

from __future__ import annotations

import small
from lab import SEEDS, Facts, Lab, essence, made_of, summary_of

GROUP_SIZES = (2, 4, 8, 16, 32)
ROUNDS = (1, 2, 4)
TARGETS = (4, 16, 64)


def measure(lab: Lab, size: str = "3M", train: Facts | None = None) -> None:
    folder = small.folder(lab, size)
    place = lab.work / "compute" / size
    for seed in SEEDS:
        same = {"scorers": small.EXACT} | (train or {})
        common = same | {"seed": seed}

        def rounds(n: int, seed: int = seed, common: Facts = common) -> Facts:
            directory = place / f"{n}-{seed}"
            settings = common | {"rounds": max(ROUNDS), "generate.group_size": n}
            lab.run("tao.yaml", directory, settings, cwd=folder)
            done = len(summary_of(directory)["rounds"])
            return {str(r): essence(directory, r) for r in ROUNDS if r <= done}

        def target(n: int, t: int, seed: int = seed, common: Facts = common) -> Facts:
            directory = place / f"{n}-target-{t}-{seed}"
            settings = common | {"rounds": 1, "generate.group_size": n, "train.target_n": t}
            if not (start := place / f"{n}-{seed}").exists():  # its cell is kept, its run is not
                rounds(n, seed, common)
            return lab.run("tao.yaml", directory, settings, cwd=folder, start=start)

        for n in GROUP_SIZES:
            of = [made_of(folder), same, ROUNDS]
            lab.cell("compute", f"{n}/{seed}", lambda n=n: rounds(n), of, place / f"{n}-{seed}")
        for n in (8, 32):
            for t in TARGETS:
                name, directory = f"{n}/target {t}/{seed}", place / f"{n}-target-{t}-{seed}"
                lab.cell("compute", name, lambda n=n, t=t: target(n, t), [made_of(folder), same], directory)
