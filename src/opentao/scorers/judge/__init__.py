"""Judges: language models behind an OpenAI-compatible endpoint as scorers. `scorer.Judge` is the scorer."""
