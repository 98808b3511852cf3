"""Adapters that are refused, each with a plain sentence."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

import adapters
from adapters import refused
from safetensors.torch import load_file, save_file

from visprune.cli import run_command
from visprune.errors import CheckpointError, UnsupportedError, UsageError
from visprune.export import export
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.find import find
from visprune.export.files.located import Located
from visprune.export.formats.adapters import check_base, read_adapter
from visprune.pruning.recipe import CONVENTION, Recipe, write_recipe


@pytest.fixture(scope="module", autouse=True)
def _silent():
    loading.silence_transformers()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "IA3"}, "is of kind IA3, and only LoRA"),
        ({"peft_type": "PROMPT_TUNING"}, "is of kind PROMPT_TUNING"),
        ({"peft_type": None}, "is of kind None"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "uses target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "uses layer_replication"),
        ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "uses ensure_weight_tying"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised with 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "initialised with 'olora'"),
        ({"init_lora_weights": "loftq"}, "initialised with 'loftq'"),
        ({"init_lora_weights": "of next year"}, "initialised with 'of next year'"),
    ],
)
def test_other_kinds(settings, words, base, adapter):
    made = adapter()
    adapters.edit_settings(made, **settings)
    refused(UnsupportedError, words, base, made)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 5}, r"has rank 2 at .* and its adapter_config\.json says 5"),
        ({"rank_pattern": {"up_proj": 7}}, "rank 2 at .*up_proj, .* says 7"),
        ({"lora_alpha": "16"}, "'16' in lora_alpha"),
        ({"lora_alpha": True}, "True in lora_alpha"),
        ({"alpha_pattern": ["q_proj"]}, r"\['q_proj'\] in alpha_pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "None in alpha_pattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "nan in alpha_pattern"),
        ({"lora_alpha": 10**400}, "0 in lora_alpha"),
        ({"rank_pattern": {"(": 2}}, r"'\(' in rank_pattern"),
        ({"rank_pattern": {"(?i)Q": 2}}, r"'\(\?i\)Q' in rank_pattern"),
        ({"use_dora": True}, "lacks lora_magnitude_vector"),
        ({"use_dora": "false"}, "'false' in use_dora"),
        ({"use_rslora": "false"}, "'false' in use_rslora"),
        ({"use_rslora": 1}, "1 in use_rslora"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(settings, words, base, adapter):
    made = adapter()
    adapters.edit_settings(made, **settings)
    refused(CheckpointError, words, base, made)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (("lora_A", "lora_C"), UnsupportedError, "lora_C.*, which is not understood"),
        (("q_proj.lora_A.weight", "q_proj.lora_A.bias"), CheckpointError, "lacks lora_A"),
        (("lora_A", "ia3_l"), UnsupportedError, "ia3_l.*, which is not understood"),
        (("0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B.x"), CheckpointError, "twice"),
        (
            ("0.mlp.up_proj.lora_A.weight", "0.mlp.up_proj.lora_magnitude_vector"),
            CheckpointError,
            "lacks lora_A",
        ),
        (
            ("layers.1.", "layers.31."),
            UnsupportedError,
            r"layers\.31\..*does not have; the nearest .*layers\.1\.",
        ),
        (("language_model.", "transformer."), UnsupportedError, "changes model.transformer"),
        (
            ("up_proj.lora", "down_proj.lora"),
            UnsupportedError,
            r"does not fit .*\[64, 32\], and the model \[32, 64\]",
        ),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_tensors(change, error, words, base, adapter):
    made = adapter()
    adapters.rename(made, lambda name: name.replace(*change))
    refused(error, words, base, made)


def test_shapes_that_do_not_fit_each_other(base, adapter):
    made = adapter()
    file = made / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    for shape in ((3, 32), (2,), (0, 32)):
        save_file(tensors | {name: torch.zeros(shape)}, file)
        refused(CheckpointError, "has matrices|has an empty matrix", base, made)


def test_a_table_of_another_vocabulary(base, adapter):
    made = adapter()
    file = made / "adapter_model.safetensors"
    table = {"base_model.model.model.language_model.embed_tokens.weight": torch.zeros(322, 32)}
    save_file(load_file(file) | table, file)
    found = refused(
        UnsupportedError, r"embed_tokens.weight it has \[322, 32\], and the model \[320, 32\]", base, made
    )
    assert "resize_token_embeddings(322)" in found.hint


def test_a_base_of_other_sizes(adapter, checkpoint):
    wide = checkpoint(checkpoint.Tiny(hidden=48))
    found = refused(UnsupportedError, "does not fit", wide, adapter())
    assert "trained on" in found.hint
    found = refused(UnsupportedError, "does not fit .*demo", None, adapter("again"))
    assert found.hint.startswith("That is the demo model, which is taken if no MODEL is given.")


@pytest.mark.parametrize(
    ("base_name", "model", "fits"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf", True),
        ("unsloth/LLaVA-1.5-7B-hf-unsloth-bnb-4bit", "llava-hf/llava-1.5-7b-hf", True),
        ("someone/llava-1.5-7b-hf-AWQ", "llava-hf/llava-1.5-7b-hf", True),
        ("liuhaotian/llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf", True),
        ("/data/models/other", "llava-hf/llava-1.5-7b-hf", True),
        ("./other", "llava-hf/llava-1.5-7b-hf", True),
        ("", "llava-hf/llava-1.5-7b-hf", True),
        ("llava-hf/llava-1.5-13b-hf", "llava-hf/llava-1.5-7b-hf", False),
        ("lmsys/vicuna-7b-v1.5", "llava-hf/llava-1.5-7b-hf", False),
        ("liuhaotian/llava-v1.6-vicuna-7b", "liuhaotian/llava-v1.5-7b", False),
    ],
)
def test_the_name_of_the_base(base_name, model, fits, adapter, tmp_path):
    made = adapter()
    adapters.edit_settings(made, base_model_name_or_path=base_name)
    read = read_adapter(Located(made, "lora"), pickled=False)
    check_base(read, Located(tmp_path, "llava"))  # a directory may be any model
    if fits:
        check_base(read, Located(tmp_path, model, "0" * 40))
        return
    with pytest.raises(UnsupportedError, match=f"was trained on {base_name}, and the model is {model}"):
        check_base(read, Located(tmp_path, model, "0" * 40))


def test_contradictions(base, adapter, tmp_path):
    saved = adapters.make(
        tmp_path / "saved", base, r=2, target_modules=["k_proj"], modules_to_save=["linear_2"]
    )
    refused(
        UnsupportedError,
        "lora and saved contradict each other: both change .*linear_2",
        base,
        adapter(),
        saved,
    )
    other = shutil.copytree(saved, tmp_path / "other")
    refused(UnsupportedError, "saved and other contradict each other", base, saved, other)


def test_one_twice(base, adapter, tmp_path):
    made = adapter()
    refused(UsageError, "would be merged twice", base, made, f"{made}/../lora")
    (tmp_path / "link").symlink_to(made)
    refused(UsageError, "would be merged twice", base, made, tmp_path / "link")


def test_not_a_number(base, adapter):
    made = adapter()
    file = made / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "up_proj.lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    refused(CheckpointError, rf"{name} in .*adapter_model\.safetensors holds NaN", base, made)


def test_a_sum_beyond_the_stored_dtype(checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(dtype="float16"))
    made = adapters.make(tmp_path / "lora", path, r=2, lora_alpha=10**6, target_modules=["up_proj"], size=9.0)
    refused(
        CheckpointError,
        r"up_proj.weight made of .* and .*adapter_model\.safetensors holds NaN or inf",
        path,
        made,
    )


def test_an_empty_name(base, tmp_path, monkeypatch, adapter):
    """As of a variable that is not set; an adapter in the working directory is not meant."""
    monkeypatch.chdir(adapter())
    for empty in ("", " "):
        refused(UsageError, "An --adapter is empty", base, empty)


def test_the_directory_above_an_adapter(base, adapter, tmp_path):
    made = shutil.copytree(adapter(), tmp_path / "named" / "other")
    found = refused(CheckpointError, "named has no adapter_config.json", base, tmp_path / "named")
    assert found.hint == f"Give the adapter inside: {made}"


@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "adapters.safetensors", "pytorch_lora_weights.bin"]
)
def test_what_an_adapter_left_beside_a_model(name, base, tmp_path):
    path = shutil.copytree(base, tmp_path / "model")
    (path / name).write_bytes(b"")
    found = refused(CheckpointError, f"has {name} beside its weights, which is a file of an adapter", path)
    assert found.hint == f"Remove {name} from it, or add the adapter_config.json of that adapter."


def test_what_is_no_adapter(base, tmp_path):
    refused(CheckpointError, "has no adapter_config.json", base, base)
    refused(CheckpointError, "There is no directory", base, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(CheckpointError, "has no adapter_model.safetensors", base, tmp_path / "empty")
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    refused(CheckpointError, "has no tensors", base, tmp_path / "empty")


def test_a_recipe_that_was_fitted_without_the_adapter(base, adapter, tmp_path):
    made, file = str(adapter()), tmp_path / "recipe.json"
    recipe = Recipe(
        schema_version=1,
        method="fitprune",
        model=base.name,
        weights_sha256=find(base).weights_sha256(),
        num_layers=2,
        hidden_size=32,
        intermediate_size=64,
        visual_tokens=16,
        scheme=(8, 0),
        alpha=0.5,
        convention=CONVENTION,
        ratio=0.5,
        ratio_on_samples=0.5,
        ratio_reached=0.5,
        samples=1,
        seed=0,
        max_prune_points=None,
        lost_self=(0.0, 0.0),
        lost_cross=(0.0, 0.0),
    )
    write_recipe(recipe, file)
    with pytest.raises(UsageError, match=f"than those of {base.name} with .*lora merged") as caught:
        export(base, adapter=[made], method="fitprune", recipe=file, output=tmp_path / "out")
    assert f"visprune fit MODEL --adapter {made} --ratio 0.5" in caught.value.hint


def test_a_command_leaves_nothing(base, adapter, tmp_path, capsys):
    made = adapter()
    adapters.rename(made, lambda name: name.replace("layers.1.", "layers.9."))
    before = {*tmp_path.iterdir()}
    arguments = ["--adapter", str(made), "--method", "none", "-o", str(tmp_path / "out")]
    for model in (str(base), str(made)):
        assert run_command("export", [model, *arguments]) == 2
    assert {*tmp_path.iterdir()} == before
    assert "does not have" in capsys.readouterr().err
