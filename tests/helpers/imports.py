"""Who imports whom in visprune: every import statement of the source, in functions and for types too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["PACKAGE", "graph", "imports", "modules", "room_of", "rooms"]

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "visprune"

# `import visprune` and the command line: the files beside the core that offer everything, each lazily.
FACE = {"visprune", "visprune.__main__", "visprune.cli"}


@cache
def modules() -> dict[str, Path]:
    """Every module of the package; links are followed one level, as they lead to the root folders."""
    found = {}
    for entry in sorted(PACKAGE.iterdir()):
        files = sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
        for file in files:
            parts = file.relative_to(PACKAGE).with_suffix("").parts
            found[".".join(["visprune", *(part for part in parts if part != "__init__")])] = file
    return found


def imports(file: Path) -> Iterator[str]:
    """Dotted names that a file imports, in functions and for types too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            # `from visprune.export import models` names a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def graph() -> dict[str, set[str]]:
    """By module, the modules of visprune that it imports."""
    found: dict[str, set[str]] = {}
    for module, file in modules().items():
        found[module] = set()
        for imported in imports(file):
            parts = imported.split(".")
            known = [
                ".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in modules()
            ]
            found[module] |= set(known[:1]) - {module}
    return found


def room_of(module: str) -> str:
    if module in FACE:
        return "face"
    parts = module.split(".")[1:]
    folder = parts if modules()[module].name == "__init__.py" else parts[:-1]
    return ".".join(folder) or "core"


@cache
def rooms() -> dict[str, set[str]]:
    """By room, the other rooms that its files import from."""
    found: dict[str, set[str]] = {}
    for module, others in graph().items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(other) for other in others} - {room})
    return found
