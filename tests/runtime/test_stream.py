"""An answer computed step by step."""

from __future__ import annotations

import pytest

from visprune.errors import UsageError
from visprune.runtime import Message, load

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with load(tiny_bundle, threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("question", ["a?", "What is it?", "colour", "b"])
def test_every_step_computes_a_token_and_the_last_one_ends_the_answer(pipeline, question):
    turn = pipeline.prepare([Message("user", question)], max_new_tokens=30)
    expected = pipeline.answer(turn).result
    stream = pipeline.answer(turn)
    pieces = []
    while not stream.ended:
        pieces.append(stream.step())
    assert len(pieces) == len(expected.token_ids)
    assert "".join(pieces) == stream.result.text == expected.text
    assert stream.step() is None


def test_a_closed_stream_has_not_ended(pipeline):
    stream = pipeline.answer(pipeline.prepare([Message("user", "a?")], max_new_tokens=30))
    stream.step()
    stream.close()
    assert stream.step() is None
    assert not stream.ended
    with pytest.raises(UsageError, match="closed before its end"):
        stream.result  # noqa: B018


def test_a_chat_holds_the_answer_once_its_last_token_is_computed(pipeline):
    chat = pipeline.chat()
    stream = chat.stream("What is it?", max_new_tokens=3)
    for _ in range(3):
        assert chat.messages == ()
        stream.step()
    assert [message.role for message in chat.messages] == ["user", "assistant"]
