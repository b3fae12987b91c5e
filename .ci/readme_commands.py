"""Runs the commands that README.md shows, so that they cannot go stale.

Every fenced block marked ``bash`` or ``sh`` is run, line by line, at the root of the clone with the project's
environment on the path. Left out: ``git clone`` and ``cd`` (the reader is already here), the commands given
with ``--done`` (they have just been run), and a block right below the comment ``<!-- not run: REASON -->``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"(?P<skip><!-- not run: [^>]+-->\s*\n)?^```(?:bash|sh)\n(?P<body>.*?)^```", re.M | re.S)


def commands(text: str) -> list[str]:
    """Returns the commands of a Markdown text, with continued lines joined and comments removed."""
    found = []
    for block in FENCE.finditer(text):
        if block["skip"] is not None:
            continue
        for line in block["body"].replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+#.*$", "", line).strip()
            if command and not command.startswith(("#", "git clone", "cd ")):
                found.append(command)
    return found


def main() -> int:
    """Runs them all; returns 1 at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--done", action="append", default=[], help="a command that need not be run again")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    environment = dict(os.environ, PATH=f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        if options.list or command in options.done:
            print(command)
            continue
        print(f"$ {command}", flush=True)
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=ROOT, env=environment, check=False
        )
        print(f"  exit code {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
