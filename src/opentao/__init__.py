"""OpenTAO: tune a language model from prompts alone, until its first try is as good as its best of N.

Names are loaded when they are used (PEP 562), so that ``import opentao`` brings in neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentao.config import Config, load_config
    from opentao.errors import TaoError
    from opentao.loop import run
    from opentao.types import Engine, Group, Prompt, Response, SamplingPlan, Score, Scorer, Strategy

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Engine",
    "Group",
    "Prompt",
    "Response",
    "SamplingPlan",
    "Score",
    "Scorer",
    "Strategy",
    "TaoError",
    "__version__",
    "load_config",
    "run",
]

_HOMES = {"Config": "config", "load_config": "config", "TaoError": "errors", "run": "loop"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'opentao' has no attribute {name!r}")
    return getattr(import_module(f"opentao.{_HOMES.get(name, 'types')}"), name)


def __dir__() -> list[str]:
    return __all__
