"""Who may import whom, and what must not be imported at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from imports import PACKAGE, graph, imports, modules, room_of, rooms

# The rooms, lowest first. A room is the files of one folder, without those of the folders in it. They import
# from their own room and from rooms before it; rooms on one line know nothing of each other.
ROOMS = (
    ("core",),
    ("pruning", "runtime.vision"),
    ("runtime.backends",),
    ("runtime",),
    ("export.models", "export.files", "quantize", "engines", "evaluation", "serve"),
    ("export.formats",),
    ("export.checkpoint",),
    ("export.graph",),
    ("export.fitprune", "export.verify"),
    ("export",),
    ("estimate",),
    ("bench.report",),
    ("bench.report.page", "bench.measure"),
    ("bench", "demo"),
    ("commands",),
    ("face",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Folders of which each knows only some of the others, whatever stands before it.
MAY_IMPORT = {
    "core": {"core"},
    "pruning": {"core", "pruning"},
    "runtime": {"core", "runtime"},
    "export": {"core", "pruning", "runtime", "export"},
    "quantize": {"core", "runtime", "quantize"},
    "engines": {"core", "runtime", "engines"},
    "evaluation": {"core", "runtime", "evaluation"},
    "serve": {"core", "runtime", "serve"},
    "estimate": {"core", "pruning", "runtime", "export", "estimate"},
}

# Never, not even inside a function: they are not installed where a bundle runs.
HEAVY = {"onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers"}

# Of the server and of answers in JSON: imported where they are used, and nowhere else.
SERVER = {"fastapi", "llguidance", "prometheus_client", "pydantic", "ray", "starlette", "uvicorn"}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or nothing."""
    done: set[str] = set()

    def search(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for other in sorted(edges[node]):
                if found := search(other, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in edges if (found := search(node, []))), [])


def run(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_has_its_room():
    assert {room_of(module) for module in modules()} == set(LEVEL)


def test_no_files_import_each_other_in_a_circle():
    assert circle(graph()) == []


def test_no_rooms_import_each_other_in_a_circle():
    assert circle(rooms()) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


@pytest.mark.parametrize("room", LEVEL)
def test_a_room_imports_only_from_rooms_before_it(room):
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        if room_of(module) == room
        for other in sorted(others)
        if room_of(other) != room and LEVEL[room_of(other)] >= LEVEL[room]
    ]
    assert not wrong


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder):
    wrong = [
        f"{module} imports {other}"
        for module, others in graph().items()
        if room_of(module).split(".")[0] == folder
        for other in sorted(others)
        if room_of(other).split(".")[0] not in MAY_IMPORT[folder]
    ]
    assert not wrong


def test_the_core_and_the_runtime_never_import_what_a_device_lacks():
    wrong = [
        f"{module} imports {name}"
        for module, file in modules().items()
        if room_of(module).split(".")[0] in ("core", "runtime")
        for name in imports(file)
        if name.split(".")[0] in HEAVY | SERVER
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["visprune.runtime", "visprune.demo.answers"])
def test_importing_what_runs_a_bundle_loads_nothing_heavy(module):
    loaded = run(
        f"""
        import sys
        import {module}
        visprune.runtime.load
        print(*{{name.split(".")[0] for name in sys.modules}})
        """
    ).split()
    assert "jinja2" in loaded
    assert not (HEAVY | SERVER | {"onnxruntime", "tensorrt"}) & set(loaded)


def test_every_module_of_a_device_imports_where_nothing_heavy_is_installed():
    """The core, the runtime, the methods and the commands, with everything optional out of reach."""
    core = [module for module in modules() if room_of(module) in ("core", "face")]
    count = run(
        f"""
        import importlib, pkgutil, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY | SERVER | {"onnxruntime", "tensorrt", "huggingface_hub"}!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        import visprune, visprune.commands, visprune.demo, visprune.pruning, visprune.runtime
        count = 0
        for name in {core!r}:
            importlib.import_module(name)
        for package in (visprune.runtime, visprune.pruning, visprune.commands):
            for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(found.name)
                count += 1
        from visprune.pruning.registry import BUILTIN, load_method
        for name in BUILTIN:
            load_method(name)()
        print(count)
        """
    )
    assert int(count) > 20


def test_help_loads_nothing_it_does_not_need():
    loaded = run(
        """
        import contextlib, io, sys
        from visprune.cli import main
        sys.argv = ["visprune", "--help"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main()
        assert "export" in out.getvalue()
        print(*{name.split(".")[0] for name in sys.modules})
        """
    ).split()
    assert "typer" in loaded
    others = {"jinja2", "numpy", "onnxruntime", "PIL", "tensorrt", "tokenizers"}
    assert not (HEAVY | SERVER | others) & set(loaded)
