"""Adapters merged while weights are read; peft's merge_and_unload is the oracle."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import adapters
from adapters import LINEAR, loaded, opened, refused
from PIL import Image
from safetensors.torch import load_file

import visprune
from visprune.cli import run_command
from visprune.errors import CheckpointError, UnsupportedError
from visprune.export import export
from visprune.export.checkpoint import loading, merging
from visprune.export.checkpoint.find import find
from visprune.export.files import located
from visprune.export.graph import weightless
from visprune.export.preview import preview

SIGLIP = {"tower": "siglip", "strategy": "full", "feature_layer": -1, "text": "qwen2", "margin": 6}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FAMILIES = {
    "llava": {"lively": True},
    "llava_next": {"family": "llava_next", "text": "mistral", "lively": True},
    "llava_onevision": {"family": "llava_onevision", **SIGLIP, "tied": True, "lively": True},
}


@pytest.fixture(scope="module", autouse=True)
def _silent():
    loading.silence_transformers()


def assert_same(model, want, tolerance=1e-5):
    """Both have the same tensors, and these are equal within float error."""
    found, want = model.state_dict(), want.state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(
            found[name].float(), tensor.float(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def changed(model, base):
    """Names of the tensors that differ from the base's."""
    plain = loaded(base).state_dict()
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_settings(family, seed, checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(**FAMILIES[family]))
    settings = adapters.random_config(seed + 10 * list(FAMILIES).index(family))
    if path_is_tied(path):  # what peft merges into one of two tied tensors changes the other; see below
        settings["target_modules"] = [one for one in settings["target_modules"] if one not in adapters.TABLES]
    made = adapters.make(tmp_path / "lora", path, seed, **settings)
    model = loaded(path, made)
    assert_same(model, adapters.merged(path, made))
    assert len(changed(model, path)) > 10


def path_is_tied(path):
    return json.loads((path / "config.json").read_text())["text_config"]["tie_word_embeddings"]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "down_proj", "fc2", "linear_1"], "use_dora": True},
        {"target_modules": ["embed_tokens", "lm_head", "patch_embedding"], "use_dora": True, "r": 3},
        {"target_modules": ["fc1", "linear_1", "linear_2"], "lora_bias": True, "bias": "none"},
        {"target_modules": "all-linear", "layers_to_transform": None, "use_rslora": True},
        {
            "target_modules": list(LINEAR),
            "modules_to_save": ["multi_modal_projector.linear_1", "lm_head", "norm"],
        },
        {"target_modules": list(LINEAR), "bias": "all", "modules_to_save": ["linear_1"]},
        {"target_modules": list(LINEAR), "fan_in_fan_out": True},
    ],
    ids=[
        *("dora", "dora of tables", "lora bias", "all linear layers", "saved modules", "all biases"),
        "fan in, fan out",
    ],
)
def test_each_setting(settings, base, tmp_path):
    made = adapters.make(tmp_path / "lora", base, **{"r": 4, "lora_alpha": 6, **settings})
    assert_same(loaded(base, made), adapters.merged(base, made))


def test_matrices_of_gpt2_are_transposed(checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(text="GPT2Config"))
    made = adapters.make(tmp_path / "lora", path, r=2, target_modules=["c_fc"], fan_in_fan_out=True)
    assert_same(loaded(path, made), adapters.merged(path, made))


def test_several_are_merged_in_order(base, tmp_path):
    first = adapters.make(tmp_path / "first", base, 1, r=4, target_modules=list(LINEAR), use_rslora=True)
    second = adapters.make(tmp_path / "second", base, 2, r=2, target_modules=["q_proj", "fc2"], use_dora=True)
    one, other = loaded(base, first, second), loaded(base, second, first)
    assert_same(one, adapters.merged(base, first, second))
    assert_same(other, adapters.merged(base, second, first))
    name = (
        "model.language_model.layers.0.self_attn.q_proj.weight"  # scaled to a length, or added to after that
    )
    assert (one.state_dict()[name] - other.state_dict()[name]).abs().max() > 0.01


