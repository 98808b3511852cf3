"""Work, bytes and memory agree with sums made by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from visprune.errors import UsageError
from visprune.estimate.flops import head_macs, projector_macs, tower_macs
from visprune.estimate.footprint import footprint, parameters
from visprune.estimate.known_models import KNOWN
from visprune.estimate.planned_model import prune
from visprune.estimate.roofline import Rates, StageWork, estimate, stage_works, weight_bytes
from visprune.estimate.token_schedule import Schedule
from visprune.export.export_options import ExportOptions
from visprune.work import LayerWork

SEVEN = "llava-hf/llava-1.5-7b-hf"


def pruned(name=SEVEN, **options):
    return prune(KNOWN[name], ExportOptions(**{"method": "none", **options}))


def work_of(model, text=64, new=128, precision="fp16"):
    return {w.stage: w for w in stage_works(model.sizes, model.tokens(text), new, precision, 2)}


def memory_of(model, text=64, new=10, precision="fp16"):
    return footprint(model.sizes, model.tokens(text), new, precision, 2)


class TestWeights:
    @pytest.mark.parametrize(
        ("name", "billions"),
        [
            # As in the model cards, without parts that do not run: the last layer of CLIP and its post-norm.
            (SEVEN, 7.05),
            ("llava-hf/llava-1.5-13b-hf", 13.34),
            ("llava-hf/llava-v1.6-mistral-7b-hf", 7.55),
            ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 8.03),
        ],
    )
    def test_parameters(self, name, billions):
        assert parameters(pruned(name).sizes) / 1e9 == pytest.approx(billions, abs=0.01)

    def test_7b_in_fp16_by_hand(self):
        found = memory_of(pruned(), new=128)
        layer = 4 * 4096**2 + 3 * 4096 * 11008
        assert found.decoder == 2 * (32 * layer + 4096 * 32064)
        assert found.embedding == 2 * 4096 * 32064
        assert found.vision == 2 * (23 * (4 * 1024**2 + 2 * 1024 * 4096) + 588 * 1024)
        assert found.projector == 2 * (1024 * 4096 + 4096**2)
        assert found.weights / 1e9 == pytest.approx(14.1, abs=0.01)

    def test_shared_keys_and_values_save_weights(self):
        mistral = pruned("llava-hf/llava-v1.6-mistral-7b-hf")
        assert mistral.sizes.layer_weights == 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336

    def test_bits(self):
        assert [weight_bytes(p, 2) for p in ("fp32", "fp16", "fp8", "int8", "int8-dynamic")] == [
            4,
            2,
            1,
            1,
            1,
        ]
        assert weight_bytes("int4", 2) == 0.5 + 2 / 128
        whole, half = (memory_of(pruned(), new=1, precision=p) for p in ("fp16", "int8"))
        assert half.decoder * 2 == whole.decoder
        assert half.embedding == whole.embedding
        assert half.cache == whole.cache


class TestMemory:
    def test_the_cache(self):
        found = memory_of(pruned(), text=0, new=64, precision="int8")
        assert found.cache == 524_288 * (576 + 64)

    def test_caches_shrink_with_depth_inside_the_llm(self):
        fastv = pruned(method="fastv", ratio=0.5)
        found = memory_of(fastv)
        assert found.cache == 2 * 4096 * 2 * (2 * (576 + 74) + 30 * (288 + 74))

    def test_activations_and_workspace(self):
        found = memory_of(pruned())
        assert found.activations == 640 * (3 * 4096 + 3 * 11008) * 2
        assert found.workspace == 32 * 640**2 * 2
        assert found.total == found.weights + found.cache + found.activations + found.workspace

    def test_tiles_are_encoded_at_once(self):
        onevision = pruned("llava-hf/llava-onevision-qwen2-0.5b-ov-hf", method="fopru-rank", ratio=0.01)
        tokens = onevision.tokens(10, (768, 768))
        assert tokens.tiles == 5
        found = footprint(onevision.sizes, tokens, 10, "fp16", 2)
        assert found.activations == 5 * 729 * (3 * 1152 + 3 * 4304) * 2


class TestWork:
    def test_nothing_shared_is_the_formula_in_print(self):
        found = work_of(pruned())
        shapes, layer = pruned().sizes.shapes, LayerWork(4096, 11008, "F3")
        prefill = Schedule.even(32, 640).macs(layer) + head_macs(shapes)
        assert found["prefill"].linear + found["prefill"].attention == 2 * prefill
        assert found["prefill"].attention == 2 * 32 * 2 * 640**2 * 4096
        tower = tower_macs(shapes) + 576 * 588 * 1024
        assert found["vision"].linear + found["vision"].attention == 2 * tower
        assert found["projector"].linear == 2 * projector_macs(shapes, 576)

    def test_a_token_reads_every_weight_and_the_cache(self):
        found = work_of(pruned(), new=128)["decode"]
        weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
        assert found.linear == 2 * weights
        assert found.attention == 2 * 2 * (640 + 64) * 4096 * 32
        assert found.bytes == 2 * weights + 3 * 524_288 * (640 + 64)

    def test_tokens_that_leave_after_attention_skip_its_mlp(self):
        found = work_of(pruned(method="fastv", ratio=0.5))["prefill"]
        attention, mlp = 3 * 4096**2, 4096**2 + 3 * 4096 * 11008
        macs = 2 * 640 * attention + 640 * mlp + 352 * mlp + 30 * 352 * (attention + mlp) + 4096 * 32064
        assert found.linear == 2 * macs
        assert found.attention == 2 * 2 * 4096 * (2 * 640**2 + 30 * 352**2)

    @pytest.mark.parametrize("name", KNOWN)
    def test_more_tokens_are_never_less_work(self, name):
        # With a picture of four tiles, every prompt here is short enough for the model.
        size = (672, 672) if KNOWN[name].features.tiling else None
        rows = []
        for ratio in (0.1, 0.25, 0.5, 0.75, 1.0):
            chosen = pruned(name, method="fopru-rank", ratio=ratio)
            tokens = chosen.tokens(64, size)
            done = stage_works(chosen.sizes, tokens, 32, "int8", 2)
            rows.append([footprint(chosen.sizes, tokens, 32, "int8", 2).total])
            rows[-1] += [value for w in done for value in (w.linear, w.attention, w.bytes)]
        for fewer, more in pairwise(rows):
            assert all(a <= b for a, b in zip(fewer, more, strict=True))
        assert rows[0] != rows[-1]

    def test_a_method_that_sees_projected_tokens_projects_all(self):
        half = {m: work_of(pruned(method=m, ratio=0.5))["projector"].linear for m in ("uniform", "divprune")}
        assert half["divprune"] == 2 * half["uniform"]


class TestEstimate:
    rates = Rates(linear=10.0, attention=5.0, bytes=2.0)

    def test_compute_bound(self):
        found = estimate(StageWork("prefill", linear=100, attention=10, bytes=4), self.rates)
        assert (found.seconds, found.binds) == (12.0, "FLOPs")

    def test_memory_bound(self):
        found = estimate(StageWork("decode", linear=10, attention=5, bytes=40), self.rates)
        assert (found.seconds, found.binds) == (20.0, "bytes")


class TestPruning:
    def test_counts_are_those_of_an_export(self):
        rows = pruned(method="fopru-row", ratio=0.25)
        assert rows.pruning.keep_tokens == 144
        assert rows.kept == "kept 144 of 576 visual tokens, 75% removed"
        assert rows.tokens(64).entering == 208

    def test_two_methods(self):
        both = pruned(method="fopru-rank", ratio=0.5, then="fastv:0.5")
        assert both.tokens(0).schedule.entering == (288,) * 2 + (144,) * 30
        assert both.at(0.25).tokens(0).schedule.entering == (144,) * 2 + (72,) * 30

    def test_another_ratio_inside(self):
        pyramid = pruned(method="pyramiddrop")
        assert pyramid.tokens(0).schedule.entering[-1] == 72
        assert pyramid.at(0.5).tokens(0).schedule.entering[-1] == 288
        assert pyramid.takes_ratios
        assert not pruned().takes_ratios

    def test_tiles(self):
        following = pruned("llava-hf/llava-v1.6-vicuna-7b-hf")
        assert following.tokens(0).tiles == 5
        assert following.tokens(0).entering == 576 + 48 * 48 + 48  # a newline for each row
        small = following.tokens(0, (336, 336))
        assert small.entering < following.tokens(0).entering

    def test_fitprune_needs_its_recipe(self):
        with pytest.raises(UsageError, match="in its recipe"):
            pruned(method="fitprune", ratio=0.5)


def test_known_models_are_whole():
    for name, model in KNOWN.items():
        sizes = model.sizes
        assert sizes.name == name
        assert sizes.shapes.hidden_size % sizes.head_dim == 0
        assert math.isqrt(sizes.shapes.vision_patches) == model.features.side
