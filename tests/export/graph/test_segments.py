"""A decoder in segments says what PyTorch says, token for token, whatever is pruned between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from plain_llava import IMAGE, Reference, Rule, fastv, fitprune, most_attended, pyramid, sparsevlm, spread
from tensorrt_10_3 import problems

import visprune
from visprune.errors import UsageError
from visprune.export import export
from visprune.pruning.fitprune import FitPrune
from visprune.pruning.sparsevlm import SparseVLM

NEW = 8


def scheme(deletions, layers):
    return tuple(deletions.get(layer, 0) for layer in range(layers))


MANY = {0: 9, 2: 5, 3: 6, 5: 7}
FEW = {0: 6, 2: 11}


@dataclass(frozen=True)
class Case:
    """A model, how it is exported, and what is then right."""

    tiny: dict[str, Any]
    options: dict[str, Any]
    rule: Rule
    before: Callable[[Any, Any], list[int]] | None = None
    verify: bool = False


def lively(**fields):
    return {"lively": True, "side": 6, "tower_layers": 2} | fields


LLAMA = lively(layers=4)
QWEN2 = lively(layers=4, text="qwen2", kv_heads=1, tied=True)
MISTRAL = lively(layers=3, text="mistral", head_dim=12)
QWEN3 = lively(layers=5, text="Qwen3Config", head_dim=16)

CASES = {
    "llama-2": Case(lively(layers=3), {"method": "none", "segments": 2}, Rule(), verify=True),
    "qwen2-each-layer": Case(QWEN2, {"method": "none", "segments": 4}, Rule()),
    "fastv-qwen2": Case(QWEN2, {"method": "fastv", "ratio": 0.3}, fastv(0.3)),
    "fastv-mistral": Case(MISTRAL | {"loud_token": IMAGE}, {"method": "fastv"}, fastv(0.5)),
    "fopru-then-fastv-llama-full": Case(
        LLAMA | {"strategy": "full", "tower_layers": 3},
        {"method": "fopru-rank", "ratio": 0.5, "then": "fastv:0.5"},
        fastv(0.5),
        most_attended(0.5),
        verify=True,
    ),
    "pyramiddrop-llama": Case(LLAMA, {"method": "pyramiddrop"}, pyramid((1, 2, 3))),
    "pyramiddrop-qwen3": Case(
        QWEN3, {"method": "pyramiddrop", "ratio": 0.3}, pyramid((1, 2, 3), 0.3), verify=True
    ),
    "pyramiddrop-mistral": Case(MISTRAL, {"method": "pyramiddrop", "keep_tokens": 9}, pyramid((1, 2), 0.25)),
    "fitprune-llama-7": Case(
        lively(layers=7, hidden=64),
        {"method": FitPrune(scheme(MANY | {6: 2}, 7), 36, 0.4)},
        fitprune(MANY, 36),
    ),
    "uniform-then-fitprune-qwen2": Case(
        QWEN2,
        {"method": "uniform", "ratio": 0.5, "then": FitPrune(scheme(FEW | {3: 5}, 4), 36, 0.6)},
        fitprune(FEW, 36),
        spread(0.5),
    ),
    "fitprune-mistral": Case(
        MISTRAL, {"method": FitPrune(scheme({1: 20}, 3), 36, 0.7)}, fitprune({1: 20}, 36), verify=True
    ),
    "sparsevlm-llama-7": Case(
        lively(layers=7, hidden=64), {"method": "sparsevlm"}, sparsevlm((0, 1, 3)), verify=True
    ),
    "sparsevlm-qwen3": Case(
        QWEN3, {"method": SparseVLM((20, 31, 8)), "keep_tokens": 9}, sparsevlm((1, 3), 0.25)
    ),
    "fopru-then-sparsevlm-mistral": Case(
        MISTRAL,
        {"method": "fopru-rank", "ratio": 0.5, "then": "sparsevlm:0.3"},
        sparsevlm((0, 1), 0.3),
        most_attended(0.5),
    ),
}
PRUNED = [name for name, case in CASES.items() if case.rule.layers]


@pytest.fixture(scope="module")
def opened(checkpoint, tmp_path_factory):
    """A case's checkpoint and its loaded bundle, exported once."""
    made = {}

    def get(name):
        if name not in made:
            case = CASES[name]
            path = checkpoint(checkpoint.Tiny(**case.tiny))
            folder = tmp_path_factory.mktemp("bundle") / name
            seen = {}
            bundle = export(
                path,
                output=folder,
                verify=case.verify,
                progress=lambda what, done, total: seen.update({what: (done, total)}),
                **case.options,
            )
            done, total = seen.get("comparing with PyTorch", (0, 0))
            assert done == total, "a progress display would not end at its end"
            made[name] = path, visprune.load(bundle.path)
        return made[name]

    yield get
    for _, pipeline in made.values():
        pipeline.close()


