"""What an import may pull in, and what the package offers by name."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import opentao

HEAVY = {"torch", "transformers", "peft", "ray", "vllm", "matplotlib", "pyarrow"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import opentao",
        "import opentao.cli",
        "from opentao import Prompt, Group, SamplingPlan, TaoError, load_config",
        "import opentao.engines.fake",
        "import opentao.scorers.registry",
    ],
)
def test_light(statement: str) -> None:
    assert not loaded_by(statement) & HEAVY


def test_importing_the_package_loads_none_of_its_modules() -> None:
    code = "import sys, opentao; print([m for m in sys.modules if m.startswith('opentao.')])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_few_names_and_each_is_there() -> None:
    assert len(opentao.__all__) <= 15
    assert sorted(opentao.__all__) == sorted(set(opentao.__all__))
    assert all(getattr(opentao, name) is not None for name in opentao.__all__)
    assert set(dir(opentao)) == set(opentao.__all__)


def test_names_are_the_ones_of_their_modules() -> None:
    from opentao import config, errors, loop, types

    assert opentao.run is loop.run
    assert opentao.load_config is config.load_config
    assert opentao.TaoError is errors.TaoError
    assert opentao.Group is types.Group


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'opentao' has no attribute 'Trainer'"):
        opentao.Trainer  # noqa: B018


def test_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert opentao.__version__ == project["version"]
