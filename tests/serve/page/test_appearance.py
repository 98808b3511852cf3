"""The page for every reader: widths, light and dark, the rules of axe-core, keyboard, touch, less motion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from page_driver import PICTURE, QUESTION, answered, overlay, settled, texts

# What a finger must hit, and is smaller than 44 pixels. An input in a label is hit by the label.
SMALL = """() => [...document.querySelectorAll(
    "button, a, select, textarea, summary, label:has(input), #ratio")]
  .filter(element => element.checkVisibility())
  .map(element => [element.id || element.textContent.trim(), element.getBoundingClientRect()])
  .filter(([, box]) => box.height < 44 || (box.width < 44 && box.width < box.height / 2))
  .map(([name, box]) => `${name}: ${box.width} x ${box.height}`)"""


def check(page: Any, width: int) -> None:
    """The rules of axe-core hold, and nothing is wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    assert not found, json.dumps(
        [(one["id"], one["help"], [node["html"][:200] for node in one["nodes"]]) for one in found], indent=1
    )
    assert page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_each_state_at_each_width_light_and_dark(visit, one, two, locked, width, scheme):
    # The policy of the page would not let axe-core in.
    look = {"width": width, "scheme": scheme, "bypass_csp": True, "reduced_motion": "reduce"}
    page = visit(one, **look)
    check(page, width)
    page = answered(visit, one, refusals=True, **look)
    page.get_by_text("The numbers").click()
    check(page, width)
    if width < 600:
        assert page.evaluate(SMALL) == []
    page.fill("#question", "word " * 3000)
    page.click("#send")
    page.wait_for_selector("#error p")
    check(page, width)
    page = answered(visit, two, **look)
    check(page, width)
    page = visit(locked, refusals=True, **look)
    page.wait_for_selector("#key-dialog[open]")
    check(page, width)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 24)"
    assert dark == (scheme == "dark")


def test_long_names_and_long_words_do_not_widen_the_page(visit, one):
    page = visit(one, width=390)
    page.set_input_files("#file", PICTURE)
    page.fill("#question", "Wh" + "a" * 300 + "t is this?")
    page.press("#question", "Enter")
    page.wait_for_selector(".turn .count")
    settled(page)
    page.evaluate("document.querySelector('#served').textContent = 'a-long-name-'.repeat(30)")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    cut = "e => getComputedStyle(e).textOverflow === 'ellipsis' || e.scrollWidth > e.clientWidth"
    assert not page.evaluate(f"({cut})(document.querySelector('#served'))")


def test_the_focus_of_the_slider_crosses_no_text(visit, one):
    page = visit(one)
    page.wait_for_selector("#keep:not([hidden])")
    page.focus("#ratio")
    page.keyboard.press("ArrowRight")  # a focus that is shown
    ring, words = page.evaluate("""() => {
      const slider = document.querySelector("#ratio");
      const style = getComputedStyle(slider);
      const outside = parseFloat(style.outlineOffset) + parseFloat(style.outlineWidth);
      return [slider.getBoundingClientRect().bottom + outside,
        document.querySelector("#ratio-least").getBoundingClientRect().top];
    }""")
    assert ring <= words


def test_the_keyboard_alone_is_enough(visit, one):
    page = visit(one)
    focused = (
        "document.activeElement.id || document.activeElement.value || document.activeElement.textContent"
    )

    def tab_to(wanted: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if page.evaluate(focused) == wanted:
                break
        assert page.evaluate(focused) == wanted
        shown = "e => getComputedStyle(e.closest('label') ?? e).outlineStyle"
        assert page.evaluate(f"({shown})(document.activeElement)") == "solid"  # the focus is seen

    tab_to("file")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(PICTURE)
    page.wait_for_selector("#shown img")
    tab_to("question")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn .count")
    settled(page)
    overlay(page)
    assert page.evaluate(focused) == "question"
    for _ in range(3):
        page.keyboard.press("Shift+Tab")  # over the numbers and the new conversation
    page.evaluate("document.activeElement.blur()")
    tab_to("file")
    tab_to("left")
    page.keyboard.press("ArrowRight")
    assert page.locator("#shown img").get_attribute("src").startswith("blob:")
    tab_to("ratio")
    page.keyboard.press("End")
    page.wait_for_function("() => document.querySelector('.count b').textContent === '144 of 144'")


def test_a_screen_reader_hears_answers_once_they_are_complete(visit, one):
    page = visit(one)
    page.set_input_files("#file", PICTURE)
    page.evaluate("""() => {
      window.heard = [];
      new MutationObserver(() => heard.push(document.querySelector("#status").textContent))
        .observe(document.querySelector("#status"), {childList: true});
    }""")
    page.fill("#question", QUESTION)
    page.press("#question", "Enter")
    page.wait_for_selector(".turn .count")
    settled(page)
    first, second = page.evaluate("heard.filter(words => !words.includes('ready'))")
    answers = texts(page, ".text")
    assert first.startswith(f"25% of the tokens: {answers[0]}. 36 of 144 visual tokens, 75% removed.")
    assert second.startswith(f"All tokens: {answers[1]}.")
    assert "nswer" in second
    assert (
        page.locator("#shown img")
        .get_attribute("alt")
        .startswith("The picture as the model saw it: 36 of 144")
    )
    assert page.get_attribute("#ratio", "aria-valuetext") == "25% of the visual tokens"
    levels = page.evaluate("[...document.querySelectorAll('main h2, main h3, main h4')].map(h => h.tagName)")
    assert levels == ["H2", "H2", "H3", "H4", "H4"]


def test_nothing_moves_where_that_is_asked_for(visit, one):
    page = answered(visit, one, reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0
