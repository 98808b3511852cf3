"""Builds of engines of the demo model for SM86, and every reason to refuse one. No GPU is needed or used."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx")

from linked import WAYS

import visprune
from visprune import cli
from visprune.bundle import Bundle
from visprune.engines import Caps, build, cache
from visprune.engines import build_process as child
from visprune.engines.build_job import plan
from visprune.engines.build_options import BuildOptions
from visprune.engines.builder import Request, build_engine
from visprune.engines.rewrite_graph import prepare
from visprune.errors import (
    BundleError,
    EngineError,
    MissingExtraError,
    UnsupportedError,
    UsageError,
    VispruneError,
)
from visprune.manifest import Quantization
from visprune.runtime.backends.profiles import Limits, profiles


@pytest.fixture(scope="module")
def built(rtx, tmp_path_factory):
    """The demo model built once: the bundle, the calls of progress, and the cache directory."""
    cache_home, place, said = tmp_path_factory.mktemp("engines"), tmp_path_factory.mktemp("built"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        made = build(rtx, place / "new", progress=lambda *args: said.append(args))
    return made, said, cache_home


@pytest.fixture
def cached(built, monkeypatch):
    """The cache that holds these engines."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built[2]))
    return built[2] / "visprune" / "engines"


@pytest.fixture
def no_child(monkeypatch):
    """Fail if an engine is built: all of them must come from the cache."""

    def fail(*arguments):
        raise AssertionError("an engine was built")

    monkeypatch.setattr("visprune.engines.build_job.build_in_subprocess", fail)


def token_pruner(bundle, output):
    graph = bundle.manifest.graphs["token_pruner"]
    made = profiles(bundle.manifest, Limits())["token_pruner"]
    return Request("token_pruner", str(bundle.file(graph.file)), str(output), "tensorrt_rtx", 86, made)


class TestBuild:
    def test_every_graph_becomes_an_engine(self, rtx, built):
        made, said, _ = built
        manifest = made.manifest
        assert [engine.graph for engine in manifest.engines] == list(rtx.manifest.graphs)
        assert {engine.sm for engine in manifest.engines} == {86}
        assert all(made.file(engine.file).stat().st_size > 100_000 for engine in manifest.engines)
        made.verify()
        assert replace(manifest, engines=(), files=rtx.manifest.files) == rtx.manifest
        assert set(manifest.files) - set(rtx.manifest.files) == {e.file for e in manifest.engines}
        assert said[-1] == ("building decoder_model_merged for SM86", 1, 1)
        assert list(made.path.parent.iterdir()) == [made.path]

    def test_the_command_takes_them_from_the_cache(self, rtx, tmp_path, cached, no_child, capfd):
        options = ["--sm", "86", "-o", str(tmp_path / "new"), "--json"]
        assert cli.run_command("build", [str(rtx.path), *options]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["engines"][0]["file"] == "engines/vision_encoder.sm86.engine"
        assert cli.run_command("build", [str(rtx.path), *options[:-1]]) == 2
        assert "exists" in capfd.readouterr().err
        assert cli.run_command("build", [str(rtx.path), *options[:-1], "--force"]) == 0
        assert "not run" in capfd.readouterr().out
        assert cli.run_command("inspect", [str(tmp_path / "new")]) == 0
        assert "engines   4 for SM86" in capfd.readouterr().out

    def test_a_damaged_entry_is_built_again(self, rtx, tmp_path, cached):
        entry = min(cached.glob("*.engine"), key=lambda path: path.stat().st_size)
        before = {path.name for path in cached.glob("*.engine")}
        entry.write_bytes(entry.read_bytes()[:-1] + b"?")
        build(rtx, tmp_path / "new").verify()
        after = {path.name for path in cached.glob("*.engine")}
        assert len(after) == len(before)
        assert all(
            visprune.bundle.sha256(path) == path.name.split(".")[1] for path in cached.glob("*.engine")
        )

    def test_two_profiles_share_their_weights(self, rtx, tmp_path):
        name = "decoder_model_merged"
        graph, made = rtx.manifest.graphs[name], profiles(rtx.manifest, Limits())[name]
        sizes = []
        for some in (made[:1], made):
            output = tmp_path / f"{len(some)}"
            build_engine(Request(name, str(rtx.file(graph.file)), str(output), "tensorrt_rtx", 86, some))
            sizes.append(output.stat().st_size)
        assert sizes[1] - sizes[0] < rtx.manifest.files[graph.data].size

    def test_kinds_of_gpu_that_are_read_once(self, rtx, tmp_path, cached, no_child):
        made = build(rtx, tmp_path / "new", sm=(sm for sm in (86,)))
        assert {engine.sm for engine in made.manifest.engines} == {86}

    @pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
    def test_bundles_of_linked_files(self, rtx, tmp_path, cached, no_child, way):
        made = build(way(rtx.path, tmp_path / "linked"), tmp_path / "new")
        made.verify()
        assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in made.path.rglob("*.*"))

    def test_a_cache_that_may_not_be_looked_into(self, tmp_path, monkeypatch):
        def refuse(folder, pattern):
            raise PermissionError(13, "Permission denied", str(folder))

        monkeypatch.setattr(Path, "glob", refuse)
        assert not cache.fetch("name", tmp_path / "place")

    def test_of_a_bundle_with_engines_nothing_is_made(self, rtx, tmp_path, cached, no_child):
        made = build(rtx, tmp_path / "new")
        with pytest.raises(UsageError, match="has engines already"):
            build(made, tmp_path / "newer")
        with pytest.raises(UsageError, match="has engines"):
            visprune.quantize(made, tmp_path / "newer", precision="int8")
        made.file(made.manifest.engines[0].file).unlink()
        with pytest.raises(BundleError, match=r"engines/vision_encoder.sm86.engine is missing"):
            Bundle.open(made.path)


