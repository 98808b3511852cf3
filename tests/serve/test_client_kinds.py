"""OpenAI's client against one server with several kinds of bundle: caches and other clients change no answer.

The oracle is a pipeline of its own for each bundle, without caches, and the command `visprune run`.
"""

from __future__ import annotations

import base64
import io
import json
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from PIL import Image
from serving import data_url, picture_part, serving, text_part

import visprune
from visprune import cli
from visprune.runtime import Sampling
from visprune.runtime.message_files import read_messages

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import checkpoints
from tracing import _collected, _quick_traces

from visprune.export import export

__all__ = ["_collected", "_quick_traces"]

ROOM = (("max_position_embeddings", 2048),)
PLAIN = {"layers": 3}
KINDS = {
    "fastv": (PLAIN, {"method": "fastv", "ratio": 0.5}),
    "dart": (PLAIN, {"method": "dart", "ratio": 0.5}),
    "resize": (PLAIN, {"method": "resize", "ratio": 0.6}),
    "tiles": ({**PLAIN, "family": "llava_next"}, {"method": "visionzip", "ratio": 0.5}),
}
LENGTH = 12


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    models = {}
    for name, (tiny, options) in KINDS.items():
        made = checkpoints.Tiny(**tiny, text_extra=ROOM)
        if made not in models:
            models[made] = checkpoints.write(made, folder / f"{name}-model")
        export(models[made], output=folder / name, verify=False, **options)
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def client(bundles):
    with serving(list(bundles.values()), "--max-queue", "64") as served:
        with openai.OpenAI(base_url=f"{served.address}/v1", api_key="-", max_retries=0) as client:
            yield client
        assert "which is a bug" not in "\n".join(served.lines)


@pytest.fixture(scope="module")
def fresh(bundles):
    """A pipeline of each bundle that keeps nothing from one request to the next."""
    loaded = {name: visprune.load(path, threads=1) for name, path in bundles.items()}
    yield loaded
    for pipeline in loaded.values():
        pipeline.close()


def picture(seed, size=(64, 90)):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return picture_part(data_url(Image.fromarray(pixels)))


def opened(url):
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return image.convert("RGB")


def user(*content):
    parts = [text_part(part) if isinstance(part, str) else part for part in content]
    return {"role": "user", "content": parts}


A, B, C = picture(1), picture(2, (150, 84)), picture(3, (40, 160))
ANSWER = {"role": "assistant", "content": "Something."}
CONVERSATIONS = {
    "a question": [user(A, "What is it?")],
    "another question": [user(A, "Where is it, and why?")],
    "text before the picture": [user("Look.", A, "What is it?")],
    "a second turn": [user(A, "What is it?"), ANSWER, user("And why?")],
    "another second turn": [user(A, "What is it?"), ANSWER, user("Where?")],
    "a picture in each turn": [user(A, "What is it?"), ANSWER, user(B, "And this?")],
    "text between pictures": [user(A, "is one,", B, "is another. Which is it?")],
    "the other order": [user(B, "is one,", A, "is another. Which is it?")],
    "the same one twice": [user(A, "is one,", A, "is another. Which is it?")],
    "three": [user(A, B, C, "Compare.")],
    "an instruction": [{"role": "system", "content": "Be brief."}, user(C, "What is it?")],
    "an answer begun": [user(A, "What is it?"), {"role": "assistant", "content": "It is"}],
    "no picture": [user("What is it?")],
}
FIGURES = ("keep_indices", "merged_indices", "visual_tokens", "tokens_kept", "layer_tokens")


@pytest.fixture
def wanted(fresh, tmp_path):
    """What a pipeline without caches answers to messages as they are in a file."""

    def answer(model, messages, **options):
        file = tmp_path / "messages.json"
        file.write_text(json.dumps(messages), encoding="utf-8")
        pipeline = fresh[model]
        turn = pipeline.prepare(read_messages(file), max_new_tokens=LENGTH, **options)
        stream = pipeline.answer(turn)
        return [piece for piece in stream if piece], stream.result

    return answer


def ask(client, model, messages, **fields):
    return client.chat.completions.create(model=model, messages=messages, max_tokens=LENGTH, **fields)


