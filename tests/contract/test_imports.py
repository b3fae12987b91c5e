"""What may be loaded by an import: the guarded part of the package works with torch and NumPy alone."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Everything that runs on an accelerator, and what it needs (DESIGN, section 2).
GUARDED = [
    "dp_flash_attention",
    "dp_flash_attention.core.errors",
    "dp_flash_attention.core.privacy",
    "dp_flash_attention.accounting",
    "dp_flash_attention.noise",
    "dp_flash_attention.attention",
    "dp_flash_attention.clipping",
    "dp_flash_attention.training",
]

PROBE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
        return None

BLOCKED = set(sys.argv[2:])
sys.meta_path.insert(0, Blocker())
import importlib
module = importlib.import_module(sys.argv[1])
for name in getattr(module, "__all__", []) if module.__name__ == "dp_flash_attention.training" else []:
    getattr(module, name)
"""


def distribution_names(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[A-Za-z0-9._-]+", requirement)[0]).lower()


def modules_to_block() -> list[str]:
    """Import names of every dependency that we declare, except torch and NumPy."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    wanted = {distribution_names(requirement) for requirement in declared} - {
        "torch",
        "numpy",
        "dp-flash-attention",
    }
    return sorted(
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if wanted & {distribution_names(name) for name in distributions}
    )


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_block_covers_the_heavy_dependencies():
    assert {"scipy", "dp_accounting", "cryptography", "safetensors", "rich", "typer", "pandas"} <= set(
        modules_to_block()
    )


def test_the_probe_notices_a_forbidden_import():
    done = run(PROBE, "dp_flash_attention.cli.main", *modules_to_block())
    assert done.returncode != 0
    assert "typer is blocked" in done.stderr


@pytest.mark.parametrize("module", GUARDED)
def test_the_import_needs_only_torch_and_numpy(module):
    done = run(PROBE, module, *modules_to_block())
    assert done.returncode == 0, done.stderr


def loaded_by(code: str) -> set[str]:
    done = run(f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)")
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr)}


def test_accounting_never_loads_torch():
    code = (
        "from dp_flash_attention import accounting as a\n"
        "event = a.PoissonSampledGaussian(sampling_prob=0.1, noise_multiplier=2.0, num_steps=3)\n"
        "a.epsilon(event, delta=1e-6), a.epsilon(event, delta=1e-6, accountant='rdp')"
    )
    assert "torch" not in loaded_by(code)


def test_describing_an_event_does_not_load_the_accountants():
    loaded = loaded_by("import dp_flash_attention.accounting as a; a.GaussianRelease(noise_multiplier=1.0)")
    assert not loaded & {"dp_accounting", "scipy"}


def test_the_help_of_the_command_loads_neither_torch_nor_numpy():
    code = (
        "from dp_flash_attention.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0"
    )
    assert not loaded_by(code) & {"torch", "numpy", "scipy", "dp_accounting", "pandas", "transformers"}
