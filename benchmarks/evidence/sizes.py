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
            settings = {"seed": seed, "rounds": 2, "scorers": small.EXACT} | (train or {})
            settings |= {"train.learning_rate": RATES[size]}

            def one(size: str = size, settings: Facts = settings, folder: Path = folder) -> Facts:
                directory = lab.work / "sizes" / f"{size}-{settings['seed']}"
                return lab.run("tao.yaml", directory, settings, cwd=folder)

            lab.cell("sizes", f"{size}/{seed}", one, [made_of(folder), settings])
