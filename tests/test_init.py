"""The template of `tao init` is valid, complete, and shows the defaults that the classes have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from opentao.config import Config, ScorerConfig, load_config
from opentao.errors import ConfigError
from opentao.init import template, write_config

CHOSEN = {"prompts.path", "scorers"}  # keys whose value is an example, not a default
NESTED = {"train.lora"}  # sections that the template writes on one line


def uncommented() -> str:
    """The template with every shown default set."""
    return re.sub(r"^( *)#(?=[a-z_]+:)", r"\1", template(), flags=re.MULTILINE)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        deeper = isinstance(value, dict) and name not in CHOSEN | NESTED
        out |= flat(value, f"{name}.") if deeper else {name: value}
    return out


def defaults() -> dict[str, Any]:
    """Every key of the config with its class default."""
    smallest = {"prompts": {"path": "x"}, "scorers": [{"type": "length"}]}
    return flat(Config.model_validate(smallest).model_dump(mode="json"))


def test_writes_a_valid_config(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path / "tao.yaml"))
    assert config.model == "smollm2-135m-instruct"
    assert [s.label for s in config.scorers] == ["json_schema"]


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "tao.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        write_config(path)
    assert path.read_text() == "mine"


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        write_config(tmp_path / "absent" / "tao.yaml")


def test_shows_every_key() -> None:
    assert set(flat(yaml.safe_load(uncommented()))) == set(defaults())


def test_shows_the_defaults_that_the_classes_have() -> None:
    Config.model_validate(yaml.safe_load(uncommented()))
    shown = {key: value for key, value in flat(yaml.safe_load(uncommented())).items() if key not in CHOSEN}
    expected = defaults()
    expected["generate.strategies"] = [{"name": "plain"}]
    assert shown == {key: value for key, value in expected.items() if key not in CHOSEN}


def test_every_section_has_a_comment() -> None:
    lines = template().splitlines()
    sections = [n for n, field in Config.model_fields.items() if isinstance(field.annotation, type)]
    for name in (n for n in sections if issubclass(Config.model_fields[n].annotation, BaseModel)):
        assert lines[lines.index(f"{name}:") - 1].startswith("# "), name


def test_a_changed_default_would_be_caught() -> None:
    changed = uncommented().replace("target_n: 16", "target_n: 8")
    assert flat(yaml.safe_load(changed))["train.target_n"] != defaults()["train.target_n"]


def test_its_scorers_can_be_built() -> None:
    from opentao.scorers.registry import build_scorer

    config = Config.model_validate(yaml.safe_load(template()))
    [audit] = re.findall("^# +audit: ({.*})$", template(), flags=re.MULTILINE)
    scorers = [*config.scorers, ScorerConfig.model_validate(yaml.safe_load(audit))]
    assert [build_scorer(s).name for s in scorers] == ["json_schema", "exact"]
