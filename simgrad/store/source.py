"""The source that computes a result, found without running it: ``code``."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from simgrad.store.content import PACKAGE, digest


@functools.cache
def code(*modules: str) -> str:
    """Name of the source of modules of simgrad and of every one they import, transitively.

    Imports are found in the source, without running it. What is imported for type checking only
    does not count, nor do comments, docstrings and layout. Of a package, only the modules count
    from which the imported names come.

    >>> code("simgrad.tree") == code("simgrad.pairs")
    False
    """
    found: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name not in found:
            source, imports = _module(name)
            found[name] = source
            todo += imports
    return digest(found)


@functools.cache
def _module(name: str) -> tuple[str, tuple[str, ...]]:
    """Digest of a module's code, and the modules of simgrad that it imports."""
    parsed, imports = _parsed(name), set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names if _file(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and _file(node.module):
            imports |= {_origin(node.module, alias.name) for alias in node.names}
    return digest(ast.dump(parsed)), tuple(sorted(imports))


@functools.cache
def _parsed(name: str) -> ast.Module:
    """A module without docstrings and without what is there for type checking."""
    file = _file(name)
    if file is None:
        raise ValueError(f"no module {name}")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = [ast.Pass()]
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return tree


def _file(name: str) -> Path | None:
    """Source of a module of simgrad, or None."""
    if name.partition(".")[0] != PACKAGE.name:
        return None
    base = PACKAGE.parent.joinpath(*name.split("."))
    return next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)


def _origin(package: str, name: str) -> str:
    """The module from which ``from package import name`` takes it."""
    if _file(f"{package}.{name}"):
        return f"{package}.{name}"
    for node in ast.walk(_parsed(package)):
        if isinstance(node, ast.ImportFrom) and node.module and _file(node.module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _origin(node.module, alias.name)
    return package
