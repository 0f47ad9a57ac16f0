"""Scorers give responses their numbers: reward models, judges, verifiers, and yours.

A scorer is any object with a `name` and `score(group)`, which returns one value a response: a number (higher is
better), `None` for unscored, or a `Score` where the reason is worth keeping. `registry.build_scorer` makes one from the
config, `run.score_groups` runs them over a group. Importing this package imports none of them.
"""
