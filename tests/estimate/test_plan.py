"""Plans and their command: memory, bounds, choices for a wanted time, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from visprune import cli
from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.boards import BOARDS, board
from visprune.estimate.choices import RATIOS, best, choices
from visprune.estimate.devices import board_device
from visprune.estimate.known_models import KNOWN
from visprune.estimate.plan import PlannedPrompt, make_plan
from visprune.estimate.planned_model import prune
from visprune.export.export_options import ExportOptions
from visprune.work import Shapes

SEVEN = "llava-hf/llava-1.5-7b-hf"
THIRTEEN, NEXT = "llava-hf/llava-1.5-13b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
SIXTY = "published:llava-1.5-7b-60"
ORIN = board_device(board("orin-nx-16gb"))
TINY = Shapes(6, 5, 2, 17, 16, 588, ((3, 8), (8, 8)), 8, 20, 2, 259)


def pruned(**options):
    return prune(KNOWN[SEVEN], ExportOptions(**{"method": "fopru-row", **options}))


@pytest.fixture
def call(capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.run_command("plan", [str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run


class TestPlan:
    def test_the_floor_of_a_token_by_hand(self):
        plan = make_plan(pruned(ratio=0.25), ORIN, "int8", PlannedPrompt())
        weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064
        cache = 3 * 524_288 * (144 + 64 + 64)
        assert plan.token.peak_ms == pytest.approx((weights + cache) / 102e9 * 1e3)
        assert plan.token.expected_ms == pytest.approx(plan.token.peak_ms / 0.7)
        assert plan.token.binds == "bytes"

    def test_the_floor_of_the_prefill_by_hand(self):
        plan = make_plan(pruned(ratio=0.25), ORIN, "int8", PlannedPrompt())
        linear = 2 * (208 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
        attention = 2 * 32 * 2 * 208**2 * 4096
        cycles = 8 * 918e6
        bound = linear / (4096 * cycles) + attention / (2048 * cycles)
        prefill = plan.stages[2]
        assert prefill.peak_ms == pytest.approx(1e3 * bound)
        assert prefill.expected_ms == pytest.approx(2e3 * bound)
        assert prefill.binds == "FLOPs"

    def test_sums(self):
        plan = make_plan(pruned(ratio=0.5), ORIN, "fp16", PlannedPrompt())
        assert [stage.stage for stage in plan.stages] == ["vision", "projector", "prefill", "decode"]
        assert plan.first_token_ms == pytest.approx(sum(s.expected_ms for s in plan.stages[:3]))
        assert plan.first_token_peak_ms < plan.first_token_ms

    def test_what_fits(self):
        nano, big = board_device(board("orin-nano-8gb")), board_device(board("agx-orin-64gb"))
        assert make_plan(pruned(), nano, "fp16", PlannedPrompt()).fits is False
        assert make_plan(pruned(), nano, "int4", PlannedPrompt()).fits is True
        assert make_plan(pruned(), big, "fp16", PlannedPrompt()).fits is True

    @pytest.mark.parametrize("name", BOARDS)
    def test_more_tokens_are_never_faster(self, name):
        device = board_device(board(name))
        for precision in device.precisions:
            plans = [make_plan(pruned(ratio=r), device, precision, PlannedPrompt()) for r in sorted(RATIOS)]
            for fewer, more in pairwise(plans):
                assert fewer.first_token_ms <= more.first_token_ms
                assert fewer.token.expected_ms <= more.token.expected_ms
                assert fewer.memory.total <= more.memory.total

    def test_fewer_bits_are_never_slower_to_decode(self):
        times = [
            make_plan(pruned(), ORIN, p, PlannedPrompt()).token.expected_ms for p in ("fp16", "int8", "int4")
        ]
        assert times == sorted(times, reverse=True)

    def test_a_prefill_of_few_tokens_is_memory_bound_and_it_says_so(self):
        thor = board_device(board("agx-thor"))
        plan = make_plan(pruned(ratio=0.125), thor, "fp16", PlannedPrompt(text_tokens=8))
        assert plan.stages[2].binds == "bytes"
        assert any("fewer visual tokens gain no more" in line for line in plan.findings)

    def test_sources_and_assumptions_are_named(self):
        plan = make_plan(pruned(), ORIN, "int4", PlannedPrompt())
        assert any("DS-10712-001" in line for line in plan.sources)
        assert any("Assumed: 2 GiB" in line for line in plan.sources)
        assert not any("builds no" in line for line in plan.findings)
        plan = make_plan(pruned(), replace(ORIN, not_built=("int4",)), "int4", PlannedPrompt())
        assert "This version of visprune builds no int4 engine for SM87." in plan.findings

    def test_refusals(self):
        with pytest.raises(UnsupportedError, match="SM87 has no fp8"):
            make_plan(pruned(), ORIN, "fp8", PlannedPrompt())
        with pytest.raises(UnsupportedError, match="Nothing is known of fp32"):
            make_plan(pruned(), ORIN, "fp32", PlannedPrompt())
        with pytest.raises(UsageError, match="no precision 'int9'"):
            make_plan(pruned(), ORIN, "int9", PlannedPrompt())
        with pytest.raises(UsageError, match="more than the 4096"):
            make_plan(pruned(), ORIN, "fp16", PlannedPrompt(new_tokens=4000))
        with pytest.raises(UsageError, match="one tile"):
            make_plan(pruned(), ORIN, "fp16", PlannedPrompt(size=(336, 336)))
        for numbers in ({"text_tokens": -1}, {"new_tokens": 0}, {"size": (0, 5)}):
            with pytest.raises(UsageError, match="no prompt"):
                PlannedPrompt(**numbers)


class TestChoices:
    def test_every_ratio_in_every_precision(self):
        found = choices(pruned(), ORIN, PlannedPrompt(), 400.0)
        assert [(c.ratio, c.precision) for c in found] == [(r, p) for r in RATIOS for p in ORIN.precisions]
        for choice in found:
            assert choice.reached == (choice.fits and choice.first_token_ms <= 400.0)

    def test_best_keeps_most_and_then_is_most_exact(self):
        found = choices(pruned(), ORIN, PlannedPrompt(), 400.0)
        chosen = best(found)
        assert chosen is not None
        in_time = [c for c in found if c.reached]
        assert chosen.ratio == max(c.ratio for c in in_time)
        assert chosen is in_time[0]

    def test_a_time_that_none_reaches(self):
        found = choices(pruned(), ORIN, PlannedPrompt(), 1.0)
        assert best(found) is None

    def test_what_does_not_fit_is_not_chosen(self):
        found = choices(pruned(), board_device(board("orin-nano-8gb")), PlannedPrompt(), 1e6)
        assert best(found).precision == "int4"
        assert best(found).ratio == 1.0

    def test_a_method_with_one_ratio_varies_precision_alone(self):
        found = choices(pruned(method="none"), ORIN, PlannedPrompt(), 400.0)
        assert [(c.ratio, c.precision) for c in found] == [(None, p) for p in ORIN.precisions]

    @pytest.mark.parametrize("time", [0.0, -1.0, float("nan")])
    def test_no_time(self, time):
        with pytest.raises(UsageError, match="No first token"):
            choices(pruned(), ORIN, PlannedPrompt(), time)


class TestCommand:
    def test_as_typed(self, call):
        options = ["--method", "fopru-row", "--ratio", 0.25, "--precision", "int8", "--ttft", 400]
        code, out, err = call(SEVEN, "--device", "orin-nx-16gb", *options)
        assert (code, err) == (0, "")
        assert out.startswith(f"ESTIMATE, not a measurement: {SEVEN} on Jetson Orin NX 16GB, int8")
        for said in (
            "kept 144 of 576",
            "usable: fits",
            "bound by",
            "first token",
            "in time, best",
            "too late",
        ):
            assert said in out

    def test_where_nothing_is_pruned_there_is_one_ratio(self, call):
        _, out, _ = call(SEVEN, "--device", "orin-nx-16gb", "--ttft", 400)
        assert out.count("as it is") == len(ORIN.precisions)

    def test_needs_neither_torch_nor_onnx(self):
        code = (
            "import sys; from visprune.cli import run_command;"
            f"run_command('plan', ['{SEVEN}', '-d', 'rtx-4090', '-m', 'pyramiddrop']);"
            "heavy = {'onnxruntime', 'torch', 'transformers', 'onnx'} & set(sys.modules);"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_json_says_the_same(self, call):
        code, out, _ = call(
            SEVEN, "-d", "rtx-4070", "-m", "fopru-rank", "--keep-tokens", 100, "--ttft", 50, "--json"
        )
        data = json.loads(out)
        assert code == 0
        assert data["estimate"] is True
        assert data["prompt_tokens"] == 164
        assert data["memory"]["total"] == sum(
            data["memory"][part] for part in ("weights", "cache", "activations", "workspace")
        )
        assert data["first_token_ms"] == pytest.approx(sum(s["expected_ms"] for s in data["stages"][:3]))
        assert len(data["ttft"]["choices"]) == len(RATIOS) * 4
        assert data["ttft"]["best"] in [*data["ttft"]["choices"], None]

    def test_a_published_recipe(self, call):
        code, out, _ = call(SEVEN, "-d", "rtx-4090", "-m", "fitprune", "--recipe", SIXTY)
        assert code == 0
        assert "127 of 576 visual tokens" in out
        assert f"- The recipe {SIXTY} was fitted on LLaVA-1.5-7B by the authors of FitPrune. Whether" in out
        assert "scaled" not in out
        after = ["-m", "fopru-rank", "--ratio", 0.5, "--then", "fitprune", "--recipe", SIXTY]
        assert "scaled to the 288 that enter" in call(SEVEN, "-d", "rtx-4090", *after)[1]
        told = call(NEXT, "-d", "rtx-4090", "-m", "fitprune", "--recipe", SIXTY, "--json")[1]
        assert "scaled to those of each prompt" in json.loads(told)["sources"][0]

    def test_a_bundle_has_its_own_pruning(self, call, tiny_copy, edit_manifest):
        edit_manifest(tiny_copy, None, shapes=TINY)
        code, out, _ = call(
            tiny_copy, "-d", "orin-nano-4gb", "--text-tokens", 10, "--new-tokens", 4, "--json"
        )
        data = json.loads(out)
        assert (code, data["kept"]) == (0, "kept 4 of 16 visual tokens, 75% removed")
        assert data["prompt_tokens"] == 14
        more = ["--ratio", "0.5", "--text-tokens", 10, "--new-tokens", 4]
        assert "kept 8 of 16" in call(tiny_copy, "-d", "orin-nano-4gb", *more)[1]

    def test_a_checkpoint_needs_no_weights(self, call, tmp_path):
        from visprune.demo import MODEL_DIR

        (tmp_path / "config.json").write_bytes((MODEL_DIR / "config.json").read_bytes())
        code, out, _ = call(tmp_path, "-d", "orin-nano-4gb", "-m", "fopru-row", "--ratio", 0.25, "--json")
        data = json.loads(out)
        demo = json.loads((MODEL_DIR / "config.json").read_text())["text_config"]
        assert code == 0
        assert data["kept"] == "kept 36 of 144 visual tokens, 75% removed"
        layer = 4 * demo["hidden_size"] ** 2 + 3 * demo["hidden_size"] * demo["intermediate_size"]
        decoder = demo["num_hidden_layers"] * layer + demo["hidden_size"] * demo["vocab_size"]
        assert data["memory"]["decoder"] == 2 * decoder

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            ([SEVEN], "device"),
            ([SEVEN, "-d", "orin-nx-16g"], "no device 'orin-nx-16g'"),
            ([SEVEN, "-d", "this"], "known only from a measurement"),
            ([SEVEN, "-d", "orin-nx-16gb", "-p", "fp8"], "SM87 has no fp8"),
            ([SEVEN, "-d", "rtx-4090", "-m", "fopru"], "no pruning method"),
            ([SEVEN, "-d", "rtx-4090", "--ratio", "0.5"], "keeps all 576"),
            ([SEVEN, "-d", "rtx-4090", "-m", "fopru-row", "--keep-tokens", "100"], "whole rows of 24"),
            ([SEVEN, "-d", "rtx-4090", "-m", "fitprune", "--ratio", "0.4"], "in its recipe"),
            ([SEVEN, "-d", "rtx-4090", "-m", "fitprune", "--recipe", "published:x"], "no published recipe"),
            ([THIRTEEN, "-d", "rtx-4090", "-m", "fitprune", "--recipe", SIXTY], "32 layers of LLaVA-1.5-7B"),
            ([SEVEN, "-d", "rtx-4090", "--image-size", "big"], "is no size"),
            ([SEVEN, "-d", "rtx-4090", "--image-size", "640x480"], "one tile"),
            ([SEVEN, "-d", "rtx-4090", "--ttft", "0"], "No first token"),
            ([SEVEN, "-d", "rtx-4090", "--calibration", "/nowhere.json"], "cannot be read"),
            (["/", "-d", "rtx-4090"], "no config.json"),
            (["no such model", "-d", "rtx-4090"], "not a hub id"),
        ],
    )
    def test_bad_input_is_two_lines_and_exit_2(self, call, arguments, what):
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        first, _ = err.splitlines()
        assert first.startswith("error: ")
        assert what in first

    def test_methods_of_a_bundle_cannot_be_changed(self, call, tiny_bundle):
        assert "has its methods" in call(tiny_bundle, "-d", "rtx-4090", "-m", "none")[2]

    def test_a_bundle_without_shapes(self, call, tiny_bundle):
        assert "does not say its model's shapes" in call(tiny_bundle, "-d", "rtx-4090")[2]
