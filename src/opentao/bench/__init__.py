"""Side by side against what a user would pick instead: same model, prompts and sampling, taking turns in one run.

`case` says what is to be done, `worker` does it the OpenTAO way, `peers/` are scripts that do it with other tools in
environments of their own, `run` starts them all and takes turns. The command: `tao bench generate --vs transformers`.
"""