def says(text, images=0):
    content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    return {"role": "user", "content": content}


def answers(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def same(answer, reference, messages, pictures):
    """An answer has the reference's tokens, and the reference's choice of visual tokens."""
    reference.layer_tokens, reference.keep_indices = [], []
    assert answer.token_ids == reference.turn(messages, pictures, NEW)
    assert answer.keep_indices == tuple(reference.keep_indices)
    assert answer.tokens_kept == sum(len(kept) for kept in reference.keep_indices)
    assert answer.visual_tokens == 36 * len(pictures)
    inside = reference.rule.layers and pictures
    assert answer.layer_tokens == (tuple(reference.layer_tokens) if inside else ())


def converse(chat, reference, pictures):
    """Two images; a new one; a question about them all."""
    first = chat.generate("What are these?", pictures[:2], max_new_tokens=NEW)
    told = [says("What are these?", 2)]
    same(first, reference, told, pictures[:2])
    second = chat.generate("And this one here?", pictures[2:], max_new_tokens=NEW)
    told += [answers(first.text), says("And this one here?", 1)]
    same(second, reference, told, pictures[2:])
    third = chat.generate("Why?", max_new_tokens=NEW)
    same(third, reference, [*told, answers(second.text), says("Why?")], [])


@pytest.mark.parametrize("name", CASES)
def test_a_conversation_equals_the_reference(name, opened, pictures):
    path, pipeline = opened(name)
    case = CASES[name]
    converse(pipeline.chat(), Reference(path, case.rule, case.before), pictures)
    alone = pipeline.generate([], "No picture at all.", max_new_tokens=NEW)
    same(alone, Reference(path, case.rule), [says("No picture at all.")], [])
    assert pipeline.manifest.parity.verified == case.verify


@pytest.mark.parametrize("name", [name for name in CASES if name not in PRUNED])
def test_nothing_pruned_equals_transformers(name, opened, pictures):
    path, pipeline = opened(name)
    processor = transformers.AutoProcessor.from_pretrained(path, backend="pil")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()

    def generated(messages, images):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        return tuple(out[0, inputs["input_ids"].shape[1] :].tolist())

    chat = pipeline.chat()
    told = [says("Both?", 2)]
    first = chat.generate("Both?", pictures[:2], max_new_tokens=NEW)
    assert first.token_ids == generated(told, pictures[:2])
    told += [answers(first.text), says("Now?", 1)]
    second = chat.generate("Now?", pictures[2:], max_new_tokens=NEW)
    assert second.token_ids == generated(told, pictures)
    alone = pipeline.generate([], "None.", max_new_tokens=NEW)
    assert alone.token_ids == generated([says("None.")], [])
    decoders = [graph for graph in pipeline.manifest.graphs if graph.startswith("decoder")]
    assert decoders == [f"decoder_segment_{k}" for k in range(CASES[name].options["segments"])]
    prefill = [part for part in first.timings_ms if part.startswith("prefill")]
    assert prefill == [f"prefill.{graph}" for graph in decoders]


def test_another_ratio_at_run_time(opened, pictures):
    for name, asked, rule in (
        ("fastv-qwen2", {"ratio": 0.75}, fastv(0.75)),
        ("fastv-mistral", {"keep_tokens": 5}, fastv(5 / 36)),
        ("fastv-mistral", {"ratio": 1.0}, fastv(1.0)),
        ("pyramiddrop-llama", {"ratio": 0.4}, pyramid((1, 2, 3), 0.4)),
        ("sparsevlm-llama-7", {"ratio": 0.6}, sparsevlm((0, 1, 3), 0.6)),
        ("sparsevlm-llama-7", {"keep_tokens": 1}, sparsevlm((0, 1, 3), 1 / 36)),
        ("sparsevlm-qwen3", {"ratio": 1.0}, sparsevlm((1, 3), 1.0)),
    ):
        path, pipeline = opened(name)
        converse(pipeline.chat(**asked), Reference(path, rule), pictures)


def test_another_ratio_before_the_llm(opened, pictures):
    path, pipeline = opened("fopru-then-fastv-llama-full")
    converse(pipeline.chat(ratio=0.25), Reference(path, fastv(0.5), most_attended(0.25)), pictures)
    path, pipeline = opened("fopru-then-sparsevlm-mistral")
    rule = sparsevlm((0, 1), 0.3)
    converse(pipeline.chat(ratio=0.25), Reference(path, rule, most_attended(0.25)), pictures)
    path, pipeline = opened("uniform-then-fitprune-qwen2")
    converse(pipeline.chat(ratio=0.75), Reference(path, fitprune(FEW, 36), spread(0.75)), pictures)


def test_a_recipe_refuses_another_ratio(opened, pictures):
    _, pipeline = opened("fitprune-mistral")
    for asked in ({"ratio": 0.5}, {"keep_tokens": 5}, {"ratio": 1.0}):
        with pytest.raises(UsageError, match="recipe fixes what is kept") as caught:
            pipeline.generate(pictures[0], "What?", **asked)
        assert "visprune-export MODEL --method fitprune --ratio" in caught.value.hint


def test_a_placeholder_that_the_model_generates_is_text(opened, pictures):
    """Its conversation is compared above; here, that the case is what it should be."""
    answer = opened("fastv-mistral")[1].generate(pictures[:2], "What are these?", max_new_tokens=NEW)
    assert IMAGE in answer.token_ids
    assert answer.layer_tokens == (72, 72, 36)


@pytest.mark.parametrize("name", ["pyramiddrop-mistral", "fitprune-mistral", "sparsevlm-qwen3"])
def test_an_abandoned_turn_changes_nothing(name, opened, pictures):
    """It shares its first words with the next one, and these would weigh in PyramidDrop's scores."""
    path, pipeline = opened(name)
    for place in range(3):
        chat = pipeline.chat()
        for prompt, shown in ((f"Something {place}?", pictures[:2]), ("Only words", [])):
            turn = chat.stream(prompt, shown, max_new_tokens=20)
            next(turn, None)
            assert not turn.ended
        converse(chat, Reference(path, CASES[name].rule), pictures)


def graphs(pipeline):
    for name, graph in pipeline.manifest.graphs.items():
        model = onnx.load(pipeline.bundle.file(graph.file), load_external_data=False)
        yield name, onnx.shape_inference.infer_shapes(model).graph


def shapes(graph):
    """Of each Softmax, the dimensions of what it gives: numbers or names."""
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    return [
        [dim.dim_value or dim.dim_param or "?" for dim in known[node.output[0]].type.tensor_type.shape.dim]
        for node in graph.node
        if node.op_type == "Softmax"
    ]


@pytest.mark.parametrize("name", PRUNED)
def test_operators_of_the_graphs(name, opened):
    pipeline, rule = opened(name)[1], CASES[name].rule
    layers, points = CASES[name].tiny["layers"], len(rule.layers)
    fused, squares, rows = 0, 0, 0
    for graph_name, graph in graphs(pipeline):
        kinds = [node.op_type for node in graph.node]
        assert not set(kinds) & {"NonZero", "Compress", "Unique", "If", "Loop", "Scan"}
        if not graph_name.startswith("decoder"):
            continue
        fused += kinds.count("Attention")
        for shape in shapes(graph):
            assert len(shape) == 4
            rows += shape[2] == 1
            squares += shape[2] != 1
    if rule.kind in ("fitprune", "sparsevlm"):  # spell out the layers they read, in parts of heads, no other
        assert (fused, rows) == (layers - points, 0)
        assert squares >= points
    else:  # one row of each head; every layer stays fused
        assert (fused, squares, rows) == (layers, 0, points)


@pytest.mark.parametrize("name", PRUNED)
def test_segments_and_their_caches(name, opened):
    manifest, rule = opened(name)[1].manifest, CASES[name].rule
    decoders = [graph for graph in manifest.graphs if graph.startswith("decoder")]
    assert decoders == [f"decoder_segment_{k}" for k in range(len(rule.layers) + 1)]
    assert [stage.graph for stage in manifest.stages].count("segment_pruner") == len(rule.layers)
    held = [
        [spec.name for spec in manifest.graphs[graph].inputs if spec.name.endswith(".key")]
        for graph in decoders
    ]
    layers = CASES[name].tiny["layers"]
    every = [name for names in held for name in names]
    assert every == [f"past_key_values.{layer}.key" for layer in range(layers)]
    before = [layer - 1 for layer in rule.layers] if rule.kind == "pyramiddrop" else list(rule.layers)
    assert (
        [int(names[-1].split(".")[1]) for names in held[:-1]] == before == list(manifest.layer_pruning.layers)
    )
    for graph in decoders[:-1]:
        scores = {spec.name: spec.dtype for spec in manifest.graphs[graph].outputs}["token_scores"]
        assert scores == "float32"


def test_only_what_scores_stands_in_two_graphs(opened):
    """PyramidDrop's scoring layer: its norm, queries and keys; all other weights are written once."""
    for name in ("pyramiddrop-qwen3", "fastv-mistral", "fitprune-mistral", "llama-2"):
        seen, twice = set(), set()
        for graph_name, graph in graphs(opened(name)[1]):
            if graph_name.startswith("decoder"):
                mine = {i.name for i in graph.initializer if "scoring_layer" in i.name}
                assert all(any(part in i for part in ("layernorm", "q_", "k_")) for i in mine)
                twice |= mine
                layers = {i.name for i in graph.initializer if i.name.startswith("layers.")}
                assert not layers & seen
                seen |= layers
        assert bool(twice) == (name == "pyramiddrop-qwen3")


def test_a_board_with_jetpack6(checkpoint, tmp_path, pictures):
    """Primitive operators and float16: the self-check passes, scores stay float32, and it runs."""
    path = checkpoint(checkpoint.Tiny(**MISTRAL))
    pruner = FitPrune((7, 9, 3), 36, 0.5)
    bundle = export(path, method=pruner, target="jetpack6", output=tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.opset, manifest.flavour, manifest.dtype) == (19, "primitive", "float16")
    rows = {row.name: row for row in manifest.parity.rows}
    assert manifest.parity.verified
    assert rows["greedy tokens"].passed
    assert {f"decoder_segment_{k} token_scores" for k in (0, 1)} <= set(rows)
    assert {f"prune point {k} keep_indices" for k in (0, 1)} <= set(rows)
    for graph in manifest.graphs.values():
        assert not list(problems(onnx.load(bundle.file(graph.file), load_external_data=False)))
    with visprune.load(bundle.path) as pipeline:
        specs = {s.name: s.dtype for s in manifest.graphs["decoder_segment_0"].outputs}
        assert (specs["last_hidden_state"], specs["token_scores"]) == ("float16", "float32")
        answer = pipeline.generate(pictures[:2], "What?", max_new_tokens=3)
    assert answer.layer_tokens == (72, 58, 40)
    assert answer.tokens_kept == 40
