"""Who may import whom, and what must not be imported at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "visprune"

CORE = {
    "background",
    "budget",
    "bundle",
    "cores",
    "errors",
    "machine",
    "manifest",
    "optional",
    "outputs",
    "records",
    "staging",
    "targets",
    "tiling",
    "verified",
    "work",
}

# What the files of a folder may import of visprune. Those not named here see everything.
MAY_IMPORT = {
    "core": CORE,
    "pruning": CORE | {"pruning"},
    "runtime": CORE | {"runtime"},
    "export": CORE | {"pruning", "runtime", "export"},
    "quantize": CORE | {"runtime", "quantize"},
    "engines": CORE | {"runtime", "engines"},
}
SEES_EVERYTHING = {"__init__", "__main__", "bench", "cli", "commands", "demo", "estimate", "evaluation"}

# The demo package itself is a few paths: the model and the samples that some commands take by default.
EXCEPTIONS = {("export/checkpoint/checkpoint.py", "visprune.demo"), ("runtime/samples.py", "visprune.demo")}

# Never, not even inside a function: they are not installed where a bundle runs.
HEAVY = {"onnx", "onnx_ir", "onnxscript", "safetensors", "torch", "transformers"}


def layer_of(file: Path) -> str:
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "core" if top in CORE else top


def files() -> list[Path]:
    """Every file of the package; links are followed one level, as they lead to the root folders."""
    found = []
    for entry in sorted(PACKAGE.iterdir()):
        found += sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] if entry.suffix == ".py" else []
    return found


def imports(file: Path) -> Iterator[str]:
    """Dotted names a file imports when it runs, function bodies included, type checking excluded."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            module = node.module or ""
            # `from visprune.export import models` names a module too.
            yield from (f"{module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def own(name: str) -> str | None:
    """The folder or file of visprune that a dotted name lies in."""
    parts = name.split(".")
    return parts[1] if parts[0] == "visprune" and len(parts) > 1 else None


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


def test_every_folder_has_its_rule():
    assert {layer_of(file) for file in files()} <= set(MAY_IMPORT) | SEES_EVERYTHING


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(layer):
    wrong = []
    for file in files():
        if layer_of(file) != layer:
            continue
        place = file.relative_to(PACKAGE).as_posix()
        for name in imports(file):
            allowed = own(name) in MAY_IMPORT[layer] | {None, "__version__"}
            if not allowed and not any(place == p and name.startswith(n) for p, n in EXCEPTIONS):
                wrong.append(f"{place} imports {name}")
    assert not wrong


def test_the_core_and_the_runtime_never_import_what_a_device_lacks():
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files()
        if layer_of(file) in ("core", "runtime")
        for name in imports(file)
        if name.split(".")[0] in HEAVY
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
    assert not (HEAVY | {"onnxruntime", "tensorrt"}) & set(loaded)


def test_every_module_of_a_device_imports_where_nothing_heavy_is_installed():
    """The core, the runtime, the methods and the commands, with everything optional out of reach."""
    count = run(
        f"""
        import importlib, pkgutil, sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY | {"onnxruntime", "tensorrt", "huggingface_hub"}!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        import visprune, visprune.commands, visprune.demo, visprune.pruning, visprune.runtime
        count = 0
        for name in {sorted(CORE)!r} + ["cli"]:
            importlib.import_module(f"visprune.{{name}}")
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
    assert not (HEAVY | {"jinja2", "numpy", "onnxruntime", "PIL", "tensorrt", "tokenizers"}) & set(loaded)
