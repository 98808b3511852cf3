"""Conversations as token ids: pictures that the template cannot show, tokens without a row, stops, system."""

import json
from dataclasses import replace

import pytest

from visprune.bundle import Bundle
from visprune.errors import InputError, UsageError
from visprune.runtime import load
from visprune.runtime.chat_template import ChatTemplate
from visprune.runtime.messages import Message
from visprune.runtime.prompts import prompt_ids
from visprune.runtime.reading import check_texts, read_template, read_tokenizer

IMAGE = 2
ITSELF = (
    "{% for m in messages %}{% if m.role == 'user' %}<image>{% endif %}{{ m.content | trim }};{% endfor %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"


@pytest.fixture
def with_template(tiny_copy, edit_manifest):
    """A function that gives the tiny bundle another chat template."""

    def give(source):
        (tiny_copy / "other.jinja").write_text(source, encoding="utf-8")
        edit_manifest(tiny_copy, "text", chat_template="other.jinja")
        return tiny_copy

    return give


@pytest.fixture
def more_tokens(tiny_copy, edit_manifest):
    """A function that makes texts special tokens of the tiny bundle's tokenizer."""

    def make(*texts):
        tokenizer = read_tokenizer(Bundle.open(tiny_copy)).backend
        tokenizer.add_special_tokens(list(texts))
        tokenizer.save(str(tiny_copy / "other.json"))
        edit_manifest(tiny_copy, "text", tokenizer="other.json")
        return tiny_copy

    return make


def test_what_the_template_cannot_show_is_told(with_template, picture):
    with load(with_template(ITSELF)) as pipeline:
        chat = pipeline.chat()
        for images, has in ((0, "0 pictures in 1 turn"), (2, "2 pictures in 1 turn")):
            with pytest.raises(InputError) as caught:
                chat.stream("What?", [picture(n) for n in range(images)])
            shows = "This model's chat template shows exactly one picture in each turn of the user"
            assert caught.value.what == f"{shows}; this conversation has {has}."
        assert chat.generate("What?", [picture(0)], max_new_tokens=2).visual_tokens == 16
        with pytest.raises(InputError, match="has 1 picture in 2 turns"):
            chat.stream("And now?")
        assert chat.generate("And now?", [picture(1)], max_new_tokens=2).visual_tokens == 16


def test_a_video_that_the_template_does_not_write(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    source = (
        "{% for m in messages %}{% for p in m.content if p.type != 'video' %}{{ p.text or '<image>' }}"
        "{% endfor %}{% endfor %}"
    )
    template = ChatTemplate(source, None, None)
    messages = [Message.blank("user", "What?", images=1, videos=1)]
    with pytest.raises(
        InputError, match="writes 1 image placeholder for a conversation with 1 picture and 1"
    ):
        prompt_ids(
            messages,
            template,
            read_tokenizer(bundle),
            bundle.manifest.text,
            bundle.manifest.decoder.vocab_size,
        )


def test_a_token_without_a_row_in_the_embedding_table_is_named(more_tokens):
    with load(more_tokens("<extra>")) as pipeline:
        with pytest.raises(InputError, match=r"the token '<extra>' with the id 259, and .* has 259 rows"):
            pipeline.generate(None, "What is <extra>?")
        assert pipeline.generate(None, "What is extra?", max_new_tokens=1).token_ids


def test_placeholders_need_no_row(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    tokenizer = read_tokenizer(bundle)
    (video,) = tokenizer.encode("~")
    manifest = replace(
        bundle.manifest,
        text=replace(bundle.manifest.text, video_token="~", video_token_id=video),
        decoder=replace(bundle.manifest.decoder, vocab_size=IMAGE),
    )
    messages = [Message.blank("user", "q", images=1, videos=1)]
    template = ChatTemplate("<bos><image>~", None, None)
    assert prompt_ids(messages, template, tokenizer, manifest.text, manifest.decoder.vocab_size) == [
        0,
        IMAGE,
        IMAGE,
    ]
    template = ChatTemplate("<bos><image>~a", None, None)
    with pytest.raises(InputError, match=r"the token 'a' .* has 2 rows"):
        prompt_ids(messages, template, tokenizer, manifest.text, manifest.decoder.vocab_size)


def test_a_special_token_ends_the_answer(tiny_copy, more_tokens):
    with load(tiny_copy) as pipeline:
        whole = pipeline.generate(None, "Say it", max_new_tokens=30)
        place = next(
            i for i, token in enumerate(whole.token_ids) if i > 3 and token not in whole.token_ids[:i]
        )
        end = whole.token_ids[place]
        name, before = (
            pipeline.loaded.tokenizer.backend.id_to_token(end),
            pipeline.loaded.tokenizer.decode(whole.token_ids[:place]),
        )
    with load(more_tokens(name)) as pipeline:
        for stop in ([name], name, ["never", name]):
            answer = pipeline.generate(None, "Say it", max_new_tokens=30, stop=stop)
            assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[: place + 1], "stop")
            assert answer.text == before
        stream = pipeline.chat().stream("Say it", max_new_tokens=30, stop=[name])
        assert "".join(stream) == stream.result.text == before
        # held back for a stop that does not come
        answer = pipeline.generate(None, "Say it", max_new_tokens=30, stop=[before[-1] + "never", name])
        assert answer.text == before


def test_a_stop_that_can_never_match_is_refused(tiny_bundle):
    with load(tiny_bundle) as pipeline:
        for stop in ("<eos>\n", "a<image>", "<eos><eos>"):
            with pytest.raises(UsageError, match="can never match"):
                pipeline.stream(None, "q", stop=[stop])
        answers = [
            pipeline.generate(None, "q", max_new_tokens=3, stop=stop) for stop in ((), ["<bos>", "\udcff"])
        ]
        assert answers[0].token_ids == answers[1].token_ids


def test_the_system_prompt_begins_every_turn(tiny_bundle, oracle, picture):
    with load(tiny_bundle) as pipeline:
        chat = pipeline.chat(system="Be brief.")
        for _ in range(2):
            told, pictures = "<bos>system: Be brief.;", []
            for turn in range(2):
                pictures.append(pipeline.loaded.pictures.processor(picture(turn)))
                cached = chat.cached_tokens
                answer = chat.generate(f"turn {turn}", [picture(turn)], max_new_tokens=5)
                told += f"user:<image> turn {turn};"
                tokenizer = pipeline.loaded.tokenizer
                ids = tokenizer.expand_images(tokenizer.encode(told + "a:"), [4] * len(pictures))
                assert list(answer.token_ids) == oracle.greedy(ids, pictures, 4, 5)
                assert answer.tokens_in == len(ids)
                assert cached == 0 or turn
                told += f"assistant: {answer.text}<eos>;"
            assert [message.role for message in chat.messages] == ["user", "assistant"] * 2
            chat.reset()
        alone = pipeline.generate(picture(0), "turn 0", max_new_tokens=5, system="Be brief.")
        assert alone.token_ids == chat.generate("turn 0", [picture(0)], max_new_tokens=5).token_ids


@pytest.mark.parametrize("source", [REFUSES, DROPS])
def test_a_template_that_cannot_show_a_system_prompt(with_template, source):
    with load(with_template(source)) as pipeline:
        for ask in (pipeline.chat, lambda **options: pipeline.stream(None, "q", **options)):
            with pytest.raises(InputError, match="cannot show a system prompt"):
                ask(system="Be brief.")


def test_a_system_prompt_without_a_template_is_a_line_in_front(tiny_copy, edit_manifest):
    edit_manifest(tiny_copy, "text", chat_template=None)
    bundle = Bundle.open(tiny_copy)
    check_texts(bundle, system="Be brief.")
    messages = [Message("system", "Be brief."), Message("user", "q")]
    assert read_template(bundle).render(messages) == "Be brief.\nq"


@pytest.mark.parametrize(
    ("system", "what"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("a <image>", "stands for an image"),
        ("\udcff", "not valid UTF-8"),
    ],
)
def test_a_system_prompt_that_cannot_be_used(tiny_bundle, system, what):
    with pytest.raises(InputError, match=f"The system prompt .*{what}"):
        check_texts(Bundle.open(tiny_bundle), system=system)


def test_a_tokenizer_knows_its_special_tokens(tiny_bundle):
    tokenizer = read_tokenizer(Bundle.open(tiny_bundle))
    assert [tokenizer.special_id(text) for text in ("<eos>", "<image>", "a", "<eos", "\udcff")] == [
        1,
        2,
        None,
        None,
        None,
    ]
    assert json.loads(tokenizer.backend.to_str())["added_tokens"][1]["content"] == "<eos>"
