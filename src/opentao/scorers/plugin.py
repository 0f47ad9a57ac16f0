"""What every scorer needs: the word for "no score", finding an object by `module:name`, calling someone else's code.

`call_plugin` is the only place of the package that catches every `Exception`: a bug in a scorer is data on the scores
of the group it met, never the end of a run and never a 0. Only a `ScoreError` passes: the scorer cannot work at all.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

from opentao.errors import ScoreError
from opentao.types import NAN, Score

Rating = float | Score | None
"""What a scorer may return for one response: a number, None (unscored), or a `Score` that says why it is unscored."""

MAX_MESSAGE = 300  # characters; the text is stored once a response


def unscored(kind: str, message: str) -> Score:
    """
    >>> unscored("timeout", "1.0 s").error
    'timeout: 1.0 s'
    """
    return Score(value=NAN, error=one_line(f"{kind}: {message}"))


def one_line(text: str) -> str:
    """Fit to store and print: it may quote an answer, with line breaks and with surrogates that UTF-8 cannot hold."""
    return " ".join(text.split()).encode("utf-8", "backslashreplace").decode()[:MAX_MESSAGE]


def call_plugin(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result, or an unscored `Score` if it raises. ScoreError, KeyboardInterrupt and SystemExit pass."""
    try:
        return function(*args)
    except ScoreError:
        raise
    except Exception as error:
        # Formatted by `traceback` because it survives an exception whose own __str__ raises.
        _, _, message = "".join(traceback.format_exception_only(error)).partition(":")
        return unscored(type(error).__name__, message or "no message")


def import_object(path: str) -> Any:
    """The object at ``module:name`` (or ``module:Class.method``); the current directory may hold the module.

    Raises:
        ValueError: the path has another shape, or there is no such module or name.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise ValueError(f"{path!r} is not of the form module:name")
    try:
        with _current_directory_importable():
            return reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path!r} cannot be imported: {error}") from error


def source_file(path: str) -> str | None:
    """The file of the module in ``module:name``, which must have been imported; None if there is no such file."""
    module = sys.modules.get(path.partition(":")[0]) if re.fullmatch(r"[\w.]+:[\w.]+", path) else None
    source = getattr(module, "__file__", None)
    return source if source is not None and os.path.isfile(source) else None


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()  # a file written a moment ago must be found
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
