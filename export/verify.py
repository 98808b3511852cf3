"""The self-check of an export: what ONNX Runtime computes against what PyTorch computes.

Each graph is fed the same inputs as the checkpoint's own modules, then the whole chain is compared
with transformers: the logits of an unpruned prompt, and greedy tokens with the same tokens pruned.
Differences are relative to the largest value of the reference, because vision towers have features
of very different sizes. Graphs are opened one after another, so that memory holds one at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from visprune.bundle import Bundle, Parity, ParityRow
from visprune.errors import ParityError
from visprune.export import attention, graphs, models
from visprune.export.checkpoint import Checkpoint
from visprune.export.loading import load_model
from visprune.export.parts import Features
from visprune.pruning.base import VisionPruner
from visprune.runtime.backends import backend
from visprune.runtime.cores import usable_cores
from visprune.runtime.runner import BackendOptions, to_numpy

__all__ = ["ROWS", "verify"]

# Largest difference, relative to the largest reference value; float32 rounding through some dozens of
# layers stays near 1e-5, float16 near 1e-2.
TOLERANCE = {"float32": 5e-4, "float16": 4e-2}
# Share of kept tokens that may differ, where scores near the cut are equal up to rounding.
KEPT_TOLERANCE = {"float32": 0.02, "float16": 0.1}
NEW_TOKENS = 8
# Comparisons made besides one for each signal, for a progress display.
ROWS = 9
IMAGES = 2

Arrays = dict[str, NDArray[Any]]


class _Check:
    """Collects rows; stops at the first that failed, because later ones follow from it."""

    def __init__(self, dtype: str, report: Callable[[str], None]) -> None:
        self.dtype = dtype
        self.tolerance = TOLERANCE[dtype]
        self.report = report
        self.rows: list[ParityRow] = []

    def close(self, name: str, got: NDArray[Any], want: Tensor, note: str = "") -> None:
        reference = want.detach().float().numpy()
        if got.shape != reference.shape:
            self.add(name, float("inf"), self.tolerance, f"shape {got.shape} instead of {reference.shape}")
        scale = float(np.abs(reference).max(initial=0.0)) or 1.0
        error = float(np.abs(got.astype(np.float32) - reference).max(initial=0.0)) / scale
        self.add(name, error if np.isfinite(got).all() else float("inf"), self.tolerance, note)

    def add(self, name: str, difference: float, tolerance: float, note: str) -> None:
        passed = difference <= tolerance
        self.rows.append(ParityRow(name, difference, tolerance, passed, note))
        self.report(name)
        if not passed:
            raise ParityError(
                f"The exported {name} differs from PyTorch by {difference:.3g}; {tolerance:.3g} is allowed"
                f"{': ' + note if note else ''}.",
                "Nothing was written; try --dtype fp32, or export with --no-verify to look into it.",
            )


class _Graphs:
    """Runs graphs of the bundle on the CPU, each in memory only while it is used."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.open = backend("cpu")
        self.options = BackendOptions(provider="cpu", threads=usable_cores())

    def run(self, name: str, feeds: Sequence[Arrays]) -> list[Arrays]:
        specs = {spec.name: spec.dtype for spec in self.bundle.manifest.graphs[name].inputs}
        with self.open(self.bundle, name, self.options) as runner:
            results = []
            for feed in feeds:
                typed = {key: np.ascontiguousarray(value, dtype=specs[key]) for key, value in feed.items()}
                # Copied: what a backend gives may keep all of its memory, weights included.
                results.append({key: np.array(to_numpy(value)) for key, value in runner.infer(typed).items()})
        _release()
        return results


@dataclass(frozen=True, slots=True)
class _Reference:
    """What transformers computes, kept after its weights are gone.

    Attributes:
        unpruned: Logits after the prompt with every visual token.
        logits: [NEW_TOKENS, V], after the pruned prompt and after each greedy token.
        embeds: [NEW_TOKENS - 1, D], the input embeddings of these tokens.
    """

    unpruned: Tensor
    logits: Tensor
    embeds: Tensor


