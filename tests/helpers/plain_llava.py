"""A LLaVA model that prunes, written out: what segments are compared with.

It shares nothing with visprune: plain loops over the decoder's submodules, its own attention and caches,
scores and counts written down from the methods' definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

__all__ = [
    "IMAGE",
    "Reference",
    "Rule",
    "fastv",
    "fitprune",
    "most_attended",
    "pyramid",
    "sparsevlm",
    "spread",
]

IMAGE = 259  # the image token of the tiny checkpoints
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


def sparsevlm(layers: tuple[int, ...], ratio: float = 110 / 576) -> Rule:
    """Scored by each of `layers` and dropped after it, in equal steps to n r."""
    step = ratio ** (1 / len(layers))
    return Rule(
        "sparsevlm",
        layers,
        lambda n: tuple(max(1, int(n * step ** (j + 1) + 1e-6)) for j in range(len(layers))),
    )


@dataclass
class Reference:
    """A LLaVA model that prunes, written out: one conversation, batch 1, float32."""

    path: Any
    rule: Rule
    before: Callable[[Any, Any], list[int]] | None = None  # vision outputs, image -> kept patches
    layer_tokens: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.processor = transformers.AutoProcessor.from_pretrained(self.path, backend="pil")
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
        raters = self.raters(hidden, visual) if pruned and self.rule.kind == "sparsevlm" else [-1]
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
            if self.rule.kind in ("fastv", "sparsevlm") and index in left:
                chosen = choose(probabilities[:, raters].mean(dim=(0, 1)), visual, left[index])
                hidden, position, place = hidden[chosen], position[chosen], place[chosen]
                visual = visual[chosen]
        return self.model.lm_head(self.decoder.norm(hidden[-1]))

    def raters(self, embeds, visual):
        """SparseVLM's raters, as places from the end, which no dropped picture moves."""
        first = int(torch.nonzero(visual)[-1]) + 1
        text = embeds[first:]
        shares = torch.stack([(text @ token).softmax(dim=0) for token in embeds[visual]]).mean(dim=0)
        mean = shares.mean()
        assert len(text) == 1 or (shares - mean).abs().min() > MARGIN * mean, "no margin: another seed"
        above = [place for place, share in enumerate(shares) if share > mean]
        return [place - len(text) for place in above or range(len(text))]

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
