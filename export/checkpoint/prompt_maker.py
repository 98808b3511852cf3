"""Prompts for a checkpoint in PyTorch, made by the runtime's own preprocessing and chat template.

Because transformers' processor is not used, a fit and a comparison see exactly the inputs that a bundle will
see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visprune.export.checkpoint.processors import Processor
from visprune.export.models.parts import Features
from visprune.runtime.messages import Message
from visprune.runtime.prompts import prompt_ids
from visprune.runtime.vision.pictures import Picture, PictureMaker
from visprune.runtime.vision.preprocess import ImageProcessor

__all__ = ["Prompt", "PromptMaker"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Images and a question in the form that a model of transformers takes.

    Attributes:
        input_ids: [1, S] int64, with one placeholder for each visual token and each newline token.
        pixel_values: [I, 3, H, W] for I images; [I, T, 3, H, W] if images are tiled, where an image of fewer
            than T tiles is padded with zeros.
        visual: [N] int64, the positions of the placeholders in `input_ids`.
        image_sizes: [I, 2] int64, height and width in pixels; None if images are not tiled.
        batch_num_images: [1] int64, the number of images; None unless the model treats several images
            differently from one.
    """

    input_ids: Tensor
    pixel_values: Tensor
    visual: Tensor
    image_sizes: Tensor | None = None
    batch_num_images: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's `forward`."""
        named = {name: getattr(self, name) for name in ("input_ids", "pixel_values")}
        more = {name: getattr(self, name) for name in ("image_sizes", "batch_num_images")}
        return named | {name: value for name, value in more.items() if value is not None}


class PromptMaker:
    """Maker of prompts for one checkpoint.

    Args:
        processor: Text and image processing of the checkpoint.
        features: Which of its tokens are visual.
        rows: Number of rows of its embedding table.
    """

    def __init__(self, processor: Processor, features: Features, rows: int) -> None:
        self._processor = processor
        self._features = features
        self._rows = rows
        image = ImageProcessor.from_config(processor.image_processor)
        self._pictures = PictureMaker(image, features.tiling)

    def __call__(self, images: Sequence[Image.Image], text: str, system: str | None = None) -> Prompt:
        """Make the prompt of one question about images.

        Args:
            images: At least one RGB image.
            text: The user's message.
            system: The system prompt.

        Raises:
            InputError: The chat template cannot show these images or refuses the conversation, or a token has
                no row in the embedding table.
        """
        messages = [*([Message("system", system)] if system else []), Message("user", [*images, text])]
        processor, tokenizer = self._processor, self._processor.tokenizer
        ids = prompt_ids(messages, processor.template, tokenizer, processor.text, self._rows)
        pictures = self._pictures.make(images)
        ids = tokenizer.expand_images(ids, [self._length(picture) for picture in pictures])
        input_ids = torch.tensor([ids])
        visual = torch.nonzero(input_ids[0] == tokenizer.image_token_id).flatten()
        tiling = self._features.tiling
        if tiling is None:
            return Prompt(input_ids, torch.from_numpy(np.concatenate([p.pixels for p in pictures])), visual)
        most = max(len(picture.pixels) for picture in pictures)
        pixels = torch.zeros(len(pictures), most, *pictures[0].pixels.shape[1:])
        for row, picture in zip(pixels, pictures, strict=True):
            row[: len(picture.pixels)] = torch.from_numpy(picture.pixels)
        sizes = torch.tensor([[image.height, image.width] for image in images])
        count = torch.tensor([len(images)]) if tiling.several == "whole" else None
        return Prompt(input_ids, pixels, visual, sizes, count)

    def _length(self, picture: Picture) -> int:
        """Return the number of tokens that an unpruned image takes in the sequence."""
        if picture.arrangement is not None:
            return picture.arrangement.tokens
        return self._features.always_kept + self._features.layout.visual_tokens
