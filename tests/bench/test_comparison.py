"""The rows of a comparison, and what is measured of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("onnxruntime")

from visprune.bench.baselines import random_tokens
from visprune.bench.comparison import compare
from visprune.bench.entries import is_unpruned, precision_of
from visprune.bench.lineup import line_up
from visprune.bench.report.page import facts
from visprune.bench.report.report import read_report
from visprune.bundle import Bundle
from visprune.errors import BundleError, CheckpointError, InputError, UnsupportedError, UsageError
from visprune.estimate.flops import savings
from visprune.runtime.vision.kept_tokens import keep_for


def no_maker(bundle, method):
    raise CheckpointError("There is no checkpoint.", "Find it.")


def test_a_bundle_against_itself_is_no_difference_and_has_its_controls(tiny_bundle, work):
    found = compare([tiny_bundle, tiny_bundle], work)
    rows = {row.name: row for row in found.report.rows}
    assert list(rows) == ["tiny at 100%", "tiny", "tiny (2)"]
    assert [row.role for row in rows.values()] == ["unpruned", "given", "given"]
    assert not rows["tiny"].against(rows["tiny (2)"]).told
    assert all(len(row.repetitions) == work.rounds for row in rows.values())
    assert {row.layer_tokens for row in rows.values()} == {(16, 16), (4, 4)}
    missing, shrunk = found.report.not_made
    assert missing.what == "random, 4 of 16"
    assert "visprune-export MODEL --method random -o random" in missing.reason
    assert shrunk.what == "resize, at most 4 of 16"
    assert "visprune-export MODEL --method resize -o resize" in shrunk.reason
    assert set(found.overlays) == set(rows)
    assert found.report.work == work
    assert rows["tiny"].memory_bytes > 10_000_000
    assert rows["tiny"].disk_bytes == sum(r.size for r in Bundle.open(tiny_bundle).manifest.files.values())


def test_a_second_question_needs_no_vision_encoder(tiny_bundle, work):
    report = compare([tiny_bundle], replace(work, cached=True)).report
    assert report.rows
    for row in report.rows:
        assert all("vision_encoder" not in one.stages for one in row.repetitions)
        assert all("prefill" in one.stages for one in row.repetitions)
        assert row.realised is None
    assert "second question" in "".join(facts.method(report).values())


def test_pytorch_keeps_no_features(tiny_bundle, work):
    with pytest.raises(UnsupportedError, match="keeps no features"):
        compare([tiny_bundle], replace(work, cached=True), against="transformers", progress=_nothing_runs)


def test_rows_of_different_models_are_allowed_and_told(tiny_bundle, tiny_copy, edit_manifest):
    source = Bundle.open(tiny_copy).manifest.source
    edit_manifest(tiny_copy, "source", model="other", weights_sha256="1" * 64)
    found = line_up([Bundle.open(tiny_bundle), Bundle.open(tiny_copy)], no_maker)
    assert any(f"different models ({source.model}, other)" in note for note in found.notes)
    assert [one.contender.role for one in found.entries].count("unpruned") == 2


def test_bundles_of_one_name_are_told_apart_by_their_paths(tiny_bundle, tiny_copy):
    found = line_up([Bundle.open(tiny_bundle), Bundle.open(tiny_copy)], no_maker)
    names = [one.contender.name for one in found.entries if one.contender.role == "given"]
    assert names == [str(tiny_bundle), str(tiny_copy)]


def test_a_random_bundle_that_is_given_runs_at_the_budgets_of_the_others(
    tiny_bundle, tiny_copy, edit_manifest
):
    edit_manifest(tiny_copy, "pruning", method="random", keep_tokens=9)
    given = line_up([Bundle.open(tiny_bundle), Bundle.open(tiny_copy)], no_maker)
    drawn = [one for one in given.entries if one.contender.role == "random"]
    assert [(one.keep.tokens, one.contender.path) for one in drawn] == [(4, str(tiny_copy))]
    assert [one.what for one in given.not_made] == ["resize, at most 4 of 16"]
    edit_manifest(tiny_copy, "pruning", keep_tokens=4)
    same = line_up([Bundle.open(tiny_bundle), Bundle.open(tiny_copy)], no_maker)
    assert not [one for one in same.entries if one.contender.role == "random"]  # it is there already


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt": "<image>"}, InputError, "stands for an image"),
        ({"images": ("nowhere.png",)}, InputError, "nowhere.png"),
        ({"provider": "cpuu"}, UsageError, "cpuu"),
    ],
)
def test_what_no_row_could_run_is_refused_before_anything_is_loaded(tiny_bundle, work, change, error, words):
    with pytest.raises(error, match=words):
        compare([tiny_bundle], replace(work, **change), progress=_nothing_runs)


def test_nothing_or_something_unknown_to_compare_is_refused(tiny_bundle, tmp_path, work):
    with pytest.raises(UsageError, match="no bundle"):
        compare([], work)
    with pytest.raises(UsageError, match="'jax'"):
        compare([tiny_bundle], work, against="jax")
    with pytest.raises(BundleError):
        compare([tiny_bundle, tmp_path], work, progress=_nothing_runs)
    with pytest.raises(UsageError, match="no picture"):
        replace(work, images=())
    with pytest.raises(UsageError, match="prompt is empty"):
        replace(work, prompt=" ")
    with pytest.raises(UsageError, match="1 new tokens"):
        replace(work, max_new_tokens=1)


def test_an_altered_bundle_is_refused_before_a_process_is_started(tiny_copy, work):
    graph = tiny_copy / "onnx" / "token_pruner.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleError, match="altered"):
        compare([tiny_copy], work)


def _nothing_runs(what: str, done: int, total: int) -> None:
    assert what not in ("loading", "warming up", "timing")


@pytest.fixture(scope="module")
def bundles(checkpoint, tmp_path_factory):
    """A checkpoint, and a folder with two bundles of it: a method before the LLM, and one inside it."""
    import visprune

    model = checkpoint(checkpoint.Tiny(layers=4))
    folder = tmp_path_factory.mktemp("bundles")
    for method in ("fopru-row", "fastv"):
        visprune.export(model, method=method, ratio=0.5, output=folder / method, verify=False)
    return model, folder


def test_controls_and_pytorch_come_from_the_checkpoint(bundles, work, monkeypatch, tmp_path):
    model, folder = bundles
    monkeypatch.chdir(model.parent)  # a manifest names a directory without the path to it
    work = replace(work, system="Be brief.")
    found = compare([folder / "fopru-row", folder / "fastv"], work, against="transformers")
    report = found.report
    rows = {row.name: row for row in report.rows}
    roles = [row.role for row in report.rows]
    assert roles[:3] == ["unpruned", "given", "given"]
    assert set(roles[3:]) == {"random", "resize", "pytorch"}
    assert not report.not_made
    manifest = Bundle.open(folder / "fastv").manifest
    drawn = [row for row in report.rows if row.role == "random"]
    assert {row.layer_tokens[0] for row in drawn} == {8, random_tokens(manifest, keep_for(manifest))}
    shrunk = [row for row in report.rows if row.role == "resize"]
    assert {row.layer_tokens for row in shrunk} == {(4,) * 4, (9,) * 4}
    for row in shrunk:
        assert row.name == f"resize {row.layer_tokens[0]} of 16, fp32"
        assert (
            row.flops.model - row.flops.decoder
            < rows["fopru-row"].flops.model - rows["fopru-row"].flops.decoder
        )
        assert row.realised == pytest.approx(
            (1 - row.against(report.unpruned(row)).ratio) / row.flops.removed
        )
    in_pytorch = rows["transformers, fp32"]
    full = rows["fopru-row at 100%"]
    assert (in_pytorch.visual_tokens, in_pytorch.text_tokens) == (16, full.text_tokens)
    assert full.text_tokens == len("SYSTEM: Be brief. USER: \nWhat is it? ASSISTANT:")
    assert in_pytorch.cache_bytes == full.cache_bytes
    assert in_pytorch.flops == full.flops
    assert {"preprocess", "vision_encoder", "token_pruner", "embedding", "prefill", "other"} == set(
        in_pytorch.repetitions[0].stages
    )
    assert rows["fastv"].prunes_inside
    assert not rows["fopru-row"].prunes_inside
    saved = savings(manifest, text_tokens=rows["fastv"].text_tokens, keep_tokens=16, unit="FLOP")
    assert rows["fastv"].flops.model == saved.model.pruned
    row = rows["fopru-row"]
    assert row.realised == pytest.approx((1 - row.against(full).ratio) / row.flops.removed)
    file = tmp_path / "report.json"
    file.write_text(report.to_json())
    assert read_report(file) == report


def test_random_has_as_much_work_as_a_method_inside_the_llm(bundles):
    manifest = Bundle.open(bundles[1] / "fastv").manifest
    keep = keep_for(manifest)
    count = random_tokens(manifest, keep)
    wanted = savings(manifest).visual.pruned
    drawn = Bundle.open(bundles[1] / "fopru-row").manifest
    drawn = replace(
        drawn,
        pruning=replace(drawn.pruning, budget=replace(drawn.pruning.budget, unit="token", unit_tokens=1)),
    )
    off = {n: abs(savings(drawn, keep_tokens=n).visual.pruned - wanted) for n in range(1, 17)}
    assert off[count] == min(off.values())
    assert not is_unpruned(manifest, keep)
    assert precision_of(manifest) == "fp32"


def test_other_weights_of_the_same_name_are_not_taken(bundles, work, monkeypatch, checkpoint, tmp_path):
    from visprune.bench.make_bundle import checkpoint_of

    model, folder = bundles
    manifest = Bundle.open(folder / "fopru-row").manifest
    other = checkpoint(checkpoint.Tiny(layers=4, seed=1))
    (tmp_path / model.name).symlink_to(other)
    monkeypatch.chdir(tmp_path)
    manifest = replace(manifest, source=replace(manifest.source, model=model.name))
    with pytest.raises(CheckpointError, match="other weights"):
        checkpoint_of(manifest)


def test_adapters_are_found_again_and_measured(bundles, work, monkeypatch, tmp_path):
    """In PyTorch the same model runs as in the bundle: the one with the adapters merged."""
    pytest.importorskip("peft")
    import adapters
    import torch

    from visprune.bench.comparison import pytorch_entries
    from visprune.bench.entries import entry
    from visprune.bench.make_bundle import checkpoint_of
    from visprune.bench.measure.in_pytorch import CheckpointModel
    from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
    from visprune.export.checkpoint.find import find
    from visprune.manifest import SourcePart

    model, folder = bundles
    (tmp_path / model.name).symlink_to(model)
    made = adapters.make(tmp_path / "lora", model, r=2, target_modules=["q_proj", "fc1"])
    want = find(tmp_path / model.name, CheckpointOptions(adapter=[str(made)]))
    monkeypatch.chdir(tmp_path)
    given = entry("row", Bundle.open(folder / "fopru-row"))
    part = SourcePart("adapter", "lora", want.sha256_of(want.parts[0].files))
    source = replace(given.manifest.source, parts=(part,), weights_sha256=want.weights_sha256())
    given = replace(given, manifest=replace(given.manifest, source=source))
    name, found = checkpoint_of(given.manifest)
    assert (name, found.adapters[0].name) == (model.name, "lora")
    contender = pytorch_entries([given])[0].contender
    merged = adapters.merged(model, made).state_dict()
    threads = torch.get_num_threads()
    with torch.enable_grad():  # what the worker turns off is turned on again at the end
        measured = CheckpointModel(contender, work)
    torch.set_num_threads(threads)
    for name, tensor in measured._model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name])
    other = replace(source, parts=())
    with pytest.raises(CheckpointError, match="other weights than the bundle of"):
        checkpoint_of(replace(given.manifest, source=other))

    def refused(words, *parts):
        with pytest.raises(CheckpointError, match=words) as raised:
            checkpoint_of(replace(given.manifest, source=replace(source, parts=parts)))
        return raised.value.hint

    adapters.edit_settings(made, lora_alpha=3)
    refused("^The adapter lora has other weights than that of the bundle", part)
    made.rename(tmp_path / "elsewhere")
    hint = refused("^The adapter of the bundle, lora, is not in the working directory", part)
    assert "their names" in hint
    refused("several adapters named lora", part, part)
    hint = refused("was found without it", replace(part, name=model.name))
    assert "two directories of one name" in hint
    (tmp_path / model.name).unlink()
    refused(f"^The model of the bundle, {model.name}, is not in the working directory", part)
