"""The reader of the README's commands, which CI runs."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "readme_commands.py"

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
