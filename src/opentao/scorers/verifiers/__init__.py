"""Built-in verifiers: programs that check an answer. One file each; `base.py` is what they share."""