def test_in_pieces_and_in_the_stored_dtype(checkpoint, tmp_path, monkeypatch):
    """The sum is rounded once."""
    path = checkpoint(checkpoint.Tiny(dtype="bfloat16", lively=True))
    whole = adapters.make(tmp_path / "lora", path, r=4, target_modules=[*LINEAR, "embed_tokens"])
    monkeypatch.setattr(merging, "_CHUNK", 100)
    found = loaded(path, whole).state_dict()
    for name, tensor in adapters.merged(path, whole).state_dict().items():
        if "embed_tokens" not in name:  # of which peft saves the whole table, in float32
            assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), tensor.bfloat16().float(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
            "of older versions",
        ),
        (
            {
                "model.language_model.": "model.",
                "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
                "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
                "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
            },
            "of the original format",
        ),
        ({"model.": "base_model.model.model.model."}, "in a wrapper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names(old, new, base, adapter, tmp_path):
    made = adapters.make(
        tmp_path / "tables",
        base,
        r=2,
        target_modules=["q_proj", "lm_head", "fc1"],
        modules_to_save=["linear_1"],
    )
    want = loaded(base, made).state_dict()

    def renamed(name):
        plain = name.removeprefix("base_model.model.")
        begin = next((begin for begin in old if plain.startswith(begin)), "")
        spelled = old.get(begin, "") + plain.removeprefix(begin)
        return spelled if spelled.startswith("base_model.") else f"base_model.model.{spelled}"

    adapters.rename(made, renamed)
    found = loaded(base, made).state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_null_is_no_setting(base, adapter):
    """As older versions of peft write settings that are not used."""
    made = adapter()
    want = loaded(base, made).state_dict()
    settings = json.loads((made / "adapter_config.json").read_text())
    settings |= {"use_rslora": None, "use_dora": None, "rank_pattern": None}
    (made / "adapter_config.json").write_text(json.dumps(settings))
    found = loaded(base, made).state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_names_of_a_training_step(base, adapter):
    """As a trainer saves them that does not go through peft."""
    made = adapter()
    want = loaded(base, made).state_dict()
    adapters.rename(
        made, lambda name: name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")
    )
    found = loaded(base, made).state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)


class TestTiedTables:
    """A module that peft trains is a copy, so what it was tied to stays as it is."""

    @pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
    def test_one_is_replaced(self, saved, checkpoint, tmp_path):
        path = checkpoint(checkpoint.Tiny(tied=True))
        made = adapters.make(tmp_path / "lora", path, r=2, target_modules=["q_proj"], modules_to_save=[saved])
        model = loaded(path, made)
        assert_same(model, adapters.merged(path, made))
        assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)

    @pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
    def test_one_is_added_to(self, target, checkpoint, tmp_path):
        """Here peft's merge would change both; the model before that merge is the one that was trained."""
        path = checkpoint(checkpoint.Tiny(tied=True))
        made = adapters.make(tmp_path / "lora", path, r=2, target_modules=[target])
        ids = torch.arange(20)[None]
        with torch.no_grad():
            want = peft.PeftModel.from_pretrained(adapters.load(path), made)(input_ids=ids).logits
            found = loaded(path, made)(input_ids=ids).logits
            plain = loaded(path)(input_ids=ids).logits
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        assert (plain - want).abs().max() > 0.01

    def test_none_is_changed(self, checkpoint, tmp_path):
        path = checkpoint(checkpoint.Tiny(tied=True))
        made = adapters.make(tmp_path / "lora", path, r=2, target_modules=["q_proj"])
        model = loaded(path, made)
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        assert_same(model, adapters.merged(path, made))


