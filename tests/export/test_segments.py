"""A decoder in segments says what PyTorch says, token for token, whatever is pruned between them.

The reference here shares nothing with visprune: plain loops over the decoder's submodules, its own attention
and caches, scores and counts written down from the methods' definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import visprune
from visprune.errors import UsageError
from visprune.export import export
from visprune.pruning.fitprune import FitPrune

NEW = 8
IMAGE = 259
MARGIN = 1e-4  # between what is kept and what is dropped, relative; rounding stays far below it

Counts = Callable[[int], tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """What a method does: at which layers, and how many visual tokens of n are left after each."""

    kind: str = "none"
    layers: tuple[int, ...] = ()
    left: Counts = lambda n: ()


def fastv(ratio: float, layer: int = 1) -> Rule:
    """Scored by `layer`, dropped after it: round(n r)."""
    return Rule("fastv", (layer,), lambda n: (math.floor(n * ratio + 0.5),))


def pyramid(starts: tuple[int, ...], ratio: float | None = None) -> Rule:
    """Dropped before each layer of `starts`: to n/2, n/4, ..., or in as many equal steps to n r."""
    step = 0.5 if ratio is None else ratio ** (1 / len(starts))
    return Rule(
        "pyramiddrop", starts, lambda n: tuple(int(n * step ** (j + 1) + 1e-6) for j in range(len(starts)))
    )


def fitprune(scheme: dict[int, int], made_for: int) -> Rule:
    """Deletes `scheme[l]` in layer l of `made_for` tokens, and as large a part of another number."""
    layers = tuple(sorted(scheme))
    gone = [sum(scheme[layer] for layer in layers[: j + 1]) for j in range(len(layers))]
    return Rule("fitprune", layers, lambda n: tuple(n - n * g // made_for for g in gone))


@dataclass
class Reference:
    """A LLaVA model that prunes, written out: one conversation, batch 1, float32."""

    path: Any
    rule: Rule
    before: Callable[[Any, Any], list[int]] | None = None  # vision outputs, image -> kept patches
    layer_tokens: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.processor = transformers.AutoProcessor.from_pretrained(self.path)
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(
            self.path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.decoder = self.model.model.language_model
        self.fed: list[int] = []
        self.images: list[tuple[Any, list[int]]] = []  # projected tokens of each, and which patches
        # Of each layer the keys, the values, and which tokens of the conversation these are.
        self.cache: list[list[Any]] = [[None, None, []] for _ in self.decoder.layers]

    def see(self, picture):
        """Projected visual tokens [K, D], and the patches they stand for; a CLS that is kept is first."""
        pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        out = self.model.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
        tokens = out.hidden_states[self.model.config.vision_feature_layer][0]
        with_cls = self.model.config.vision_feature_select_strategy == "full"
        kept = list(range(len(tokens) - 1)) if self.before is None else self.before(self.model, out)
        rows = ([0] if with_cls else []) + [1 + patch for patch in kept]
        return self.model.model.multi_modal_projector(tokens[rows]), kept

    @torch.no_grad()
    def turn(self, messages, new_pictures, count):
        """Greedy tokens after a whole conversation; what of it was fed before is not fed again."""
        seen = [self.see(picture) for picture in new_pictures]
        self.images += seen
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        parts = self.processor.tokenizer(text)["input_ids"]
        each = iter(self.images)
        ids = [i for token in parts for i in ([token] * len(next(each)[0]) if token == IMAGE else [token])]
        same = 0
        while same < min(len(ids) - 1, len(self.fed)) and ids[same] == self.fed[same]:
            same += 1
        for layer in self.cache:  # what the answer was retold as may be spelled in other tokens
            held = sum(token < same for token in layer[2])
            layer[:] = [layer[0][:, :held], layer[1][:, :held], layer[2][:held]] if layer[2] else layer
        self.fed = self.fed[:same]
        embeds = self.model.get_input_embeddings()(torch.tensor(ids[same:]))
        visual = torch.zeros(len(embeds), dtype=torch.bool)
        if seen:
            visual = torch.tensor(ids[same:]) == IMAGE
            embeds[visual] = torch.cat([tokens for tokens, _ in seen])
        logits = self.forward(ids[same:], embeds, visual)
        self.read_survivors(ids, seen)
        out = []
        while True:
            first, second = logits.topk(2).values.tolist()
            assert first - second > MARGIN * logits.abs().max()
            out.append(int(logits.argmax()))
            if len(out) == count or out[-1] == self.model.config.text_config.eos_token_id:
                return tuple(out)
            embed = self.model.get_input_embeddings()(torch.tensor(out[-1:]))
            logits = self.forward(out[-1:], embed, torch.zeros(1, dtype=torch.bool))

    def read_survivors(self, ids, seen):
        """Which patches of the new images the last layer holds."""
        held, self.keep_indices = set(self.cache[-1][2]), []
        places = [i for i, token in enumerate(ids) if token == IMAGE]
        places = places[len(places) - sum(len(tokens) for tokens, _ in seen) :]
        for tokens, patches in seen:
            mine, places = places[: len(tokens)], places[len(tokens) :]
            mine = mine[len(tokens) - len(patches) :]  # without a CLS
            self.keep_indices.append(
                tuple(p for place, p in zip(mine, patches, strict=True) if place in held)
            )

    def forward(self, ids, hidden, visual):
        """Append tokens [S, D]; the logits after the last one, [V]."""
        place = torch.arange(len(self.fed), len(self.fed) + len(ids))
        self.fed += ids
        pruned = bool(visual.any())
        left = dict(zip(self.rule.layers, self.rule.left(int(visual.sum())), strict=True)) if pruned else {}
        if pruned:
            self.layer_tokens = []
        position = place
        for index, layer in enumerate(self.decoder.layers):
            if self.rule.kind == "pyramiddrop":
                if index in left:
                    score = self.last_query(layer, hidden, position)
                    chosen = choose(score, visual, left[index])
                    hidden, place, visual = hidden[chosen], place[chosen], visual[chosen]
                start = len(self.cache[index][2])
                position = torch.arange(start, start + len(hidden))
            if pruned:
                self.layer_tokens.append(int(visual.sum()))
            mixed, probabilities = self.attend(index, layer, hidden, position, place)
            if self.rule.kind == "fitprune" and index in left:
                most = probabilities.amax(dim=0)
                score = most[visual].mean(dim=0) * most[~visual].mean(dim=0)
                chosen = choose(score, visual, left[index])
                hidden, position, place = hidden[chosen], position[chosen], place[chosen]
                mixed, visual = mixed[chosen], visual[chosen]
            hidden = hidden + layer.self_attn.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if self.rule.kind == "fastv" and index in left:
                chosen = choose(probabilities.mean(dim=0)[-1], visual, left[index])
                hidden, position, place = hidden[chosen], position[chosen], place[chosen]
                visual = visual[chosen]
        return self.model.lm_head(self.decoder.norm(hidden[-1]))

    def project(self, layer, hidden, position, names):
        """Queries, keys, values as named, each [heads, S, Dh], turned by their positions."""
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        found = {}
        for name in names:
            heads = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
            if hasattr(attention, f"{name}_norm"):
                heads = getattr(attention, f"{name}_norm")(heads)
            found[name] = heads.transpose(0, 1)
        cos, sin = self.decoder.rotary_emb(hidden[None], position[None])
        turned = apply_rotary_pos_emb(found["q"][None], found["k"][None], cos, sin)
        found["q"], found["k"] = turned[0][0], turned[1][0]
        return [found[name] for name in names]

    def attend(self, index, layer, hidden, position, place):
        """Heads' outputs side by side [S, H Dh], and probabilities of the new tokens [H, S, S]."""
        query, key, value = self.project(layer, hidden, position, "qkv")
        held = self.cache[index]
        past = len(held[2])
        held[0] = key if held[0] is None else torch.cat([held[0], key], dim=1)
        held[1] = value if held[1] is None else torch.cat([held[1], value], dim=1)
        held[2] = held[2] + place.tolist()
        mixed, probabilities = [], []
        for head in range(len(query)):
            mine = head // (len(query) // len(key))
            logits = query[head] @ held[0][mine].T / math.sqrt(query.shape[-1])
            later = torch.ones_like(logits, dtype=torch.bool).triu(past + 1)
            row = logits.masked_fill(later, -math.inf).softmax(dim=-1)
            mixed.append(row @ held[1][mine])
            probabilities.append(row[:, past:])
        return torch.cat(mixed, dim=-1), torch.stack(probabilities)

    def last_query(self, layer, hidden, position):
        """PyramidDrop's score [S]: the last token's attention to the new tokens alone, mean over heads."""
        query, key = self.project(layer, hidden, position, "qk")
        groups = len(query) // len(key)
        rows = [query[h, -1] @ key[h // groups].T / math.sqrt(query.shape[-1]) for h in range(len(query))]
        return torch.stack(rows).softmax(dim=-1).mean(dim=0)


def choose(score, visual, count):
    """All text and the `count` visual tokens of largest score, in order; the cut must be clear."""
    ranked = sorted(score[visual].tolist(), reverse=True)
    if count < len(ranked):
        assert ranked[count - 1] - ranked[count] > MARGIN * ranked[count - 1], "no margin: another seed"
        return torch.nonzero(~visual | (score > ranked[count]))[:, 0]
    return torch.arange(len(score))


def most_attended(ratio):
    """FoPru's rank: attention received in the feature layer, CLS aside; ratio of the patches."""

    def select(model, out):
        # Hidden state -2 is the output of layer -2.
        layer = model.config.vision_feature_layer
        received = out.attentions[layer][0].mean(dim=0)[1:, 1:].mean(dim=0)
        ranked = received.argsort(descending=True).tolist()
        count = int(len(ranked) * ratio)
        cut = received[ranked[count - 1]] - received[ranked[count]]
        assert cut > MARGIN * received[ranked[count]], "no margin: another seed"
        return sorted(ranked[:count])

    return select


def spread(ratio):
    """`uniform`: K of N patches, evenly, each in the middle of its share."""

    def select(model, out):
        total = out.hidden_states[0].shape[1] - 1
        count = int(total * ratio)
        return [int((j + 0.5) * total / count) for j in range(count)]

    return select


def scheme(deletions, layers):
    return tuple(deletions.get(layer, 0) for layer in range(layers))


MANY = {0: 9, 3: 5, 5: 6, 6: 3, 8: 4}
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
    "mistral-2": Case(MISTRAL, {"method": "none", "segments": 2}, Rule()),
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
    "fitprune-llama-10": Case(
        lively(layers=10, hidden=64),
        {"method": FitPrune(scheme(MANY | {9: 2}, 10), 36, 0.4)},
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
    processor = transformers.AutoProcessor.from_pretrained(path)
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
    ):
        path, pipeline = opened(name)
        converse(pipeline.chat(**asked), Reference(path, rule), pictures)


def test_another_ratio_before_the_llm(opened, pictures):
    path, pipeline = opened("fopru-then-fastv-llama-full")
    converse(pipeline.chat(ratio=0.25), Reference(path, fastv(0.5), most_attended(0.25)), pictures)
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


@pytest.mark.parametrize("name", ["pyramiddrop-mistral", "fitprune-mistral"])
def test_an_abandoned_turn_changes_nothing(name, opened, pictures):
    """It shares its first words with the next one, and these would weigh in PyramidDrop's scores."""
    path, pipeline = opened(name)
    for place in range(3):
        chat = pipeline.chat()
        turn = chat.stream(f"Something {place}?", pictures[:2], max_new_tokens=5)
        next(turn, None)
        turn = chat.stream("Only words", max_new_tokens=5)
        next(turn, None)
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
    if rule.kind == "fitprune":  # spells out the layers it reads, in parts of heads, and no other
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
    for name in ("pyramiddrop-qwen3", "fastv-mistral", "fitprune-mistral", "mistral-2"):
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
    with visprune.load(bundle.path) as pipeline:
        for _, graph in graphs(pipeline):
            kinds = {node.op_type for node in graph.node}
            assert not kinds & {"Attention", "RMSNormalization", "RotaryEmbedding", "NonZero"}
        specs = {s.name: s.dtype for s in manifest.graphs["decoder_segment_0"].outputs}
        assert (specs["last_hidden_state"], specs["token_scores"]) == ("float16", "float32")
        answer = pipeline.generate(pictures[:2], "What?", max_new_tokens=3)
    assert answer.layer_tokens == (72, 58, 40)
    assert answer.tokens_kept == 40