@torch.no_grad()
def verify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    features: Features,
    pruner: VisionPruner,
    report: Callable[[str], None],
) -> Parity:
    """Compare a written bundle with the checkpoint it came from.

    Args:
        bundle: Complete but for its parity result.
        checkpoint: Loaded here, between the small graphs and the decoder, so that never both the
            decoder and its reference are in memory.
        features: Which tokens are visual.
        pruner: The method.
        report: Called with the name of each comparison made.

    Raises:
        ParityError: A difference is larger than the tolerance.
    """
    manifest = bundle.manifest
    check, run = _Check(manifest.dtype, report), _Graphs(bundle)
    pixels = _pictures(features)
    # Both pictures pruned; the first one whole.
    cases = ((manifest.pruning.keep_tokens, IMAGES), (features.layout.visual_tokens, 1))
    prompts = [_prompt(bundle, count + features.always_kept, images) for count, images in cases]

    (vision,) = run.run("vision_encoder", [{"pixel_values": pixels.numpy()}])
    named = {"vision_features": vision["image_features"], **{name: vision[name] for name in pruner.signals}}
    pruned = run.run(
        "token_pruner",
        [
            {name: value[:images] for name, value in named.items()} | {"keep_tokens": np.array(count)}
            for count, images in cases
        ],
    )
    embedded = run.run(
        "embedding",
        [
            {"input_ids": ids.numpy(), "image_features": part["image_features"]}
            for ids, part in zip(prompts, pruned, strict=True)
        ],
    )
    got = {"vision": vision, "pruned": pruned[0], "embedded": embedded[0]}
    reference = _compare_inputs(check, checkpoint, features, pruner, (pixels, prompts, got))
    _release()
    _compare_decoder(check, run, [part["inputs_embeds"] for part in embedded], reference)
    return Parity(verified=True, rows=tuple(check.rows))


def _compare_inputs(
    check: _Check,
    checkpoint: Checkpoint,
    features: Features,
    pruner: VisionPruner,
    seen: tuple[Tensor, list[Tensor], dict[str, Arrays]],
) -> _Reference:
    """Compare everything before the decoder; give what the decoder will be compared with."""
    pixels, prompts, got = seen
    # The reference is float32, whatever the checkpoint and the target are.
    model = load_model(checkpoint).float()
    parts = models.family(checkpoint.model_type).parts(model)
    attention.register()
    parts.tower.set_attn_implementation(attention.IMPLEMENTATION["primitive"])
    tower = models.tower(model.config.vision_config.model_type)
    want = graphs.VisionEncoder(parts, tower, features, pruner.signals)(pixels)
    for name, value in zip(("image_features", *pruner.signals), want, strict=True):
        check.close(f"vision_encoder {name}", got["vision"][name], value)

    wrapper = graphs.TokenPruner(parts, features, pruner)
    indices = got["pruned"]["keep_indices"]
    keep = torch.tensor(indices.shape[1])
    mine = [torch.from_numpy(got["vision"][name]) for name in pruner.signals]
    tokens = torch.from_numpy(got["vision"]["image_features"].astype(np.float32))
    projected, same = wrapper(tokens, keep, mine)
    _check_kept(check, "token_pruner keep_indices", indices, same, 0.0)
    check.close("token_pruner image_features", got["pruned"]["image_features"], projected)
    _, own = wrapper(want[0], keep, list(want[1:]))
    _check_kept(check, "kept set", indices, own, KEPT_TOLERANCE[check.dtype])

    image_features = parts.projector(_gather(want[0], torch.from_numpy(indices), features))
    embeds = graphs.Embedding(parts, model.config.image_token_id)(prompts[0], image_features)
    check.close("embedding inputs_embeds", got["embedded"]["inputs_embeds"], embeds)

    _release()
    parts.tower.set_attn_implementation("eager")
    unpruned = model(input_ids=prompts[1], pixel_values=pixels[:1], logits_to_keep=1).logits
    cache, table = DynamicCache(), parts.language_model.get_input_embeddings()
    logits, inputs = [], [embeds]
    for _ in range(NEW_TOKENS):
        out = parts.language_model(inputs_embeds=inputs[-1], past_key_values=cache, use_cache=True)
        logits.append(parts.lm_head(out.last_hidden_state[:, -1:]))
        inputs.append(table(logits[-1].argmax(dim=-1)))
    return _Reference(unpruned, torch.cat(logits, dim=1)[0], torch.cat(inputs[1:-1], dim=1)[0])


