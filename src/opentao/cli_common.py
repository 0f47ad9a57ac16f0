"""What all commands share: expected failures as one line and an exit status, `--json`, set-up of the process."""

from __future__ import annotations

import errno
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import typer

from opentao.errors import DataError, TaoError

Returned = TypeVar("Returned")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
MORE_ROOM = "lower train.row_tokens or generate.batch_responses, or set train.method: lora"
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def writable(path: Path | None) -> None:
    """Said before hours of work, not after: a file or folder can be made there.

    Raises:
        DataError: it cannot.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path if path.is_dir() else path.parent):
            pass
    except OSError as error:
        raise DataError(f"{path}: nothing can be written there: {error.strerror}") from error


def guarded(command: Callable[..., Returned]) -> Callable[..., Returned]:
    """Turn expected failures into one line and the contract's exit status; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Returned:
        _write_anything()
        try:
            with _answer_alone(bool(kwargs.get("as_json"))):
                return command(*args, **kwargs)
        except TaoError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(
                "stopped" + ("; the same command goes on from here" if isinstance(kwargs.get("run"), Path) else ""), 1
            )
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
                raise
            _fail(f"out of memory: {MORE_ROOM}", 1)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            if error.errno in FULL:
                _fail(f"disk full{where}; free some space and run it again", 1)
            if error.errno not in NOT_OURS:
                raise
            _fail(f"{error.strerror}{where}", 1)

    return wrapped


_answer: ContextVar[TextIO] = ContextVar("answer")  # where `--json` prints its object


@contextmanager
def _answer_alone(as_json: bool) -> Iterator[None]:
    """With `--json` standard output is the answer's alone: what a scorer or a library prints goes to standard error."""
    _answer.set(sys.stdout)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield


def _write_anything() -> None:
    """A terminal that is not UTF-8 gets escapes, not a traceback at the end of a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, status: int) -> Any:
    print(f"tao: {message}", file=sys.stderr)
    raise typer.Exit(status)


def prepare_process() -> None:
    """For commands that compute. transformers draws bars of its own; ours say more."""
    from opentao.allocator import use_large_pages

    use_large_pages()

    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def emit(value: Any, as_json: bool, text: str | None = None) -> None:
    if as_json:
        out = _answer.get()
        unicode = (getattr(out, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
        print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False), file=out)
    elif text is not None:
        print(text)
