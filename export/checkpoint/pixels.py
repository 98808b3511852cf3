"""A trial of the runtime's image preprocessing with a checkpoint's settings, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visprune.errors import CheckpointError, ExportError
from visprune.runtime.vision.arrangement import pixel_values
from visprune.runtime.vision.preprocess import ImageProcessor

if TYPE_CHECKING:
    from visprune.export.checkpoint.processors import Processor
    from visprune.export.models.parts import Features

__all__ = ["check_pixels"]


def check_pixels(processor: Processor, features: Features) -> None:
    """Refuse an image processor that the runtime cannot run, or whose images do not fit the vision tower.

    Raises:
        UnsupportedError: The runtime does not implement what the processor does.
        CheckpointError: The processor and the model disagree about tiles.
        ExportError: The processor makes images or frames of another size than the vision tower takes.
    """
    size = features.image_size
    picture = Image.fromarray(np.zeros((size, size + 2, 3), np.uint8))
    image = ImageProcessor.from_config(processor.image_processor)
    if features.tiling is None:
        _check_size(image(picture), features)
    else:
        listed = processor.image_processor.get("image_grid_pinpoints")
        if [list(pair) for pair in features.tiling.pinpoints] != listed:
            raise CheckpointError(
                f"The image processor has the grid pinpoints {listed}, and the model has others.",
                "Make image_grid_pinpoints the same in config.json and in the processor's file.",
            )
        _check_size(pixel_values(picture, features.tiling, image), features)
    if processor.video_processor is not None:
        _check_size(ImageProcessor.from_config(processor.video_processor)(picture), features)


def _check_size(pixels: NDArray[np.float32], features: Features) -> None:
    size = features.image_size
    if pixels.shape[1:] != (features.channels, size, size):
        raise ExportError(
            f"The image processor makes pictures of {pixels.shape[3]} x {pixels.shape[2]} pixels, and the "
            f"vision tower takes {size} x {size}.",
            "Correct processor_config.json or preprocessor_config.json.",
        )