def _compare_decoder(
    check: _Check, run: _Graphs, embeds: Sequence[NDArray[Any]], reference: _Reference
) -> None:
    """Unpruned logits against transformers' own forward; then greedy tokens of the pruned prompt.

    Decoding is fed PyTorch's tokens, so that one near tie does not hide what follows it.
    """
    manifest = run.bundle.manifest
    name = next(n for n in manifest.graphs if n.startswith("decoder"))
    specs = {spec.name: spec.dtype for spec in manifest.graphs[name].inputs}
    facts = manifest.decoder
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_dim), facts.cache_dtype)
    with run.open(run.bundle, name, run.options) as runner:

        def step(inputs: NDArray[Any], start: int, past: dict[str, Any]) -> dict[str, Any]:
            positions = np.arange(start, start + inputs.shape[1], dtype=np.int64)[None]
            feeds = {"inputs_embeds": inputs.astype(specs["inputs_embeds"]), "position_ids": positions}
            cache = {
                key: past.get(key.replace("past_key_values", "present"), empty)
                for key in specs
                if key not in feeds
            }
            return dict(runner.infer(feeds | cache))

        whole = step(embeds[1], 0, {})
        check.close(
            "prefill logits, nothing pruned",
            to_numpy(whole["logits"]),
            reference.unpruned,
            "against transformers",
        )
        del whole
        out = step(embeds[0], 0, {})
        check.close("prefill logits, pruned", to_numpy(out["logits"])[0], reference.logits[:1])
        wrong, worst, tolerance = 0, 0.0, check.tolerance
        for index, want in enumerate(reference.logits.numpy()):
            if index:
                token = reference.embeds[index - 1 : index].numpy()[None]
                out = step(token, embeds[0].shape[1] + index - 1, out)
            got = to_numpy(out["logits"]).astype(np.float32)[0, -1]
            scale = float(np.abs(want).max()) or 1.0
            worst = max(worst, float(np.abs(got - want).max()) / scale)
            # A tie is no difference: the other token must be worse by more than rounding.
            wrong += float(want.max() - want[int(got.argmax())]) / scale > 2 * tolerance
        check.add("decode logits", worst, tolerance, f"{NEW_TOKENS - 1} cached steps")
        check.add("greedy tokens", float(wrong), 0.0, f"{NEW_TOKENS - wrong} of {NEW_TOKENS} equal")


def _gather(vision_features: Tensor, indices: Tensor, features: Features) -> Tensor:
    """The kept tokens of PyTorch's own features, by plain indexing."""
    fixed = torch.arange(features.always_kept).expand(len(indices), -1)
    order = torch.cat([fixed, indices + features.always_kept], dim=1)
    return torch.cat([tile[kept] for tile, kept in zip(vision_features, order, strict=True)])


def _release() -> None:
    """Give memory back before the next large thing is loaded.

    Modules refer to each other in circles, so they hold their weights until they are collected; and glibc
    keeps what the last graph has freed, a gigabyte of it, unless it is told.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _check_kept(check: _Check, name: str, got: NDArray[Any], want: Tensor, tolerance: float) -> None:
    sets = [(set(a.tolist()), set(b.tolist())) for a, b in zip(got, want.numpy(), strict=True)]
    differ = sum(len(a - b) for a, b in sets)
    count = sum(len(b) for _, b in sets)
    ascending = bool((np.diff(got, axis=1) > 0).all())
    note = f"{differ} of {count} differ" if ascending else "indices are not ascending"
    check.add(name, differ / count if ascending else float("inf"), tolerance, note)


def _pictures(features: Features) -> Tensor:
    """Two pictures with structure: smooth waves and noise, in the range of normalised pixels."""
    generator = torch.Generator().manual_seed(0)
    size = features.image_size
    line = torch.linspace(0, 6.28, size)
    waves = torch.sin(line[:, None] * 2) + torch.cos(line[None, :] * 3)
    noise = torch.randn(IMAGES, features.channels, size, size, generator=generator)
    return waves * torch.tensor([0.5, -0.5]).view(IMAGES, 1, 1, 1) + 0.5 * noise


def _prompt(bundle: Bundle, tokens_per_image: int, images: int) -> Tensor:
    """Four words, then for each image its placeholders and four more words: [1, S]."""
    text, decoder = bundle.manifest.text, bundle.manifest.decoder
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, decoder.vocab_size, (1 + images, 4), generator=generator)
    words = torch.where(words == text.image_token_id, 1 if text.image_token_id == 0 else 0, words)
    image = torch.full((tokens_per_image,), text.image_token_id)
    return torch.cat([words[0], *(part for line in words[1:] for part in (image, line))]).unsqueeze(0)
