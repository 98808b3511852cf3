"""Prompt forms of LLaVA's code: their published texts, and the tokens that LLaVA's code makes of them."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from visprune.errors import InputError, UsageError
from visprune.export.checkpoint.checkpoint import Checkpoint
from visprune.export.checkpoint.conversations import (
    CONVERSATIONS,
    choose,
    conversation_template,
    image_text,
)
from visprune.export.checkpoint.tokenizer import read_tokenizer
from visprune.runtime.chat_template import ANY_NUMBER, ChatTemplate
from visprune.runtime.messages import Message
from visprune.runtime.text import Tokenizer as RuntimeTokenizer

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
HONEST = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
# Three turns: a picture in the first, none in the second, two in the third.
TURNS = [
    Message.blank("user", "Who is it?", images=1),
    Message("assistant", "A cat."),
    Message("user", "Where?"),
    Message("assistant", "On a mat."),
    Message.blank("user", "Compare them.", images=2),
]
# What the system says without a system message, and the published text of these turns with {} in its place.
PUBLISHED = {
    "vicuna_v1": (
        USER,
        "{} USER: <image>\nWho is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: On a mat.</s>"
        "USER: <image>\n<image>\nCompare them. ASSISTANT:",
    ),
    "llava_v1": (
        HUMAN,
        "{} USER: <image>\nWho is it? ASSISTANT: A cat.</s>USER: Where? ASSISTANT: On a mat.</s>"
        "USER: <image>\n<image>\nCompare them. ASSISTANT:",
    ),
    "llava_v0": (
        HUMAN,
        "{}###Human: <image>\nWho is it?###Assistant: A cat.###Human: Where?###Assistant: On a mat."
        "###Human: <image>\n<image>\nCompare them.###Assistant:",
    ),
    "llava_llama_2": (
        LANGUAGE_AND_VISION,
        "[INST] <<SYS>>\n{}\n<</SYS>>\n\n<image>\nWho is it? [/INST] A cat. </s><s>[INST] Where? [/INST] "
        "On a mat. </s><s>[INST] <image>\n<image>\nCompare them. [/INST]",
    ),
    "llava_llama_3": (
        LANGUAGE_AND_VISION,
        "<s><|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWho is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhere?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nOn a mat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nCompare them.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen": (
        "You are a helpful assistant.",
        "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n<image>\nWho is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nOn a mat.<|im_end|>\n"
        "<|im_start|>user\n<image>\n<image>\nCompare them.<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "chatml_direct": (
        "Answer the questions.",
        "<|im_start|>system\n{}<|im_end|><|im_start|>user\n<image>\nWho is it?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhere?<|im_end|>"
        "<|im_start|>assistant\nOn a mat.<|im_end|>"
        "<|im_start|>user\n<image>\n<image>\nCompare them.<|im_end|>"
        "<|im_start|>assistant\n",
    ),
    "mpt": (
        HONEST,
        "<|im_start|>system\n{}<|im_end|><|im_start|>user\n<image>\nWho is it?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhere?<|im_end|>"
        "<|im_start|>assistant\nOn a mat.<|im_end|>"
        "<|im_start|>user\n<image>\n<image>\nCompare them.<|im_end|>"
        "<|im_start|>assistant\n",
    ),
    "plain": ("", "{}<image>\nWho is it?\nA cat.\nWhere?\nOn a mat.\n<image>\n<image>\nCompare them.\n"),
}
MISTRAL = (
    "[INST] {}<image>\nWho is it? [/INST] A cat. </s>[INST] Where? [/INST] On a mat. </s>"
    "[INST] <image>\n<image>\nCompare them. [/INST]"
)


def template(name, image="<image>\n", bos="<s>"):
    return ChatTemplate(conversation_template(name, image=image), bos, "</s>", "<image>")


class TestTexts:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_of_three_turns(self, name):
        sentence, published = PUBLISHED[name]
        form = template(name)
        assert form.render(TURNS) == published.format(sentence)
        assert form.render([Message("system", "Be {brief}."), *TURNS]) == published.format("Be {brief}.")
        bare = [Message(turn.role, turn.text) for turn in TURNS]
        assert form.render(bare) == published.format(sentence).replace("<image>\n", "")
        assert published.format(sentence).startswith(form.render(TURNS[:2], add_generation_prompt=False))

    def test_of_mistral_which_has_no_sentence(self):
        form = template("mistral_instruct")
        assert form.render(TURNS) == MISTRAL.format("")
        told = [Message("system", "Be brief."), *TURNS]
        assert form.render(told) == MISTRAL.format("<<SYS>>\nBe brief.\n<</SYS>>\n\n")

    def test_every_form_is_tested_here(self):
        assert {form.name for form in CONVERSATIONS.values()} == {*PUBLISHED, "mistral_instruct"}
        assert CONVERSATIONS["v1"] is CONVERSATIONS["vicuna_v1"]
        assert CONVERSATIONS["qwen_1_5"] is CONVERSATIONS["qwen"]

    @pytest.mark.parametrize("name", CONVERSATIONS)
    def test_any_number_of_pictures_and_a_system_message(self, name):
        form = template(name)
        assert form.describe() == ANY_NUMBER
        assert form.shows_system
        video = form.render([Message.blank("user", "What?", videos=1)])
        assert video == form.render([Message.blank("user", "What?", images=1)])
        with pytest.raises(InputError, match="turns of user and assistant"):
            form.render([Message("user", "What?"), Message("tool", "3")])

    def test_ends_of_turns(self):
        ends = {name: template(name).turn_end() for name in PUBLISHED}
        assert ends["vicuna_v1"] == "</s>"
        assert ends["qwen"] == "<|im_end|>\n"
        assert ends["llava_llama_3"] == "<|eot_id|>"
        assert template("mistral_instruct").turn_end() == " </s>"

    def test_other_texts_for_an_image(self):
        image = '<im_start><image><im_end>"\\\n'
        assert template("vicuna_v1", image).render(TURNS[:1]) == (
            f"{USER} USER: {image}Who is it? ASSISTANT:"
        )

    def test_a_tokenizer_without_a_token_that_begins_a_text(self):
        assert template("llava_llama_3", bos=None).render(TURNS).startswith("<|start_header_id|>system")

    def test_names_that_are_unknown(self):
        with pytest.raises(UsageError, match="no conversation form 'vicuna_v2'") as caught:
            conversation_template("vicuna_v2", image="<image>\n")
        assert "'vicuna_v1'" in caught.value.hint
        with pytest.raises(UsageError) as caught:
            conversation_template("xyz", image="<image>\n")
        assert all(name in caught.value.hint for name in CONVERSATIONS)

    def test_the_choice(self):
        assert choose("llava_mistral", ["<s>", "</s>"]) == "mistral_instruct"
        assert choose("llava_qwen", ["<|im_start|>", "<|im_end|>"]) == "qwen"
        for model_type in ("llava", "llava_llama"):
            assert choose(model_type, ["<|begin_of_text|>", "<|start_header_id|>"]) == "llava_llama_3"
            assert choose(model_type, ["<s>", "<|im_start|>"]) == "chatml_direct"
            assert choose(model_type, ["<s>", "</s>"]) == "vicuna_v1"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece model with the settings of Llama's: it keeps every space."""
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sentencepiece")
    lines = [f"USER: Who is on mat {i}? ASSISTANT: A cat in 2023 [INST] it {i} [/INST]" for i in range(300)]
    (path / "corpus.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"),
        model_prefix=str(path / "tokenizer"),
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return path / "tokenizer.model"


