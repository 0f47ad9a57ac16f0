"""Run what a model wrote, in a process that can do little: `run.run_jobs`, with the layers of `restrict`."""
