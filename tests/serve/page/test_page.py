"""The page in a headless Chromium with a real server: questions about the demo picture and their answers."""

from __future__ import annotations

import base64
import io
import json

import pytest
from page_driver import PICTURE, QUESTION, answered, ask, overlay, same, set_ratio, settled, texts
from PIL import Image

from visprune.pruning.registry import BUILTIN
from visprune.runtime import load


@pytest.fixture(scope="module")
def pipeline(quarter):
    with load(quarter, threads=1) as loaded:
        yield loaded


def test_a_picture_is_asked_about(visit, one, pipeline):
    page = answered(visit, one)
    pruned = pipeline.generate(PICTURE, QUESTION)
    full = pipeline.generate(PICTURE, QUESTION, ratio=1.0)
    assert texts(page, ".text") == [pruned.text.strip(), full.text.strip()]
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]
    assert "75% removed" in page.inner_text("#kept")
    agree = "The same answer" if pruned.text.strip() == full.text.strip() else "Another answer"
    assert page.inner_text(".verdict").startswith(agree)
    assert same(overlay(page), pipeline.overlay(PICTURE, pruned.keep_indices[0]))
    page.get_by_role("radio", name="Original").check()
    assert page.locator("#shown img").get_attribute("src").startswith("blob:")


def test_the_slider_answers_again_with_another_count_and_another_overlay(visit, one, pipeline):
    page = answered(visit, one)
    before = overlay(page)
    set_ratio(page, 50)
    half = pipeline.generate(PICTURE, QUESTION, ratio=0.5)
    assert texts(page, ".count b") == ["72 of 144", "144 of 144"]
    assert texts(page, ".text")[0] == half.text.strip()
    assert same(overlay(page), pipeline.overlay(PICTURE, half.keep_indices[0]))
    assert not same(overlay(page), before)
    assert page.locator(".turn").count() == 1
    with_all = page.locator("#ratio")
    with_all.press("End")
    page.wait_for_timeout(500)
    settled(page)
    assert texts(page, ".count b") == ["144 of 144"]  # there is nothing to compare it with
    assert page.inner_text(".verdict") == ""
    set_ratio(page, 50)
    assert texts(page, ".count b") == ["72 of 144", "144 of 144"]


def test_what_was_answered_before_is_not_asked_for_again(visit, one):
    page = answered(visit, one)
    asked = []
    page.on("request", lambda request: asked.append(request.post_data_json.get("visprune")))
    set_ratio(page, 30)
    set_ratio(page, 25)
    assert asked == [{"overlay": True, "reuse_prefix": False, "ratio": 0.3}]
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]


def test_a_conversation_goes_on_about_the_same_picture(visit, one, pipeline):
    page = answered(visit, one)
    sent = []
    page.on("request", lambda request: sent.append(json.loads(request.post_data)))
    ask(page, "What color is the letter?")
    chat = pipeline.chat()
    first = chat.stream(QUESTION, PICTURE).result
    second = chat.stream("What color is the letter?").result
    assert texts(page, ".text")[0] == second.text.strip()
    messages = sent[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in messages[0]["content"]] == ["image_url", "text"]
    assert messages[1]["content"] == first.text
    assert messages[2]["content"] == "What color is the letter?"
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".turn").count() == 0
    ask(page, QUESTION)
    assert len(sent[-1]["messages"]) == 1


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(visit, one, how):
    page = visit(one)
    give = """([bytes, how]) => {
      const data = new DataTransfer();
      const content = Uint8Array.from(atob(bytes), c => c.charCodeAt(0));
      data.items.add(new File([content], "scene.png", {type: "image/png"}));
      const event = how === "paste" ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true})
        : new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true});
      document.querySelector(how === "paste" ? "#question" : "#frame").dispatchEvent(event);
    }"""
    page.evaluate(give, [base64.b64encode(PICTURE.read_bytes()).decode(), how])
    page.wait_for_selector("#shown img")
    ask(page, QUESTION)
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]


def test_a_large_picture_is_made_smaller_before_it_is_sent(visit, one, tmp_path):
    Image.linear_gradient("L").resize((2400, 1200)).convert("RGB").save(tmp_path / "large.jpg")
    page = visit(one)
    page.set_input_files("#file", tmp_path / "large.jpg")
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, QUESTION)
    address = asked.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (1600, 800)


def test_markup_in_a_question_and_in_an_answer_is_text(visit, one):
    page = answered(visit, one)
    hostile = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    ask(page, hostile)
    assert page.locator(".turn:last-child .question").inner_text() == hostile
    event = {"choices": [{"delta": {"content": hostile}, "finish_reason": "stop"}]}
    figures = {"visual_tokens": 9, "tokens_kept": 3, "timings_ms": {}, "queue_ms": 0, "overlays": []}
    body = f"data: {json.dumps({**event, 'visprune': figures})}\n\ndata: [DONE]\n\n"  # no model says this
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    ask(page, "What is the digit?")
    assert texts(page, ".text") == [hostile, hostile]
    assert page.evaluate("window.ran === undefined && !document.querySelector('.turn script, .turn img')")


def test_two_bundles_are_shown_side_by_side(visit, two, pipeline, demo_bundle):
    page = answered(visit, two)
    with load(demo_bundle, threads=1) as loaded:
        other = loaded.generate(PICTURE, QUESTION)
        drawn = loaded.overlay(PICTURE, other.keep_indices[0])
    first = pipeline.generate(PICTURE, QUESTION)
    assert texts(page, ".text") == [first.text.strip(), other.text.strip()]
    assert texts(page, ".count b") == ["36 of 144", "15 of 144"]
    assert same(overlay(page, 0), pipeline.overlay(PICTURE, first.keep_indices[0]))
    assert same(overlay(page, 1), drawn)
    names = ["quarter, 25%", "uniform, 10%"]
    assert page.locator("#shown figcaption").all_inner_texts() == names
    for name, picture in zip(["First", "Second"], names, strict=True):
        page.get_by_role("radio", name=name).check()
        assert page.locator("#shown figcaption").all_inner_texts() == [picture]
    page.select_option("#right-bundle", label="all tokens of the same bundle")
    settled(page)
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]
    page.select_option("#left-bundle", "uniform")
    settled(page)
    assert texts(page, ".count b")[0] == "15 of 144"


def test_the_words_of_the_page_are_explained(visit, two):
    page = visit(two)
    page.get_by_text("What the words mean").click()
    words = page.locator("#terms dt").all_inner_texts()
    assert {"visual token", "pruner", "prefill", "decode", "uniform"} <= set(words)
    assert all(page.locator("#terms dd").all_inner_texts())
    explained = page.evaluate("async () => (await import('/page/words.js')).METHODS")
    assert set(explained) == set(BUILTIN)
