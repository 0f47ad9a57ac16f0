"""Liger's Triton kernels (norms, gated MLP, log-probs) in a model on a GPU, if they are installed.

Optional: ``pip install '.[gpu]'`` in a checkout. The environment's OPENTAO_LIGER=0 leaves them out. What they gain is
measured by `benchmarks/gpu.py` (dev/LOG.md has the figures).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None


# What Liger raises for a classifier of a family that it knows, or for a family that this transformers lacks.
UNFIT = (ImportError, TypeError, ValueError, AttributeError, KeyError)
ACTIVATIONS = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}  # of Liger's MLPs


def _not_its(config: Any) -> dict[str, bool]:
    """Liger's MLPs that are not this model's: they have one activation, whatever the config says."""
    own = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return {mlp: False for mlp, names in ACTIVATIONS.items() if own not in names}


def uses_liger(device: torch.device) -> bool:
    return device.type == "cuda" and os.environ.get("OPENTAO_LIGER") != "0" and _installed()


def patch(model: Any) -> bool:
    """Put Liger's kernels into a causal LM on a GPU whose family it knows, before any adapter. True if it did.

    The head and the loss stay ours: `opentao.pack` needs one log-prob a token. So does the rotary embedding: Liger's is
    compiled anew for every number of rows.
    """
    if not uses_liger(next(model.parameters()).device):
        return False
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except (ImportError, AttributeError) as error:  # a version that does not go with this transformers
        log.warning("Liger cannot be used: %s", error)
        return False
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        log.info("Liger has no kernels for %s", model.config.model_type)
        return False
    module = sys.modules[type(model).__module__]
    names = dict(vars(module))
    try:
        _apply_liger_kernel_to_instance(
            model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False, **_not_its(model.config)
        )
    except UNFIT as error:
        log.info("Liger cannot patch %s: %s", type(model).__name__, error)
        return False
    finally:
        vars(module).update(names)  # it also changes the family for all models to come, on a CPU too
    return True


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax of logits [T, V] at targets [T], in fp32; the gradient overwrites the logits."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: Tensor = liger_cross_entropy(logits, targets, reduction="none")
    return -loss.float()
