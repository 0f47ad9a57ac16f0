"""Model size: the same tasks for decoders of two sizes that are trained here, and for 135M, which is shown examples."""

from __future__ import annotations

from pathlib import Path

import small
from decoders import SIZES
from lab import SEEDS, Facts, Lab, made_of

RATES = {"1M": 4e-4, "3M": 4e-4, "135M": 2e-4}


def measure(lab: Lab, train: Facts | None = None) -> None:
    for size in (*SIZES, "135M"):
        folder = small.folder(lab, size)
        for seed in SEEDS:
            settings = {"rounds": 2, "scorers": small.EXACT} | (train or {}) | {"train.learning_rate": RATES[size]}
            directory = lab.work / "sizes" / f"{size}-{seed}"

            def one(d: Path = directory, s: Facts = settings | {"seed": seed}, folder: Path = folder) -> Facts:
                return lab.run("tao.yaml", d, s, cwd=folder)

            lab.cell("sizes", f"{size}/{seed}", one, [made_of(folder), settings], directory)
