"""Which weights a model name means, and loading them.

A name is a built-in one (`builtin.py`, needs no hub), a local folder, or a hub name. Only safetensors are loaded (a
pickle can run code), and code from a hub runs only where `trust_remote_code` is set.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opentao.builtin import BUILT_IN, DEFAULT_MODEL, Progress, built_in_model
from opentao.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "BUILT_IN",
    "DEFAULT_MODEL",
    "ensure_chat_template",
    "hub_commit",
    "load_causal_lm",
    "load_classifier",
    "load_model",
    "load_tokenizer",
    "resolve_model",
]

log = logging.getLogger("opentao")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# ---------------------------------------------------------------------------------------------------- names


def resolve_model(name: str, *, progress: Progress | None = None) -> Path | str:
    """The folder of a built-in or local model, or the hub name as it is.

    A built-in model that is not in the cache yet is downloaded and converted; `progress` replaces the bar on standard
    error.

    Raises:
        ModelError: no such model, no safetensors in the folder, or the built-in model cannot be had.
    """
    if name in BUILT_IN:
        return built_in_model(name, progress)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked_folder(folder)
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise ModelError(
            f"model {name!r}: expected a built-in name ({', '.join(BUILT_IN)}), an existing folder with config.json"
            " and *.safetensors, or a hub name such as org/name"
        )
    return name


@functools.cache
def hub_commit(name: str) -> str | None:
    """The commit that a hub name stands for in this process: of its config, which is fetched if the cache has none.

    Raises:
        ModelError: the config cannot be had; one line.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    with _as_model_error(name):
        found: str | None = extract_commit_hash(cached_file(name, "config.json"), None)
    return found


def _revision(where: Path | str) -> dict[str, str]:
    """All of a process's loading of a hub model is of one commit, the one that its hash names."""
    commit = hub_commit(where) if isinstance(where, str) else None
    return {"revision": commit} if commit else {}


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "an adapter, to be merged into its base first" if adapter else "no config.json"
        raise ModelError(f"model {str(folder)!r}: {what}; expected a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        others = sorted(p.name for ending in ("bin", "pt", "pth", "gguf") for p in folder.glob(f"*.{ending}"))
        found = f"; found {', '.join(others)}" if others else ""
        raise ModelError(f"model {str(folder)!r}: no *.safetensors{found}; only safetensors are loaded")
    return folder


# ---------------------------------------------------------------------------------------------------- loading


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template in any case (see `ensure_chat_template`).

    Raises:
        ModelError: it cannot be resolved or loaded; one line.
    """
    from transformers import AutoTokenizer

    where = resolve_model(name)
    with _as_model_error(name):
        tokenizer = AutoTokenizer.from_pretrained(str(where), trust_remote_code=trust_remote_code, **_revision(where))
    return ensure_chat_template(tokenizer)


def load_causal_lm(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The language model, in evaluation mode on the CPU, with SDPA attention where the architecture has it.

    Raises:
        ModelError: it cannot be resolved or loaded; one line.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, name, dtype, trust_remote_code)


def load_classifier(name: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """A sequence-classification model (a reward model), otherwise as `load_causal_lm`.

    Weights without its head are a language model's, say, and an error: a random head would score at random.
    """
    from transformers import AutoModelForSequenceClassification

    return _load(AutoModelForSequenceClassification, name, dtype, trust_remote_code)


def load_model(
    name: str, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Language model and tokenizer together."""
    model = load_causal_lm(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return model, load_tokenizer(name, trust_remote_code=trust_remote_code)


def _load(auto_class: Any, name: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    import torch

    # On new GPUs cuDNN's attention is torch's first choice. It plans anew for every shape, and here most are new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    where = resolve_model(name)
    with _as_model_error(name), _quiet_loading():
        model, loading = auto_class.from_pretrained(
            str(where),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **_revision(where),
        )
    if missing := sorted(loading["missing_keys"]):  # transformers fills them with random numbers
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(f"model {name!r}: no weights for {', '.join(missing[:3])}{more} of {type(model).__name__}")
    loaded: PreTrainedModel = model.eval()
    return loaded


@contextlib.contextmanager
def _as_model_error(name: str) -> Iterator[None]:
    """What transformers and the hub raise for an unusable model (their messages span many lines), as one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"model {name!r} cannot be loaded: {reason[:600]}") from error


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bar for reading weights from a local disk; it takes a moment, and a stage loads often."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer without a chat template (a base model's) a minimal one; says so in the log.

    The template is ``User: …``, blank line, ``Assistant:``, with the beginning token first if the tokenizer puts it
    there itself. It is saved with the policy, so the tuned model is asked as it was trained.
    """
    if tokenizer.chat_template is None:
        first = tokenizer("a")["input_ids"][0]
        bos = "{{ bos_token }}" if tokenizer.bos_token is not None and first == tokenizer.bos_token_id else ""
        tokenizer.chat_template = bos + PLAIN_TEMPLATE
        log.warning("%s: no chat template; using 'User: … Assistant:'", tokenizer.name_or_path or "tokenizer")
    return tokenizer
