"""The bundled calibration set: scenes with one question each, which `visprune fit` uses without `--data`.

`python -m visprune.demo.calibration_set` draws them again. Their seeds are used neither in training nor for
the held-out questions, so a recipe that is fitted on them has not seen the questions that judge it.
"""

from __future__ import annotations

import json

import numpy as np

from visprune.demo import CALIBRATION
from visprune.demo.scenes import questions, scene

__all__ = ["main"]

_FIRST_SCENE = 900_000  # held-out scenes are below 600,000, those of training start at 1,000,000
_SCENES = 16


def main() -> None:
    """Write `calibration.jsonl` and the images that it names."""
    folder = CALIBRATION.with_suffix("")
    folder.mkdir(exist_ok=True)
    lines = []
    for index in range(_SCENES):
        seed = _FIRST_SCENE + index
        drawn = scene(seed)
        asked = questions(drawn.things, np.random.default_rng(seed))[0]
        path = folder / f"scene{index:02}.png"
        drawn.image.save(path, optimize=True)
        lines.append(json.dumps({"image": f"{folder.name}/{path.name}", "prompt": asked.text}))
    CALIBRATION.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
