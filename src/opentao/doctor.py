"""`tao doctor`: what is installed, what the machine has, the state of the cache; with a config, what it will cost.

Functions return plain data, ready for `--json`; `render` prints it for people. The cost comes from `cost.py`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentao.builtin import BUILT_IN, cache_root, cache_state
from opentao.cli_common import MORE_ROOM
from opentao.config import Config
from opentao.cost import estimate
from opentao.isolation.run import missing_layers
from opentao.types import Prompt

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("opentao", "torch", "transformers", "peft", "pyarrow")


def diagnose(config: Config | None = None, prompts: Sequence[Prompt] = ()) -> dict[str, Any]:
    """The `machine` report; with a config, its `estimate` on these prompts under the key "estimate".

    Raises:
        DataError: a config, but no prompt.
        ModelError: the config's model cannot be had.
    """
    report = machine()
    return report if config is None else report | {"estimate": estimate(config, prompts)}


def versions() -> dict[str, str]:
    """Python and the packages whose versions matter; "absent" where there is none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """Bytes that can be had now, within the container's limit; None where the system does not tell."""
    known = [n for n in (_meminfo(), _container_limit()) if n is not None]
    return min(known) if known else None


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # all there is: the best other systems say
    except (AttributeError, ValueError, OSError):
        return None


def _container_limit() -> int | None:
    """As `engines.memory` counts it: files that were merely read are free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return limit - int((folder / "memory.current").read_text()) + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no container, or "max"
        return None


def gpus() -> list[str]:
    """Name and memory of each GPU that torch can use."""
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in found]


def _gpu_free() -> int | None:
    """Bytes of the first GPU that nothing holds, which is the one a run takes; None without a GPU."""
    import torch

    return torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None


def machine() -> dict[str, Any]:
    """Everything about this computer, ready for JSON."""
    cache = cache_root()
    there = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    return {
        "versions": versions(),
        "cores": num_cores(),
        "memory_bytes": available_memory(),
        "gpus": gpus(),
        "gpu_free_bytes": _gpu_free(),
        "isolation_lacks": list(missing_layers()),
        "cache": {"folder": str(cache), "models": {name: cache_state(name, verify=True) for name in BUILT_IN}},
        "disk_free_bytes": {"cache": shutil.disk_usage(there).free, "here": shutil.disk_usage(Path.cwd()).free},
    }


def render(report: dict[str, Any], console: Console) -> None:
    """Print what `diagnose` found."""
    from rich.table import Table

    table = Table(show_header=False, title="This machine")
    for name, value in _machine_rows(report):
        table.add_row(name, value)
    console.print(table)
    if cost := report.get("estimate"):
        if (gpu := report["gpu_free_bytes"]) is None:
            _render_cost(cost, report["memory_bytes"], console, "")
        else:
            _render_cost(cost, gpu, console, " on the GPU")


def _machine_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    free = report["disk_free_bytes"]
    return [
        *report["versions"].items(),
        ("cores", str(report["cores"])),
        ("memory available", _gigabytes(report["memory_bytes"])),
        ("GPU", "; ".join(report["gpus"]) or "none: everything runs on the CPU"),
        ("isolation", _isolation(report["isolation_lacks"])),
        ("cache", report["cache"]["folder"]),
        *((f"  {name}", state) for name, state in report["cache"]["models"].items()),
        ("disk free", f"cache {_gigabytes(free['cache'])}, here {_gigabytes(free['here'])}"),
    ]


def _render_cost(cost: dict[str, Any], memory: int | None, console: Console, where: str) -> None:
    """`memory`: what there is of the kind that the run takes, which `where` names."""
    from rich.table import Table

    p = cost["prompts"]
    console.print(
        f"{p['total']} prompts of {p['mean_tokens']:.0f} tokens: about {p['heldout']} held out to judge,"
        f" {p['per_round']} in each round"
    )
    columns = ("stage", "sampled", "computed", "trained", "minutes")
    console.print("[bold]Estimate[/bold] from a short measurement; upper bound: every response takes max_new_tokens")
    table = Table(*columns)
    for name, tokens in cost["tokens"].items():
        counts = [f"{tokens[kind]:,}" for kind in ("decode", "forward", "train")]
        table.add_row(name, *counts, f"{cost['minutes'][name]:.1f}")
    table.add_row("all", "", "", "", f"{sum(cost['minutes'].values()):.1f}", style="bold")
    console.print(table)
    peak = cost["peak_memory_bytes"]
    console.print(f"Estimated peak memory: {_gigabytes(peak)}, of {_gigabytes(memory)} available{where}")
    if peak is not None and memory is not None and peak > memory:
        console.print(f"This will not fit: {MORE_ROOM}")


def _isolation(lacks: list[str]) -> str:
    """Of the verifiers that run what a model wrote."""
    return f"lacks {', '.join(lacks)}: verifiers sql and python_tests need `isolation: process`" if lacks else "full"


def _gigabytes(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 1e9:.1f} GB"
