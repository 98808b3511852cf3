"""Checkpoints as people bring them: each kind of trouble is mended, or named with what to do about it.

What an export refuses a dry run refuses, with the same sentence.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

import tokenizers
from checkpoints import TEMPLATE
from PIL import Image
from published import OLD_NAMES
from safetensors.torch import load_file, save_file

import visprune
from visprune.cli import run_command
from visprune.errors import CheckpointError, UnsupportedError, UsageError, VispruneError
from visprune.export import export
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.processors import load_processor
from visprune.export.checkpoint.template import find_template
from visprune.export.graph import weightless
from visprune.export.preview import preview
from visprune.runtime.backends.runner import to_numpy
from visprune.runtime.messages import Message

LONG = (("max_position_embeddings", 2048),)
QWEN = {"tower": "siglip", "strategy": "full", "feature_layer": -1, "margin": 6, "text": "qwen2"}


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint of the test's own: `copy(**fields of Tiny) -> Path`."""

    def make(**tiny):
        path = checkpoint(checkpoint.Tiny(**tiny))
        return shutil.copytree(path, tmp_path / f"model-{len(list(tmp_path.iterdir()))}")

    return make


def edit(file, **changes):
    """Change keys of a JSON file; a key of `text_config` as text_config__key; ... takes one away."""
    data = json.loads(file.read_text()) if file.exists() else {}
    for key, value in changes.items():
        place, _, name = key.rpartition("__")
        part = data[place] if place else data
        part.pop(name, None)
        if value is not ...:
            part[name] = value
    file.write_text(json.dumps(data))
    return data


def old(name):
    """The name that published checkpoints have for a tensor."""
    return next((new + name[len(begin) :] for begin, new in OLD_NAMES if name.startswith(begin)), name)


def tensors(path, change):
    """Change the weights: `change(name, tensor)` gives the new name and tensor, or None."""
    file = path / "model.safetensors"
    changed = (change(name, tensor) for name, tensor in load_file(file).items())
    save_file(dict(pair for pair in changed if pair), file, {"format": "pt"})


def refused(kind, match, model, **options):
    """By a dry run and by an export, with the same words, nothing written."""
    options = {"method": "fopru-rank", "ratio": 0.5} | options
    out = model.parent / "never"
    with pytest.raises(kind, match=match) as dry:
        preview(model, output=out, **options)
    with pytest.raises(kind, match=match) as real:
        export(model, output=out, **options)
    assert (dry.value.what, dry.value.hint) == (real.value.what, real.value.hint)
    assert "Download the checkpoint again" not in real.value.hint
    assert not out.exists()
    return real.value


def read(model):
    """All that an export reads of a checkpoint but its weights, which this gives with their names."""
    loading.silence_transformers()
    checkpoint = find(model)
    processor = load_processor(checkpoint, loading.load_config(checkpoint))
    return processor, weightless.load_model(checkpoint).state_dict()


