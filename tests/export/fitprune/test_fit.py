"""Fitting recipes on real modules: statistics against transformers' own attentions, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import visprune
from visprune.cli import run_command
from visprune.demo import CALIBRATION
from visprune.errors import InputError, UnsupportedError, UsageError, VispruneError
from visprune.export import models
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.find import find
from visprune.export.checkpoint.processors import load_processor
from visprune.export.checkpoint.prompt_maker import PromptMaker
from visprune.export.fitprune import attention_statistics as statistics
from visprune.pruning.recipe import read_recipe
from visprune.runtime.samples import read_samples

IMAGE_TOKEN = 259  # of the tiny checkpoints


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(checkpoint.Tiny(layers=4))


@pytest.fixture
def data(tmp_path, pictures):
    """A calibration file of three samples."""
    lines = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "prompt": f"What is {index}?" + "!" * index}))
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    return path


def loaded(path, picture):
    """The model under eager attention, and one sample of it under ours."""
    auto = transformers.LlavaForConditionalGeneration
    eager = auto.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ours = auto.from_pretrained(path, dtype=torch.float32).eval()
    checkpoint = find(path)
    config = loading.load_config(checkpoint)
    make = PromptMaker(load_processor(checkpoint, config), models.family("llava").features(config), 320)
    prompt = make([picture], "What?")
    parts = models.family("llava").parts(ours)
    statistics.prepare(ours, parts)
    return eager, prompt, statistics.sample(ours, parts, prompt)


def reduced(attention, visual, after):
    """The definition, with loops: attention [H, S, S], places of visual tokens and of text after them."""
    highest = attention.max(0)
    by_visual = [sum(highest[i, j] for i in visual) / len(visual) for j in visual]
    by_text = [sum(highest[i, j] for i in after) / len(after) for j in visual]
    return np.array(by_visual), np.array(by_text)


@pytest.mark.parametrize("text", ["llama", "qwen2", "mistral", "Qwen3Config"])
def test_statistics_are_those_of_eager_attention(text, checkpoint, pictures):
    eager, prompt, sample = loaded(checkpoint(checkpoint.Tiny(text=text, layers=3)), pictures[0])
    with torch.no_grad():
        outputs = eager(input_ids=prompt.input_ids, pixel_values=prompt.pixel_values, output_attentions=True)
    ids = prompt.input_ids[0].tolist()
    visual = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
    after = range(visual[-1] + 1, len(ids))
    assert len(visual) == 16
    one = sample.start()
    for layer, attention in enumerate(outputs.attentions):
        wanted = reduced(attention[0].double().numpy(), visual, after)
        found = one.attend(layer)
        assert np.allclose(found.self_, wanted[0], atol=1e-6)
        assert np.allclose(found.cross, wanted[1], atol=1e-6)


def masked_attentions(model, prompt, deleted):
    """Attention of each layer where tokens are hidden from all layers after the one that deletes them.

    All tokens stay in the sequence, at their positions; a token that is hidden changes no other, so the rest
    of the sequence is what it would be without it. Independent of gathering.
    """
    decoder, gone = model.model.language_model, torch.zeros(prompt.input_ids.shape[1], dtype=torch.bool)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(prompt.input_ids)
        features = model.model.get_image_features(pixel_values=prompt.pixel_values).pooler_output[0]
        hidden[0, prompt.visual] = features
        positions = torch.arange(hidden.shape[1])[None]
        rotary = decoder.rotary_emb(hidden, positions)
        for layer, module in enumerate(decoder.layers):
            causal = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)
            causal[:, gone] = float("-inf")
            causal.fill_diagonal_(0.0)
            normed = module.input_layernorm(hidden)
            out, weights = module.self_attn(
                normed, attention_mask=causal[None, None], position_embeddings=rotary
            )
            yield weights[0].double().numpy(), (~gone).numpy()
            hidden = hidden + out
            gone = gone.clone()
            gone[deleted.get(layer, [])] = True
            hidden = hidden + module.mlp(module.post_attention_layernorm(hidden))


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_statistics_after_deletions(text, checkpoint, pictures):
    eager, prompt, sample = loaded(checkpoint(checkpoint.Tiny(text=text, layers=4)), pictures[1])
    visual = prompt.visual.tolist()
    after = range(visual[-1] + 1, prompt.input_ids.shape[1])
    deleted = {0: [visual[i] for i in (0, 3, 7)], 2: [visual[i] for i in (1, 15)]}
    one = sample.start()
    for layer, (attention, here) in enumerate(masked_attentions(eager, prompt, deleted)):
        left = [place for place in visual if here[place]]
        other = one.copy()
        found = one.attend(layer)
        wanted = reduced(attention, left, after)
        assert np.allclose(found.self_, wanted[0], atol=1e-6)
        assert np.allclose(found.cross, wanted[1], atol=1e-6)
        again = other.attend(layer)  # a copy goes its own way
        other.delete(np.arange(2))
        assert np.array_equal(again.self_, found.self_)
        one.delete(np.array([left.index(place) for place in deleted.get(layer, [])], dtype=np.int64))
    with pytest.raises(ValueError, match="comes next"):
        sample.start().attend(1)


def test_a_fit_is_repeatable_and_bound_to_its_model(model, data, tmp_path):
    first = visprune.fit(model, ratio=0.5, data=data, output=tmp_path / "a.json")
    again = visprune.fit(model, ratio=0.5, data=data, output=tmp_path / "b.json")
    assert first == again == read_recipe(tmp_path / "a.json")
    assert (first.num_layers, first.visual_tokens, first.samples) == (4, 16, 3)
    assert first.ratio_on_samples <= 0.5
    assert first.true_ratio() == first.ratio_reached
    assert sum(first.scheme) > 0
    drawn = [visprune.fit(model, ratio=0.5, data=data, samples=1, seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1]
    assert (drawn[0].samples, drawn[0].seed, drawn[2].seed) == (1, 3, 4)


def test_half_precision_is_fitted_in_float32(checkpoint, data):
    recipe = visprune.fit(checkpoint(checkpoint.Tiny(layers=4, dtype="float16")), ratio=0.5, data=data)
    assert recipe.ratio_on_samples <= 0.5


def test_prune_points_are_limited(model, data):
    recipe = visprune.fit(model, ratio=0.6, data=data, max_prune_points=1)
    assert len(recipe.prune_points) == 1
    assert recipe.scheme[-1] == 0
    assert recipe.unconstrained is not None
    free = visprune.fit(model, ratio=0.6, data=data)
    assert recipe.unconstrained.scheme == free.scheme
    assert free.alpha <= recipe.alpha


def test_the_bundled_samples_on_the_demo_model():
    lines = read_samples(None).usable
    assert len(lines) == 16
    assert all(line.image.parent == CALIBRATION.with_suffix("") for line in lines)
    assert sum(line.image.stat().st_size for line in lines) < 300_000
    steps = []
    recipe = visprune.fit(ratio=0.6, samples=4, progress=lambda *step: steps.append(step))
    assert (recipe.model, recipe.visual_tokens, recipe.samples) == ("visprune-demo", 144, 4)
    assert recipe.ratio_reached == pytest.approx(0.6, abs=0.02)
    last = {what: (done, total) for what, done, total in steps}
    assert len(last) == 4
    assert all(done == total for done, total in last.values())
    assert all(0 <= done <= total for _, done, total in steps)


LINE = {"image": "0.png", "prompt": "What?"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        (json.dumps(LINE) + "\n{", "Line 2 of .* is not JSON"),
        ("[1]", "Line 1 of .* is not a JSON object"),
        (json.dumps({"image": "0.png"}), "Line 1 of .* has no 'prompt'"),
        (json.dumps({"prompt": "What?"}), "has no 'image'"),
        (json.dumps({**LINE, "prompt": 3}), "'prompt' is not a text"),
        (json.dumps({**LINE, "prompt": " "}), "'prompt' is not a text"),
        (json.dumps({**LINE, "image": "none.png"}), "Line 1 of .*no picture at .*none.png"),
        (json.dumps({**LINE, "image": "data.jsonl"}), "Line 1 of .*data.jsonl"),
        (
            json.dumps(LINE) + "\n" + json.dumps({**LINE, "prompt": "a <image>?"}),
            "Line 2 of .*contains <image>",
        ),
        (
            json.dumps({**LINE, "prompt": "long " * 200}),
            r"Line 1 of .* tokens, 16 of them visual, and the model takes 512",
        ),
    ],
)
def test_bad_samples_are_refused_before_weights_are_read(text, words, model, data, monkeypatch):
    data.write_text(text)
    monkeypatch.setattr("visprune.export.graph.weightless.load_model", None)
    with pytest.raises((InputError, UsageError), match=words):
        visprune.fit(model, ratio=0.5, data=data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "outside"),
        ({"ratio": 1.1}, "outside"),
        ({"ratio": float("nan")}, "outside"),
        ({"ratio": 0.5, "max_prune_points": 0}, "prune points"),
        ({"ratio": 0.5, "samples": 0}, "0 samples"),
        ({"ratio": 0.5, "samples": 4}, "4 samples were asked for, and the calibration file has 3"),
        ({"ratio": 0.5, "seed": -1}, "seed"),
        ({"ratio": 0.5, "device": "abacus"}, "abacus"),
        ({"ratio": 0.5, "data": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"ratio": 0.05}, "cannot be reached"),
    ],
)
def test_bad_options_are_refused_before_weights_are_read(options, words, model, data, monkeypatch):
    monkeypatch.setattr("visprune.export.graph.weightless.load_model", None)
    with pytest.raises((UsageError, UnsupportedError), match=words):
        visprune.fit(model, **{"data": data, **options})


def test_an_output_that_exists_is_refused_first(data, tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UsageError, match="exists"):
        visprune.fit("no/such-model", ratio=0.5, data=data, output=tmp_path / "recipe.json")


def test_a_decoder_of_another_form_is_refused(checkpoint, data):
    with pytest.raises(UnsupportedError, match="cannot be cut"):
        visprune.fit(checkpoint(checkpoint.Tiny(text="GemmaConfig", head_dim=8)), ratio=0.5, data=data)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}USER: hello{% endfor %}", "leaves out what the user says"),
        (
            "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
            r"writes it 0 times for one picture",
        ),
        (
            "{% for m in messages %}{{ m.content[-1].text }}<image>{% endfor %}",
            "Line 1 of .*data.jsonl has no text after the image",
        ),
        ("{{ raise_exception('never') }}", "chat template refuses this conversation: never"),
    ],
)
def test_templates_that_hide_the_image(template, words, model, data, tmp_path):
    given = tmp_path / "template.jinja"
    given.write_text(template)
    with pytest.raises(VispruneError, match=words):
        visprune.fit(model, ratio=0.5, data=data, chat_template=given)


class TestCommand:
    def test_prints_a_plot_and_a_table(self, model, data, tmp_path, capsys):
        out = tmp_path / "recipe.json"
        arguments = [str(model), "--ratio", "0.6", "--data", str(data), "-o", str(out)]
        assert run_command("fit", [*arguments, "--max-prune-points", "1"]) == 0
        printed = capsys.readouterr()
        recipe = read_recipe(out)
        for words in (
            "16 visual tokens enter",
            "█",
            f"-{max(recipe.scheme)}",
            "any number of points",
            f"{recipe.alpha:.4f}",
            f"{recipe.unconstrained.alpha:.4f}",
            "60.00%",
            f"{recipe.ratio_reached:.2%}",
            "F3, MAC, visual tokens only",
            "attention lost",
            f"1 (layer {recipe.prune_points[0]})",
            str(out),
        ):
            assert words in printed.out
        assert "measuring attention" in printed.err
        assert max(map(len, printed.out.splitlines())) <= 100 + len(str(out))

    def test_json_is_alone_on_stdout(self, model, data, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert run_command("fit", [str(model), "--ratio", "0.5", "--data", str(data), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        path = tmp_path / f"{model.name}-fitprune-0.5.json"
        assert facts.pop("path") == path.name
        assert facts == json.loads(path.read_text())

    @pytest.mark.parametrize(
        ("arguments", "what", "hint"),
        [
            (["--ratio", "1.5"], "outside (0, 1]", "0.4"),
            (["--ratio", "much"], "--ratio", "--help"),
            ([], "--ratio", "--help"),
            (["--ratio", "0.5", "--data", "none.jsonl"], "none.jsonl", "path"),
            (["--ratio", "0.01"], "cannot be reached", "at least 0."),
            (["--ratio", "0.5", "--samples", "99"], "99 samples", "1 to"),
        ],
    )
    def test_errors_are_two_sentences(self, arguments, what, hint, model, data, capsys, tmp_path):
        out = tmp_path / "recipe.json"
        if "--data" not in arguments:
            arguments = [*arguments, "--data", str(data)]
        assert run_command("fit", [str(model), *arguments, "-o", str(out)]) == 2
        printed = capsys.readouterr()
        error, advice = printed.err.splitlines()[-2:]
        assert printed.out == ""
        assert what in error
        assert hint in advice
        assert "Traceback" not in printed.err
        assert not out.exists()
