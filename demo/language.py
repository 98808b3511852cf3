"""Stage 2 of the demo model: projector and language model learn to answer from features computed once.

The vision tower is frozen, so this stage never sees pixels. A training sequence holds one image and several
questions. A block mask lets each question see only the image and itself, at the positions that it would have
alone. So every answer is trained in exactly the single-question form of the chat template, and the image is
processed once for all of them.

Some batches show a window of the patch grid around one thing, as if the image had been cropped. A model that
always sees 144 tokens, most of them background, comes to depend on background: without windows, its accuracy
fell to chance when only the tokens of things were kept, and recovered when five patches of background were
added.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from visprune.demo.scenes import SceneQuestion, Thing, questions
from visprune.demo.tower import coverage

__all__ = ["LanguageSettings", "answered", "train_language"]

_IGNORE = -100
_WELL_COVERED = 16  # pixels of a patch, out of 64


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """Settings of the training in stage 2."""

    steps: int = 1200
    batch: int = 16
    questions: int = 8
    learning_rate: float = 1.5e-3
    window_share: float = 0.3  # share of batches that see a window of the patch grid instead of all of it
    chat_share: float = 0.12  # share of batches of plain chats of several turns, half with a second image


class _Sequence:
    """One training sequence under construction: token ids, labels, positions and block numbers."""

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.positions: list[int] = []
        self.blocks: list[int] = []

    def add(self, ids: Sequence[int], *, answer: bool = False, block: int = 0, start: int) -> int:
        """Append tokens from position `start` on, and return the next position."""
        self.ids += ids
        self.labels += ids if answer else [_IGNORE] * len(ids)
        self.positions += range(start, start + len(ids))
        self.blocks += [block] * len(ids)
        return start + len(ids)

    def add_image(self, tokens: int, *, start: int) -> int:
        """Append the placeholders of an image, and return the next position."""
        return self.add([self.image_token] * tokens, start=start)


class _Encoder:
    """Cached token ids of the parts of a chat; there are only a few hundred different parts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]


def _blocked(encode: _Encoder, asked: Sequence[SceneQuestion], tokens: int, sequence: _Sequence) -> None:
    """Fill a sequence with one image of `tokens` tokens, and questions that do not see one another."""
    start = sequence.add(encode("<s>USER: "), start=0)
    start = sequence.add_image(tokens, start=start)
    start = sequence.add(encode("\n"), start=start)
    for block, question in enumerate(asked, start=1):
        at = sequence.add(encode(f"{question.text} ASSISTANT:"), block=block, start=start)
        sequence.add(encode(f" {question.answer}</s>"), answer=True, block=block, start=at)


def _chat(
    encode: _Encoder, turns: Sequence[tuple[bool, SceneQuestion]], tokens: int, sequence: _Sequence
) -> None:
    """Fill a sequence with a plain chat, in which a turn may have an image."""
    at = sequence.add(encode("<s>"), start=0)
    for has_image, question in turns:
        if has_image:
            at = sequence.add(encode("USER: "), start=at)
            at = sequence.add_image(tokens, start=at)
            at = sequence.add(encode("\n"), start=at)
            at = sequence.add(encode(f"{question.text} ASSISTANT:"), start=at)
        else:
            at = sequence.add(encode(f"USER: {question.text} ASSISTANT:"), start=at)
        at = sequence.add(encode(f" {question.answer}</s>"), answer=True, start=at)