class TestBesideTheBase:
    def test_it_is_merged_first_and_a_note_says_so(self, base, adapter, tmp_path):
        path = shutil.copytree(base, tmp_path / "model")
        for file in adapter("first").iterdir():
            shutil.copy(file, path)
        second = adapters.make(tmp_path / "second", base, 2, r=2, target_modules=["q_proj"], use_dora=True)
        found = opened(path, second)
        assert [part.name for part in found.parts] == ["model", "second"]
        notes = preview(path, method="none").notes
        assert sum("adapter beside its weights" in note for note in notes) == 1
        assert_same(weightless.load_model(found), adapters.merged(base, tmp_path / "first", second))

    def test_nothing_beside_it(self, adapter, tmp_path):
        made = adapter()
        adapters.edit_settings(made, base_model_name_or_path="llava-hf/llava-1.5-7b-hf")
        found = refused(UnsupportedError, r"holds an adapter \(LORA\) of llava-hf/llava-1\.5-7b-hf", made)
        assert f"visprune-export llava-hf/llava-1.5-7b-hf --adapter {made}" in found.hint
        (made / "config.json").write_text("{}")  # as LLaVA's training leaves it
        refused(UnsupportedError, "no model that it could be merged into", made)

    def test_other_files_than_a_whole_adapter(self, base, tmp_path):
        path = shutil.copytree(base, tmp_path / "model")
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        refused(CheckpointError, "has no adapter_model.safetensors", path)


class TestLlavasOwnRuns:
    """A language model as the base; LLaVA's configuration and a pickled projector beside the adapter."""

    @pytest.fixture
    def run(self, checkpoint, tmp_path):
        tiny = checkpoint.Tiny(text="llama", lively=True)
        whole = adapters.load(checkpoint(tiny))
        text = whole.config.text_config
        decoder = transformers.LlamaForCausalLM(text).eval()
        decoder.model.load_state_dict(whole.model.language_model.state_dict())
        decoder.lm_head.load_state_dict(whole.lm_head.state_dict())
        base, tower, path = tmp_path / "vicuna", tmp_path / "clip", tmp_path / "run"
        decoder.save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoint(tiny) / name, base)
        vision = transformers.CLIPVisionModel(whole.config.vision_config)
        own = whole.model.vision_tower.state_dict()
        assert own.keys() == vision.state_dict().keys()
        vision.load_state_dict(own)
        vision.save_pretrained(tower)
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}
        ).save_pretrained(tower)
        adapters.make(path, decoder, r=4, target_modules=["q_proj", "up_proj"])
        settings = decoder.config.to_dict() | {
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": str(tower),
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": 32,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "image_aspect_ratio": "pad",
        }
        (path / "config.json").write_text(json.dumps(settings))
        projector = whole.model.multi_modal_projector.state_dict()
        places = {"linear_1": "0", "linear_2": "2"}
        trained = {
            f"base_model.model.model.mm_projector.{places[name.split('.')[0]]}.{name.split('.')[1]}": tensor
            for name, tensor in projector.items()
        }
        torch.save(trained, path / "non_lora_trainables.bin")
        return base, path, whole

    def test_the_model_that_was_trained(self, run, tmp_path):
        base, path, whole = run
        found = opened(base, path, pickled_weights=True)
        assert found.model_type == "llava"
        assert [(part.role, part.name) for part in found.parts] == [
            ("vision tower", "clip"),
            ("adapter", "run"),
        ]
        assert {file.name for file in found.parts[1].files} == {
            "adapter_model.safetensors",
            "adapter_config.json",
            "non_lora_trainables.bin",
        }
        decoder = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        decoder = peft.PeftModel.from_pretrained(decoder, path).merge_and_unload()
        whole.model.language_model.load_state_dict(decoder.model.state_dict())
        whole.lm_head.load_state_dict(decoder.lm_head.state_dict())
        assert_same(weightless.load_model(found), whole)
        dry = preview(base, adapter=[str(path)], pickled_weights=True, method="none", output=tmp_path / "out")
        assert "vision_encoder" in [graph.name for graph in dry.graphs]

    def test_the_projector_is_never_left_out(self, run):
        base, path, _ = run
        found = refused(UnsupportedError, "weights in a pickle, non_lora_trainables.bin", base, path)
        assert "--pickled-weights" in found.hint

    def test_without_the_projector(self, run):
        base, path, _ = run
        (path / "non_lora_trainables.bin").unlink()
        found = refused(CheckpointError, "run has no non_lora_trainables.bin with the projector", base, path)
        assert "that LLaVA's training wrote" in found.hint

    def test_without_the_configuration(self, run):
        base, path, _ = run
        (path / "config.json").unlink()
        found = refused(
            UnsupportedError,
            r"no LLaVA \(its model type is 'llama'\), and .*run has no config.json of one",
            base,
            path,
            pickled_weights=True,
        )
        assert "Put the config.json that LLaVA's training wrote beside the adapter" in found.hint
        found = refused(UnsupportedError, "'llama' is not supported: it is a language model alone", base)
        assert "--adapter" in found.hint

    def test_a_pickle_of_the_adapter_itself(self, base, adapter):
        made = adapter()
        want = loaded(base, made).state_dict()
        torch.save(load_file(made / "adapter_model.safetensors"), made / "adapter_model.bin")
        (made / "adapter_model.safetensors").unlink()
        refused(UnsupportedError, "weights in a pickle, adapter_model.bin", base, made)
        found = loaded(base, made, pickled_weights=True).state_dict()
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_hub_ids(base, adapter, tmp_path, monkeypatch):
    """A file of the adapter may be a pickle, so pickles are fetched too; the commit is recorded."""
    commit = "0" * 40
    for name, files in (("my-lora", adapter()), ("llava-1.5-7b-hf", base)):
        root = tmp_path / "hub" / f"models--somebody--{name}"
        shutil.copytree(files, root / "snapshots" / commit)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr("visprune.export.files.located._snapshot", recording(located._snapshot, asked))
    found = opened("somebody/llava-1.5-7b-hf", "somebody/my-lora")
    assert [(part.name, part.revision) for part in found.parts] == [("somebody/my-lora", commit)]
    assert ["*.bin" in patterns for patterns in asked] == [False, True]
    snapshot = tmp_path / "hub" / "models--somebody--my-lora" / "snapshots" / commit
    adapters.edit_settings(snapshot, base_model_name_or_path="someone/llava-13b")
    refused(
        UnsupportedError,
        "somebody/my-lora was trained on someone/llava-13b, and the model is somebody/llava-1.5-7b-hf",
        "somebody/llava-1.5-7b-hf",
        "somebody/my-lora",
    )
    with pytest.raises(UnsupportedError) as caught:
        find("somebody/my-lora")
    assert caught.value.hint.endswith("visprune-export someone/llava-13b --adapter somebody/my-lora")


