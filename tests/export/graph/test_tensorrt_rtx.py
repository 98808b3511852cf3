"""Every kind of graph, in fp16, becomes a TensorRT-RTX engine for SM86; no GPU is needed for that.

It is no proof for another TensorRT: neither for the version on a Jetson nor for an SM that it cannot target.
"""

from __future__ import annotations

import pytest

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("torch")

from rtx_engines import check

from visprune.export import export
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.freepruner import FreePruner

# On the demo model: attention has kernels for heads of its size, and none for those of smaller models.
CASES = {
    "fastv-after-fastervlm": {"method": "fastervlm", "then": "fastv"},
    "pyramiddrop-after-vispruner": {"method": "vispruner", "then": "pyramiddrop"},
    "fitprune-after-divprune": {"method": "divprune", "then": FitPrune((60, 0, 0), 144, 0.7)},
    "segments-after-freepruner": {"method": FreePruner(combine="votes"), "segments": 2},
    "merged-after-freepruner": {"method": "freepruner"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_graph_builds(case, tmp_path):
    bundle = export(output=tmp_path / "bundle", target="rtx", verify=False, **CASES[case])
    check(bundle, bundle.manifest.graphs)


@pytest.mark.parametrize(
    "method", ["cdpruner", "dart", "downsample", "holov", "prumerge+", "resize", "visionzip"]
)
def test_methods_before_the_llm_build(method, tmp_path):
    bundle = export(output=tmp_path / "bundle", target="rtx", verify=False, method=method)
    check(bundle, ["vision_encoder", "token_pruner"])


@pytest.mark.parametrize(
    "method",
    ["fastv", FitPrune((6, 0, 0), 16, 0.7), "sparsevlm"],
    ids=["last-row", "all-rows", "rows-of-raters"],
)
def test_decoders_whose_heads_share_keys_build(method, checkpoint, tmp_path):
    path = checkpoint(checkpoint.Tiny(text="qwen2", layers=3, head_dim=64))
    bundle = export(path, method=method, output=tmp_path / "bundle", target="rtx", verify=False)
    wanted = ("decoder", "segment", "embedding")
    check(bundle, [name for name in bundle.manifest.graphs if name.startswith(wanted)])


NEXT = {"family": "llava_next", "text": "mistral"}
NEXT_VIDEO = {"family": "llava_next_video"}
ONEVISION = {
    "family": "llava_onevision",
    "tower": "siglip",
    "strategy": "full",
    "feature_layer": -1,
    "text": "qwen2",
    "tied": True,
}
FAMILIES = {
    "llava-interleave": (ONEVISION | {"family": "llava"}, {"method": "fopru-rank"}),
    "llava-next-rank": (NEXT, {"method": "fopru-rank", "then": "fastv"}),
    "llava-next-row": (NEXT, {"method": "fopru-row"}),
    "llava-next-global": (NEXT, {"method": "fastervlm", "anyres_scope": "global"}),
    "llava-next-vispruner": (NEXT, {"method": "vispruner"}),
    "llava-next-visionzip": (NEXT, {"method": "visionzip"}),
    "llava-next-freepruner": (NEXT, {"method": "freepruner"}),
    "llava-next-video-rank": (NEXT_VIDEO, {"method": "fopru-rank"}),
    "llava-next-video-divprune": (NEXT_VIDEO, {"method": "divprune"}),
    "vipllava": ({"family": "vipllava", "feature_layer": (-2, -3)}, {"method": "fopru-rank"}),
    "llava-onevision-rank": (ONEVISION, {"method": "fopru-rank"}),
    "llava-onevision-divprune": (ONEVISION, {"method": "divprune"}),
    "llava-onevision-uniform": (ONEVISION, {"method": "uniform", "segments": 2}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_of_every_family_builds(family, checkpoint, tmp_path):
    settings, options = FAMILIES[family]
    layers = 3 if options.keys() & {"then", "segments"} else 1
    path = checkpoint(checkpoint.Tiny(layers=layers, head_dim=64, tower_hidden=64, **settings))
    bundle = export(path, output=tmp_path / "bundle", target="rtx", verify=False, **options)
    check(bundle, bundle.manifest.graphs)
