"""The folders, the links, the packaging tables and a built wheel say the same."""

from __future__ import annotations

import importlib
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

import visprune
from visprune import demo

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BUILD = PYPROJECT["tool"]["hatch"]["build"]
FOLDERS = sorted(
    path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name not in ("tests", "docs")
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a wheel built from this checkout, by name."""
    backend = pytest.importorskip("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = backend.build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as archive:
        return {item: archive.read(item) for item in archive.namelist()}


def test_there_are_folders():
    assert {"demo", "export", "pruning", "runtime"} <= set(FOLDERS)


def test_each_folder_has_a_relative_link_and_nothing_else_has():
    links = {path.name: path for path in (ROOT / "src" / "visprune").iterdir() if path.is_symlink()}
    assert sorted(links) == FOLDERS
    for name, link in links.items():
        assert link.readlink() == Path("..", "..", name)
        assert link.resolve() == ROOT / name


def test_the_packaging_tables_name_each_folder():
    assert BUILD["targets"]["wheel"]["force-include"] == {name: f"visprune/{name}" for name in FOLDERS}
    assert sorted(BUILD["exclude"]) == [f"/src/visprune/{name}" for name in FOLDERS]


def test_the_wheel_holds_every_module_once(wheel):
    sources = {
        path.relative_to(ROOT).as_posix(): path for name in FOLDERS for path in (ROOT / name).rglob("*.py")
    }
    own = [path for path in (ROOT / "src" / "visprune").iterdir() if not path.is_symlink()]
    for path in own:
        for file in path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []:
            sources[file.relative_to(ROOT / "src" / "visprune").as_posix()] = file
    assert len(sources) > 40
    packed = {
        name.removeprefix("visprune/")
        for name in wheel
        if name.startswith("visprune/") and name.endswith(".py")
    }
    assert packed == set(sources)
    assert all(wheel[f"visprune/{name}"] == path.read_bytes() for name, path in sources.items())
    assert "visprune/py.typed" in wheel


def test_the_wheel_holds_the_page_of_the_server(wheel):
    files = [path for path in (ROOT / "serve" / "page").iterdir() if path.is_file()]
    assert {path.name for path in files} >= {
        "index.html",
        "app.js",
        "style.css",
        "docs.html",
        "docs.js",
        "icon.svg",
    }
    for path in files:
        assert wheel[f"visprune/serve/page/{path.name}"] == path.read_bytes()


def test_the_wheel_holds_the_demo_model(wheel):
    files = [path for path in demo.MODEL_DIR.rglob("*") if path.is_file()] + [demo.IMAGE, demo.QUESTIONS]
    samples = list(demo.CALIBRATION.with_suffix("").iterdir())
    assert len(samples) == 16
    files += [demo.CALIBRATION, *samples]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".png"}
    for path in files:
        assert (
            wheel[f"visprune/demo/{path.relative_to(demo.MODEL_DIR.parent).as_posix()}"] == path.read_bytes()
        )


def test_the_wheel_holds_the_templates_of_the_report_page(wheel):
    files = [path for path in (ROOT / "bench" / "report" / "page" / "templates").iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".css", ".jinja"}
    for path in files:
        assert wheel[f"visprune/{path.relative_to(ROOT).as_posix()}"] == path.read_bytes()


def test_the_wheel_holds_the_published_recipes(wheel):
    file = ROOT / "pruning" / "published_recipes.json"
    assert wheel["visprune/pruning/published_recipes.json"] == file.read_bytes()


def test_the_wheel_holds_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"visprune", f"visprune-{visprune.__version__}.dist-info"}
    assert not [name for name in wheel if "__pycache__" in name or name.endswith((".pyc", ".pt", ".npz"))]
    assert sum(map(len, wheel.values())) < 16_000_000


def test_the_source_distribution_builds_the_same_wheel(tmp_path, wheel):
    backend = pytest.importorskip("hatchling.build")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = backend.build_sdist(str(tmp_path))
        with tarfile.open(tmp_path / name) as archive:
            archive.extractall(tmp_path, filter="data")
        patch.chdir(tmp_path / name.removesuffix(".tar.gz"))
        again = backend.build_wheel(str(tmp_path))
    with zipfile.ZipFile(tmp_path / again) as archive:
        assert set(archive.namelist()) == set(wheel)


@pytest.mark.parametrize(("command", "target"), sorted(PYPROJECT["project"]["scripts"].items()))
def test_every_command_has_its_function(command, target):
    module, _, function = target.partition(":")
    assert command == "visprune" or command.startswith("visprune-")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("name", visprune.__all__)
def test_every_public_name_is_there(name):
    assert getattr(visprune, name) is not None


def test_no_module_is_named_like_a_dependency():
    taken = {
        "jinja2",
        "numpy",
        "onnx",
        "onnxruntime",
        "rich",
        "tensorrt",
        "tokenizers",
        "torch",
        "transformers",
        "typer",
    }
    modules = {path.stem for name in ("src", *FOLDERS) for path in (ROOT / name).rglob("*.py")}
    assert not taken & modules
