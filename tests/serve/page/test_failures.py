"""The page when something is refused, fails, is stopped or needs a key: a sentence, and nothing is lost."""

from __future__ import annotations

import json

from page_driver import KEY, PICTURE, QUESTION, answered, ask, settled, texts


def failed(page) -> str:
    """Return the sentence that the page shows, once there is one."""
    page.wait_for_selector("#error p")
    return page.inner_text("#error p")


def test_a_file_that_is_no_picture(visit, one, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    page = answered(visit, one)
    page.set_input_files("#file", tmp_path / "notes.png")
    assert failed(page).startswith("notes.png is not a picture that this browser can read.")
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]  # the conversation is still there
    page.get_by_role("button", name="Close").click()
    assert page.inner_text("#error") == ""


def test_no_picture_and_no_question(visit, one):
    page = visit(one)
    page.click("#send")
    assert failed(page) == "Write a question first."
    page.fill("#question", QUESTION)
    page.click("#send")
    page.wait_for_function(
        "() => document.querySelector('#error').innerText.includes('Choose a picture first.')"
    )
    assert page.input_value("#question") == QUESTION


def test_a_question_that_the_server_refuses(visit, one):
    page = visit(one, refusals=True)
    page.set_input_files("#file", PICTURE)
    page.wait_for_selector("#shown img")
    long = "word " * 3000
    page.fill("#question", long)
    with page.expect_response("**/v1/chat/completions") as refused:
        page.click("#send")
    assert refused.value.status == 400
    assert failed(page) == refused.value.json()["error"]["message"]
    assert page.locator(".turn").count() == 0
    assert page.input_value("#question") == long.strip()
    ask(page, QUESTION)
    assert page.inner_text("#error") == ""


def test_a_ratio_that_fails_keeps_the_conversation(visit, one):
    page = answered(visit, one, refusals=True)
    page.context.set_offline(True)
    page.press("#ratio", "ArrowRight")
    assert failed(page) == "The server cannot be reached. Check that it is running, then try again."
    settled(page)
    page.context.set_offline(False)
    page.press("#ratio", "End")
    page.wait_for_function("() => document.querySelector('.count b')?.textContent === '144 of 144'")


def test_a_server_that_cannot_be_reached(visit, one):
    page = visit(one, refusals=True)
    page.set_input_files("#file", PICTURE)
    page.context.set_offline(True)
    page.fill("#question", QUESTION)
    page.click("#send")
    assert failed(page) == "The server cannot be reached. Check that it is running, then try again."
    assert page.input_value("#question") == QUESTION
    page.context.set_offline(False)
    page.click("#send")
    page.wait_for_selector(".turn .count")


def test_a_busy_server_says_when_to_try_again(visit, one):
    page = visit(one, refusals=True)
    page.set_input_files("#file", PICTURE)
    body = {"error": {"message": "The server's queue is full: 16 requests are waiting. Try again later."}}
    busy = {"status": 429, "headers": {"Retry-After": "7"}, "body": json.dumps(body)}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**busy))
    page.fill("#question", QUESTION)
    page.click("#send")
    assert failed(page) == "The server's queue is full: 16 requests are waiting. Try again in 7 seconds."


def test_a_server_that_loads_is_asked_again(visit, one):
    page = visit(one, refusals=True)
    loads = {"status": 503, "headers": {"Retry-After": "1"}, "body": "{}"}
    page.route("**/v1/models", lambda route: route.fulfill(**loads), times=1)
    page.reload()
    assert "503" in failed(page)
    page.wait_for_function("() => document.querySelector('#served').textContent.startsWith('quarter')")
    assert page.inner_text("#error") == ""


def test_a_model_whose_tokens_are_no_grid_is_asked_without_pictures(visit, one):
    page = visit(one, refusals=True)
    page.set_input_files("#file", PICTURE)
    error = {
        "message": "The visual tokens of this model are not a grid of patches.",
        "param": "visprune.overlay",
    }
    asked = []

    def refuse(route) -> None:
        pruning = route.request.post_data_json["visprune"]
        asked.append(pruning)
        if pruning["overlay"]:
            route.fulfill(status=400, body=json.dumps({"error": error}))
        else:
            route.continue_()

    page.route("**/v1/chat/completions", refuse)
    ask(page, QUESTION)
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]
    whole = {"reuse_prefix": False}
    assert asked == [
        {"overlay": True, **whole},
        {"overlay": False, **whole},
        {"overlay": False, "ratio": 1, **whole},
    ]
    assert not page.locator("#views").is_visible()


def test_a_stream_that_breaks_off(visit, one):
    page = visit(one)
    page.set_input_files("#file", PICTURE)
    half = 'data: {"choices": [{"delta": {"content": "M"}, "finish_reason": null}]}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=half, content_type="text/event-stream")
    )
    page.fill("#question", QUESTION)
    page.click("#send")
    assert failed(page) == "The connection ended before the answer was complete. Ask again."
    assert page.input_value("#question") == QUESTION


def test_an_answer_is_stopped_before_it_comes(visit, one):
    page = visit(one, refusals=True)
    page.set_input_files("#file", PICTURE)
    page.wait_for_selector("#shown img")
    slow = {"offline": False, "latency": 3000, "downloadThroughput": -1, "uploadThroughput": -1}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.fill("#question", QUESTION)
    page.click("#send")
    page.click("#stop")
    settled(page)
    assert page.locator(".turn").count() == 0
    assert page.input_value("#question") == QUESTION
    assert page.inner_text("#error") == ""


def test_a_key_is_asked_for_and_forgotten_with_the_page(visit, locked):
    page = visit(locked, refusals=True)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => document.querySelector('#key-why').textContent === 'This key is not known. Check it.'"
    )
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.set_input_files("#file", PICTURE)
    page.wait_for_function("() => document.querySelector('#served').textContent.startsWith('quarter')")
    ask(page, QUESTION)
    assert texts(page, ".count b") == ["36 of 144", "144 of 144"]
    assert (
        page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        == '[{},{},""]'
    )
    page.reload()
    page.wait_for_selector("#key-dialog[open]")
    page.get_by_role("button", name="Cancel").click()
    assert failed(page) == "This server answers only with a key. Try again and give one."


def test_a_key_is_kept_for_the_tab_where_that_is_said(visit, locked):
    page = visit(locked, refusals=True)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key", KEY)
    page.get_by_label("Keep it until this tab is closed").check()
    page.get_by_role("button", name="Continue").click()
    ready = "() => document.querySelector('#served').textContent.startsWith('quarter')"
    page.wait_for_function(ready)
    page.reload()
    page.wait_for_function(ready)
    assert not page.locator("#key-dialog").is_visible()
    assert page.evaluate("sessionStorage.length") == 1
    assert page.evaluate("localStorage.length") == 0
