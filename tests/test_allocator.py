"""The allocator's setting, seen through the process's memory map."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LARGE_PAGES = """
import sys, torch
from opentao.allocator import use_large_pages
if sys.argv[1] == "large":
    use_large_pages()
kept = torch.ones(64_000_000)  # 256 MB
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line.startswith("AnonHugePages")))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_tensors_lie_on_large_pages() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives large pages always or never")
    clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    kilobytes = [
        int(subprocess.check_output([sys.executable, "-c", LARGE_PAGES, mode], text=True, env=clean))
        for mode in ("usual", "large")
    ]
    assert kilobytes[1] > kilobytes[0] + 100_000
