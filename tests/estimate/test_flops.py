"""Savings in work agree with the figures that papers print, and with sums made by hand."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from visprune import cli
from visprune.budget import Budget, LayerBudget
from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError
from visprune.estimate.flops import (
    Saving,
    head_macs,
    in_unit,
    patch_embedding_macs,
    projector_macs,
    savings,
    tower_macs,
)
from visprune.estimate.token_schedule import Schedule
from visprune.manifest import LayerPruning
from visprune.work import LayerWork, Shapes

LLAVA_7B = Shapes(1024, 4096, 23, 577, 576, 588, ((1024, 4096), (4096, 4096)), 4096, 11008, 32, 32064)
SEVEN, THIRTEEN = (4096, 11008), (5120, 13824)

# Shapes of the tiny bundle: 16 visual tokens, 2 layers of width 8.
TINY = Shapes(6, 5, 2, 17, 16, 588, ((3, 8), (8, 8)), 8, 20, 2, 259)


def inside(boundary="attention", layer=0, ratio=0.5, **changes):
    budget = LayerBudget(1, ratio, **changes)
    return LayerPruning("fastv", {"k": 1}, (layer,), boundary, "original", budget)


class TestPublished:
    """Figures of papers, to the digits in print."""

    def test_the_7b_decoder_exactly(self):
        macs = Schedule.even(32, 576).macs(LayerWork(*SEVEN, "F3"))
        assert macs == 3_817_152_184_320
        assert round(macs / 1e12, 2) == 3.82
        assert in_unit(macs, "MAC") == macs
        assert in_unit(macs, "FLOP") == 7_634_304_368_640

    @pytest.mark.parametrize(
        ("tokens", "whole", "pyramid", "printed"),
        [
            (576, 3.8172, 1.7774, ("3.82", "1.78")),
            (2880, 20.8252, 9.4646, ("20.8", "9.46")),
            (5184, 40.6164, 18.0758, ("40.6", "18.1")),
        ],
    )
    def test_pyramiddrop(self, tokens, whole, pyramid, printed):
        layer = LayerWork(*SEVEN)
        full = Schedule.even(32, tokens).macs(layer)
        kept = (tokens // 2, tokens // 4, tokens // 8)
        schedule = Schedule.pruned(32, tokens, (7, 15, 23), kept)
        assert schedule.entering == (tokens,) * 8 + (kept[0],) * 8 + (kept[1],) * 8 + (kept[2],) * 8
        assert round(full / 1e12, 4) == whole
        assert round(schedule.macs(layer) / 1e12, 4) == pyramid
        assert (f"{full / 1e12:.3g}", f"{schedule.macs(layer) / 1e12:.3g}") == printed

    @pytest.mark.parametrize(("removed", "mean"), [(0, 154.6), (0.9, 29.8), (0.75, 50.2), (0.5, 84.6)])
    def test_fastv_on_13b_as_a_mean_of_layers(self, removed, mean):
        left = 612 - int(576 * removed)
        macs = Schedule.pruned(40, 612, (1,), (left,)).macs(LayerWork(*THIRTEEN, "F2"))
        assert round(macs / 40 / 1e9, 1) == mean

    @pytest.mark.parametrize(("left", "mean"), [(612, 99.3), (324, 54.8)])
    def test_fastv_on_7b_as_a_mean_of_layers(self, left, mean):
        macs = Schedule.pruned(32, 612, (1,), (left,)).macs(LayerWork(*SEVEN, "F2"))
        assert round(macs / 32 / 1e9, 1) == mean

    def test_the_vision_side(self):
        assert round(tower_macs(LLAVA_7B) / 1e12, 4) == 0.1827
        assert round(projector_macs(LLAVA_7B, 576) / 1e12, 5) == 0.01208
        assert patch_embedding_macs(LLAVA_7B) == 576 * 3 * 14 * 14 * 1024
        assert head_macs(LLAVA_7B) == 4096 * 32064

    def test_the_cache(self):
        heads = (32, 128, 2)
        assert Schedule.even(32, 1).cache_bytes(*heads) == 524_288
        assert round(Schedule.even(32, 576).cache_bytes(*heads) / 1e6, 1) == 302.0
        assert round(Schedule.even(32, 320).cache_bytes(*heads) / 1e6, 1) == 167.8


def test_the_page_prints_what_it_says(capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "flops.md").read_text(encoding="utf-8")
    block = page.split("```python\n")[1].split("```")[0]
    exec(block, {})
    said = [line.split("  # ")[1] for line in block.splitlines() if "  # " in line]
    assert said
    assert capsys.readouterr().out.splitlines() == said


class TestSchedule:
    layer = LayerWork(10, 30)

    def test_one_token_in_one_layer(self):
        assert Schedule.even(1, 1).macs(self.layer) == 4 * 100 + 2 * 10 + 3 * 300
        assert Schedule.even(1, 1).macs(LayerWork(10, 30, "F2")) == 4 * 100 + 2 * 10 + 2 * 300

    def test_deletion_inside_the_first_layer(self):
        schedule = Schedule.pruned(2, 8, (0,), (3,), "attention")
        assert schedule == Schedule((8, 3), (3, 3))
        first = 3 * 8 * 100 + 2 * 64 * 10 + 3 * 100 + 3 * 3 * 300
        assert schedule.macs(self.layer) == first + self.layer.layer(3)

    def test_deletion_after_the_first_layer(self):
        schedule = Schedule.pruned(2, 8, (0,), (3,), "layer")
        assert schedule == Schedule((8, 3), (8, 3))
        assert schedule.macs(self.layer) == self.layer.layer(8) + self.layer.layer(3)

    def test_several_points_and_text(self):
        schedule = Schedule.pruned(4, 8, (0, 2), (5, 2), "attention")
        assert schedule == Schedule((8, 5, 5, 2), (5, 5, 2, 2))
        assert schedule.plus(10) == Schedule((18, 15, 15, 12), (15, 15, 12, 12))

    def test_a_layer_caches_what_entered_it(self):
        caches = {Schedule.pruned(2, 8, (0,), (3,), at).cache_bytes(1, 1, 1) for at in ("attention", "layer")}
        assert caches == {2 * (8 + 3)}

    def test_nothing_deleted_is_even(self):
        for boundary in ("attention", "layer"):
            assert Schedule.pruned(3, 8, (1,), (8,), boundary) == Schedule.even(3, 8)
        assert Schedule.pruned(3, 8, (), ()) == Schedule.even(3, 8)

    @pytest.mark.parametrize(
        ("points", "kept"),
        [
            ((0,), ()),
            ((2,), (1,)),
            ((-1,), (1,)),
            ((1, 0), (3, 2)),
            ((0, 0), (3, 2)),
            ((0,), (9,)),
            ((0,), (-1,)),
        ],
    )
    def test_what_is_no_schedule(self, points, kept):
        with pytest.raises(UsageError):
            Schedule.pruned(2, 8, points, kept)

    def test_both_counts_for_each_layer(self):
        with pytest.raises(UsageError, match="no schedule"):
            Schedule((8, 8), (8,))


@pytest.mark.parametrize(
    ("unpruned", "pruned", "text"),
    [
        (3_817_152_184_320, 954_000_000_000, "0.95 of 3.82 T MAC, 75.0% removed"),
        (20_825_222_676_480, 9_464_551_833_600, "9.5 of 20.8 T MAC, 54.6% removed"),
        (154_641_530_880, 154_641_530_880, "155 of 155 G MAC, 0.0% removed"),
        (1_234_567, 1_000, "0.00 of 1.23 M MAC, 99.9% removed"),
        (10, 5, "5.0 of 10.0 MAC, 50.0% removed"),
        (12_345 * 10**12, 12_345 * 10**12, "12345 of 12345 T MAC, 0.0% removed"),
    ],
)
def test_for_people(unpruned, pruned, text):
    assert Saving(unpruned, pruned).describe("MAC") == text


class TestSavings:
    @pytest.fixture
    def manifest(self, tiny_bundle):
        """Return the tiny bundle's manifest with LLaVA-1.5-7B's sizes."""
        manifest = Bundle.open(tiny_bundle).manifest
        return replace(
            manifest,
            shapes=LLAVA_7B,
            pruning=replace(manifest.pruning, keep_tokens=144, budget=Budget(576), grid=(24, 24)),
            decoder=replace(
                manifest.decoder, num_layers=32, num_kv_heads=32, head_dim=128, cache_dtype="float16"
            ),
        )

    def test_before_the_llm(self, manifest):
        found, layer = savings(manifest, text_tokens=36), LayerWork(*SEVEN)
        assert (found.convention, found.unit, found.images) == ("F3", "MAC", 1)
        assert (found.visual_tokens, found.text_tokens) == (576, 36)
        assert found.visual == Saving(3_817_152_184_320, 32 * layer.layer(144))
        assert found.sequence == Saving(32 * layer.layer(612), 32 * layer.layer(180))
        same = 182_670_112_768 + 576 * 588 * 1024 + 4096 * 32064
        linears = 1024 * 4096 + 4096 * 4096
        assert found.model.unpruned == same + 576 * linears + found.sequence.unpruned
        assert found.model.pruned == same + 144 * linears + found.sequence.pruned
        assert found.cache_bytes == Saving(576 * 524_288, 144 * 524_288)

    def test_inside_the_llm(self, manifest):
        pyramid = LayerPruning("x", {}, (7, 15, 23), "layer", "renumbered", LayerBudget(3, 0.125))
        whole = replace(manifest, layer_pruning=pyramid, pruning=replace(manifest.pruning, keep_tokens=576))
        found = savings(whole)
        assert found.visual == Saving(3_817_152_184_320, 1_777_399_234_560)
        assert found.model.unpruned - found.model.pruned == found.sequence.unpruned - found.sequence.pruned
        assert savings(whole, layer_ratio=1.0).visual.removed == 0.0

    def test_before_and_inside(self, manifest):
        found = savings(replace(manifest, layer_pruning=inside()), text_tokens=0)
        expected = Schedule.pruned(32, 144, (0,), (72,), "attention").macs(LayerWork(*SEVEN))
        assert found.visual == found.sequence == Saving(3_817_152_184_320, expected)

    def test_a_cls_is_a_token_too(self, manifest):
        found = savings(replace(manifest, pruning=replace(manifest.pruning, always_kept=1)))
        layer = LayerWork(*SEVEN)
        assert found.visual == Saving(32 * layer.layer(577), 32 * layer.layer(145))

    def test_images_see_each_other_in_the_decoder_and_not_in_the_tower(self, manifest):
        one, two = savings(manifest, text_tokens=0), savings(manifest, images=2, text_tokens=0)
        assert two.visual.unpruned == 32 * LayerWork(*SEVEN).layer(1152)
        around = one.model.unpruned - one.visual.unpruned - head_macs(LLAVA_7B)
        assert two.model.unpruned - two.visual.unpruned - head_macs(LLAVA_7B) == 2 * around

    def test_other_choices(self, manifest):
        mac, flop = savings(manifest), savings(manifest, unit="FLOP")
        assert (flop.unit, flop.model.pruned) == ("FLOP", 2 * mac.model.pruned)
        assert flop.cache_bytes == mac.cache_bytes
        f2 = savings(manifest, convention="F2")
        assert f2.visual.unpruned == mac.visual.unpruned - 32 * 576 * 4096 * 11008
        assert savings(manifest, keep_tokens=576).visual.removed == 0.0
        two = savings(replace(manifest, shapes=replace(LLAVA_7B, convention="F2")))
        assert two == f2

    @pytest.mark.parametrize(
        "choice", [{"images": 0}, {"text_tokens": -1}, {"keep_tokens": 577}, {"layer_ratio": 0.5}]
    )
    def test_what_cannot_be(self, manifest, choice):
        with pytest.raises(UsageError):
            savings(manifest, **choice)

    def test_not_known(self, manifest):
        assert savings(replace(manifest, shapes=None)) is None


class TestShapes:
    @pytest.mark.parametrize("change", [{"hidden_size": 0}, {"projector": ((3, 0),)}, {"vision_layers": -1}])
    def test_sizes_are_checked(self, change):
        with pytest.raises(UsageError, match=f"{next(iter(change))} is"):
            replace(TINY, **change)

    def test_a_tower_may_run_no_layer(self):
        assert tower_macs(replace(TINY, vision_layers=0)) == 0

    def test_travels_in_a_manifest(self, tiny_copy, edit_manifest):
        assert Bundle.open(tiny_copy).manifest.shapes is None
        edit_manifest(tiny_copy, None, shapes=TINY)
        assert Bundle.open(tiny_copy).manifest.shapes == TINY

    def test_of_another_decoder(self, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, None, shapes=replace(TINY, num_layers=3))
        with pytest.raises(BundleError, match="3 layers"):
            Bundle.open(tiny_copy)


class TestInspect:
    @pytest.fixture
    def call(self, capfd):
        def run(*arguments):
            assert cli.run_command("inspect", [str(a) for a in arguments]) == 0
            return capfd.readouterr().out

        return run

    def test_names_the_convention(self, call, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, None, shapes=TINY)
        lines = call(tiny_copy).splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("work"))
        # F3 by hand: 2 layers of 4 n 64 + 2 n^2 8 + 3 n 8 20, with n = 16 and 4, 80 and 68
        assert lines[at : at + 4] == [
            "work      decoder, 16 visual tokens of one image: 6.4 of 31.7 k MAC, 79.8% removed "
            "(F3: three MLP matrices)",
            "          with 64 text tokens: 248 of 323 k MAC, 23.1% removed",
            "          and with the vision tower, projector and output head: 321 of 396 k MAC, 19.1% removed",
            "cache     512 B of 2.05 kB for the visual tokens, 75.0% removed",
        ]

    def test_says_that_it_does_not_know(self, call, tiny_bundle):
        assert "work      not known" in call(tiny_bundle)
        assert json.loads(call(tiny_bundle, "--json"))["work"] is None

    def test_json(self, call, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, None, shapes=TINY)
        found = json.loads(call(tiny_copy, "--json"))["work"]
        assert found == asdict(savings(Bundle.open(tiny_copy).manifest))
        assert (found["convention"], found["text_tokens"]) == ("F3", 64)

    def test_the_method_inside(self, call, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, None, layer_pruning=inside())
        assert (
            "inside    fastv (k=1): kept 2 of 4 visual tokens after the attention of layer 0, "
            "50% removed; positions original"
        ) in call(tiny_copy).splitlines()

    def test_several_points_and_a_recipe(self, call, tiny_copy, edit_manifest):
        many = LayerPruning(
            "x",
            {"scheme": [1, 1, 0, 0, 0, 0], "stages": 4},
            (0, 2, 3),
            "layer",
            "renumbered",
            LayerBudget(3, 0.125),
        )
        decoder = Bundle.open(tiny_copy).manifest.decoder
        edit_manifest(tiny_copy, None, layer_pruning=many, decoder=replace(decoder, num_layers=5))
        assert (
            "inside    x (scheme: 6 values, stages=4): kept 2, 1 and 1 of 4 visual tokens after "
            "layers 0, 2 and 3, 75% removed in the end; positions renumbered"
        ) in call(tiny_copy).splitlines()
