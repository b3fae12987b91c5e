"""What the README shows runs: the reader of its commands, which CI uses, and its Python."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "readme_commands.py"
README = ROOT / "README.md"

TEXT = """
# Title

```bash
git clone somewhere
cd somewhere
make test            # all the tests
dpfa account \\
  --epsilon 1
```

<!-- not run: needs a GPU -->
```bash
dpfa train --device cuda
```

```python
import this
```

```sh
# a remark
make demo
```
"""


def test_commands_are_found_joined_and_filtered():
    spec = importlib.util.spec_from_file_location("readme_commands", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [" ".join(command.split()) for command in module.commands(TEXT)] == [
        "make test",
        "dpfa account --epsilon 1",
        "make demo",
    ]


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "-DP" in capsys.readouterr().out
