"""What `tao doctor` finds is plain data, and is printed for people."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from opentao import doctor
from opentao.builtin import DEFAULT_MODEL, cache_entry
from opentao.config import Config
from opentao.doctor import available_memory, diagnose, machine, num_cores, render, versions
from opentao.types import Prompt


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENTAO_CACHE", str(tmp_path / "cache"))


def printed(report: dict) -> str:
    console = Console(file=StringIO(), width=120)
    render(report, console)
    return console.file.getvalue()


def test_machine_is_json() -> None:
    report = json.loads(json.dumps(machine(), allow_nan=False))
    assert report["cores"] == num_cores() >= 1
    assert report["memory_bytes"] is None or report["memory_bytes"] > 1e6
    assert report["cache"]["models"] == {DEFAULT_MODEL: "absent"}
    assert report["disk_free_bytes"]["cache"] > 0


def test_isolation_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for lacks, said in (((), "full"), (("Landlock",), "lacks Landlock: verifiers sql and python_tests need")):
        monkeypatch.setattr(doctor, "missing_layers", lambda lacks=lacks: lacks)
        assert said in printed(machine())


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    found = versions()
    assert found["no-such-package"] == "absent"
    assert re.match(r"2\.\d+", found["torch"])


def test_damaged_cache_is_shown() -> None:
    cache_entry(DEFAULT_MODEL).mkdir(parents=True)
    assert re.search(rf"{DEFAULT_MODEL} .*damaged", printed(diagnose()))


def test_memory_where_the_system_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_meminfo", lambda: None)
    monkeypatch.setattr(doctor, "_container_limit", lambda: None)
    assert available_memory() is None
    assert "unknown" in printed(machine())


def test_memory_within_the_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_meminfo", lambda: 8_000)
    monkeypatch.setattr(doctor, "_container_limit", lambda: 2_000)
    assert available_memory() == 2_000


def test_cost_of_a_config(tiny_model_dir: Path) -> None:
    tree = {"model": str(tiny_model_dir), "prompts": {"path": "x"}, "scorers": [{"type": "length"}]}
    prompts = [Prompt.from_text("My parcel is late.")] * 20
    config = Config.model_validate(tree | {"generate": {"max_new_tokens": 16}})
    text = printed(diagnose(config, prompts))
    assert "Estimate from a short measurement; upper bound" in text
    assert re.search(r"generate\W+2,048 ", text), text  # 2 rounds of 8 prompts, 8 responses of 16 tokens


def test_says_so_if_it_will_not_fit(tiny_model_dir: Path) -> None:
    tree = {"model": str(tiny_model_dir), "prompts": {"path": "x"}, "scorers": [{"type": "length"}]}
    report = diagnose(Config.model_validate(tree), [Prompt.from_text("Hi.")] * 5)
    report["memory_bytes"], report["estimate"]["peak_memory_bytes"] = 10, 11
    report["gpu_free_bytes"] = None
    assert "will not fit" in printed(report)
    report["gpu_free_bytes"] = 12  # then it is the GPU's that counts
    assert "available on the GPU" in printed(report) and "will not fit" not in printed(report)


def test_import_is_light() -> None:
    code = "import sys, opentao.doctor; assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