def _window(thing: Thing, side: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the patches of a window around a thing, up to one patch wider on each side, ascending."""
    rows, columns = np.divmod(np.flatnonzero(coverage(thing) >= _WELL_COVERED), side)
    top, left = (max(0, int(v.min() - rng.integers(2))) for v in (rows, columns))
    bottom, right = (min(side, int(v.max() + 1 + rng.integers(2))) for v in (rows, columns))
    return (np.arange(top, bottom)[:, None] * side + np.arange(left, right)).reshape(-1)


def _loss(
    model: LlavaForConditionalGeneration, sequences: Sequence[_Sequence], features: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of the answer tokens.

    Args:
        model: The demo model.
        sequences: The training sequences.
        features: Features of all images, [tokens, Dv], in the order of the placeholders.
    """
    length = max(len(s.ids) for s in sequences)
    table = np.full((4, len(sequences), length), _IGNORE, dtype=np.int64)
    for row, s in enumerate(sequences):
        table[:, row, : len(s.ids)] = (s.ids, s.labels, s.positions, s.blocks)
    ids, labels, positions, blocks = torch.from_numpy(table)
    padding = ids == _IGNORE
    text_config: Any = model.config.text_config
    ids = ids.masked_fill(padding, text_config.pad_token_id)
    embeds = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(features)
    is_image = (ids == model.config.image_token_index)[..., None]
    embeds = embeds.masked_scatter(is_image, projected)
    same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=(same & causal)[:, None],  # [B, 1, S, S]
        position_ids=positions.clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    wanted = labels[:, 1:] != _IGNORE
    return functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), labels[:, 1:][wanted])


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features: NDArray[np.float16],
    things: Sequence[Sequence[Thing]],
    settings: LanguageSettings,
    rng: np.random.Generator,
    report: Callable[[int, str], None],
) -> None:
    """Train the projector and the language model of `model` in place.

    Args:
        model: The demo model; its tower is neither used nor changed.
        tokenizer: Its tokenizer.
        features: Features of the tower for the training images, [images, N, Dv].
        things: The things in each image.
        settings: The settings of the training.
        rng: Draws images, questions and wordings.
        report: Called every 100 steps with the step and the mean loss since the last call.
    """
    encode = _Encoder(tokenizer)
    tokens = features.shape[1]
    module = torch.nn.ModuleList(
        [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    )
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.learning_rate, weight_decay=0.05, betas=(0.9, 0.98)
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step in range(1, settings.steps + 1):
        picked = rng.choice(len(features), settings.batch, replace=False)
        asked = [questions(things[i], rng) for i in picked]
        sequences = [_Sequence(model.config.image_token_index) for _ in picked]
        visual = features[picked]
        form = rng.random()
        if form < settings.window_share:
            windows = [_window(about[0].thing, math.isqrt(tokens), rng) for about in asked]
            for sequence, about, window in zip(sequences, asked, windows, strict=True):
                inside = [q for q in about if q.thing == about[0].thing]
                _blocked(encode, inside, len(window), sequence)
            visual = np.concatenate([v[window] for v, window in zip(visual, windows, strict=True)])
        elif form < settings.window_share + settings.chat_share / 2:
            for sequence, about in zip(sequences, asked, strict=True):
                _chat(encode, [(turn == 0, q) for turn, q in enumerate(about[:5])], tokens, sequence)
        elif form < settings.window_share + settings.chat_share:
            # The second turn has a second image; questions are about the latest image.
            sequences = sequences[::2]
            for sequence, first, second in zip(sequences, asked[::2], asked[1::2], strict=True):
                turns = [(True, first[0]), (True, second[0]), (False, second[1])]
                _chat(encode, turns, tokens, sequence)
        else:
            for sequence, about in zip(sequences, asked, strict=True):
                _blocked(encode, about[: settings.questions], tokens, sequence)
        flat = torch.from_numpy(visual.reshape(-1, visual.shape[-1]).astype(np.float32))
        loss = _loss(model, sequences, flat)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == settings.steps:
            seconds = time.perf_counter() - started
            report(step, f"loss {np.mean(losses):.4f}, {seconds / step:.2f} s a step")
            losses.clear()
            model.train()


@torch.no_grad()
def answered(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    features: torch.Tensor,
    asked: Sequence[SceneQuestion],
    batch: int = 100,
) -> NDArray[np.bool_]:
    """Return whether greedy decoding gives exactly the right answer to each question.

    The right answer is fed in. Greedy decoding would have produced it if each of its tokens, and the end
    token after them, is the most likely one at its position. This takes one pass instead of several. It is
    the exact match of `visprune.evaluation.metrics` for answers that no limit cuts off: an answer that goes
    on after the right text is another text.

    Args:
        model: The demo model.
        tokenizer: Its tokenizer.
        features: The kept features of the image of each question, before the projector, [questions, K, Dv].
        asked: The questions.
        batch: Number of questions in a pass.

    Returns:
        One truth value for each question.
    """
    encode = _Encoder(tokenizer)
    model.eval()
    right: list[bool] = []
    head, newline = encode("<s>USER: "), encode("\n")
    kept = features.shape[1]
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        texts = [(newline + encode(f"{q.text} ASSISTANT:"), encode(f" {q.answer}</s>")) for q in part]
        width = max(len(q) + len(a) for q, a in texts)
        # Padding is on the right, where causal attention does not reach.
        tail = torch.tensor([q + a + [0] * (width - len(q) - len(a)) for q, a in texts])
        embed = model.get_input_embeddings()
        embeds = torch.cat(
            [
                embed(torch.tensor([head])).expand(len(part), -1, -1),
                model.model.multi_modal_projector(features[start : start + batch].float()),
                embed(tail),
            ],
            dim=1,
        )
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        guess = model.lm_head(hidden[:, len(head) + kept :]).argmax(-1)
        for row, (question_ids, answer_ids) in enumerate(texts):
            at = len(question_ids) - 1
            right.append(guess[row, at : at + len(answer_ids)].tolist() == answer_ids)
    return np.array(right)
