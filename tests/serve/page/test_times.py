"""The times on the page: what is drawn and said is true, whatever the server has in its caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_driver import QUESTION, ask, set_ratio, settled, texts
from PIL import Image
from serving import serving

from visprune.bundled import MODEL_DIR

STAGES = ["waiting", "image and text", "vision encoder", "pruner", "prefill", "decode"]
ALL_OF_THE_SAME = "all tokens of the same bundle"


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    """A picture that no server has seen yet."""
    noise = np.random.default_rng().integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def about(page: Any, picture: Path) -> list[dict[str, Any]]:
    """Choose a picture. Return a list that gets the object `visprune` of every answer."""
    answers: list[dict[str, Any]] = []

    def keep(figures: dict[str, Any]) -> None:
        answers.append(figures)

    page.expose_function("answered", keep)
    page.evaluate("""async () => {
      const {Api} = await import("/page/api.js");
      const answer = Api.prototype.answer;
      Api.prototype.answer = async function (...given) {
        const found = await answer.apply(this, given);
        await window.answered(found.figures);
        return found;
      };
    }""")
    page.set_input_files("#file", picture)
    page.wait_for_selector("#shown img")
    return answers


def table(page: Any) -> dict[str, list[str]]:
    """Return the numbers of each stage, one for each answer."""
    rows = page.locator(".turn:last-child table tbody tr")
    found = rows.evaluate_all("rows => rows.map(row => [...row.children].map(cell => cell.textContent))")
    assert [row[0] for row in found] == STAGES
    return {stage: cells for stage, *cells in found}


def totals(page: Any) -> list[str]:
    return page.locator(".turn:last-child .bar-title b").all_inner_texts()


def kinds(page: Any, place: int) -> list[str]:
    """Return the colours of a bar."""
    return (
        page.locator(".turn:last-child .bar")
        .nth(place)
        .evaluate("b => [...b.children].map(p => p.className)")
    )


def everything_computed(answers: list[dict[str, Any]]) -> None:
    """Each answer computed its whole prompt, so that its times can be compared."""
    for answer in answers:
        assert answer["cached"]["tokens"] == 0
        assert answer["timings_ms"]["token_pruner"] > 0
        assert answer["timings_ms"]["prefill"] > 0


def test_times_are_drawn_and_told_as_a_table(visit, one, unseen):
    page = visit(one)
    answers = about(page, unseen)
    ask(page, QUESTION)
    everything_computed(answers)
    bars = page.locator(".bar")
    assert bars.count() == 2
    for place in range(2):
        assert "prefill" in bars.nth(place).get_attribute("aria-label")
        drawn = bars.nth(place).bounding_box()["width"]
        parts = bars.nth(place).evaluate(
            "bar => [...bar.children].map(part => part.getBoundingClientRect().width)"
        )
        assert 0 < sum(parts) <= drawn + 1
    # The picture is the same, so the vision encoder ran once; the page says what it took then.
    assert ["without the cache" in text for text in totals(page)] == [False, True]
    assert ["without the cache" in cell for cell in table(page)["vision encoder"]] == [False, True]
    assert ["saved" in kinds(page, place) for place in range(2)] == [False, True]
    assert ["had been encoded before" in text for text in texts(page, ".facts")] == [False, True]
    assert "prompt tokens" not in page.inner_text(".turn")


def test_later_questions_and_other_ratios_are_hatched_alike(visit, one, unseen):
    page = visit(one)
    answers = about(page, unseen)
    ask(page, QUESTION)
    ask(page, "What color is the letter?")
    encoder = answers[0]["timings_ms"]["vision_encoder"]
    for place_of_first in (2, 4):
        if place_of_first == 4:
            set_ratio(page, 40)
        shown = [answers[place_of_first], answers[3]]
        for place, (text, answer) in enumerate(zip(totals(page), shown, strict=True)):
            assert {"saved", "prefill"} <= set(kinds(page, place))
            stages = answer["timings_ms"].items()
            spent = sum(ms for stage, ms in stages if stage not in ("total", "decode_per_token"))
            spent += answer["queue_ms"]
            without = float(text.partition("(")[2].split()[0])
            assert without == pytest.approx(spent + encoder, abs=0.51)
        assert not page.locator(".times > .soft").count()
    everything_computed(answers)
    assert len(answers) == 5


def test_after_a_reload_the_encoder_is_left_out_of_both_bars(visit, one, unseen):
    page = visit(one)
    about(page, unseen)
    ask(page, QUESTION)
    page.reload()
    page.set_input_files("#file", unseen)
    ask(page, QUESTION)
    for place in range(2):
        assert not {"vision", "saved"} & set(kinds(page, place))
        assert "prefill" in kinds(page, place)
    assert all(text.endswith(" without the vision encoder") for text in totals(page))
    assert table(page)["vision encoder"] == ["encoded before", "encoded before"]
    why = page.inner_text(".times > .soft")
    assert why.startswith("The picture was encoded for an earlier request")
    assert why.endswith("So both bars leave the vision encoder out.")
    assert all("had been encoded before" in text for text in texts(page, ".facts"))


def test_a_bundle_that_saw_the_picture_before_is_compared_with_one_that_did_not(visit, two, unseen):
    first = visit(two)
    first.select_option("#right-bundle", label=ALL_OF_THE_SAME)
    about(first, unseen)
    ask(first, QUESTION)
    page = visit(two)
    answers = about(page, unseen)
    ask(page, QUESTION)
    assert [answer["cached"]["images"] for answer in answers] == [1, 0]
    for place in range(2):
        assert not {"vision", "saved"} & set(kinds(page, place))
    assert all(text.endswith(" without the vision encoder") for text in totals(page))
    cells = table(page)["vision encoder"]
    assert cells[0] == "encoded before"
    assert cells[1].endswith(" ms")
    assert page.inner_text(".times > .soft").startswith("quarter, 25%: the picture was encoded")
    assert ["had been encoded before" in text for text in texts(page, ".facts")] == [True, False]
    page.select_option("#right-bundle", label=ALL_OF_THE_SAME)  # the first bundle's time stays unknown
    settled(page)
    assert table(page)["vision encoder"] == ["encoded before", "encoded before"]


def test_a_model_that_shrinks_pictures_is_timed_at_each_ratio(visit, tmp_path, unseen):
    export = pytest.importorskip("visprune.export").export
    export(MODEL_DIR, method="resize", ratio=0.25, output=tmp_path / "smaller", verify=False)
    with serving([tmp_path / "smaller"], "--threads", "1") as served:
        page = visit(served.address)
        answers = about(page, unseen)
        ask(page, QUESTION)
        assert [answer["cached"]["images"] for answer in answers] == [0, 0]  # the encoder saw two pictures
        ask(page, "What color is the letter?")
        assert [answer["cached"]["images"] for answer in answers] == [0, 0, 1, 1]
        for cell, answer in zip(table(page)["vision encoder"], answers[:2], strict=True):
            saved = float(cell.partition("(")[2].split()[0])
            assert saved == pytest.approx(answer["timings_ms"]["vision_encoder"], abs=0.51)
