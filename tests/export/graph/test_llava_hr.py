"""LLaVA-HR with every method: what is kept, what is refused, what it costs, and what its graphs become."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

import hr_checkpoints
from hr_reference import Sizes, random_tensors, see
from torch.utils.flop_counter import FlopCounterMode

import visprune
from visprune.bundle import Bundle
from visprune.errors import UnsupportedError
from visprune.estimate.flops import patch_embedding_macs, tower_macs
from visprune.estimate.planned_model import ModelSizes
from visprune.export import export
from visprune.export.checkpoint import loading
from visprune.export.exporter import ExportOptions, prepare
from visprune.export.models import llava
from visprune.pruning.registry import BUILTIN
from visprune.quantize import quantize

SIZES = Sizes(layers=4)
NEED_CLS = {"fastervlm", "vispruner"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return hr_checkpoints.write(SIZES, tmp_path_factory.mktemp("llava-hr"), layers=3)


@pytest.fixture(scope="module")
def bundle(path, tmp_path_factory):
    output = tmp_path_factory.mktemp("bundle") / "rank"
    return export(path, method="fopru-rank", ratio=0.25, output=output)


def test_the_self_check_passes(bundle):
    assert bundle.manifest.parity.verified
    assert bundle.manifest.source.vision_type == "llava_hr_vision_model"


def test_kept_tokens_are_those_of_the_references_attention(bundle, path, pictures):
    """FoPru: the attention received in the last layer, mean over heads and queries."""
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    tensors, keep = random_tensors(SIZES), SIZES.side**2 // 4
    with visprune.load(bundle.path) as pipeline:
        for picture in pictures:
            pixels = torch.as_tensor(np.asarray(processor(picture)["pixel_values"]))
            with torch.no_grad():
                _, attention = see(SIZES, tensors, pixels)
            scores = attention[-1][0].double().mean(dim=(0, 1)).numpy()
            order = np.argsort(-scores)
            assert scores[order[keep - 1]] - scores[order[keep]] > 1e-9
            answer = pipeline.generate(picture, "What?", max_new_tokens=1)
            assert (answer.visual_tokens, answer.tokens_kept) == (SIZES.side**2, keep)
            assert answer.keep_indices[0] == tuple(sorted(order[:keep].tolist()))


@pytest.mark.parametrize("method", BUILTIN)
def test_only_methods_that_need_a_cls_are_refused(method, path):
    settings = ExportOptions(method=method, ratio=0.7 if method == "fitprune" else None, verify=False)
    if method in NEED_CLS:
        with pytest.raises(UnsupportedError, match=f"{method} scores with the CLS token, which this model"):
            prepare(path, None, settings, dry=True)
    else:
        job, _ = prepare(path, None, settings, dry=True)
        assert job.pruning.budget.visual_tokens == SIZES.side**2


def test_work_is_what_pytorch_counts(path):
    """With every weight of the tower, and every FLOP of an image, in the ConvNeXt and the adapters too."""
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, attn_implementation="eager")
    shapes = loading.shapes(model, llava.features(model.config))
    tower = model.model.vision_tower
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, SIZES.image, SIZES.image))
    assert 2 * (patch_embedding_macs(shapes) + tower_macs(shapes)) == counter.get_total_flops()
    assert shapes.vision_other.macs > tower_macs(shapes) / 4
    weights = [m.weight for m in tower.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert ModelSizes("", shapes, 2, 8, 2048).tower_weights == sum(weight.numel() for weight in weights)


def test_int8(bundle, pictures, tmp_path):
    lines = []
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "prompt": "What?"}) + "\n")
    (tmp_path / "lines.jsonl").write_text("".join(lines))
    made = quantize(
        bundle, tmp_path / "int8", precision="int8", calibration=tmp_path / "lines.jsonl", timing=False
    )
    Bundle.open(made.path).verify()
    assert made.manifest.quantization.parts["vision"] == "int8"
    assert all(error.relative_l2 < 0.1 for error in made.manifest.quantization.errors)
    with visprune.load(made.path) as pipeline:
        assert pipeline.generate(pictures[0], "What?", max_new_tokens=2).token_ids


def test_every_graph_builds_with_tensorrt_rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from rtx_engines import check

    sizes = Sizes(layers=4, hidden=128, heads=2, mlp=256)  # attention has kernels for heads of this size
    path = hr_checkpoints.write(sizes, tmp_path / "model", layers=3, hidden=128, heads=2, kv_heads=2)
    options = {"method": "fopru-rank", "then": "fastv", "target": "rtx", "verify": False}
    made = export(path, output=tmp_path / "bundle", **options)
    check(made, made.manifest.graphs)
