"""Every library that the package imports is declared, so that a fresh installation has it."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements):
    return {normal(re.match(r"[\w.-]+", line)[0]) for line in requirements}


ALWAYS = declared(PROJECT["dependencies"])
EXTRAS = declared(r for extra in PROJECT["optional-dependencies"].values() for r in extra)


def imported():
    """Top-level modules of others and the files that import them; at the top of a file or not."""
    found = {}
    for path in sorted((ROOT / "simgrad").rglob("*.py")):
        parsed = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(parsed):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "simgrad":
                    found.setdefault(top, []).append((path.relative_to(ROOT), node in parsed.body))
    return found


@pytest.mark.parametrize("module", sorted(imported()))
def test_every_library_that_is_imported_is_declared(module):
    homes = metadata.packages_distributions().get(module, [module])
    assert {normal(home) for home in homes} & (ALWAYS | EXTRAS), imported()[module]


def test_what_the_floors_without_extras_import_is_always_installed():
    """Bridge and validation have extras of their own; anyone may import the rest."""
    apart = ("simgrad/bridge", "simgrad/validation", "simgrad/report")
    needed = {
        module
        for module, places in imported().items()
        if any(at_top and not str(path).startswith(apart) for path, at_top in places)
    }
    homes = {m: metadata.packages_distributions().get(m, [m]) for m in needed}
    assert not {m for m, names in homes.items() if not {normal(n) for n in names} & ALWAYS}