def test_what_the_bench_adds_beside_engines_has_engines(built, tmp_path):
    from visprune.bench.make_bundle import export_variant

    made = export_variant(built[0], "random", tmp_path, lambda *_: None, engines=True)
    assert made.manifest.pruning.method == "random"
    assert {engine.sm for engine in made.manifest.engines} == {86}
    assert [engine.graph for engine in made.manifest.engines] == list(made.manifest.graphs)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "kind", "match"),
        [
            ({"target": "onnxruntime"}, UnsupportedError, "has no engines"),
            ({"target": "rtz"}, UsageError, "Did you mean 'rtx'"),
            ({"sm": (87,)}, UnsupportedError, "no SM87.* Give some of: 75, 80, 86, 89, 120, 121"),
            ({"sm": (86, 89, 86)}, UsageError, "SM86 is given 2 times"),
            ({"sm": ()}, UsageError, "No SM"),
            ({"limits": Limits(max_prompt=9999)}, UsageError, "context holds 1024"),
        ],
    )
    def test_before_anything_is_built(self, options, kind, match, rtx, tmp_path, no_child):
        with pytest.raises(kind, match=match):
            build(rtx, tmp_path / "new", **options)
        assert not list(tmp_path.iterdir())

    def test_a_bundle_for_another_target(self, rtx_copy, tmp_path, no_child):
        with pytest.raises(UnsupportedError, match="exported for onnxruntime") as caught:
            build(rtx_copy(target="onnxruntime"), tmp_path / "new")
        assert "visprune-export --method fopru-rank --keep-tokens 72 --target rtx" in caught.value.hint

    def test_fp8_before_sm89(self, rtx, tmp_path):
        parts = Quantization({"decoder": "fp8"}, 0, (), (), "quantization.json")
        bundle = Bundle(rtx.path, replace(rtx.manifest, quantization=parts))
        assert [str(p) for p in plan(bundle, BuildOptions(sm=(86, 89))).problems] == [
            "SM86 has no fp8: that begins with SM89. Quantize with --precision int8 for this GPU."
        ]

    def test_without_tensorrt(self, rtx, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(MissingExtraError, match=r'pip install "visprune\[tensorrt-rtx\]"'):
            build(rtx, tmp_path / "new")

    def test_a_dry_run_lists_all_problems(self, rtx, capfd):
        arguments = [str(rtx.path), "--dry-run", "--json"]
        assert cli.run_command("build", arguments) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["problems"] == []
        assert set(told["profiles"]) == set(rtx.manifest.graphs)
        assert cli.run_command("build", [*arguments, "--sm", "87,86,86", "--max-prompt", "2000"]) == 2
        assert len(json.loads(capfd.readouterr().out)["problems"]) == 3
        assert cli.run_command("build", arguments[:-1]) == 0
        assert "keep_tokens 1 > 72 > 144" in capfd.readouterr().out

    def test_without_polygraphy(self, rtx, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "polygraphy", None)
        with pytest.raises(MissingExtraError, match=r'pip install "visprune\[tensorrt-rtx\]"'):
            build(rtx, tmp_path / "new")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--sm", "ada", "-o", "x"],
            ["--workspace", "0"],
            ["--max-memory", "nan"],
            ["--max-memory", "-1"],
            [],
        ],
    )
    def test_a_command_line_that_says_too_little(self, arguments, rtx, capfd):
        assert cli.run_command("build", [str(rtx.path), *arguments]) == 2
        assert "error: " in capfd.readouterr().err


class TestMemory:
    def test_of_the_process_that_builds(self, rtx, tmp_path):
        with pytest.raises(EngineError, match=r"vision_encoder for SM86 took .* GB of memory, and 0.01 GB"):
            build(rtx, tmp_path / "new", caps=Caps(host=10_000_000))
        assert not list(tmp_path.iterdir())

    def test_of_the_gpu_while_a_layer_runs(self, rtx, tmp_path):
        request = replace(token_pruner(rtx, tmp_path / "engine"), workspace=1)
        with pytest.raises(EngineError, match="could not build token_pruner for SM86") as caught:
            build_engine(request)
        assert caught.value.hint == "Give a larger --workspace."
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("caps", [{"workspace": 0}, {"host": -1}, {"workspace": 4e9}, {"host": True}])
    def test_that_cannot_be(self, caps):
        with pytest.raises(UsageError, match="A cap on memory is"):
            Caps(**caps)


