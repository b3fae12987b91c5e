"""The command ``dpfa``: parse, call, print; nothing else."""
