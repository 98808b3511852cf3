"""Shared fixtures: a bundle made by hand, small enough to be read, with a NumPy reading of its graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visprune.budget import Budget
from visprune.bundle import Bundle
from visprune.bundled import MODEL_DIR
from visprune.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Decoder,
    FileRecord,
    Graph,
    Manifest,
    Parity,
    ParityRow,
    Pruning,
    Source,
    Stage,
    TensorSpec,
    Text,
)
from visprune.records import sha256

BOS, EOS, IMAGE = 0, 1, 2
VOCABULARY = 259  # three special tokens and the bytes
HIDDEN, HEADS, HEAD_DIM, LAYERS = 8, 2, 4, 2
SIDE, PATCH, VISUAL = 56, 14, 16
CONTEXT = 256

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@dataclass(frozen=True)
class Weights:
    """Of the tiny model."""

    projector: np.ndarray  # [3, D]
    embedding: np.ndarray  # [V, D]
    query: np.ndarray  # [L, D, D]
    key: np.ndarray
    value: np.ndarray
    position: np.ndarray  # [D], times the position, added to queries and keys
    head: np.ndarray  # [D, V]

    @classmethod
    def seeded(cls, seed: int) -> Weights:
        draw = np.random.default_rng(seed).standard_normal
        shapes = {"projector": (3, HIDDEN), "embedding": (VOCABULARY, HIDDEN)}
        shapes |= dict.fromkeys(("query", "key", "value"), (LAYERS, HIDDEN, HIDDEN))
        shapes |= {"position": (HIDDEN,), "head": (HIDDEN, VOCABULARY)}
        arrays = {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}
        arrays["position"] *= 0.05
        arrays["head"][:, EOS] -= 1.0  # answers should not end at once
        return cls(**arrays)


class Oracle:
    """The tiny model in NumPy: whole sequences, no cache."""

    def __init__(self, weights: Weights) -> None:
        self.w = weights

    def features(self, pixels: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """[K, D] and the kept indices of one image [1, 3, H, W]: the brightest patches."""
        grid = SIDE // PATCH
        means = (
            pixels[0].reshape(3, grid, PATCH, grid, PATCH).mean(axis=(2, 4)).reshape(3, VISUAL).T
        )  # [N, 3]
        kept = np.sort(np.argsort(-means.sum(1), kind="stable")[:keep])
        return means[kept] @ self.w.projector, kept

    def logits(self, ids: Sequence[int], visual: np.ndarray) -> np.ndarray:
        """[V] after the last token; placeholders take the rows of `visual` [M, D] in order."""
        tokens = np.array(ids)
        x = self.w.embedding[tokens].copy()
        places = np.flatnonzero(tokens == IMAGE)[: len(visual)]
        x[places] = visual[: len(places)]
        turn = np.arange(len(ids), dtype=np.float32)[:, None] * self.w.position
        hidden_from = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        for layer in range(LAYERS):

            def heads(matrix: np.ndarray) -> np.ndarray:
                return matrix.reshape(-1, HEADS, HEAD_DIM).transpose(1, 0, 2)

            q, k = heads(x @ self.w.query[layer] + turn), heads(x @ self.w.key[layer] + turn)
            scores = q @ k.transpose(0, 2, 1) / 4 + hidden_from
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out = (p / p.sum(-1, keepdims=True)) @ heads(x @ self.w.value[layer])
            x = x + np.tanh(out.transpose(1, 0, 2).reshape(-1, HIDDEN))
        return x[-1] @ self.w.head

    def greedy(self, ids: Sequence[int], images: Sequence[np.ndarray], keep: int, count: int) -> list[int]:
        """Generated tokens, the one that ends the answer included."""
        visual = [self.features(pixels, keep)[0] for pixels in images]
        rows = np.concatenate(visual) if visual else np.zeros((0, HIDDEN), np.float32)
        out: list[int] = []
        while len(out) < count and (not out or out[-1] != EOS):
            out.append(int(self.logits([*ids, *out], rows).argmax()))
        return out


def _graph(
    name: str, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]
) -> Any:
    from onnx import helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        name,
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)


def _vision() -> Any:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node(
            "AveragePool", ["pixel_values"], ["pooled"], kernel_shape=[PATCH] * 2, strides=[PATCH] * 2
        ),
        helper.make_node("Reshape", ["pooled", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["image_features"], perm=[0, 2, 1]),
    ]
    return _graph(
        "vision_encoder",
        nodes,
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["T", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["T", VISUAL, 3])],
        {"flat": np.array([0, 3, -1])},
    )


def _pruner(weights: Weights) -> Any:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceSum", ["vision_features", "last"], ["scores"], keepdims=0),
        helper.make_node("Reshape", ["keep_tokens", "one"], ["k"]),
        helper.make_node("TopK", ["scores", "k"], ["_", "chosen"], axis=1),
        helper.make_node("TopK", ["chosen", "k"], ["keep_indices", "__"], axis=1, largest=0),
        helper.make_node("Unsqueeze", ["keep_indices", "last"], ["column"]),
        helper.make_node("Expand", ["column", "width"], ["columns"]),
        helper.make_node("GatherElements", ["vision_features", "columns"], ["kept"], axis=1),
        helper.make_node("MatMul", ["kept", "projector"], ["projected"]),
        helper.make_node("Reshape", ["projected", "flat"], ["image_features"]),
    ]
    return _graph(
        "token_pruner",
        nodes,
        [
            helper.make_tensor_value_info("vision_features", TensorProto.FLOAT, ["T", VISUAL, 3]),
            helper.make_tensor_value_info("keep_tokens", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["M", HIDDEN]),
            helper.make_tensor_value_info("keep_indices", TensorProto.INT64, ["T", "K"]),
        ],
        {
            "last": np.array([-1]),
            "one": np.array([1]),
            "width": np.array([1, 1, 3]),
            "flat": np.array([-1, HIDDEN]),
            "projector": weights.projector,
        },
    )


def _embedding(weights: Weights) -> Any:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Equal", ["input_ids", "image"], ["is_placeholder"]),
        helper.make_node("Cast", ["is_placeholder"], ["ones"], to=TensorProto.INT64),
        helper.make_node("CumSum", ["ones", "axis"], ["order"]),
        # As in an exported graph, a placeholder that the model itself generated counts as text.
        helper.make_node("Shape", ["image_features"], ["count"], end=1),
        helper.make_node("LessOrEqual", ["order", "count"], ["is_inside"]),
        helper.make_node("And", ["is_placeholder", "is_inside"], ["is_visual"]),
        helper.make_node("Where", ["is_visual", "order", "zero"], ["index"]),
        helper.make_node("Concat", ["blank", "image_features"], ["rows"], axis=0),
        helper.make_node("Gather", ["rows", "index"], ["visual"]),
        helper.make_node("Gather", ["embedding", "input_ids"], ["text"]),
        helper.make_node("Unsqueeze", ["is_visual", "last"], ["mask"]),
        helper.make_node("Where", ["mask", "visual", "text"], ["inputs_embeds"]),
    ]
    return _graph(
        "embedding",
        nodes,
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"]),
            helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["M", HIDDEN]),
        ],
        [helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["B", "S", HIDDEN])],
        {
            "image": np.array(IMAGE),
            "axis": np.array(1),
            "zero": np.array(0),
            "blank": np.zeros((1, HIDDEN), np.float32),
            "last": np.array([-1]),
            "embedding": weights.embedding,
        },
    )


def _decoder(weights: Weights) -> Any:
    from onnx import TensorProto, helper

    make = helper.make_node
    constants: dict[str, Any] = {
        "split": np.array([0, 0, HEADS, HEAD_DIM]),
        "join": np.array([0, 0, HIDDEN]),
        "scale": np.array(0.25, np.float32),
        "lowest": np.array(-1e9, np.float32),
        "none": np.array(0.0, np.float32),
        "axes": np.array([1]),
        "position": weights.position,
        "head": weights.head,
        "two": np.array(2),
        "nil": np.array(0),
        "step": np.array(1),
        "minus": np.array([-1]),
        "end": np.array([2**31]),
        "third": np.array([-1]),
    }
    nodes = [
        make("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["places", "third"], ["places3"]),
        make("Mul", ["places3", "position"], ["turn"]),  # [B, S, D]
    ]
    x = "inputs_embeds"
    for i in range(LAYERS):
        for part in ("query", "key", "value"):
            constants[f"w_{part}{i}"] = getattr(weights, part)[i]
            nodes.append(make("MatMul", [x, f"w_{part}{i}"], [f"{part}_{i}"]))
            if part != "value":
                nodes.append(make("Add", [f"{part}_{i}", "turn"], [f"{part}t_{i}"]))
            source = f"{part}_{i}" if part == "value" else f"{part}t_{i}"
            nodes.append(make("Reshape", [source, "split"], [f"{part}r_{i}"]))
            nodes.append(make("Transpose", [f"{part}r_{i}"], [f"{part}h_{i}"], perm=[0, 2, 1, 3]))
        for part in ("key", "value"):
            nodes.append(
                make(
                    "Concat", [f"past_key_values.{i}.{part}", f"{part}h_{i}"], [f"present.{i}.{part}"], axis=2
                )
            )
        if i == 0:
            nodes += [
                make("Shape", ["present.0.key"], ["shape"]),
                make("Gather", ["shape", "two"], ["total"]),
                make("Range", ["nil", "total", "step"], ["columns"]),
                make("Unsqueeze", ["position_ids", "third"], ["rows"]),
                make("Greater", ["columns", "rows"], ["hidden"]),
                make("Where", ["hidden", "lowest", "none"], ["mask3"]),
                make("Unsqueeze", ["mask3", "axes"], ["mask"]),
            ]
        nodes += [
            make("Transpose", [f"present.{i}.key"], [f"kt_{i}"], perm=[0, 1, 3, 2]),
            make("MatMul", [f"queryh_{i}", f"kt_{i}"], [f"raw_{i}"]),
            make("Mul", [f"raw_{i}", "scale"], [f"scaled_{i}"]),
            make("Add", [f"scaled_{i}", "mask"], [f"masked_{i}"]),
            make("Softmax", [f"masked_{i}"], [f"p_{i}"], axis=-1),
            make("MatMul", [f"p_{i}", f"present.{i}.value"], [f"mixed_{i}"]),
            make("Transpose", [f"mixed_{i}"], [f"back_{i}"], perm=[0, 2, 1, 3]),
            make("Reshape", [f"back_{i}", "join"], [f"joined_{i}"]),
            make("Tanh", [f"joined_{i}"], [f"bounded_{i}"]),
            make("Add", [x, f"bounded_{i}"], [f"x_{i + 1}"]),
        ]
        x = f"x_{i + 1}"
    nodes += [
        make("Slice", [x, "minus", "end", "axes"], ["tail"]),
        make("MatMul", ["tail", "head"], ["logits"]),
    ]
    cache = ["B", HEADS, "P", HEAD_DIM]
    names = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    info = helper.make_tensor_value_info
    return _graph(
        "decoder_model_merged",
        nodes,
        [
            info("inputs_embeds", TensorProto.FLOAT, ["B", "S", HIDDEN]),
            info("position_ids", TensorProto.INT64, ["B", "S"]),
            *(info(f"past_key_values.{name}", TensorProto.FLOAT, cache) for name in names),
        ],
        [
            info("logits", TensorProto.FLOAT, ["B", 1, VOCABULARY]),
            *(info(f"present.{name}", TensorProto.FLOAT, ["B", HEADS, "P + S", HEAD_DIM]) for name in names),
        ],
        constants,
    )


_STAGES = (
    Stage("vision_encoder", "image", {"pixel_values": "pixel_values"}, {"image_features": "vision_features"}),
    Stage(
        "token_pruner",
        "image",
        {"vision_features": "vision_features", "keep_tokens": "keep_tokens"},
        {"image_features": "image_features", "keep_indices": "keep_indices"},
    ),
    Stage(
        "embedding",
        "always",
        {"input_ids": "input_ids", "image_features": "image_features"},
        {"inputs_embeds": "inputs_embeds"},
    ),
)


def _write_tokenizer(path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": BOS, "<eos>": EOS, "<image>": IMAGE} | {c: i + 3 for i, c in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<image>"])
    backend.save(str(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` with the true hashes of all other files."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(path.stat().st_size, sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")


def make_tiny_bundle(folder: Path, seed: int = 0) -> Path:
    """Write the tiny bundle and give its path."""
    onnx = pytest.importorskip("onnx")
    weights = Weights.seeded(seed)
    (folder / "onnx").mkdir(parents=True)
    graphs: dict[str, Graph] = {}
    models = (_vision(), _pruner(weights), _embedding(weights), _decoder(weights))
    for model in models:
        onnx.checker.check_model(model)
        name = model.graph.name
        onnx.save(model, folder / "onnx" / f"{name}.onnx")

        def specs(values: Any) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    v.name,
                    onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name,
                    tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
                )
                for v in values
            )

        graphs[name] = Graph(f"onnx/{name}.onnx", None, specs(model.graph.input), specs(model.graph.output))
    last = graphs["decoder_model_merged"]
    same = [{t.name: t.name for t in tensors} for tensors in (last.inputs, last.outputs)]
    _write_tokenizer(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    processor |= {"crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    grid = SIDE // PATCH
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(
            "tiny", "llava", "clip", "llama", 1, "float32", "0" * 64, {"visprune": "0"}, "2026-01-01"
        ),
        target="onnxruntime",
        flavour="primitive",
        dtype="float32",
        opset=19,
        graphs=graphs,
        stages=(*_STAGES, Stage("decoder_model_merged", "always", *same)),
        pruning=Pruning("fopru-rank", {}, 4, Budget(VISUAL), (grid, grid), 0, 0, "contiguous"),
        decoder=Decoder(LAYERS, HEADS, HEAD_DIM, "float32", VOCABULARY, CONTEXT, None, (EOS,)),
        text=Text("tokenizer.json", "chat_template.jinja", "<image>", IMAGE, "<bos>", "<eos>"),
        image_processor="preprocessor_config.json",
        parity=Parity(True, (ParityRow("vision_encoder", 1e-6, 1e-4, True, ""),)),
    )
    write_manifest(folder, manifest)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: processes take them in this order, and none should wait for the last one."""
    folders = ("export", "engines", "bench", "quantize", "evaluation")

    def order(item: pytest.Item) -> int:
        if item.path.name == "test_readme.py":
            return 0
        return next((1 + i for i, folder in enumerate(folders) if folder in item.path.parts), 9)

    items.sort(key=order)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle. Tests that change it take `tiny_copy`."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with 15 of 144 tokens: few enough for some wrong answers."""
    export = pytest.importorskip("visprune.export").export
    folder = tmp_path_factory.mktemp("demo") / "uniform"
    export(MODEL_DIR, method="uniform", ratio=0.11, output=folder, verify=False)
    return folder


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    """A tiny bundle of the test's own."""
    return make_tiny_bundle(tmp_path / "tiny")


@pytest.fixture
def edit_manifest() -> Callable[..., None]:
    """A function that replaces fields of a part of a manifest: edit(folder, "decoder", context_length=8)."""

    def edit(folder: Path, part: str | None, **changes: Any) -> None:
        manifest = Bundle.open(folder).manifest
        if part:
            changes = {part: replace(getattr(manifest, part), **changes)}
        write_manifest(folder, replace(manifest, **changes))

    return edit


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """The tiny bundle's model in NumPy."""
    return Oracle(Weights.seeded(0))


@pytest.fixture
def picture() -> Callable[[int], Image.Image]:
    """A function that makes a different noisy picture of the model's own size for every number."""

    def make(seed: int) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the cache of the person who runs it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The Chromium of this machine, with playwright to drive it; without either the test is skipped."""
    pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    return found


@pytest.fixture(scope="module")
def chromium(chromium_path: str) -> Iterator[Any]:
    """A headless browser. It ends with the module, because playwright has an event loop until then."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=chromium_path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def scene() -> Image.Image:
    """The image that comes with the demo model."""
    from visprune.bundled import IMAGE

    return Image.open(IMAGE).convert("RGB")
