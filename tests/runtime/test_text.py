"""Encoding, placeholders, and streams that equal the decoded whole for every kind of tokenizer."""

import json
import random
import time

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from visprune.errors import BundleError, InputError
from visprune.runtime.text import TextStream, Tokenizer

CORPUS = [
    "The cat sat on the mat, and the small red square is left of the blue circle.",
    "What is in the picture? There are three digits: 3, 5 and 8.",
    "猫在垫子上。图片里有什么?",
    "naïve café, straße — “quoted”…",
]
SAMPLES = [
    "The cat is on the mat.",
    "  two  spaces and a tab\t\n\nnew lines ",
    "猫和狗在图片里。",
    "Emoji 😀👩‍👩‍👧 and 🇪🇺 flags, e\u0301 accents, ﷽, \U0001d518nicode",
    "",
]
SPECIAL = ["<s>", "</s>", "<image>"]


def byte_level():
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(decoder):
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    content = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", *SPECIAL, *(f"<0x{value:02X}>" for value in range(256)), *content["vocab"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in content["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def llama():
    return sentencepiece(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    )


def metaspace():
    return sentencepiece(decoders.Metaspace())


def words(decoder=None):
    pieces = ["<unk>", "the", "cat</w>", "sat", "on</w>", "a", ".", ",", "##s", "##ing", "猫", "▁", "</w>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "llama": llama,
    "metaspace": metaspace,
    "words": words,
    "wordpiece": lambda: words(decoders.WordPiece()),
    "bpe-suffix": lambda: words(decoders.BPEDecoder("</w>")),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def tokenizer(request, tmp_path_factory):
    return read(request.param(), tmp_path_factory.mktemp("tokenizer"))


def read(backend, folder, bos_token="<s>"):
    backend.save(str(folder / "tokenizer.json"))
    end = backend.token_to_id("</s>")
    return Tokenizer.from_file(
        folder / "tokenizer.json", "<image>", backend.token_to_id("<image>"), bos_token, (end,)
    )


def streamed(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    parts = [stream.push(token) for token in ids]
    return [*parts, stream.finish()], stream.stopped


def until_stop(text, stops):
    """The text before the stop that is completed first, reading letter by letter."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_streams_of_text_equal_the_whole(tokenizer):
    for sample in SAMPLES:
        ids = tokenizer.encode(sample)
        parts, _ = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)


def test_streams_of_random_tokens_equal_the_whole(tokenizer):
    rng = random.Random(0)
    size = tokenizer.backend.get_vocab_size()
    favoured = sorted(tokenizer.byte_ids | tokenizer.hidden_ids) or [0]
    for trial in range(600):
        ids = [rng.randrange(size + 2) for _ in range(rng.randrange(1, 40))]  # two ids that do not exist
        if trial % 2:
            ids = [rng.choice(favoured) if rng.random() < 0.5 else token for token in ids]
        parts, _ = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids), ids


def test_stops_cut_the_same_wherever_tokens_end(tokenizer):
    rng = random.Random(1)
    size = tokenizer.backend.get_vocab_size()
    for sample in [*SAMPLES, *CORPUS, *([None] * 150)]:
        ids = tokenizer.encode(sample) if sample else [rng.randrange(size) for _ in range(25)]
        text = tokenizer.decode(ids)
        at = [rng.randrange(len(text) + 1) for _ in range(6)]
        stops = tuple(text[i : i + length] for i, length in zip(at, (1, 2, 5), strict=False))
        stops = tuple(stop for stop in stops if stop)
        stops += ("never there", text[at[3] : at[3] + 3] + "\0")
        parts, stopped = streamed(tokenizer, ids, stops)
        assert ("".join(parts), stopped) == until_stop(text, stops)


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_half_a_character_is_never_shown(kind, tmp_path):
    tokenizer = read(KINDS[kind](), tmp_path)
    for sample in SAMPLES:
        parts, _ = streamed(tokenizer, tokenizer.encode(sample))
        assert not any("\ufffd" in part for part in parts)


def test_text_comes_as_soon_as_it_is_final(tmp_path):
    tokenizer = read(byte_level(), tmp_path)
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("cat 😀!")
    parts = [stream.push(token) for token in ids]
    assert parts[-1] == "!"
    assert [part for part in parts if part][-2].endswith("😀")
    assert stream.finish() == ""


def test_a_stop_string_across_tokens_is_held_back_and_let_go(tmp_path):
    tokenizer = read(byte_level(), tmp_path)
    letters = [tokenizer.encode(letter)[0] for letter in "abENDcENd"]
    stream = TextStream(tokenizer, ("END",))
    assert [stream.push(token) for token in letters[:5]] == ["a", "b", "", "", ""]
    assert stream.stopped
    assert stream.push(letters[5]) == stream.finish() == ""
    stream = TextStream(tokenizer, ("END",))
    assert [stream.push(token) for token in letters[5:]] == ["c", "", "", "ENd"]
    assert not stream.stopped
    assert [stream.push(token) for token in letters[2:4]] == ["", ""]
    assert stream.finish() == "EN"


def test_an_unfinished_character_at_the_end_is_shown_as_one(tmp_path):
    for kind in (byte_level, llama):
        tokenizer = read(kind(), tmp_path)
        ids = tokenizer.encode("a😀")[:-1]
        parts, _ = streamed(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert parts[-1].startswith("\ufffd")


def test_the_cost_of_a_token_does_not_grow(tmp_path):
    rng = random.Random(2)
    for kind in (byte_level, llama):
        tokenizer = read(kind(), tmp_path)
        stray = tokenizer.backend.token_to_id("<0x80>") or tokenizer.backend.token_to_id("Ģ")  # byte 0x80
        size = tokenizer.backend.get_vocab_size()
        for ids in ([stray] * 20_000, [rng.randrange(size) for _ in range(20_000)]):
            started = time.monotonic()
            parts, _ = streamed(tokenizer, ids)
            assert time.monotonic() - started < 20  # a second; minutes if every push decoded everything
            assert "".join(parts) == tokenizer.decode(ids)


def test_special_tokens_are_added_unless_the_text_begins_with_bos(tmp_path):
    backend = byte_level()
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = read(backend, tmp_path)
    assert tokenizer.encode("cat") == tokenizer.encode("<s>cat")
    assert tokenizer.encode("cat").count(start) == 1
    assert read(backend, tmp_path, bos_token=None).encode("<s>cat").count(start) == 2
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = read(backend, tmp_path)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]
    assert len(tokenizer.encode("a")) == 1


def test_expanding_equals_repeating_the_placeholder_in_the_text(tokenizer):
    ids = tokenizer.encode("<image>\nthe cat <image> sat <image>")
    expected = tokenizer.encode("<image><image>\nthe cat <image> sat <image><image><image>")
    assert tokenizer.expand_images(ids, [2, 1, 3]) == expected


def test_placeholders_and_images_must_match(tokenizer):
    ids = tokenizer.encode("<image> the cat")
    for counts in ([], [1, 2]):
        with pytest.raises(InputError, match=rf"1 placeholder\(s\) '<image>' for {len(counts)} image"):
            tokenizer.expand_images(ids, counts)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    for path in (tmp_path / "tokenizer.json", tmp_path / "none.json"):
        with pytest.raises(BundleError, match="cannot be read"):
            Tokenizer.from_file(path, "<image>", 2, None, ())


def test_a_tokenizer_with_another_image_token(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for token, number in (("<image>", 0), ("<picture>", 2)):
        with pytest.raises(BundleError, match="does not turn"):
            Tokenizer.from_file(tmp_path / "tokenizer.json", token, number, None, ())


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@pytest.mark.parametrize("begins", ["", "{{ bos_token }}"])
def test_a_whole_prompt_equals_the_llava_processor(kind, begins, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from visprune.runtime.chat_template import ChatTemplate
    from visprune.runtime.messages import Message

    backend = KINDS[kind]()
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer = read(backend, tmp_path)
    source = begins + (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content %}"
        "{{ '<image>\n' if p.type == 'image' else p.text }} {% endfor %}{% endfor %}"
    )
    theirs = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
        ),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=source,
    )
    picture = Image.new("RGB", (30, 40))
    content = [{"type": "image", "image": picture}] * 2 + [{"type": "text", "text": "What differs? 猫"}]
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True
    )
    text = ChatTemplate(source, "<s>", "</s>").render([Message.blank("user", "What differs? 猫", images=2)])
    ids = tokenizer.expand_images(tokenizer.encode(text), [4, 4])
    assert [ids] == [list(row) for row in expected["input_ids"]]
    assert ids.count(start) == 1
