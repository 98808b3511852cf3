"""LLaVA-HR from its original format to tokens, with every method; the oracle shares no code with visprune.

The tower is that of `hr_reference`, and the decoder is transformers' own.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

import checkpoints
import hr_checkpoints
from hr_reference import Sizes, random_tensors, see
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorrt_10_3 import problems
from torch.utils.flop_counter import FlopCounterMode

import visprune
from visprune.background import BackgroundThread
from visprune.bundle import Bundle
from visprune.errors import UnsupportedError, UsageError
from visprune.estimate.flops import patch_embedding_macs, tower_macs
from visprune.estimate.planned_model import ModelSizes
from visprune.export import export
from visprune.export.checkpoint import loading
from visprune.export.checkpoint.checkpoint_options import CheckpointOptions
from visprune.export.checkpoint.find import find
from visprune.export.exporter import ExportOptions, prepare
from visprune.export.formats import llava_hr
from visprune.export.graph import graph_specs, weightless
from visprune.export.models import llava
from visprune.pruning.fastv import FastV
from visprune.pruning.registry import BUILTIN
from visprune.quantize import quantize

SIZES = Sizes(layers=4, depths=(1, 1, 5, 1))  # a stage of the ConvNeXt has more blocks than the ViT layers
PLACES = SIZES.side**2
<<<<<<< HEAD
NEED_CLS = {"fastervlm", "holov", "prumerge+", "visionzip", "vispruner"}
=======
NEED_CLS = {"fastervlm", "holov", "vispruner"}
>>>>>>> w-select
NEW = 8
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        hr_checkpoints.tower_sizes(patch, SIZES)
        folder = tmp_path_factory.mktemp("llava-hr")
        (folder / "template.jinja").write_text(checkpoints.TEMPLATE)
        yield hr_checkpoints.write(SIZES, hr_checkpoints.decoder_of(), folder)


@pytest.fixture(scope="module")
def options(path):
    """Options of every export here; prompt forms are tested elsewhere."""
    return {"chat_template": path / "template.jinja"}


@pytest.fixture(scope="module")
def bundle(path, options, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundle") / "rank"
    return export(path, method="fopru-rank", ratio=0.25, output=output, **options)


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(3)
    sizes = ((90, 130), (150, 84), (40, 160), (1000, 700))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


class Oracle:
    """What a LLaVA-HR answers, from the files of its checkpoint."""

    def __init__(self, path):
        self.weights = load_file(path / "model.safetensors")
        self.tower = random_tensors(SIZES)
        self.decoder = hr_checkpoints.decoder_of()
        self.tokenizer = checkpoints.tokenizer()

    @staticmethod
    def pixels(picture):
        """Padded to a square with the mean colour, resized, normalised: [1, 3, S, S]."""
        edge = max(picture.size)
        square = Image.new("RGB", (edge, edge), tuple(int(part * 255) for part in MEAN))
        square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
        resized = square.resize((SIZES.image, SIZES.image), Image.Resampling.BICUBIC)
        values = (np.asarray(resized, dtype=np.float64) / 255 - MEAN) / DEVIATION
        return torch.from_numpy(values.astype(np.float32).transpose(2, 0, 1)[None])

    @torch.no_grad()
    def look(self, picture):
        """Visual tokens of a picture [N, D], and the attention that each receives in the last layer [N]."""
        features, attention = see(SIZES, self.tower, self.pixels(picture))
        first, second = (
            [self.weights[f"model.mm_projector.{i}.{kind}"] for kind in ("weight", "bias")] for i in (0, 2)
        )
        projected = torch.nn.functional.gelu(torch.nn.functional.linear(features[0], *first))
        received = attention[-1][0].double().mean(dim=(0, 1))
        return torch.nn.functional.linear(projected, *second), received.numpy()

    def embeds(self, prompt, visual):
        """A prompt with the visual tokens [N, D] of one picture [1, S, D], and where these begin."""
        before, after = f"USER: <image>\n{prompt} ASSISTANT:".split("<image>")
        table = self.decoder.get_input_embeddings()
        first, last = (table(torch.tensor(self.tokenizer(text)["input_ids"])) for text in (before, after))
        return torch.cat([first, visual, last])[None], len(first)

    @torch.no_grad()
    def answer(self, prompt, visual):
        """Greedy tokens after a prompt."""
        embeds, _ = self.embeds(prompt, visual)
        out = self.decoder.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, eos_token_id=2)
        return tuple(out[0].tolist())

    @torch.no_grad()
    def most_needed(self, prompt, visual, count):
        """The visual tokens that FitPrune keeps in the first layer, ascending."""
        embeds, start = self.embeds(prompt, visual)
        self.decoder.set_attn_implementation("eager")
        attention = self.decoder(inputs_embeds=embeds, output_attentions=True).attentions[0]
        most = attention[0].amax(dim=0).double()  # [S, S], over heads
        columns = most[:, start : start + len(visual)]
        score = (columns[start : start + len(visual)].sum(0) * columns[start + len(visual) :].sum(0)).numpy()
        order = np.argsort(-score)
        assert score[order[count - 1]] > score[order[count]] * (1 + 1e-5)
        return tuple(sorted(order[:count].tolist()))


@pytest.fixture(scope="module")
def oracle(path):
    return Oracle(path)


def test_the_bundle_says_what_it_is(bundle):
    assert bundle.manifest.parity.verified
    assert bundle.manifest.source.vision_type == "llava_hr_vision_model"
    assert bundle.manifest.pruning.grid == (SIZES.side, SIZES.side)


def test_same_tokens_as_the_reference(bundle, oracle, pictures):
    with visprune.load(bundle.path) as pipeline:
        for picture in pictures:
            visual, received = oracle.look(picture)
            whole = pipeline.generate(picture, "What?", ratio=1.0, max_new_tokens=NEW)
            assert whole.visual_tokens == whole.tokens_kept == PLACES
            assert whole.token_ids == oracle.answer("What?", visual)
            order = np.argsort(-received)
            keep = PLACES // 4
            assert received[order[keep - 1]] - received[order[keep]] > 1e-9
            kept = np.sort(order[:keep])
            pruned = pipeline.generate(picture, "What?", max_new_tokens=NEW)
            assert pruned.keep_indices[0] == tuple(kept.tolist())
            assert pruned.token_ids == oracle.answer("What?", visual[kept])


@pytest.fixture(scope="module")
def lines(pictures, tmp_path_factory):
    """Samples of two pictures, for calibrations and fits."""
    folder = tmp_path_factory.mktemp("samples")
    for index, picture in enumerate(pictures[:2]):
        picture.save(folder / f"{index}.png")
    said = [json.dumps({"image": f"{index}.png", "prompt": "What?"}) + "\n" for index in range(2)]
    (folder / "lines.jsonl").write_text("".join(said))
    return folder / "lines.jsonl"


def test_a_fitted_recipe(path, options, oracle, lines, pictures, tmp_path):
    """The decoder has two layers, so FitPrune deletes in the first one."""
    file = tmp_path / "recipe.json"
    recipe = visprune.fit(path, ratio=0.7, data=lines, output=file, **options)
    assert recipe.visual_tokens == PLACES
    made = export(path, method="fitprune", recipe=file, output=tmp_path / "fit", verify=False, **options)
    with visprune.load(made.path) as pipeline:
        answer = pipeline.generate(pictures[0], "What?", max_new_tokens=2)
    left = PLACES - recipe.scheme[0]
    assert answer.layer_tokens == (PLACES, left)
    visual, _ = oracle.look(pictures[0])
    assert answer.keep_indices[0] == oracle.most_needed("What?", visual, left)


@pytest.mark.parametrize("method", BUILTIN)
def test_only_methods_that_need_a_cls_are_refused(method, path, options):
    instance = {"fastv": FastV(first_pruned_layer=1)}.get(method, method)  # the decoder has two layers
    ratio = 0.7 if method == "fitprune" else None
    settings = ExportOptions(method=instance, ratio=ratio, **options)
    if method in NEED_CLS:
        with pytest.raises(
            UnsupportedError, match=f"{re.escape(method)} scores with the CLS token, which this model"
        ):
            prepare(path, None, settings, dry=True)
    else:
        job, _ = prepare(path, None, settings, dry=True)
        assert job.pruning.budget.visual_tokens == PLACES


def test_an_adapter_with_the_published_names(path, options, tmp_path):
    """LoRA in both towers and in the language model, and a whole layer between the towers."""
    stored = load_file(path / "model.safetensors")
    tower = f"{hr_checkpoints.PREFIX}fast_vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1"
    modules = {
        tower: "vision_tower.layers.0.encoder.mlp.fc1",
        f"{hr_checkpoints.PREFIX}slow_vision_tower.vision_tower.stages.2.blocks.4.mlp.fc2": (
            "vision_tower.slow_tower.stages.2.layers.4.pwconv2"
        ),
        "model.layers.1.self_attn.q_proj": "language_model.layers.1.self_attn.q_proj",
        "model.mm_projector.2": "multi_modal_projector.linear_2",
    }
    tensors, want = {}, {}
    for old, new in modules.items():
        weight = stored[f"{old}.weight"]
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        name = f"base_model.model.{old}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        want[new] = weight + 4 / 2 * up @ down
    name = next(name for name in stored if "align_stages_latent.1." in name and name.endswith(".weight"))
    tensors[f"base_model.model.{name}"] = stored[name] + 1
    adapter = tmp_path / "lora"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    found = weightless.load_model(find(path, CheckpointOptions(adapter=[str(adapter)], **options)))
    for new, weight in want.items():
        torch.testing.assert_close(found.get_parameter(f"model.{new}.weight"), weight)
    replaced = llava_hr.tower_name(name.removeprefix(hr_checkpoints.PREFIX), SIZES.layers)
    assert torch.equal(found.get_parameter(f"model.vision_tower.{replaced}"), stored[name] + 1)


def test_a_vision_tower_from_elsewhere_is_refused(path, options):
    settings = ExportOptions(method="none", vision_tower="openai/clip-vit-large-patch14-336", **options)
    with pytest.raises(UsageError, match="LLaVA-HR, which has its two towers inside"):
        prepare(path, None, settings, dry=True)


def test_work_is_what_pytorch_counts(path):
    """With every weight of the tower, and every FLOP of an image, in the ConvNeXt and the adapters too."""
    model = weightless.load_model(find(path))
    shapes, tower = loading.shapes(model, llava.features(model.config)), model.model.vision_tower
    tower.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, SIZES.image, SIZES.image))
    assert 2 * (patch_embedding_macs(shapes) + tower_macs(shapes)) == counter.get_total_flops()
    assert shapes.vision_other.macs > tower_macs(shapes) / 4
    weights = [m.weight for m in tower.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert ModelSizes("", shapes, 2, 8, 2048).tower_weights == sum(weight.numel() for weight in weights)


def test_int8(bundle, lines, pictures, tmp_path):
    made = quantize(bundle, tmp_path / "int8", precision="int8", calibration=lines, timing=False)
    Bundle.open(made.path).verify()
    assert made.manifest.quantization.parts["vision"] == "int8"
    assert all(error.relative_l2 < 0.1 for error in made.manifest.quantization.errors)
    with visprune.load(made.path) as pipeline:
        assert pipeline.generate(pictures[0], "What?", max_new_tokens=2).token_ids


def test_the_vision_encoder_has_only_what_tensorrt_10_3_takes(path, options, tmp_path, monkeypatch):
    settings = ExportOptions(method="fopru-rank", target="jetpack6", verify=False, **options)
    job, _ = prepare(path, tmp_path / "never", settings)
    every = graph_specs.graph_specs
    monkeypatch.setattr(graph_specs, "graph_specs", lambda *a: every(*a)[:1])
    (tmp_path / "onnx").mkdir()
    with BackgroundThread() as background:
        (graph,) = job._write_graphs(tmp_path, background).values()
    model = onnx.load(tmp_path / graph.file, load_external_data=False)
    assert "Resize" in {node.op_type for node in model.graph.node}
    assert not list(problems(model))


def test_every_graph_builds_with_tensorrt_rtx(options, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    from rtx_engines import check

    sizes = Sizes(layers=4, hidden=128, heads=2, mlp=256)  # attention has kernels for heads of this size
    hr_checkpoints.tower_sizes(monkeypatch, sizes)
    decoder = hr_checkpoints.decoder_of(layers=3, hidden=128, heads=2)
    path = hr_checkpoints.write(sizes, decoder, tmp_path / "model")
    how = {"method": "fopru-rank", "then": "fastv", "target": "rtx", "verify": False}
    made = export(path, output=tmp_path / "bundle", **how, **options)
    check(made, made.manifest.graphs)