def same(one, other):
    """Whether two models have the same weights."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ends(model):
    return read(model)[0].tokenizer.eos_token_ids


def exported(model, **options):
    options = {"method": "fopru-rank", "ratio": 0.5} | options
    return export(model, output=model.parent / f"{model.name}-bundle", **options)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))


def answer(bundle, **options):
    with visprune.load(bundle.path) as pipeline:
        return pipeline.generate(picture(), "What?", max_new_tokens=6, **options)


class TestAdapters:
    def test_alone(self, tmp_path):
        path = tmp_path / "adapter"
        path.mkdir()
        edit(path / "adapter_config.json", peft_type="LORA")
        save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, path / "adapter_model.safetensors")
        refused(UnsupportedError, r"holds an adapter \(LORA\)", path)

    def test_among_the_weights(self, copy):
        path = copy()
        tensors(path, lambda n, t: (n.replace("q_proj.weight", "q_proj.lora_A.weight"), t))
        refused(UnsupportedError, "weights of an adapter among its own", path)


class TestTokenizer:
    def test_is_that_of_the_file_and_not_what_a_class_makes_of_it(self, copy):
        """A class that rebuilds it would join the digits, which the file keeps apart."""
        path = copy(family="llava_onevision", **QWEN)
        fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        data = json.loads(fast.to_str())
        data["model"]["vocab"] |= {"<image>": 259, "<video>": 260, "20": 261, "23": 262, "2023": 263}
        data["model"]["merges"] = [["2", "0"], ["2", "3"], ["20", "23"]]
        level = data["pre_tokenizer"]
        digits = {"type": "Digits", "individual_digits": True}
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
        (path / "tokenizer.json").write_text(json.dumps(data))
        edit(path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        want = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode("2023").ids
        assert len(want) == 4
        processor, _ = read(path)
        assert processor.tokenizer.encode("2023") == want
        assert processor.json == (path / "tokenizer.json").read_text()

    def test_tokens_that_only_the_files_beside_it_know_are_added(self, copy):
        path = copy()
        data = json.loads((path / "tokenizer.json").read_text())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] < 259]
        (path / "tokenizer.json").write_text(json.dumps(data))
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        refused(CheckpointError, "no image placeholder with the id 259", path)
        edit(path / "added_tokens.json", **{"<image>": 259, "<video>": 260})
        processor, _ = read(path)
        assert processor.tokenizer.encode("a<image>") == [67, 259]
        edit(path / "added_tokens.json", **{"<image>": 270, "<video>": 271})
        refused(CheckpointError, r"give '<image>' the id 270, and the tokenizer's next free id is 259", path)

    def test_of_sentencepiece_becomes_a_tokenizer_json(self, copy, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        path = copy()
        lines = [f"The cat sat on mat {i} in 2023, and what is in picture {7 * i}?" for i in range(300)]
        (tmp_path / "corpus.txt").write_text("\n".join(lines))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "corpus.txt"),
            model_prefix=str(path / "tokenizer"),
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            hard_vocab_limit=False,
        )
        count = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).vocab_size()
        (path / "tokenizer.json").unlink()
        said = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (path / "tokenizer_config.json").write_text(json.dumps(said))
        edit(path / "added_tokens.json", **{"<image>": count})
        edit(path / "config.json", image_token_id=count)
        bundle = exported(path, verify=False)
        text = "In 2023, where is the cat?\n Größe"
        want = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).encode(text)
        got = tokenizers.Tokenizer.from_file(str(bundle.file("tokenizer.json")))
        assert got.encode(text, add_special_tokens=False).ids == want
        assert answer(bundle).visual_tokens == 16
        edit(path / "tokenizer_config.json", legacy=False)  # transformers loses a space in front then
        assert read(path)[0].tokenizer.backend.encode(f" {text}", add_special_tokens=False).ids == (
            sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).encode(f" {text}")
        )
        (path / "tokenizer.model").write_bytes(b"no model")
        refused(CheckpointError, "is not a SentencePiece model", path)

    def test_a_pointer_of_git_lfs(self, copy):
        for name in ("tokenizer.json", "config.json", "model.safetensors"):
            path = copy()
            (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
            assert "git lfs pull" in refused(CheckpointError, f"{name} is not the file itself", path).hint


class TestTemplate:
    def test_that_writes_another_placeholder(self, copy):
        path = copy()
        edit(path / "config.json", image_token_id=260)
        found = refused(
            CheckpointError, r"'<video>' \(260\) by a picture.*writes it 0 times.*'<image> \(259\)'", path
        )
        assert "--chat-template" in found.hint

    def test_none_at_all(self, copy, capsys, tmp_path):
        path = copy()
        (path / "chat_template.jinja").unlink()
        edit(path / "tokenizer_config.json", chat_template=...)
        edit(path / "processor_config.json", chat_template=...)
        bundle = exported(path, verify=False)
        assert "has no chat template" in capsys.readouterr().err
        assert any("no chat template" in note for note in preview(path, method="none").notes)
        assert run_command("inspect", [str(bundle.path)]) == 0
        assert "template  none: prompts are handed to the model as they are" in capsys.readouterr().out
        given = tmp_path / "given.jinja"
        given.write_text(TEMPLATE)
        framed = exported(path, verify=False, chat_template=given, force=True)
        assert framed.file("chat_template.jinja").read_text() == TEMPLATE
        given = tmp_path / "given.json"
        given.write_text(json.dumps({"chat_template": TEMPLATE}))
        assert find_template(find(path, CheckpointOptions(chat_template=given))) == TEMPLATE

    @pytest.mark.parametrize(("name", "text"), [("a.jinja", " \n"), ("a.json", "{}"), ("a.json", "nonsense")])
    def test_a_given_file_without_one(self, name, text, copy, tmp_path):
        (tmp_path / name).write_text(text)
        refused(UsageError, "holds no chat template", copy(), chat_template=tmp_path / name)
        refused(UsageError, "cannot be used", copy(), chat_template=tmp_path / "nowhere.jinja")

    def test_that_writes_the_image_token_itself(self, copy, capsys):
        path = copy()
        (path / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}<image>{% endif %}"
            "{{ m.content | trim }} {% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        )
        bundle = exported(path, verify=False)
        assert "shows exactly one picture in each turn of the user" in capsys.readouterr().err
        assert answer(bundle).visual_tokens == 16
        assert run_command("inspect", [str(bundle.path)]) == 0
        assert "exactly one picture in each turn of the user" in capsys.readouterr().out

    def test_that_ends_turns_with_a_token_of_its_own(self, copy, capsys):
        """Llama 3: a text ends with <|end_of_text|>, an answer with <|eot_id|>, which is `<video>` here."""
        path = copy()
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "<video>\n"))
        assert exported(path, verify=False).manifest.decoder.eos_token_ids == (2, 260)
        assert "ends an answer with <video> (260)" in capsys.readouterr().err
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "<video></s>"))
        assert ends(path) == (2, 260)
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("</s>", "<video> and more"))
        assert ends(path) == (2,)

    def test_places_in_the_order_of_transformers(self, copy):
        path = copy()
        for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
            edit(path / name, chat_template=f"{TEMPLATE}{{# {name} #}}")
        for name in ("processor_config.json", "chat_template.json"):
            source = find_template(find(path))
            assert name in source
            assert source == transformers.AutoProcessor.from_pretrained(path).chat_template
            edit(path / name, chat_template=...)
        (path / "chat_template.json").unlink()
        assert find_template(find(path)) == TEMPLATE
        (path / "chat_template.jinja").unlink()
        assert "tokenizer_config.json" in find_template(find(path))


class TestWeights:
    def test_tied_by_the_text_configuration_alone(self, copy):
        path = copy(family="llava_next", tied=True, text="qwen2", text_extra=LONG)
        _, want = read(path)
        edit(path / "config.json", tie_word_embeddings=False)
        assert same(read(path)[1], want)
        assert torch.equal(want["lm_head.weight"], want["model.language_model.embed_tokens.weight"])
        assert exported(path).manifest.parity.verified
        edit(path / "config.json", text_config__tie_word_embeddings=False)
        assert "tie_word_embeddings" in refused(CheckpointError, "lack 1 of .*lm_head.weight", path).hint

    @pytest.mark.parametrize("family", ["llava", "llava_onevision"])
    def test_a_placeholder_beyond_the_embedding_table(self, family, copy):
        """Its row is replaced anyway: the same model with rows for it has the same embeddings."""
        path = copy(family=family, text_extra=LONG)
        whole = exported(path, verify=False)
        edit(path / "config.json", text_config__vocab_size=259)
        tensors(path, lambda n, t: (n, t[:259].clone() if t.shape[0] == 320 else t))
        short = export(path, method="fopru-rank", ratio=0.5, output=path.parent / "short")
        assert short.manifest.parity.verified
        feeds = {"input_ids": np.array([[5, 259, 259, 7]]), "image_features": np.ones((2, 32), np.float32)}
        got = []
        for bundle in (whole, short):
            with visprune.load(bundle.path) as pipeline:
                embeds = pipeline._runners["embedding"].infer(feeds)["inputs_embeds"]
                got.append(to_numpy(embeds).copy())
                assert pipeline.generate(picture(), "What?", max_new_tokens=4).token_ids
        assert np.array_equal(*got)

    @pytest.mark.parametrize(("tower", "layer"), [("clip", -2), ("siglip", -1)])
    def test_what_nothing_uses_may_be_absent(self, tower, layer, copy):
        path = copy(tower=tower, feature_layer=layer)
        _, want = read(path)
        spare = ["post_layernorm"] + (["encoder.layers.2."] if layer == -2 else [])
        tensors(path, lambda n, t: None if any(part in n for part in spare) else (n, t))
        _, got = read(path)
        for name, tensor in got.items():
            assert torch.equal(tensor, want[name] * (0 if any(part in name for part in spare) else 1)), name
        assert exported(path).manifest.parity.verified
        tensors(path, lambda n, t: None if "encoder.layers.1.mlp.fc1" in n else (n, t))
        refused(CheckpointError, r"lack 2 of \d+ tensors: model\.vision_tower.*layers\.1\.mlp\.fc1", path)

    def test_quantized(self, copy):
        path = copy()
        for key in ("quantization_config", "compression_config"):
            for place in ("", "text_config__", "vision_config__"):
                edit(path / "config.json", **{f"{place}{key}": {"bits": 4}})
                refused(UnsupportedError, "holds quantized weights", path)
                edit(path / "config.json", **{f"{place}{key}": None})
        assert find(path)

    @pytest.mark.parametrize(
        "name", ["qweight", "weight_packed", "weight_scale", "SCB", "weight.absmax", "scales"]
    )
    def test_quantized_by_the_names(self, name, copy):
        path = copy()
        tensors(path, lambda n, t: (n.replace("up_proj.weight", f"up_proj.{name}"), t))
        refused(UnsupportedError, "holds quantized weights", path)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda name: f"module.{name}",
            lambda name: f"base_model.model.{name}",
            lambda name: f"_orig_mod.module.{name}",
            lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
            lambda name: name.replace("language_model.", "language_model._orig_mod.", 1),
        ],
    )
    def test_names_that_wrappers_lengthened(self, wrap, copy):
        path = copy()
        _, want = read(path)
        tensors(path, lambda n, t: (wrap(n), t))
        assert same(read(path)[1], want)

    def test_names_of_another_framework(self, copy):
        path = copy()
        tensors(path, lambda n, t: (f"flax.{n.replace('weight', 'kernel')}", t))
        found = refused(
            CheckpointError,
            r"lm_head\.weight is one of them; they have 80 that the model does not, such as flax\.",
            path,
        )
        assert "config.json" in found.hint

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("model.gguf", "GGUF"),
            ("flax_model.msgpack", "Flax"),
            ("weights.npz", "MLX"),
            ("other.safetensors", "transformers does not read"),
        ],
    )
    def test_files_of_another_framework(self, name, words, copy):
        path = copy()
        (path / "model.safetensors").unlink()
        (path / name).write_bytes(b"x")
        refused(CheckpointError, words, path)

    @pytest.mark.parametrize(("value", "verify"), [(float("nan"), True), (float("inf"), False)])
    def test_numbers_that_are_none(self, value, verify, copy, tmp_path):
        path = copy()

        def spoil(name, tensor):
            if name.endswith("layers.0.mlp.up_proj.weight"):
                tensor[0, 0] = value
            return name, tensor

        tensors(path, spoil)
        with pytest.raises(
            CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight in .* holds NaN or infinity"
        ):
            export(path, method="none", output=tmp_path / "out", verify=verify)
        assert not (tmp_path / "out").exists()

    def test_a_missing_tensor_shows_in_a_dry_run(self, copy):
        path = copy()
        tensors(path, lambda n, t: None if n.endswith("layers.1.mlp.up_proj.weight") else (n, t))
        refused(
            CheckpointError, r"lack 1 of 80 tensors: model\.language_model\.layers\.1\.mlp\.up_proj", path
        )


class TestEndsOfText:
    @pytest.mark.parametrize(
        "said",
        [
            {"max_new_tokens": 0},
            {"cache_implementation": "nope"},
            {"num_return_sequences": 2},
            {"eos_token_id": "</s>"},
            {"eos_token_id": ["</s>", 2, "nonsense", None, True]},
            {"eos_token_id": {"odd": 1}},
            {"eos_token_id": ...},
        ],
    )
    def test_are_read_leniently(self, said, copy):
        path = copy()
        edit(path / "generation_config.json", **said)
        assert ends(path) == (2,)

    def test_in_their_order(self, copy):
        path = copy()
        edit(path / "generation_config.json", eos_token_id=["<pad>", 2])
        assert ends(path) == (0, 2)
        (path / "generation_config.json").unlink()
        edit(path / "config.json", text_config__eos_token_id=[5, 2])
        assert ends(path) == (5, 2)
        edit(path / "config.json", text_config__eos_token_id=..., eos_token_id=7)
        assert ends(path)[0] == 7
        edit(path / "config.json", eos_token_id=...)
        edit(path / "tokenizer_config.json", eos_token="<video>")
        assert ends(path)[0] == 260


class TestSlidingWindow:
    @pytest.mark.parametrize(("text", "scope"), [("mistral", "layers"), ("Gemma3TextConfig", "whole")])
    def test_is_no_parity_error(self, text, scope, copy):
        path = copy(text=text, head_dim=8, text_extra=(("sliding_window", 24),))
        for options in ({}, {"method": "none", "ratio": None, "force": True}):
            bundle = exported(path, verify=scope, **options)
            assert bundle.manifest.decoder.sliding_window == 24
            assert bundle.manifest.parity.verified

    def test_that_no_picture_fits_into(self, copy):
        path = copy(text="mistral", text_extra=(("sliding_window", 12),))
        found = refused(UnsupportedError, "takes 8 tokens .* sliding window holds 12", path)
        assert "fewer visual tokens" in found.hint
        assert exported(path, ratio=0.25).manifest.parity.verified


class TestProcessors:
    def test_of_transformers_is_not_needed(self, copy, tmp_path):
        path = copy(layers=4)
        made = []
        for changes in ({}, {"processor_class": "LlavaNextProcessor", "patch_size": ...}):
            edit(path / "processor_config.json", **changes)
            made.append(visprune.fit(path, ratio=0.6))
        assert made[0] == made[1]

    def test_a_class_that_is_not_named(self, copy):
        path = copy(family="llava_next", text_extra=LONG)
        said = json.loads((path / "processor_config.json").read_text())["image_processor"]
        edit(path / "processor_config.json", image_processor=...)
        del said["image_processor_type"]
        (path / "preprocessor_config.json").write_text(json.dumps(said))
        assert read(path)[0].image_processor["image_processor_type"] == "LlavaNextImageProcessor"
        (path / "preprocessor_config.json").unlink()
        refused(CheckpointError, r"no preprocessor_config\.json", path)


class TestConfiguration:
    def test_a_square_given_as_a_pair(self, copy):
        path = copy()
        edit(path / "config.json", vision_config__image_size=[56, 56], vision_config__patch_size=[14, 14])
        bundle = exported(path)
        assert bundle.manifest.parity.verified
        assert bundle.manifest.pruning.grid == (4, 4)

    def test_keys_of_the_original_format_that_are_left_over(self, copy):
        path = copy()
        edit(path / "config.json", mm_vision_tower="openai/clip", mm_hidden_size=32)
        assert find(path).model_type == "llava"
        edit(path / "config.json", architectures=...)
        assert find(path).model_type == "llava"
        edit(path / "config.json", architectures=["LlavaMistralForCausalLM"])
        refused(UnsupportedError, "original format and has mm_projector_type", path)

    def test_a_count_is_of_one_tile(self, copy):
        path = copy(family="llava_next", text_extra=LONG)
        found = refused(
            UsageError,
            r"Cannot keep 40 tokens: a count is of one tile, which has 16",
            path,
            ratio=None,
            keep_tokens=40,
        )
        assert (
            found.hint == "40 of the 80 of a picture of 112 x 112 pixels are --keep-tokens 8, or --ratio 0.5."
        )
        found = refused(UsageError, "of one tile", path, ratio=None, keep_tokens=4000)
        assert found.hint == "Give a count from 1 to 16."
        bundle = exported(path, verify=False)
        with (
            visprune.load(bundle.path) as pipeline,
            pytest.raises(VispruneError, match="a count is of one tile"),
        ):
            pipeline.chat(keep_tokens=40)


class TestVariants:
    """More of the same kinds, as others found them."""

    @pytest.mark.parametrize("index", [67, 39, 2, 1])
    def test_a_placeholder_that_is_a_part_of_texts(self, index, copy):
        path = copy()
        edit(path / "config.json", image_token_id=index)
        refused(CheckpointError, f"the token {index} by a picture, and .* is a part of texts", path)

    @pytest.mark.parametrize(
        "part",
        ["lora_down.weight", "ia3_l", "hada_w1_a", "base_layer.weight", "modules_to_save.default.weight"],
    )
    def test_adapters_of_other_kinds(self, part, copy):
        path = copy()
        tensors(path, lambda n, t: (n.replace("q_proj.weight", f"q_proj.{part}"), t))
        refused(UnsupportedError, "weights of an adapter among its own", path)

    def test_a_head_behind_a_common_beginning_is_not_lost(self, copy):
        path = copy()
        _, want = read(path)
        tensors(path, lambda n, t: ("model." + old(n), t))
        assert same(read(path)[1], want)
        edit(path / "config.json", tie_word_embeddings=True, text_config__tie_word_embeddings=True)
        assert torch.equal(
            read(path)[1]["model.language_model.embed_tokens.weight"],
            want["model.language_model.embed_tokens.weight"],
        )
        tensors(path, lambda n, t: (n.removeprefix("model."), t))
        edit(path / "config.json", tie_word_embeddings=False, text_config__tie_word_embeddings=False)
        tensors(path, lambda n, t: (n.replace("lm_head", "old_head"), t))
        assert "old_head" in refused(CheckpointError, "lack 1 of 80 tensors: lm_head", path).what

    def test_tensors_to_spare_are_named(self, copy):
        path = copy()
        weights = load_file(path / "model.safetensors")
        save_file(weights | {"model.extra.bias": torch.ones(2)}, path / "model.safetensors", {"format": "pt"})
        notes = preview(path, method="none").notes
        assert any(
            "1 tensors that the model of config.json does not, such as model.extra.bias" in n for n in notes
        )

    def test_a_template_that_writes_another_role(self, copy):
        path = copy()
        (path / "chat_template.jinja").write_text("{{ pad_token }}" + TEMPLATE)
        processor, _ = read(path)
        told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        want = transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(
            told, tokenize=False, add_generation_prompt=True
        )
        assert processor.template.render([Message.blank("user", "What?", images=1)]) == want

    @pytest.mark.parametrize(
        "name", ["chat_template.jinja", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
    )
    def test_a_link_to_a_file_that_is_missing(self, name, copy):
        path = copy()
        (path / name).unlink()
        (path / name).symlink_to("../../blobs/none")
        refused(CheckpointError, f"{name} is a link to a file that is missing", path)

    def test_ends_of_text_that_cannot_be_read(self, copy):
        path = copy()
        (path / "generation_config.json").write_text("{")
        processor, _ = read(path)
        assert processor.tokenizer.eos_token_ids == (2,)
        assert "generation_config.json is not JSON" in processor.notes[0]

    def test_no_numbers_in_a_tensor_that_nothing_uses(self, copy):
        path = copy()
        tensors(path, lambda n, t: (n, t * float("nan") if "post_layernorm" in n else t))
        assert exported(path).manifest.parity.verified

    def test_a_tokenizer_with_padding_and_truncation(self, copy):
        path = copy()
        data = json.loads((path / "tokenizer.json").read_text())
        data["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        data["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
        (path / "tokenizer.json").write_text(json.dumps(data))
        assert len(read(path)[0].tokenizer.encode("a text of many tokens")) == 21

    def test_an_attention_whose_package_is_not_here(self, copy):
        path = copy()
        _, want = read(path)
        config = json.loads((path / "config.json").read_text())
        for part in (config, config["text_config"], config["vision_config"]):
            part["_attn_implementation"] = "flash_attention_2"
        (path / "config.json").write_text(json.dumps(config))
        assert same(read(path)[1], want)

    @pytest.mark.parametrize(
        "change",
        [
            {"projector_hidden_act": "nonsense"},
            {"text_config__hidden_act": "nonsense"},
            {"text_config__pad_token_id": 4000},
            {"text_config__num_key_value_heads": 0},
        ],
    )
    def test_a_model_that_cannot_be_built(self, change, copy):
        path = copy()
        edit(path / "config.json", **change)
        refused(CheckpointError, "cannot be (built|read)", path)

    def test_a_window_left_over_from_another_decoder(self, copy):
        path = copy()
        edit(path / "config.json", text_config__sliding_window=12)
        assert exported(path, verify=False).manifest.decoder.sliding_window is None
