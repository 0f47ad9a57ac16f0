"""Every error that OpenTAO raises on purpose. `tao` prints its one line and exits with its `exit_code`."""

from __future__ import annotations


class TaoError(Exception):
    """Base of all; the message is one line that a person can act on."""

    exit_code = 1


class ConfigError(TaoError):
    """Bad config or bad usage: names file, line, key and what was expected."""

    exit_code = 2


class DataError(TaoError):
    """Input that cannot be used: names file, line (or row), key and what was expected."""


class StoreError(TaoError):
    """A run directory that cannot be used: locked by a live owner, damaged, or from another config."""


class ModelError(TaoError):
    """A model that cannot be resolved, loaded or used for the task."""


class BrokenModelError(ModelError):
    """Weights that make no numbers any more; of a policy: the rounds before it are judged."""


class ScoreError(TaoError):
    """A scorer that can score nothing at all. A scorer may raise it: the run ends, and goes on from there once mended.

    Any other exception of a scorer leaves unscored what it met, and no more.
    """


class TrainError(TaoError):
    """Training had to stop (NaN loss, no informative group); the last good policy is kept."""
