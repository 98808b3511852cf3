"""A report reads back as it was written, and says no more than its rows allow."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from visprune.bench.report.formatting import ratio, stage_medians
from visprune.bench.report.report import NotMade, fastest, read_report
from visprune.bench.report.table import print_report, verdicts
from visprune.errors import BundleError, UsageError


def test_a_report_reads_back_as_it_was_written(large_report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(large_report.to_json(), encoding="utf-8")
    assert read_report(file) == large_report


def test_a_report_of_another_schema_or_of_nothing_is_refused(large_report, tmp_path):
    file = tmp_path / "report.json"
    file.write_text(replace(large_report, schema_version=99).to_json())
    with pytest.raises(UsageError, match="schema 99"):
        read_report(file)
    file.write_text("[]")
    with pytest.raises(UsageError, match="schema None"):
        read_report(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_report(tmp_path / "missing.json")


def test_a_field_that_is_missing_is_named(large_report, tmp_path):
    data = json.loads(large_report.to_json())
    del data["rows"][3]["cache_bytes"]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"rows\[3\] has no 'cache_bytes'"):
        read_report(file)


def test_a_row_is_compared_with_the_unpruned_one_of_its_model_and_precision(row, report):
    full = [
        row("a", role="unpruned"),
        row("b", role="unpruned", precision="int8"),
        row("c", role="unpruned", weights="1" * 64),
    ]
    rows = [row("d"), row("e", precision="int8"), row("f", weights="1" * 64), row("g", precision="int4")]
    made = report(*full, *rows)
    assert [made.unpruned(one) for one in rows] == [*full, None]
    in_pytorch = row("h", role="pytorch", precision="bf16", weights="1" * 64)
    assert made.unpruned(in_pytorch) is full[2]


def test_the_fastest_stands_alone_only_where_it_can_be_told(row, report):
    slow, quick, alike = row("slow", 20, seed=1), row("quick", 10, seed=2), row("alike", 10, seed=3)
    assert fastest([slow, quick], "first_token") == (quick, ())
    best, ties = fastest([slow, quick, alike], "first_token")
    assert {best.name, *(one.name for one in ties)} == {"quick", "alike"}
    assert "first token: quick is the fastest." in verdicts(report(slow, quick))
    assert any("no difference can be told between" in line for line in verdicts(report(quick, alike)))


def test_a_wide_spread_has_no_winner(row, report):
    said = verdicts(report(row("a", 10, noise=0.8, seed=1), row("b", 11, noise=0.8, seed=2)))
    assert not any("is the fastest" in line for line in said)
    assert sum("no difference can be told" in line for line in said) == 2


def test_choosing_tokens_is_told_to_cost_time_where_it_does(row, report):
    full = row("none", 20, role="unpruned", method="none")
    drawn = row("random 36", 8, role="random", method="random", kept=36, seed=1)
    chosen = row("fopru", 10, kept=36, seed=2)
    said = verdicts(report(full, drawn, chosen))
    assert any(line.startswith("fopru takes 1.2") and line.endswith("of random 36.") for line in said)
    alike = row("fopru", 8, kept=36, seed=2)
    assert not any("takes" in line for line in verdicts(report(full, drawn, alike)))


def test_a_smaller_picture_is_told_to_be_faster_where_it_is(row, report):
    full = row("none", 20, role="unpruned", method="none")
    small = row("resize 36", 5, role="resize", method="resize", kept=36, seed=1)
    smaller = row("resize 9", 4, role="resize", method="resize", kept=9, seed=4)
    pruned = [row("fopru", 10, kept=36, seed=2), row("fastv", 12, method="fastv", kept=40, seed=3)]
    other = row("fopru, int8", 15, kept=36, seed=2, precision="int8")
    said = verdicts(report(full, *pruned, other, small, smaller))
    (sentence,) = [line for line in said if "rows of about as many tokens" in line]
    told = [f"{one.name} takes {ratio(one.against(small))}" for one in pruned]
    said_first = "first token: resize 36 is faster than rows of about as many tokens; relative to it, "
    assert sentence == f"{said_first}{', '.join(told)}."
    assert "first token: fopru is the fastest." in said  # of the rows that were given
    quick = row("fopru", 4.5, kept=36, seed=2)
    assert not any("resize" in line for line in verdicts(report(full, quick, small)))


def test_what_was_not_made_is_told_with_its_reason(row, report):
    said = verdicts(report(row("a"), not_made=(NotMade("random", "No checkpoint. Export one."),)))
    assert "not in the table: random: No checkpoint. Export one." in said


def test_segments_are_one_prefill(row):
    one = row("a").repetitions[0]
    parts = {"prefill.decoder_segment_0": 3.0, "segment_pruner": 0.5, "prefill.decoder_segment_1": 1.0}
    cut = replace(row("a"), repetitions=(replace(one, stages={"vision_encoder": 2.0, **parts}),))
    assert stage_medians(cut)["prefill"] == 4.5
    assert stage_medians(cut)["vision"] == 2.0
    assert cut.prefill_speed == pytest.approx(1e3 * (144 + 12) / 4.5)


def test_the_tables_have_every_row_and_fit_their_width(large_report, capsys):
    print_report(large_report)
    printed = capsys.readouterr().out
    for row in large_report.rows:
        assert printed.count(row.name) >= 2
    assert "no counter" in printed
    assert "99%" in printed
    table = printed.split("\n\n")[0].splitlines()
    assert len(table) == len(large_report.rows) + 1  # no cell is broken into lines