def check(reply, result):
    """All that a reply says of an answer."""
    assert reply.choices[0].message.content == result.text
    assert reply.choices[0].finish_reason == ("length" if result.finish_reason == "length" else "stop")
    assert reply.usage.prompt_tokens == result.tokens_in
    assert reply.usage.completion_tokens == len(result.token_ids)
    for name in FIGURES:
        assert reply.visprune[name] == json.loads(json.dumps(getattr(result, name))), name


@pytest.mark.parametrize("model", KINDS)
def test_caches_change_no_answer(client, wanted, model):
    images = tokens = 0
    for name in list(CONVERSATIONS) * 2:
        reply = ask(client, model, CONVERSATIONS[name])
        check(reply, wanted(model, CONVERSATIONS[name])[1])
        images += reply.visprune["cached"]["images"]
        tokens += reply.usage.prompt_tokens_details.cached_tokens
    assert images >= 5
    assert tokens > 20


@pytest.mark.parametrize("model", KINDS)
def test_another_ratio_and_back(client, wanted, model):
    for name in ("a question", "text between pictures", "another question"):
        messages = CONVERSATIONS[name]
        for ratio in (1.0, 0.3, 0.8, 0.3, None):
            extra = {"visprune": {"ratio": ratio}} if ratio else {}
            check(ask(client, model, messages, extra_body=extra), wanted(model, messages, ratio=ratio)[1])


@pytest.mark.parametrize("model", KINDS)
def test_pieces_are_those_of_the_runtime(client, wanted, model):
    for name in ("three", "an instruction"):
        pieces, result = wanted(model, CONVERSATIONS[name])
        chunks = list(ask(client, model, CONVERSATIONS[name], stream=True))
        got = [chunk.choices[0].delta.content for chunk in chunks]
        assert [piece for piece in got if piece] == pieces
        assert chunks[-1].visprune["keep_indices"] == [list(kept) for kept in result.keep_indices]


@pytest.mark.parametrize("model", KINDS)
def test_overlays(client, fresh, model):
    messages = CONVERSATIONS["text between pictures"]
    found = ask(client, model, messages, extra_body={"visprune": {"overlay": True}}).visprune
    drawn = []
    for number, (part, overlay) in enumerate(zip((A, B), found["overlays"], strict=True)):
        image = opened(part["image_url"]["url"])
        options = {"images": 2, "keep_tokens": found["keep_tokens"]}
        kept, merged = found["keep_indices"][number], found["merged_indices"][number]
        drawn.append(fresh[model].overlay(image, kept, merged_indices=merged, **options).tobytes())
        assert opened(overlay).tobytes() == drawn[-1]
    assert drawn[0] != drawn[1]


def test_all_at_once(client, wanted):
    """Six clients ask all models, greedy or not, streamed or not; each gets the answer that it gets alone."""
    rows = [
        (model, name, {"temperature": 0.9, "top_p": 0.95, "seed": number} if number % 3 == 0 else {})
        for number, (model, name) in enumerate((m, n) for m in KINDS for n in CONVERSATIONS)
    ]

    def one(row):
        model, name, fields = row
        if len(name) % 2:
            return ask(client, model, CONVERSATIONS[name], **fields).choices[0].message.content
        chunks = ask(client, model, CONVERSATIONS[name], stream=True, **fields)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    random.Random(0).shuffle(rows)
    with ThreadPoolExecutor(6) as clients:
        texts = list(clients.map(one, rows))
    for (model, name, fields), text in zip(rows, texts, strict=True):
        sampling = Sampling(**fields)
        assert text == wanted(model, CONVERSATIONS[name], sampling=sampling)[1].text, (model, name)


@pytest.mark.parametrize("model", ["dart", "tiles"])
def test_equals_the_command_token_for_token(client, bundles, tmp_path, capfd, model):
    messages = CONVERSATIONS["a picture in each turn"]
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(messages), encoding="utf-8")
    options = ["--messages", str(file), "--json", "--max-new-tokens", str(LENGTH), "--threads", "1"]
    assert cli.run_command("run", [str(bundles[model]), *options]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert len(printed["token_ids"]) == LENGTH
    reply = ask(client, model, messages)
    assert reply.choices[0].message.content == printed["text"]
    assert reply.usage.prompt_tokens == printed["tokens_in"]
    assert reply.usage.completion_tokens == len(printed["token_ids"])
    for name in FIGURES:
        assert reply.visprune[name] == printed[name]
