"""The verdict: one line that says what was gained, what was lost, and whether to keep it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("onnx_ir")

from visprune.quantize.timing import Times
from visprune.quantize.verdict import Answers, GraphReport, Report

PARTS = dict.fromkeys(("vision", "projector", "decoder", "head"), "int8") | {"embedding": "float"}


def graph(name, prefill, step=None, error=0.012):
    times = [Times(*pair, 0.03) if pair else None for pair in (prefill, step)]
    return GraphReport(name, "int8", error, 0.9999, (1000, 260), *times)


def report(prefill=((300.0, 100.0), (100.0, 100.0)), step=(10.0, 2.5), right=None, parts=PARTS):
    """Return the report of a vision encoder and a decoder, with `right` of 1,000 questions answered right."""
    vision, decoder = prefill if prefill else (None, None)
    graphs = (graph("vision_encoder", vision), graph("decoder_model_merged", decoder, step, 0.034))
    answers = Answers(4, 4, 1000 if right else 0, right or (0, 0))
    return Report(parts, 12, 4, (), "a machine", graphs, (), answers)


def test_all_that_is_known_is_said():
    said = report(right=(900, 897)).verdict()
    assert said == (
        "int8: first token 2x faster, each further token 4x faster, 26% of the bytes, "
        "output error at most 3.4%, 0.3 points fewer right answers: keep it"
    )


def test_a_difference_within_the_spread_is_none():
    said = report(prefill=((300.0, 295.0), (100.0, 99.0)), step=None).verdict()
    assert said.startswith("int8: first token as fast, as far as can be told, ")


@pytest.mark.parametrize(
    ("settings", "ending"),
    [
        ({}, ": keep it"),
        ({"prefill": None, "step": None}, ": smaller; measure it where it will run"),
        ({"prefill": ((300.0, 300.0), (100.0, 99.0)), "step": None}, "keep it only for its size"),
        (
            {"prefill": ((300.0, 600.0), (100.0, 100.0))},
            "keep it where the first token matters less than the rest",
        ),
        ({"step": (2.0, 4.0)}, ": keep it where decoding matters less than the rest"),
        ({"right": (900, 880)}, ": not worth it, the limit is 1"),
        ({"right": (900, 890)}, ": keep it"),
        ({"right": (900, 890), "parts": PARTS | {"decoder": "int4"}}, ": keep it"),
        (
            {"right": (900, 879), "parts": PARTS | {"decoder": "int4"}},
            ": not worth it, the limit is 2",
        ),
    ],
)
def test_judgements(settings, ending):
    assert report(**settings).verdict().endswith(ending)


@pytest.mark.parametrize(
    ("right", "text"),
    [
        ((900, 905), "0.5 points more right answers"),
        ((900, 900), "as many right answers"),
        ((900, 895), "0.5 points fewer right answers"),
    ],
)
def test_points(right, text):
    assert f"{text}:" in report(right=right).verdict()


def test_a_mix_names_its_precisions_once():
    said = report(parts=PARTS | {"decoder": "int4", "head": "float"}).verdict()
    assert said.startswith("int8 + int4: ")


def test_what_was_not_measured_is_not_said():
    whole = report(prefill=None, step=None)
    bare = replace(whole, answers=None, graphs=tuple(replace(one, relative_l2=None) for one in whole.graphs))
    assert (
        bare.verdict() == "int8: times not measured, 26% of the bytes: smaller; measure it where it will run"
    )
    assert whole.speedup("prefill") is None
    assert whole.speedup("step") is None
    some = replace(report(), graphs=(*report().graphs, graph("token_pruner", None)))
    assert some.speedup("prefill") is None  # some graphs together are not the time to the first token
    assert some.speedup("step") == 4.0


def test_the_file():
    said = report(right=(900, 905))
    read = json.loads(said.to_json())
    assert read["verdict"] == said.verdict()
    assert read["graphs"][1]["step"] == {"before": 10.0, "after": 2.5, "spread": 0.03}
    assert read["answers"]["right"] == [900, 905]