class TestChild:
    def test_one_that_is_killed_leaves_nothing(self, rtx, tmp_path, monkeypatch):
        start = subprocess.Popen

        def killed(*arguments, **options):
            process = start(*arguments, **options)
            process.kill()
            return process

        monkeypatch.setattr(child.subprocess, "Popen", killed)
        with pytest.raises(
            EngineError, match="Building vision_encoder for SM86 was ended by SIGKILL"
        ) as caught:
            build(rtx, tmp_path / "new")
        assert "too little memory" in caught.value.hint
        assert not list(tmp_path.iterdir())

    def test_what_a_killed_command_left_is_cleared(self, rtx, tmp_path, cached, no_child):
        (tmp_path / ".visprune-partial-0123abcd").mkdir()
        made = build(rtx, tmp_path / "new")
        assert list(tmp_path.iterdir()) == [made.path]

    def test_it_ends_with_its_parent(self, rtx, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "visprune.engines.build_process", str(tmp_path)],
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=30,
            capture_output=True,
        )
        assert done.returncode == 1
        assert not list(tmp_path.iterdir())

    def test_a_graph_that_cannot_be_read(self, rtx_copy, tmp_path):
        onnx = pytest.importorskip("onnx")
        bundle = rtx_copy()
        path = bundle.file(bundle.manifest.graphs["token_pruner"].file)
        model = onnx.load(path, load_external_data=False)
        node = next(node for node in model.graph.node if node.op_type == "Gather")
        node.op_type, node.name, node.domain = "Ungather", "odd", ""
        path.write_bytes(model.SerializeToString())
        (tmp_path / "talk").mkdir()
        with pytest.raises(
            EngineError, match=r"cannot read token_pruner at node 'odd' \(Ungather\)"
        ) as caught:
            child.build_in_subprocess(token_pruner(bundle, tmp_path / "engine"), tmp_path / "talk")
        assert "likely has no Ungather" in caught.value.hint

    def test_an_engine_that_cannot_be_written(self, rtx, tmp_path):
        (tmp_path / "talk").mkdir()
        request = token_pruner(rtx, tmp_path / "nowhere" / "engine")
        with pytest.raises(EngineError, match="token_pruner cannot be written: No such file") as caught:
            child.build_in_subprocess(request, tmp_path / "talk")
        assert "Free some space" in caught.value.hint

    def test_a_graph_that_is_none(self, rtx_copy, tmp_path):
        bundle = rtx_copy()
        path = bundle.file(bundle.manifest.graphs["decoder_model_merged"].file)
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(BundleError, match=r"decoder_model_merged\.onnx is no ONNX graph"):
            prepare(path, cache_capacity=0)

    def test_half_an_outcome_is_that_of_one_that_died(self, rtx, tmp_path, monkeypatch):
        (tmp_path / "outcome.json").write_text('{"kind": "Eng')
        monkeypatch.setattr(child, "_wait", lambda *_: 1)
        with pytest.raises(EngineError, match="token_pruner for SM86 failed with exit code 1"):
            child.build_in_subprocess(token_pruner(rtx, tmp_path / "engine"), tmp_path)

    def test_its_last_words_are_told(self, tmp_path, rtx):
        request = token_pruner(rtx, tmp_path / "engine")
        log = tmp_path / "stderr.txt"
        log.write_text("a\nb\nc\nd\n")
        assert "said last: b c d" in str(child._failure(request, 3, log))
        assert isinstance(child._failure(request, -11, log), VispruneError)
        assert "SIGSEGV" in str(child._failure(request, -11, log))


def _build_in(path, output):
    build(path, output)


def test_two_processes_share_a_cache(rtx, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_build_in, args=(rtx.path, tmp_path / name)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    for name in "ab":
        Bundle.open(tmp_path / name).verify()
    left = list((tmp_path / "cache" / "visprune" / "engines").iterdir())
    assert {path.suffix for path in left} == {".engine"}
    assert len({path.name.split(".")[0] for path in left}) == len(rtx.manifest.graphs)
    assert all(visprune.bundle.sha256(path) == path.name.split(".")[1] for path in left)


def test_a_key_depends_on_all_that_an_engine_does(rtx, tmp_path):
    request = token_pruner(rtx, tmp_path / "engine")
    other_form = tmp_path / "other.onnx"
    other_form.write_bytes(Path(request.onnx).read_bytes() + b"?")
    changes = [
        {},
        {"onnx": str(other_form)},
        {"graph": "embedding"},
        {"flavour": "tensorrt"},
        {"sm": 89},
        {"profiles": ()},
        {"workspace": 1},
    ]
    keys = [cache.key(rtx.manifest, replace(request, **change), "1.7") for change in changes]
    keys.append(cache.key(rtx.manifest, request, "1.8"))
    keys.append(cache.key(replace(rtx.manifest, dtype="float32"), request, "1.7"))
    keys.append(cache.key(rtx.manifest, request, "1.7", "RTX A2000"))
    assert len(set(keys)) == len(changes) + 3
    elsewhere = replace(request, output="elsewhere", timing_cache="other")
    assert cache.key(rtx.manifest, elsewhere, "1.7") == keys[0]
