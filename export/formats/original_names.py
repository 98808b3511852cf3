"""Names of tensors in checkpoints of LLaVA's original format, and their names for transformers."""

from __future__ import annotations

import re

__all__ = ["known_name"]

# From top to bottom; the first pattern that matches is replaced. What follows each of them stays. The new
# names are those under which the first converted checkpoints were published, which every version of
# transformers reads.
_RULES = (
    (r"model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", "vision_tower.vision_model."),
    (r"model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"model\.image_newline$", "image_newline"),
    (r"model\.(?=(embed_tokens|layers|norm)\.)", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)


def known_name(name: str) -> str:
    """Return the name that transformers knows for a tensor of the original format.

    A name that is not of the original format is returned as it is.
    """
    for pattern, replacement in _RULES:
        renamed, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return renamed
    return name
