"""What holds of the whole repository: public names, arrows, changelog, words that must not be committed."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import dp_flash_attention

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "dp_flash_attention"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())


def public_names(module: ModuleType) -> set[str]:
    """What a reader takes for public: not underscored, not a module, not a feature of the language."""
    return {
        name
        for name in dir(module)
        if not name.startswith("_")
        and name != "annotations"
        and not inspect.ismodule(getattr(module, name))
        and getattr(getattr(module, name), "__module__", "").startswith("dp_flash_attention")
    }


def test_the_top_level_has_at_most_fifteen_names_and_all_of_them_exist():
    names = getattr(dp_flash_attention, "__all__", [])
    assert len(names) <= 15
    assert len(set(names)) == len(names)
    for name in names:
        getattr(dp_flash_attention, name)  # resolves lazily exported names too
    # After the loop lazily loaded names and modules are attributes; nothing else may have appeared.
    assert public_names(dp_flash_attention) <= set(names)


def test_a_star_import_of_the_top_level_works():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "from dp_flash_attention import *"], check=False
    )
    assert done.returncode == 0


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_that_exports_says_exactly_what(room):
    module = importlib.import_module(f"dp_flash_attention.{room}")
    names = getattr(module, "__all__", [])
    assert len(set(names)) == len(names)
    for name in names:
        assert hasattr(module, name)
    assert public_names(module) <= set(names)


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_exports_is_documented(room):
    module = importlib.import_module(f"dp_flash_attention.{room}")
    assert inspect.getdoc(module), f"{room} has no docstring"
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            text = inspect.getdoc(value) or ""
            generated = text.startswith(f"{name}(")  # what a dataclass without a docstring gets
            assert text, f"{room}.{name} has no docstring"
            assert not generated, f"{room}.{name} has no docstring"


def test_the_changelog_starts_with_this_version():
    headings = re.findall(
        r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    versions = [(version, date) for version, date in headings if version != "Unreleased"]
    assert versions[0][0] == PROJECT["project"]["version"]
    assert all(re.fullmatch(r"\d{4}-\d{2}-\d{2}|unreleased", date) for _, date in versions)
    assert all(date != "unreleased" for _, date in versions[1:])


def test_every_room_is_in_the_layers_and_brings_its_forbidden_edges():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    layers = next(contract for contract in contracts if contract["type"] == "layers")
    assert set(ROOMS) <= {layer.strip("()") for layer in layers["layers"]}
    # The edges that must never exist (DESIGN, section 2), as far as both ends exist.
    forbidden = {
        "core": {"torch", "numpy", "scipy"},
        "accounting": {"torch"},
        "noise": {"dp_flash_attention.accounting"},
        "crypto": {"torch", "flwr"},
        "threats": {"dp_flash_attention.federated", "dp_flash_attention.gateway"},
        "enhancement": {"dp_flash_attention.training.data"},
    }
    for room, targets in forbidden.items():
        if room not in ROOMS:
            continue
        existing = {
            target for target in targets if not target.startswith("dp_") or target.split(".")[1] in ROOMS
        }
        enforced = {
            target
            for contract in contracts
            if contract["type"] == "forbidden" and f"dp_flash_attention.{room}" in contract["source_modules"]
            for target in contract["forbidden_modules"]
        }
        assert existing <= enforced, f"{room} lacks the contract against {existing - enforced}"


def test_the_environment_and_the_arguments_are_read_by_the_command_alone():
    readers = {("os", "environ"), ("os", "getenv"), ("os", "environb"), ("sys", "argv")}
    offenders = []
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] in ("cli", "gateway"):
            continue
        offenders += [
            f"{path.relative_to(ROOT)}:{node.lineno}"
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and (node.value.id, node.attr) in readers
        ]
    assert offenders == []


def test_source_files_stay_readable_in_one_sitting():
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert too_long == {}


def test_every_source_file_says_what_it_is():
    for info in pkgutil.walk_packages([str(SOURCE)]):
        relative = Path(*info.name.split("."))
        path = SOURCE / relative / "__init__.py" if info.ispkg else SOURCE / relative.with_suffix(".py")
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def committed_text_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def forbidden_words() -> re.Pattern[str]:
    # Written in pieces, so that this file does not hold what it looks for.
    folders = "|".join(("work", "root", "tmp/venv"))
    hosts = "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("files", "pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("registry", "npmjs", "org"),
            ("index", "crates", "io"),
        )
    )
    return re.compile(rf"(?<![\w./-])/(?:{folders})/|{hosts}")


def test_the_search_for_forbidden_words_finds_them():
    pattern = forbidden_words()
    assert pattern.search("see " + "/".join(("", "work", "main")) + " there")
    assert pattern.search("https://" + ".".join(("pypi", "org")) + "/simple")
    assert not pattern.search("src/work/file and network/root/ and tmp/x")


def test_no_machine_path_or_registry_host_is_committed():
    pattern = forbidden_words()
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in committed_text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert found == []