def llava_pieces(prompt, encode):
    """Tokens as LLaVA's code makes them: -200 for an image, and each piece between images encoded alone."""
    found = []
    for piece in prompt.split("<image>"):
        found += [-200, *encode(piece)]
    return found[1:]


def slow_llama(model, legacy):
    """The rule of the LlamaTokenizer that LLaVA's code loads, without the token that begins a text."""
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    newline = processor.encode("\n")  # "▁" and a byte, which is never a part of a longer piece

    def encode(piece):
        found = []
        for index, part in enumerate(re.split("(</?s>)", piece)):
            if part in ("<s>", "</s>"):
                found.append(processor.piece_to_id(part))
            elif part and (legacy or index == 0):
                found += processor.encode(part)
            elif part:  # without the "▁" in front
                ids = processor.encode(f"\n{part}")
                assert ids[: len(newline)] == newline
                found += ids[len(newline) :]
        return found

    return encode


def ours(backend, name, bos="<s>"):
    """Tokens of the runtime for the three turns, images as -200."""
    image = backend.token_to_id("<image>")
    tokenizer = RuntimeTokenizer.from_backend(backend, "<image>", image, bos, (2,))
    ids = tokenizer.encode(template(name, image_text(backend, "<image>"), bos).render(TURNS))
    return [-200 if token == image else token for token in ids]


class TestTokens:
    @pytest.mark.parametrize("legacy", [True, False])
    def test_of_a_sentencepiece_model(self, legacy, sentencepiece_model, tmp_path):
        encode = slow_llama(sentencepiece_model, legacy)
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
        said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(said | {"legacy": legacy, "add_bos_token": True})
        )
        size = len(json.loads(read(tmp_path).json)["model"]["vocab"])
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": size}))
        backend = read(tmp_path).backend
        for name in ("vicuna_v1", "llava_v1", "llava_v0", "llava_llama_2"):
            sentence, published = PUBLISHED[name]
            assert ours(backend, name) == [1, *llava_pieces(published.format(sentence), encode)], name
        assert ours(backend, "mistral_instruct") == [1, *llava_pieces(MISTRAL.format(""), encode)]
        assert image_text(backend, "<image>") == ("<image>\n" if legacy else "<image> \n")
        later = slow_llama(sentencepiece_model, not legacy)("A cat.</s>USER: Where?")
        assert later != encode("A cat.</s>USER: Where?")  # the two rules differ in later turns

    def test_no_space_is_lost_in_front(self, sentencepiece_model, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
        said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": True}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
        for text in ("USER", " USER", "   a  b "):
            got = read(tmp_path).backend.encode(text, add_special_tokens=False).ids
            assert got == slow_llama(sentencepiece_model, True)(text), text

    def test_of_a_byte_level_tokenizer(self):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator([published for _, published in PUBLISHED.values()], trainer)
        special = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        backend.add_special_tokens([AddedToken(token, special=True) for token in (*special, "<image>")])
        assert image_text(backend, "<image>") == "<image>\n"
        for name in ("qwen", "chatml_direct", "mpt", "llava_llama_3"):
            sentence, published = PUBLISHED[name]
            want = llava_pieces(
                published.format(sentence).removeprefix("<s>"),
                lambda piece: backend.encode(piece, add_special_tokens=False).ids,
            )
            assert ours(backend, name, bos=None) == want, name


def read(path):
    known = {"name": "x", "path": path, "model_type": "llava", "weights": (), "tensors": {}}
    return read_tokenizer(Checkpoint(**known, conversation="vicuna_v1"))
