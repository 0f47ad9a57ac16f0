"""`tao init`: a commented config to start from. The text is `data/tao.yaml`; tests hold it against `Config`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from opentao.errors import ConfigError


def template() -> str:
    """The commented config. A line ``#key: value`` (no space) shows a default that is not set."""
    return (files("opentao") / "data" / "tao.yaml").read_text(encoding="utf-8")


def write_config(path: Path = Path("tao.yaml")) -> Path:
    """Write the template to a new file.

    Raises:
        ConfigError: the file exists already, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template())
    except FileExistsError as error:
        raise ConfigError(f"{path}: exists already and is not overwritten") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    return path
