"""How much keys and values may take: bytes a token, and the memory that is free now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from opentao.config import GPU_ROW_TOKENS, GPU_ROWS, ROW_TOKENS, ROWS

CGROUP = Path("/sys/fs/cgroup")
UNKNOWN = 2 << 30  # where the system does not tell, e.g. macOS: 2 GB


def default_rows(device: torch.device) -> int:
    """Responses decoded side by side where the config does not say."""
    return GPU_ROWS if device.type == "cuda" else ROWS


KEPT = 24, 6  # numbers that the backward pass keeps of a token in a layer: of hidden, of intermediate size
KEPT_BYTES = 4  # of each, about: some are bf16, some fp32
ROW_SHARE = 0.5  # of a GPU's free memory, for the activations of a row


def default_row_tokens(model: Any) -> int:
    """A packed row's most tokens where the config does not say; on a GPU as many as its free memory holds, about."""
    device = model.device
    if device.type != "cuda":
        return ROW_TOKENS
    text = model.config.get_text_config()
    wide = KEPT[0] * text.hidden_size + KEPT[1] * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    token_bytes = KEPT_BYTES * text.num_hidden_layers * wide
    return max(ROW_TOKENS, min(GPU_ROW_TOKENS, int(ROW_SHARE * free_bytes(device)) // token_bytes))


def cache_token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token, all layers."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * width * model.dtype.itemsize)


def free_bytes(device: torch.device, proc: Path = Path("/proc"), cgroup: Path = CGROUP) -> int:
    """Memory that can be taken without pushing anything out: of the GPU, or of the machine and its container."""
    if device.type == "cuda":  # what torch holds and does not use is free too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    known = [limit for limit in (_available(proc), _container(cgroup)) if limit is not None]
    return min(known, default=UNKNOWN)


def _available(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container(cgroup: Path) -> int | None:
    """What a container may still take; files it has merely read count as free."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
