"""The command that a message names where a bundle must be exported again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from visprune.budget import Budget, LayerBudget
from visprune.bundle import Bundle
from visprune.errors import UnsupportedError, UsageError
from visprune.manifest import LayerPruning, Quantization, SourcePart
from visprune.rebuild import export_command, refuse_other_target


def test_the_command_that_makes_the_same_for_another_target(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    source, before = manifest.source, manifest.pruning

    def inside(method, **budget):
        return LayerPruning(method, {}, (1,), "layer", "original", LayerBudget(1, 0.25, **budget))

    recipe = inside("fitprune", deletions=(4,), recipe_tokens=16)
    published = replace(recipe, options={"recipe": "published:llava-1.5-7b-60"})
    whole = replace(before, method="none", budget=Budget(16, prunable=False))
    parts = (  # one of which lies beside the model's own weights
        SourcePart("vision tower", "c/d", "0" * 64),
        SourcePart("adapter", "a/b", "1" * 64),
        SourcePart("adapter", "mine", "2" * 64),
        SourcePart("adapter", "e/f", "3" * 64),
    )
    two = {f"decoder_segment_{k}": manifest.graphs["embedding"] for k in range(2)}
    for changes, words in (
        ({}, "MODEL --method fopru-rank --keep-tokens 4"),
        ({"source": replace(source, model="a/b")}, "a/b --method fopru-rank --keep-tokens 4"),
        ({"source": replace(source, model="visprune-demo")}, "--method fopru-rank --keep-tokens 4"),
        (
            {"source": replace(source, model="a/b", parts=parts)},
            "a/b --vision-tower c/d --adapter ADAPTER --adapter e/f --method fopru-rank --keep-tokens 4",
        ),
        ({"layer_pruning": inside("fastv")}, "MODEL --method fopru-rank --keep-tokens 4 --then fastv:0.25"),
        ({"layer_pruning": inside("fastv"), "pruning": whole}, "MODEL --method fastv --ratio 0.25"),
        ({"layer_pruning": recipe, "pruning": whole}, "MODEL --method fitprune --recipe BUNDLE/recipe.json"),
        (
            {"layer_pruning": published},
            "MODEL --method fopru-rank --keep-tokens 4 --then fitprune --recipe published:llava-1.5-7b-60",
        ),
        (
            {"graphs": two, "target": "rtx", "dtype": "float32"},
            "MODEL --method fopru-rank --keep-tokens 4 --segments 2 --dtype fp32",
        ),
    ):
        assert export_command(replace(manifest, **changes), "rtx") == f"visprune-export {words} --target rtx"


def test_a_bundle_for_another_target(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    refuse_other_target(manifest, "onnxruntime")
    with pytest.raises(UnsupportedError, match="exported for onnxruntime, and engines for rtx") as caught:
        refuse_other_target(manifest, "rtx")
    assert export_command(manifest, "rtx") in caught.value.hint
    assert caught.value.hint.endswith("--target rtx.")
    with pytest.raises(UsageError, match="Did you mean 'rtx'"):
        refuse_other_target(manifest, "rtz")


def test_the_command_for_another_method(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    quantized = Quantization({"decoder": "int8"}, 2, (), (), "report.json")
    for changes, words in (
        ({}, "MODEL --method none -o none"),
        ({"dtype": "float16"}, "MODEL --method none --dtype fp16 -o none"),
        ({"dtype": "float16", "target": "rtx"}, "MODEL --method none --target rtx -o none"),
        ({"dtype": "float32", "target": "rtx"}, "MODEL --method none --dtype fp32 --target rtx -o none"),
        (
            {"quantization": quantized},
            "MODEL --method none -o none, then visprune-quantize none with the same options",
        ),
    ):
        command = export_command(replace(manifest, **changes), method="none")
        assert command == f"visprune-export {words}"