def recording(function, asked):
    def record(hub_id, revision, patterns, **options):
        asked.append(patterns)
        return function(hub_id, revision, patterns, **options)

    return record


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_exports_answer_as_the_merged_model_does(family, checkpoint, tmp_path, capsys):
    """Tied tables that become two, and an adapter of every part."""
    from oracle import NEW, Oracle

    long = {"text_extra": (("max_position_embeddings", 2048),)}
    path = checkpoint(checkpoint.Tiny(**FAMILIES[family] | long | {"tied": True}))
    first = adapters.make(
        tmp_path / "first",
        path,
        1,
        r=4,
        target_modules=[*LINEAR, "out_proj"],
        modules_to_save=["embed_tokens"],
    )
    second = adapters.make(tmp_path / "second", path, 2, r=2, target_modules=["down_proj"], use_dora=True)
    bundle = export(
        path, adapter=[str(first), str(second)], method="fopru-rank", ratio=0.5, output=tmp_path / "out"
    )
    assert bundle.manifest.parity.verified
    parts = bundle.manifest.source.parts
    assert [(part.role, part.name) for part in parts] == [("adapter", "first"), ("adapter", "second")]
    want = shutil.copytree(path, tmp_path / "merged")
    adapters.merged(path, first, second).save_pretrained(want)
    oracle = Oracle(want)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8))
    with visprune.load(bundle.path) as pipeline:
        got = pipeline.generate(image, "What?", ratio=1.0, max_new_tokens=NEW)
    assert got.token_ids == oracle.generate([(1, "What?", None)], [image])
    assert got.token_ids != Oracle(path).generate([(1, "What?", None)], [image])
    assert run_command("inspect", [str(bundle.path)]) == 0
    assert f"adapter   second, SHA-256 {parts[1].sha256[:16]}" in capsys.readouterr().out
