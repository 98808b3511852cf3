"""The page of the API: all that the server describes, from the server alone."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_lists_what_the_server_describes(visit, one, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = visit(one, "/docs", width=width, scheme=scheme, bypass_csp=True)
    page.wait_for_selector("#operations section")
    described = page.request.get(f"{one}/openapi.json").json()
    listed = page.locator("#operations h2").all_inner_texts()
    assert listed == [
        f"{method.upper()} {path}"
        for path, entries in described["paths"].items()
        for method in entries
        if method in ("get", "post")
    ]
    request = page.locator("#operations section").filter(has_text="/v1/chat/completions").first
    shown = request.locator("dt code").all_text_contents()
    schema = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = schema["schema"]["$ref"].rpartition("/")[2]
    assert set(described["components"]["schemas"][name]["properties"]) <= set(shown)
    assert {"messages", "role", "image_url", "url", "ratio", "overlay"} <= set(shown)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert axe.Axe().run(page).response["violations"] == []


def test_its_examples_name_this_server(visit, one):
    page = visit(one, "/docs")
    page.wait_for_function("() => document.querySelector('#python-example').textContent.includes('quarter')")
    for example in page.locator("pre").all_inner_texts():
        assert f"{one}/v1" in example
        assert "BASE" not in example
        assert "MODEL" not in example


def test_its_fields_say_what_is_taken(visit, one):
    page = visit(one, "/docs")
    page.wait_for_selector("#operations section")
    request = page.locator("#operations section").filter(has_text="/v1/chat/completions").first
    text = request.inner_text()
    assert "9223372036854776000" not in text
    assert "At least 1, at most 1" not in text
    described = request.locator("dt:has(> code:text-is('stop')) + dd").first.inner_text()
    assert described.endswith("Up to 16 items.")
    any_value, one_value, null = request.locator("h3:text-is('Request') + dl > .idle").all()
    assert any_value.locator("code").all_inner_texts() == [
        "metadata",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "parallel_tool_calls",
    ]
    taken = one_value.locator("span").all_inner_texts()
    assert {"n 1", "store false", "top_logprobs 0", "tools []", "logit_bias {}"} <= set(taken)
    assert {'tool_choice "none" or "auto"', 'modalities ["text"]'} <= set(taken)
    assert "audio" in null.locator("code").all_inner_texts()
