"""Rates are fitted to made-up measurements of known rates, and unusable measurements are refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from visprune import cli
from visprune.bench.calibration_report import read_calibration
from visprune.bench.report.report import SCHEMA_VERSION, BenchReport, Machine, Repetition, Row
from visprune.bench.report.report import Workload as Asked
from visprune.bundle import Bundle
from visprune.errors import BundleError, UsageError
from visprune.estimate.boards import board
from visprune.estimate.devices import ASSUMED, board_device, measured_device
from visprune.estimate.known_models import KNOWN
from visprune.estimate.measured_rates import Observation, fit
from visprune.estimate.plan import PlannedPrompt, make_plan
from visprune.estimate.planned_model import bundle_model, prune
from visprune.estimate.roofline import Rates, StageWork, estimate, stage_works
from visprune.export.export_options import ExportOptions
from visprune.work import Shapes

TRUE = Rates(linear=80e9, attention=40e9, bytes=12e9)
TINY = Shapes(6, 5, 2, 17, 16, 588, ((3, 8), (8, 8)), 8, 20, 2, 259)
SEVEN, HALF = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"


def observed(rates=TRUE, noise=1.0, name=SEVEN):
    """Return every stage at two ratios, with the times of a machine that has these rates."""
    found = []
    for ratio in (1.0, 0.25):
        model = prune(KNOWN[name], ExportOptions(method="fopru-rank", ratio=ratio))
        for work in stage_works(model.sizes, model.tokens(64), 16, "fp32", 4):
            found.append(Observation(work, estimate(work, rates).seconds * noise))
    return found


class TestFit:
    def test_finds_the_rates_that_made_the_times(self):
        found = fit(observed())
        assert found.bytes == pytest.approx(TRUE.bytes)
        assert found.linear == pytest.approx(TRUE.linear, rel=0.05)
        assert found.attention == pytest.approx(TRUE.attention, rel=0.5)  # 1 to 6% of the work: hard to see

    def test_predicts_another_model(self):
        found = fit(observed())
        for seen in observed(name=HALF):
            assert estimate(seen.work, found).seconds == pytest.approx(seen.seconds, rel=0.1)

    def test_half_the_speed_is_half_the_rates(self):
        fast, slow = fit(observed()), fit(observed(noise=2.0))
        assert asdict(slow) == pytest.approx({name: rate / 2 for name, rate in asdict(fast).items()})

    def test_stages_that_cannot_tell_rates_apart_share_one(self):
        alike = [Observation(StageWork(stage, 100, 10, 1), 11.0) for stage in ("vision", "prefill")]
        found = fit([*alike, Observation(StageWork("decode", 1, 1, 40), 10.0)])
        assert found.linear == pytest.approx(10.0)
        assert found.attention == pytest.approx(10.0)
        assert found.bytes == 4.0

    def test_times_that_no_positive_rates_explain_give_one_rate(self):
        odd = [
            Observation(StageWork("vision", 100, 0, 1), 10.0),
            Observation(StageWork("prefill", 100, 100, 1), 2.0),
        ]
        found = fit([*odd, Observation(StageWork("decode", 1, 1, 40), 10.0)])
        assert found.linear == found.attention > 0

    def test_a_memory_bound_stage_says_nothing_of_flops(self):
        waiting = Observation(StageWork("prefill", 1, 0, int(100 * TRUE.bytes)), 100.0)
        found = fit([*observed(), waiting])
        assert found == fit(observed())

    def test_too_little(self):
        with pytest.raises(UsageError, match="how fast memory is"):
            fit([o for o in observed() if o.work.stage != "decode"])
        with pytest.raises(UsageError, match="how fast products are"):
            fit([o for o in observed() if o.work.stage == "decode"])


@pytest.fixture
def bundle(tiny_copy, edit_manifest):
    edit_manifest(tiny_copy, None, shapes=TINY)
    return tiny_copy


def row(path, name="tiny", precision="fp32", factor=1.0, rates=TRUE, text=40):
    """Return a row as the bench would write it on a machine with these rates."""
    model = bundle_model(Bundle.open(path).manifest, name)
    tokens = model.tokens(text)
    item_size = 2 if precision == "fp16" else 4
    done = {
        w.stage: 1e3 * factor * estimate(w, rates).seconds
        for w in stage_works(model.sizes, tokens, 8, precision, item_size)
    }
    stages = {"vision_encoder": done["vision"], "token_pruner": 1.0, "prefill": done["prefill"], "other": 3.0}
    noise = (0.9, 1.0, 1.0, 1.7)
    return Row(
        name=name,
        role="given",
        path=str(path),
        model="tiny",
        weights="0" * 64,
        method="fopru-rank",
        precision=precision,
        visual_tokens=16,
        layer_tokens=(4, 4),
        text_tokens=text,
        new_tokens=8,
        disk_bytes=1,
        load=1.0,
        memory_bytes=1,
        device_bytes=None,
        cache_bytes=1,
        flops=None,
        repetitions=tuple(
            Repetition(9.0, {stage: ms * n for stage, ms in stages.items()}, done["decode"] * n)
            for n in noise
        ),
    )


def report(tmp_path, *rows, provider="cpu"):
    machine = Machine("A processor", 2, 8_000_000_000, "Linux", "3.12", {}, "A GPU", "none")
    asked = Asked(("a.png",), "What?", 8, 2, provider=provider)
    path = tmp_path / "bench.json"
    path.write_text(BenchReport(SCHEMA_VERSION, "2026-01-01", machine, asked, rows).to_json())
    return path


class TestRead:
    def test_medians_of_a_report(self, tmp_path, bundle):
        found = read_calibration(report(tmp_path, row(bundle)))
        assert found.rates["fp32"].bytes == pytest.approx(TRUE.bytes)
        assert found.rates["fp32"].linear == pytest.approx(TRUE.linear, rel=0.3)
        assert (found.machine, found.memory, found.item_size) == ("A processor", 8_000_000_000, 4)
        assert found.describe() == "tiny on A processor (cpu, 2 threads)"

    def test_a_precision_each(self, tmp_path, bundle):
        rows = [row(bundle), row(bundle, "small", "int8", factor=0.5), row(bundle, "odd", "mixed")]
        rows += [replace(row(bundle, "torch"), role="pytorch", path="/nowhere")]
        found = read_calibration(report(tmp_path, *rows))
        assert list(found.rates) == ["fp32", "int8"]
        assert found.bundles == ("tiny", "small")
        assert measured_device(found).precisions == ("fp32", "int8")

    def test_a_plan_of_what_was_measured_is_what_was_measured(self, tmp_path, bundle):
        measured = row(bundle)
        device = measured_device(read_calibration(report(tmp_path, measured)))
        plan = make_plan(
            bundle_model(Bundle.open(bundle).manifest, "tiny"), device, "fp32", PlannedPrompt(40, 8)
        )
        told = {stage.stage: stage.expected_ms for stage in plan.stages}
        median = measured.repetitions[1]  # of 0.9, 1, 1 and 1.7
        assert told["decode"] == pytest.approx(median.per_token)
        assert told["prefill"] == pytest.approx(median.stages["prefill"], rel=0.1)
        assert told["vision"] == pytest.approx(median.stages["vision_encoder"], rel=0.1)

    def test_bundles_that_are_gone(self, tmp_path, bundle):
        with pytest.raises(BundleError, match="shapes of tiny"):
            read_calibration(report(tmp_path, replace(row(bundle), path=str(tmp_path / "gone"))))

    def test_nothing_to_use(self, tmp_path, bundle):
        with pytest.raises(UsageError, match="no row"):
            read_calibration(report(tmp_path, row(bundle, precision="mixed")))

    @pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 99}'])
    def test_no_report(self, tmp_path, text):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(UsageError):
            read_calibration(tmp_path / "bench.json")


class TestBoards:
    def gpu(self, tmp_path, bundle, share):
        """Write a report of a GPU that reaches a share of the peaks of an RTX 4060."""
        found = board("rtx-4060")
        peak = found.peak("fp16") * share
        rates = Rates(peak, peak, found.bandwidth * 1e9 * share)
        return report(tmp_path, row(bundle, precision="fp16", rates=rates, text=2000), provider="cuda")

    def test_shares_are_measured_and_hold_for_other_precisions(self, tmp_path, bundle):
        found = board("rtx-4060")
        device = board_device(found, read_calibration(self.gpu(tmp_path, bundle, 0.25)))
        assert device.rates["fp16"].bytes == pytest.approx(found.bandwidth * 1e9 / 4, rel=0.2)
        ratio = {p: device.rates[p].linear / found.peak(p) for p in device.precisions}
        assert len({round(value, 9) for value in ratio.values()}) == 1
        assert "Calibrated on tiny on A GPU (cuda)." in device.sources

    def test_faster_than_the_datasheet_is_another_device(self, tmp_path, bundle):
        with pytest.raises(UsageError, match="times what the datasheet"):
            board_device(board("rtx-4060"), read_calibration(self.gpu(tmp_path, bundle, 4.0)))

    def test_a_processor_says_nothing_of_a_gpu(self, tmp_path, bundle):
        with pytest.raises(UsageError, match="measured on a CPU"):
            board_device(board("rtx-4060"), read_calibration(report(tmp_path, row(bundle))))

    def test_without_one_shares_are_assumed_and_said(self):
        device = board_device(board("rtx-4060"))
        assert device.rates["fp16"].bytes == 272e9 * ASSUMED.bytes
        assert any(line.startswith("Assumed, not measured: 50%") for line in device.sources)


def test_the_command_takes_a_calibration(tmp_path, bundle, capfd):
    path = report(tmp_path, row(bundle))
    code = cli.run_command("plan", [SEVEN, "-d", "this", "--calibration", str(path), "--json"])
    data = json.loads(capfd.readouterr().out)
    assert (code, data["device"], data["title"], data["precision"]) == (0, "this", "A processor", "fp32")
    assert data["first_token_peak_ms"] is None
    assert data["fits"] is False  # 28 GB of float32 in 8 GB
    assert any("trust it less" in line for line in data["findings"])
    assert cli.run_command("plan", [SEVEN, "-d", "this", "--calibration", str(path), "-p", "int8"]) == 2
    assert "Nothing is known of int8 on A processor." in capfd.readouterr().err
