"""Fixtures for all tests: a tiny random model that needs no hub, and the built-in model where it can be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny import build_tiny_model

from opentao.errors import ModelError

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub's client: no test may reach a network by accident
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each of two processes has one core, and so has what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
settings.register_profile("any speed", deadline=None)  # a busy machine is no failure
settings.load_profile("any speed")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny.py`."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The built-in model's folder; the test is skipped, with the reason, where its weights cannot be downloaded."""
    from opentao.models import DEFAULT_MODEL, resolve_model

    try:
        return Path(resolve_model(DEFAULT_MODEL))
    except ModelError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(str(error))
